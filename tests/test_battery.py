"""What every clipper does for every wrapper and training loop, over the table of all of them.

The contract that Optax tests its own optimizers with, and what clipping adds to it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from breadth import one_of_each_kind
from clipper_table import CLIPPERS, WEIGHT_BASED, scope_of
from compat import enable_x64
from trees import assert_same_bits

import optax_smartclip as smartclip

every_clipper = pytest.mark.parametrize("name", CLIPPERS)

HISTORY_BASED = [name for name in CLIPPERS if name not in WEIGHT_BASED]


def mixed_tree(seed, size=1.0):
    """Leaves of every kind, random, with `size` as the root mean square of an element."""
    rng = np.random.default_rng(seed)

    def leaf(shape, dtype):
        return jnp.asarray(np.asarray(size * rng.normal(size=shape)).astype(dtype))

    return {
        "body": {"bias": leaf(4, jnp.float16), "kernel": leaf((3, 4), jnp.float32)},
        "empty": leaf((0, 3), jnp.float32),
        "frozen": optax.MaskedNode(),
        "head": (leaf((4, 2), jnp.bfloat16), None),
        "temperature": leaf((), jnp.float32),
    }


PARAMS = mixed_tree(0)
# No gradient here is large in comparison with these.
LARGE_PARAMS = mixed_tree(0, size=1e4)


def stream(num_steps, seed=1):
    """Gradients with norms like those in training, and a spike every ten steps."""
    sizes = 0.1 * np.exp(0.2 * np.random.default_rng(seed).normal(size=num_steps))
    sizes[11::10] *= 1000
    return [mixed_tree(100 * seed + step, size) for step, size in enumerate(sizes)]


@functools.cache
def build(name):
    """A clipper and its jitted update, compiled once for all tests."""
    tx = CLIPPERS[name]()
    return tx, jax.jit(tx.update)


def run(name, grads, state=None, params=PARAMS):
    """The updates and states of a loop of jitted steps."""
    tx, update = build(name)
    state = tx.init(params) if state is None else state
    updates, states = [], []
    for grad in grads:
        update_now, state = update(grad, state, params)
        updates.append(update_now)
        states.append(state)
    return updates, states


def assert_close(actual, expected, ulps=4):
    """Equal up to some units in the last place of each leaf's dtype."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        inexact = jnp.issubdtype(a.dtype, jnp.inexact)
        rtol = ulps * float(jnp.finfo(a.dtype).eps) if inexact else 0
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol)


