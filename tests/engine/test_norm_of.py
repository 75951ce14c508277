"""`norm_of`: the norm is that of another tree, and the gradient is still scaled."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import program_text
import pytest
import reference
from clipper_table import FUNCTIONS, WEIGHT_BASED
from compilation import JUDGED
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from steps import run
from trees import assert_same_bits, random_tree

import optax_smartclip as smartclip

NAN, INF = np.nan, np.inf
SHAPES = {"layer": {"kernel": (8, 4), "bias": (8,)}, "head": (16,)}
PARAMS = random_tree(0, 0.1, SHAPES)
GRADS = [random_tree(1 + step, size, SHAPES) for step, size in enumerate([1.0, 2.0, 50.0, 1.5])]

HISTORY_BASED = [
    partial(smartclip.clip_by_rule, smartclip.ThresholdRule(jnp.zeros, jnp.add, jnp.add)),
    *(function for name, function in FUNCTIONS.items() if name not in WEIGHT_BASED),
]


def limit(threshold):
    """A rule with one threshold that never changes."""
    return smartclip.ThresholdRule(
        init=lambda groups: jnp.zeros(groups),
        threshold=lambda state, norms: jnp.full_like(norms, threshold),
        record=lambda state, norms, thresholds: state,
    )


def times_rms(updates, params):
    """Each leaf of the gradient times the RMS of its parameter."""
    return jax.tree.map(lambda g, p: g * jnp.sqrt(jnp.mean(jnp.square(p))), updates, params)


def rms(leaf):
    return np.sqrt(np.mean(np.float64(leaf) ** 2))


def expected_norms(grads, scope):
    weighted = jax.tree.map(lambda g, p: np.float64(g) * rms(p), grads, PARAMS)
    groups = [weighted] if scope == "global" else jax.tree.leaves(weighted)
    return np.squeeze([reference.norm(group) for group in groups])


@pytest.mark.parametrize("scope", ["global", "per_param"])
def test_the_norm_is_that_of_the_other_tree_and_the_gradient_is_scaled(scope):
    tx = smartclip.clip_by_rule(limit(0.4), scope=scope, norm_of=times_rms)
    updates, state = run(tx, PARAMS, GRADS)
    norms = expected_norms(GRADS[-1], scope)
    np.testing.assert_allclose(state.last.grad_norm, norms, rtol=1e-6)
    scales = np.minimum(1.0, 0.4 / norms)
    np.testing.assert_allclose(state.last.clip_scale, scales, rtol=1e-6)
    assert np.any(scales < 1)
    leaves = jax.tree.leaves(GRADS[-1])
    for update, leaf, scale in zip(
        jax.tree.leaves(updates[-1]), leaves, np.broadcast_to(scales, len(leaves)), strict=True
    ):
        np.testing.assert_allclose(update, leaf * scale, rtol=1e-6)


@pytest.mark.parametrize("make", HISTORY_BASED)
def test_every_history_based_clipper_takes_it(make):
    tx = make(norm_of=times_rms)
    with pytest.raises(ValueError, match="`params` must be passed to `update`, because `norm_of`"):
        tx.update(GRADS[0], tx.init(PARAMS))


def test_norm_of_the_gradient_itself_adds_nothing_to_the_program():
    def moved(**options):
        tx = smartclip.autoclip(scope="per_layer", **options)
        step = jax.jit(tx.update).lower(GRADS[0], tx.init(PARAMS), PARAMS)
        return program_text.usual_bytes(step.compile(JUDGED))

    plain = moved()
    assert moved(norm_of=lambda updates, params: updates) == plain
    assert moved(norm_of=times_rms) > plain


@partial(jax.jit, static_argnums=2)
def clip_weighted(grads, weights, nonfinite="zero"):
    tx = smartclip.clip_by_rule(
        limit(1.0), norm_of=partial(jax.tree.map, jnp.multiply), nonfinite=nonfinite
    )
    updates, state = tx.update(grads, tx.init(weights), weights)
    return updates, state.last


MAGNITUDES = st.sampled_from([0.0, 1e-30, 1e-20, 1e-3, 0.5, 3.0, 1e15, 1e25])


@hypothesis.given(
    size=MAGNITUDES,
    weights=st.lists(st.sampled_from([0.0, 1e-12, 0.1, 1.0, 1e4, 1e12]), min_size=2, max_size=2),
    seed=st.integers(0, 99),
)
@hypothesis.example(size=1e25, weights=[1.0, 1e-12], seed=0)
@hypothesis.example(size=1e-30, weights=[1.0, 1.0], seed=0)
def test_the_gradient_keeps_its_direction_and_the_other_norm_is_limited(size, weights, seed):
    directions = random_tree(seed, 1.0, {"a": (3,), "b": (2, 2)})
    grads = jax.tree.map(lambda leaf: leaf * np.float32(size), directions)
    weights = dict(zip(grads, map(np.float32, weights), strict=True))
    # The clipper expects a weight for each element of the gradient.
    weights = {name: np.full_like(grads[name], weight) for name, weight in weights.items()}
    updates, record = clip_weighted(grads, weights)
    # The products are in float32, as in the clipper: tiny ones are zero.
    norm = reference.norm(jax.tree.map(lambda g, w: g * w, grads, weights))
    np.testing.assert_allclose(record.grad_norm, norm, rtol=1e-5, atol=1e-37)
    scale = 1.0 if norm <= 1.0 else 1.0 / norm
    for name, leaf in grads.items():
        np.testing.assert_allclose(updates[name], leaf * scale, rtol=1e-5, atol=1e-37)
        if norm < 0.99:
            assert_same_bits(updates[name], leaf)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
def test_a_bad_gradient_is_detected_also_at_a_weight_of_zero(bad, nonfinite):
    grads = {"a": np.float32([1.0, bad]), "b": np.float32([2.0])}
    weights = {"a": np.zeros(2, np.float32), "b": np.ones(1, np.float32)}
    updates, record = clip_weighted(grads, weights, nonfinite)
    assert int(record.num_nonfinite) == 1
    expected = grads if nonfinite == "propagate" else jax.tree.map(np.zeros_like, grads)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_the_norms_of_layers_that_are_stacked():
    grads, params = (
        random_tree(seed, 1.0, {"kernel": (3, 4, 2), "bias": (3, 4)}) for seed in (0, 1)
    )
    params["kernel"][1] *= 30
    tx = smartclip.clip_by_rule(
        limit(5.0), scope="per_layer", stacked={"": 0}, norm_of=jax.vmap(times_rms)
    )
    (updates,), state = run(tx, params, [grads])
    norms = np.array(
        [
            np.hypot(*[reference.norm(grads[name][i]) * rms(params[name][i]) for name in grads])
            for i in range(3)
        ]
    )
    np.testing.assert_allclose(state.last.grad_norm, norms, rtol=1e-6)
    scales = np.minimum(1.0, 5.0 / norms)
    assert 0 < np.sum(scales < 1) < 3
    np.testing.assert_allclose(updates["bias"], grads["bias"] * scales[:, None], rtol=1e-6)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_the_function_sees_the_whole_arrays(mode):
    tx = smartclip.clip_by_rule(limit(0.4), norm_of=times_rms)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))

    def place(tree):
        return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P("x"))), tree)

    with jax.set_mesh(mesh):
        (updates,), state = run(tx, PARAMS, GRADS[1:2], place)
    norm = expected_norms(GRADS[1], "global")
    np.testing.assert_allclose(state.last.grad_norm, norm, rtol=1e-5)
    assert norm > 0.4
    np.testing.assert_allclose(updates["head"], GRADS[1]["head"] * 0.4 / norm, rtol=1e-5)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


def test_under_shard_map_the_function_sums_over_devices_itself():
    def times_whole_rms(updates, params):
        def weigh(grad, param):
            return grad * jnp.sqrt(jax.lax.pmean(jnp.mean(jnp.square(param)), "x"))

        return jax.tree.map(weigh, updates, params)

    tx = smartclip.clip_by_rule(limit(0.4), norm_of=times_whole_rms, axis_name="x")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    @partial(jax.shard_map, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=(P("x"), P()))
    def update(grads, params):
        updates, state = tx.update(grads, tx.init(params), params)
        return updates, state.last.grad_norm

    updates, norm = jax.jit(update)(GRADS[1], PARAMS)
    expected = expected_norms(GRADS[1], "global")
    np.testing.assert_allclose(norm, expected, rtol=1e-5)
    assert expected > 0.4
    np.testing.assert_allclose(updates["head"], GRADS[1]["head"] * 0.4 / expected, rtol=1e-5)


def test_masked_leaves_may_be_missing_from_the_other_tree():
    tx = smartclip.clip_by_rule(
        limit(1.0),
        mask={"a": True, "b": False},
        norm_of=lambda updates, _: {"a": 2.0 * updates["a"].astype(jnp.float32), "b": None},
    )
    grads = {"a": jnp.bfloat16([3.0, 4.0]), "b": jnp.float32([7.0])}
    updates, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
    np.testing.assert_allclose(state.last.grad_norm, 10.0)
    assert updates["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(updates["a"]), [0.3, 0.4], rtol=4e-3)
    np.testing.assert_array_equal(updates["b"], [7.0])


def test_a_wrapper_reports_the_norm_of_the_gradient():
    clipper = smartclip.clip_by_rule(limit(1.0), norm_of=lambda updates, _: 2.0 * updates)
    _, state = run(smartclip.skip_spikes(clipper), np.float32(0.0), [np.float32(3.0)])
    record = smartclip.metrics(state)
    np.testing.assert_allclose([record["skip_norm"], record["grad_norm"]], [3.0, 6.0])


def test_it_may_be_injected_if_it_is_a_static_argument():
    make = optax.inject_hyperparams(smartclip.zscore_clip, static_args=("norm_of",))
    tx = make(zmax=3.0, norm_of=times_rms)
    state = tx.init(PARAMS)
    updates, after = jax.eval_shape(tx.update, GRADS[0], state, PARAMS)
    assert jax.tree.map(jnp.shape, (updates, after)) == jax.tree.map(jnp.shape, (GRADS[0], state))


@pytest.mark.parametrize("norm_of", ["rms", 2.0, {"a": 1.0}, jnp.ones(())])
def test_a_value_that_is_not_a_function_is_refused(norm_of):
    with pytest.raises(ValueError, match="`norm_of` must be a function of the gradient") as error:
        smartclip.autoclip(norm_of=norm_of)
    assert repr(norm_of) in str(error.value)
    assert ("`static_args`" in str(error.value)) == isinstance(norm_of, jax.Array)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        ({"a": np.ones(2, np.float32)}, "leaf 'b/0' has the shape (1,), got nothing."),
        ({"a": np.ones(2, np.float32), "b": [None]}, "leaf 'b/0' has the shape (1,), got nothing."),
        (
            {"a": np.ones((2, 1), np.float32), "b": [np.ones(1)]},
            "leaf 'a' has the shape (2,), got float32(2, 1).",
        ),
        (
            {"a": np.ones(2, np.int32), "b": [np.ones(1)]},
            "leaf 'a' has the shape (2,), got int32(2,).",
        ),
    ],
)
def test_another_tree_than_the_gradients_is_refused(returned, got):
    grads = {"a": jnp.ones(2), "b": [jnp.ones(1)]}
    tx = smartclip.clip_by_rule(limit(1.0), norm_of=lambda updates, params: returned)
    with pytest.raises(ValueError, match="`norm_of` must return a tree of floats") as error:
        tx.update(grads, tx.init(grads), grads)
    assert got in str(error.value)


def test_the_norm_of_the_gradient_cannot_be_handed_over():
    tx = smartclip.clip_by_rule(limit(1.0), norm_of=times_rms)
    with pytest.raises(ValueError, match=r"`grad_norm` is .* needs norm_of=None, got norm_of="):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS, grad_norm=1.0)