def kinds(tree):
    """What `jit` would have to recompile for, if it changed."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


# Structure: traced, not compiled.


@every_clipper
def test_ignores_extra_arguments_that_it_does_not_know(name):
    tx = CLIPPERS[name]()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    update = functools.partial(tx.update, value=jnp.ones(()), unknown="something")
    updates, _ = jax.eval_shape(
        lambda grads, state, params: update(grads, state, params), PARAMS, tx.init(PARAMS), PARAMS
    )
    assert kinds(updates) == kinds(PARAMS)


@every_clipper
def test_state_is_strongly_typed_and_keeps_its_kind(name):
    tx = CLIPPERS[name]()
    state = tx.init(PARAMS)
    _, after = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    assert kinds(after) == kinds(state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


@every_clipper
def test_dtypes_stay_what_they_are_where_float64_is_enabled(name):
    with enable_x64(True):
        tx = CLIPPERS[name]()
        params = {**PARAMS, "double": jnp.ones(2, jnp.float64)}
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert kinds((updates, after)) == kinds((params, state))
        assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(state)} <= {1, 4}


@every_clipper
def test_state_can_be_carried_through_scan_and_cond(name):
    tx = CLIPPERS[name]()
    state = tx.init(PARAMS)

    def step(carry, keep):
        updates, state = carry
        carry = jax.lax.cond(
            keep, lambda: tx.update(updates, state, PARAMS), lambda: (updates, state)
        )
        return carry, None

    carry, _ = jax.eval_shape(lambda: jax.lax.scan(step, (PARAMS, state), jnp.array([True, False])))
    assert kinds(carry) == kinds((PARAMS, state))


@every_clipper
def test_init_needs_only_shapes_and_dtypes(name):
    tx = CLIPPERS[name]()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    state = tx.init(PARAMS)
    assert_same_bits(tx.init(shapes), state)
    assert kinds(jax.eval_shape(tx.init, shapes)) == kinds(state)


@every_clipper
@pytest.mark.parametrize("grad_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
def test_update_has_the_dtypes_of_the_gradient(name, grad_dtype, param_dtype):
    tx = CLIPPERS[name]()
    grads, params = (
        {"w": jax.ShapeDtypeStruct((2, 3), dtype), "b": jax.ShapeDtypeStruct((), dtype)}
        for dtype in (grad_dtype, param_dtype)
    )
    updates, _ = jax.eval_shape(tx.update, grads, tx.init(params), params)
    assert kinds(updates) == kinds(grads)


@every_clipper
def test_a_tree_without_leaves_passes(name):
    tx = CLIPPERS[name]()
    empty = {"frozen": optax.MaskedNode(), "nothing": None}
    updates, state = jax.eval_shape(tx.update, empty, tx.init(empty), empty)
    assert updates == empty
    assert kinds(state) == kinds(tx.init(empty))


@every_clipper
def test_gradients_may_be_none_where_parameters_are_not(name):
    tx = CLIPPERS[name]()
    state = tx.init(PARAMS)
    grads = {**PARAMS, "body": {"bias": None, "kernel": PARAMS["body"]["kernel"]}}
    updates, after = jax.eval_shape(tx.update, grads, state, PARAMS)
    assert kinds(updates) == kinds(grads)
    assert kinds(after) == kinds(state)


@every_clipper
def test_integer_and_float0_leaves_pass_untouched(name):
    tx = CLIPPERS[name]()
    params = {"w": jnp.ones(2), "steps": jnp.arange(2), "seed": jnp.arange(3)}
    grads = {"w": jnp.ones(2), "steps": jnp.arange(2), "seed": np.zeros(3, jax.dtypes.float0)}

    def update(grad):
        updates, _ = tx.update({**grads, "w": grad}, tx.init(params), params)
        assert updates["steps"] is grads["steps"]
        assert updates["seed"] is grads["seed"]
        return updates["w"]

    assert kinds(jax.eval_shape(update, grads["w"])) == kinds(params["w"])


@pytest.mark.parametrize("name", HISTORY_BASED)
def test_history_based_clippers_need_no_params(name):
    tx = CLIPPERS[name]()
    state = tx.init(PARAMS)
    updates, after = jax.eval_shape(tx.update, PARAMS, state)
    assert kinds((updates, after)) == kinds((PARAMS, state))


@pytest.mark.parametrize("name", sorted(WEIGHT_BASED))
def test_weight_based_clippers_say_that_they_need_params(name):
    tx = CLIPPERS[name]()
    with pytest.raises(ValueError, match="`params` must be passed"):
        tx.update(PARAMS, tx.init(PARAMS))


@every_clipper
def test_map_params_finds_parameters_in_other_states_only(name):
    tx = optax.chain(CLIPPERS[name](), optax.adam(0.1))
    state = tx.init(PARAMS)
    marked = optax.tree.map_params(
        tx, lambda _: "parameter", state, transform_non_params=lambda _: "other"
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    assert set(jax.tree.leaves(marked[0])) == {"other"}
    assert set(jax.tree.leaves(marked[1][0].mu)) == {"parameter"}


@every_clipper
@pytest.mark.parametrize("place", ["alone", "chain", "named_chain", "inject_hyperparams"])
def test_tree_get_finds_every_metric_and_still_the_count_of_others(name, place):
    if place == "chain":
        tx = optax.chain(CLIPPERS[name](), optax.scale_by_adam())
    elif place == "named_chain":
        tx = optax.named_chain(("clip", CLIPPERS[name]()), ("adam", optax.scale_by_adam()))
    elif place == "inject_hyperparams":
        tx = optax.inject_hyperparams(CLIPPERS[name], hyperparam_dtype=jnp.float32)()
    else:
        tx = CLIPPERS[name]()
    state = tx.init(PARAMS)
    found = {field: optax.tree.get(state, field) for field in smartclip.ClipMetrics._fields}
    assert None not in found.values()
    assert_same_bits(found, smartclip.metrics(state))
    assert (optax.tree.get(state, "count") is None) == (place == "alone")


# Values, from loops of the one jitted update.


@one_of_each_kind
def test_eager_steps_equal_jitted_ones_and_no_nan_arises_on_the_way(name):
    # One small leaf: each operation on another shape is compiled anew.
    params = np.float32([[3.0, -4.0], [0.5, 0.1]])
    direction = np.float32([[0.1, 2.0], [-3.0, 4.0]])
    tx = CLIPPERS[name](max_norm=2.0)
    update = jax.jit(tx.update)
    eager_state = jitted_state = tx.init(params)
    for size in (0.0, 0.1, 0.1, 50.0, 1e30, np.inf):
        grads = jnp.asarray(np.float32(size) * direction)
        jitted_updates, jitted_state = update(grads, jitted_state, params)
        with jax.debug_nans(True):
            eager_updates, eager_state = tx.update(grads, eager_state, params)
        assert_close((eager_updates, eager_state), (jitted_updates, jitted_state))


@one_of_each_kind
def test_donated_steps_equal_others_and_compile_once(name):
    tx, _ = build(name)
    grads = stream(4)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    expected, expected_state = PARAMS, tx.init(PARAMS)
    params, state = jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS)
    for grad in grads:
        updates, (expected_state,) = run(name, [grad], expected_state, expected)
        expected = optax.apply_updates(expected, updates[0])
        # The last record is never read, so that `jit` drops those buffers before they are given.
        given = [leaf for leaf in jax.tree.leaves((params, state.rule)) if leaf.size]
        params, state = train_step(params, state, grad)
        assert all(leaf.is_deleted() for leaf in given)
    assert train_step._cache_size() == 1
    assert_close((params, state), (expected, expected_state))


@one_of_each_kind
def test_scan_equals_a_loop_of_jitted_steps(name):
    tx, _ = build(name)
    grads = stream(200)
    # The loop passes `params`, the scan only where it must.
    params = PARAMS if name in WEIGHT_BASED else None

    def step(state, grad):
        updates, state = tx.update(grad, state, params)
        return state, updates

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *grads)
    state, updates = jax.jit(lambda grads: jax.lax.scan(step, tx.init(PARAMS), grads))(stacked)
    expected_updates, expected_states = run(name, grads)
    expected_updates = jax.tree.map(lambda *leaves: np.stack(leaves), *expected_updates)
    # Not every bit: XLA may order the sum within a leaf otherwise in another program.
    assert_close((updates, state), (expected_updates, expected_states[-1]))


@every_clipper
def test_resuming_from_a_copy_of_the_state_repeats_every_bit(name):
    grads = stream(30)
    expected_updates, expected_states = run(name, grads)
    saved = jax.tree.map(np.array, expected_states[14])
    updates, states = run(name, grads[15:], saved)
    assert_same_bits(updates, expected_updates[15:])
    assert_same_bits(states[-1], expected_states[-1])


@every_clipper
def test_every_clipper_clips_the_spike(name):
    grads = stream(12)
    updates, states = run(name, grads)
    np.testing.assert_array_equal(
        np.asarray(states[-1].last.clipped) > 0, states[-1].last.grad_norm > 0
    )
    assert reference.norm(updates[-1]) < reference.norm(grads[-1]) / 2


@every_clipper
def test_constant_gradients_are_returned_bit_for_bit(name):
    grads = [mixed_tree(3)] * 30 + [mixed_tree(3, size=0.1)] * 5
    updates, states = run(name, grads, params=LARGE_PARAMS)
    assert_same_bits(updates, grads)
    assert not np.any(states[-1].last.num_clipped)
    np.testing.assert_array_equal(states[-1].last.clip_scale, 1.0)


@every_clipper
def test_zero_gradients_give_zero_updates(name):
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    grads = [zeros, *stream(12), zeros, zeros]
    updates, states = run(name, grads)
    for step in (0, -2, -1):
        assert_same_bits(updates[step], zeros)
        np.testing.assert_array_equal(states[step].last.grad_norm, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1].rule))


@every_clipper
def test_steps_with_nan_or_inf_leave_no_trace_but_their_count(name):
    grads = stream(24)
    bad = [
        jax.tree.map(lambda leaf, value=value: jnp.full_like(leaf, value), PARAMS)
        for value in (np.nan, -np.inf)
    ]
    expected_updates, expected_states = run(name, grads)
    updates, states = run(name, [*grads[:13], *bad, *grads[13:]])
    assert_same_bits(updates[:13] + updates[15:], expected_updates)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    assert_same_bits(updates[13:15], [zeros, zeros])
    for state, expected in ((states[14], expected_states[12]), (states[-1], expected_states[-1])):
        np.testing.assert_array_equal(state.last.num_steps, expected.last.num_steps + 2)
        np.testing.assert_array_equal(state.last.num_clipped, expected.last.num_clipped)
        # The empty leaf has the norm 0, also where it is a group of its own.
        poisoned = np.array([True, True, False, True, True])
        poisoned = poisoned if state.num_observed.size == poisoned.size else np.array(True)
        np.testing.assert_array_equal(state.last.num_nonfinite, 2 * poisoned)
        learnt, expected_learnt = (
            jax.tree.map(lambda leaf, mask=poisoned: leaf[mask], (x.rule, x.num_observed))
            for x in (state, expected)
        )
        assert_same_bits(learnt, expected_learnt)


@every_clipper
def test_one_nan_costs_its_own_group_and_nothing_else(name):
    (grads,) = stream(1)
    kernel = grads["body"]["kernel"]
    poisoned = {**grads, "body": {**grads["body"], "kernel": kernel.at[1, 2].set(np.nan)}}
    (clean,), _ = run(name, [grads])
    (updates,), (state,) = run(name, [poisoned])
    zeros = jax.tree.map(jnp.zeros_like, grads)
    expected = {
        "global": zeros,
        "per_layer": {**clean, "body": zeros["body"]},
        "per_param": {**clean, "body": {**clean["body"], "kernel": zeros["body"]["kernel"]}},
        "unit": {
            **clean,
            "body": {**clean["body"], "kernel": clean["body"]["kernel"].at[:, 2].set(0)},
        },
    }
    assert_same_bits(updates, expected[scope_of(name)])
    assert np.sum(state.last.num_nonfinite) == 1


@pytest.mark.parametrize("name", HISTORY_BASED)
def test_the_first_step_is_recorded_in_the_metrics(name):
    (grads,) = stream(1)
    _, (state,) = run(name, [grads])
    record = smartclip.metrics(state)
    np.testing.assert_allclose(
        np.linalg.norm(record["grad_norm"]), reference.norm(grads), rtol=1e-6
    )
    np.testing.assert_array_equal(record["num_steps"], 1)


# Derivatives, a fixed ceiling and nonfinite="propagate", from one compiled function.

FACTORS = (1.0, 2.0, 0.5)


def small_tree(seed):
    """Float32 leaves in two layers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(rng.normal(size=shape)),
        {"a": {"w": (2, 3)}, "c": (2,)},
        is_leaf=lambda node: isinstance(node, tuple),
    )


GRAD, DIRECTION, WEIGHTS, PROJECTION = (small_tree(seed) for seed in range(4))
STEP = 1e-3
ROWS = {
    "zero": jax.tree.map(np.zeros_like, GRAD),
    "grad": GRAD,
    "ahead": jax.tree.map(lambda g, d: g + np.float32(STEP) * d, GRAD, DIRECTION),
    "behind": jax.tree.map(lambda g, d: g - np.float32(STEP) * d, GRAD, DIRECTION),
    "one zero leaf": {**GRAD, "a": jax.tree.map(np.zeros_like, GRAD["a"])},
    "nan": jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), GRAD),
    "inf": jax.tree.map(lambda leaf: np.full_like(leaf, -np.inf), GRAD),
}


@functools.cache
def differentiate(name):
    """For each of ROWS: a function of the updates of three steps, the updates, its derivative."""
    tx = CLIPPERS[name](max_norm=1.0, nonfinite="propagate")

    def loss(grad):
        def step(state, factor):
            scaled = jax.tree.map(lambda leaf: factor * leaf, grad)
            updates, state = tx.update(scaled, state, WEIGHTS)
            return state, updates

        _, updates = jax.lax.scan(step, tx.init(WEIGHTS), jnp.array(FACTORS))
        products = jax.tree.map(lambda u, v: jnp.sum(u * v[None]), updates, PROJECTION)
        return optax.tree.sum(products), updates

    rows = jax.tree.map(lambda *leaves: np.stack(leaves), *ROWS.values())
    results = jax.jit(jax.vmap(jax.value_and_grad(loss, has_aux=True)))(rows)
    return {
        row: jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index]), results)
        for index, row in enumerate(ROWS)
    }


@one_of_each_kind
def test_derivatives_through_three_updates_are_finite_and_right(name):
    results = differentiate(name)
    for row in ("zero", "grad", "one zero leaf"):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results[row]))
    # Nothing is clipped at zero: the updates are the gradient times each of the factors.
    expected = jax.tree.map(lambda leaf: leaf * sum(FACTORS), PROJECTION)
    jax.tree.map(np.testing.assert_allclose, results["zero"][1], expected)

    (_, updates), derivative = results["grad"]
    slope = sum(
        np.sum(np.float64(a) * b)
        for a, b in zip(jax.tree.leaves(derivative), jax.tree.leaves(DIRECTION), strict=True)
    )
    ((ahead, _), _), ((behind, _), _) = results["ahead"], results["behind"]
    atol = 2e-3 * reference.norm(updates)
    assert abs(slope) > 10 * atol
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * STEP), rtol=1e-2, atol=atol)


@every_clipper
def test_max_norm_holds_from_the_first_step_on(name):
    (_, updates), _ = differentiate(name)["grad"]
    first = jax.tree.map(lambda leaf: leaf[0], updates)
    norms, given_norms = (
        [
            reference.norm(group)
            for group in {
                "global": [tree],
                "per_layer": [tree["a"], tree["c"]],
                "per_param": [tree["a"]["w"], tree["c"]],
                "unit": [*tree["a"]["w"].T, tree["c"]],
            }[scope_of(name)]
        ]
        for tree in (first, GRAD)
    )
    assert max(given_norms) > 1
    if name in HISTORY_BASED:
        np.testing.assert_allclose(norms, np.minimum(given_norms, 1), rtol=1e-6)
    else:
        assert max(norms) <= 1


@every_clipper
@pytest.mark.parametrize("row", ["nan", "inf"])
def test_propagate_lets_nonfinite_gradients_pass_as_they_are(name, row):
    (_, updates), _ = differentiate(name)[row]
    expected = jax.tree.map(lambda leaf: np.stack([leaf] * len(FACTORS)), ROWS[row])
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


# Hyperparameters.


def thresholds_of(tx, norms, dtype=jnp.float32):
    """The thresholds of a transformation for gradients of given norms, one leaf of `dtype`."""
    params = jnp.zeros(1, dtype)

    def step(state, norm):
        _, state = tx.update(norm[None], state, params)
        return state, smartclip.metrics(state)["clip_threshold"]

    norms = jnp.asarray(np.asarray(norms).astype(dtype))
    run = jax.jit(lambda norms: jax.lax.scan(step, tx.init(params), norms)[1])
    return reference.unreported(np.asarray(run(norms)))


NORMS = np.float32(np.exp(np.random.default_rng(4).normal(size=60)))


@one_of_each_kind
def test_hyperparameters_rounded_to_bfloat16_change_next_to_nothing(name):
    tx = optax.inject_hyperparams(CLIPPERS[name])()
    hyperparams = tx.init(jnp.zeros(1, jnp.bfloat16)).hyperparams.values()
    # Only the auto mode has no number but the integer `warmup_steps`.
    assert any(value.dtype == jnp.bfloat16 for value in hyperparams) == (name != "autoclip")
    np.testing.assert_allclose(
        thresholds_of(tx, NORMS, jnp.bfloat16),
        thresholds_of(CLIPPERS[name](), NORMS, jnp.bfloat16),
        rtol=2e-2,
    )


def late_value(early, late):
    """A schedule that changes at step 30."""
    return lambda count: jnp.where(count < 30, early, late)


# Of units, thresholds are not reported.
AGC = functools.partial(smartclip.agc, scope="per_param")


@pytest.mark.parametrize(
    ("factory", "hyperparameter", "expected"),
    [
        (
            smartclip.autoclip,
            "percentile",
            lambda value: reference.percentile_thresholds(NORMS, value, 1024),
        ),
        (
            smartclip.zscore_clip,
            "zmax",
            lambda value: reference.zscore_thresholds(NORMS, zmax=value),
        ),
        (
            smartclip.zscore_clip,
            "max_norm",
            lambda value: np.minimum(reference.zscore_thresholds(NORMS), value),
        ),
        (
            smartclip.autoclip,
            "warmup_steps",
            lambda value: reference.lower_fence_thresholds(NORMS, warmup_steps=value),
        ),
        (AGC, "clipping", lambda value: np.full(60, value * 1e-3)),
        (AGC, "eps", lambda value: np.full(60, value * 1e-2)),
    ],
)
def test_a_hyperparameter_may_follow_a_schedule(factory, hyperparameter, expected):
    early, late = (3, 40) if hyperparameter == "warmup_steps" else (1.5, 80.0)
    tx = optax.inject_hyperparams(factory)(**{hyperparameter: late_value(early, late)})
    thresholds = np.r_[expected(early)[:30], expected(late)[30:]]
    np.testing.assert_allclose(thresholds_of(tx, NORMS), thresholds, rtol=1e-5)


def test_a_decay_that_bfloat16_rounds_to_one_still_follows_the_norms():
    tx = optax.inject_hyperparams(smartclip.zscore_clip)(decay=0.999)
    # A stream that bfloat16 holds exactly, with a lower level after 1500 steps.
    norms = np.random.default_rng(5).choice([1.0, 1.5, 2.0], size=4000)
    norms[1500:] /= 4
    assert tx.init(jnp.zeros(1, jnp.bfloat16)).hyperparams["decay"] == 1
    expected = reference.zscore_thresholds(norms, decay=0.999)
    assert expected[-1] < 0.6 * expected[1500]
    thresholds = thresholds_of(tx, norms, jnp.bfloat16)
    np.testing.assert_allclose(thresholds, expected, rtol=0.05)


@pytest.mark.parametrize("factory", [smartclip.autoclip, smartclip.zscore_clip])
def test_a_function_as_scope_is_a_static_argument_of_inject_hyperparams(factory):
    def first_letter(path):
        return path[0].key[0]

    params = {"a1": jnp.ones(2), "a2": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax.inject_hyperparams(factory, static_args="scope")(scope=first_letter, max_norm=1.0)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(optax.tree.get(state, "grad_norm"), [2, 2**0.5], rtol=1e-6)
    np.testing.assert_allclose([reference.norm(updates[key]) for key in ("a1", "b")], [0.5**0.5, 1])
