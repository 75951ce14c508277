"""What every clipper gets right in extreme ranges, next to what Optax's own clipping does there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compat import enable_x64

import optax_smartclip as smartclip

# Each with a ceiling on the global norm that is far below whatever else it would allow.
CLIPPERS = {
    "autoclip": lambda max_norm: smartclip.autoclip(max_norm=max_norm),
    "percentile": lambda max_norm: smartclip.autoclip(90.0, max_norm=max_norm),
    "geometric_quantile": lambda max_norm: smartclip.autoclip(
        90.0, history=smartclip.geometric_quantile(), max_norm=max_norm
    ),
    "zscore_clip": lambda max_norm: smartclip.zscore_clip(max_norm=max_norm),
    "agc": lambda max_norm: smartclip.agc(1e30, scope="global", max_norm=max_norm),
}
AUTOCLIP = CLIPPERS["autoclip"]
every_clipper = pytest.mark.parametrize("clipper", CLIPPERS.values(), ids=CLIPPERS)


@functools.partial(jax.jit, static_argnums=0)
def first_step(clipper, grads, max_norm):
    """Update and state of a first step, with parameters that are like the gradient."""
    tx = clipper(max_norm)
    params = jax.tree.map(jnp.ones_like, grads)
    return tx.update(grads, tx.init(params), params)


@jax.jit
def optax_clip(grads, max_norm):
    return optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())[0]


@every_clipper
def test_float16_gradients_of_300_are_clipped_and_not_dropped(clipper):
    grads = jnp.full(4, 300.0, jnp.float16)
    updates, state = first_step(clipper, grads, jnp.float32(1.0))
    assert updates.dtype == jnp.float16
    np.testing.assert_array_equal(updates, [0.5] * 4)
    np.testing.assert_array_equal(state.last.grad_norm, 600.0)


def test_optax_drops_float16_gradients_of_300():
    updates, _ = optax.clip_by_global_norm(1.0).update(
        jnp.full(4, 300.0, jnp.float16), optax.EmptyState()
    )
    np.testing.assert_array_equal(updates, [0.0] * 4)


@every_clipper
@pytest.mark.parametrize("size", [2.0, 1e20, 1e30, 1e37])
def test_every_finite_gradient_comes_out_at_the_threshold(clipper, size):
    grads = np.float32(size) * np.float32([0.6, -0.8])
    updates, state = first_step(clipper, grads, jnp.float32(1.0))
    np.testing.assert_allclose(state.last.grad_norm, reference.norm(grads), rtol=1e-6)
    np.testing.assert_allclose(updates, [0.6, -0.8], rtol=1e-6)
    theirs = optax_clip(grads, jnp.float32(1.0))
    np.testing.assert_allclose(theirs, [0.6, -0.8] if size == 2.0 else [0.0, 0.0], rtol=1e-6)


# AGC is not among them: it leaves norms alone that are far below clipping * eps.
@pytest.mark.parametrize("name", ["autoclip", "percentile", "geometric_quantile", "zscore_clip"])
def test_gradients_whose_squares_underflow_are_clipped_too(name):
    grads, max_norm = jnp.float32([3e-25, 4e-25]), jnp.float32(1e-26)
    updates, _ = first_step(CLIPPERS[name], grads, max_norm)
    np.testing.assert_allclose(updates, [6e-27, 8e-27], rtol=1e-6)
    np.testing.assert_array_equal(optax_clip(grads, max_norm), grads)


def test_the_norm_of_many_bfloat16_leaves_is_the_true_one():
    # In bfloat16, 256 + 1 is 256: of the squared norm 296, Optax sees 256.
    grads = [jnp.ones(256, jnp.bfloat16), *[jnp.ones(1, jnp.bfloat16)] * 40]
    updates, state = first_step(AUTOCLIP, grads, jnp.float32(16.5))
    np.testing.assert_allclose(state.last.grad_norm, np.sqrt(296), rtol=1e-6)
    np.testing.assert_allclose(reference.norm(updates), 16.5, rtol=4e-3)
    tx = optax.clip_by_global_norm(16.5)
    theirs, _ = jax.jit(tx.update)(grads, optax.EmptyState())
    assert reference.norm(theirs) == np.sqrt(296)


@every_clipper
@pytest.mark.parametrize("grads", [[0.0, 0.0], [3.0, 4.0], [1e30, 0.0]])
def test_a_limit_of_zero_gives_zeros(clipper, grads):
    # A schedule can reach it, where a Python number must be positive.
    updates, _ = first_step(clipper, jnp.float32(grads), jnp.float32(0.0))
    np.testing.assert_array_equal(updates, [0.0, 0.0])


def test_a_limit_of_zero_and_a_gradient_of_zero_are_nan_in_optax():
    assert np.all(np.isnan(optax_clip(jnp.zeros(2), jnp.float32(0.0))))


@every_clipper
def test_zeros_in_eager_mode_are_no_nan_on_the_way(clipper):
    tx = clipper(1.0)
    with jax.debug_nans(True):
        updates, _ = tx.update(jnp.zeros(2), tx.init(jnp.ones(2)), jnp.ones(2))
    np.testing.assert_array_equal(updates, [0.0, 0.0])


def test_a_dropped_infinity_is_no_nan_on_the_way():
    tx = AUTOCLIP(1.0)
    with jax.debug_nans(True):
        updates, _ = tx.update(jnp.float32([np.inf, 1.0]), tx.init(jnp.ones(2)))
    np.testing.assert_array_equal(updates, [0.0, 0.0])


@pytest.mark.parametrize("grads", [[0.0, 0.0], [np.inf, 1.0]])
def test_both_are_nan_on_the_way_through_optax(grads):
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        optax.clip_by_global_norm(1.0).update(jnp.float32(grads), optax.EmptyState())


WEIGHTS = np.float32([2.0, -1.0])


@functools.partial(jax.jit, static_argnums=0)
def slopes(clipper, grads, max_norm):
    """The derivative of a weighted sum of the updates with respect to the gradient."""
    return jax.grad(lambda grads: jnp.sum(WEIGHTS * first_step(clipper, grads, max_norm)[0]))(grads)


@every_clipper
@pytest.mark.parametrize(
    ("grads", "max_norm"),
    [
        ([0.0, 0.0], 1.0),
        ([0.0, 0.0], 0.0),
        ([3.0, 4.0], 0.0),
        ([0.3, 0.4], 1.0),
        ([3.0, 4.0], 1.0),
        ([3e25, 4e25], 1e20),
    ],
)
def test_the_derivative_of_an_update_is_that_of_the_formula_everywhere(clipper, grads, max_norm):
    grads = np.float32(grads)
    norm = np.linalg.norm(np.float64(grads))
    expected = np.float64(WEIGHTS)
    if norm > max_norm:
        direction = grads / norm
        expected = max_norm / norm * (expected - direction * np.dot(direction, expected))
    actual = slopes(clipper, grads, jnp.float32(max_norm))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_the_derivative_of_the_update_of_zeros_is_nan_in_optax():
    slope = jax.grad(lambda grads: jnp.sum(optax_clip(grads, jnp.float32(1.0))))(jnp.zeros(2))
    assert np.all(np.isnan(slope))


@every_clipper
def test_a_non_finite_step_is_zeros_and_never_remembered(clipper):
    tx = clipper(max_norm=None)
    update = jax.jit(tx.update)
    state = skipped = tx.init(jnp.ones(2))
    for size, bad in ((1.0, np.nan), (2.0, np.inf), (1.5, -np.inf)):
        grads = jnp.float32([0.6, 0.8]) * size
        expected, state = update(grads, state, jnp.ones(2))
        zeros, skipped = update(jnp.float32([bad, 1.0]), skipped, jnp.ones(2))
        updates, skipped = update(grads, skipped, jnp.ones(2))
        np.testing.assert_array_equal(zeros, [0.0, 0.0])
        np.testing.assert_array_equal(updates, expected)
    jax.tree.map(np.testing.assert_array_equal, skipped.rule, state.rule)
    np.testing.assert_array_equal(skipped.num_observed, state.num_observed)
    np.testing.assert_array_equal(skipped.last.num_nonfinite, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_makes_a_nan_of_the_update_in_optax(bad):
    assert np.isnan(optax_clip(jnp.float32([bad, 1.0]), jnp.float32(1.0))[0])


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@every_clipper
def test_updates_keep_their_dtype_and_the_state_its_types(clipper):
    tx = clipper(1.0)

    def check(params):
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert types(after) == types(state)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float32", "int32", "bool"}
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
        for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert (update.shape, update.dtype) == (param.shape, param.dtype)

    names = ["float16", "bfloat16", "float32", "complex64", "float8_e4m3fn"]
    leaves = [jnp.ones(3, name) for name in names]
    check(leaves)
    check([*leaves, jnp.asarray(1.0)])
    with enable_x64(True):
        check([jnp.ones(3, "float64"), jnp.ones(3, "complex128"), *leaves, jnp.asarray(1.0)])


@every_clipper
def test_double_precision_gradients_are_clipped_in_double_precision_mode(clipper):
    with enable_x64(True):
        grads = jnp.asarray([3.0, 4.0 + 1e-12])
        clipped, _ = first_step(clipper, grads, jnp.float32(1.0))
        within, _ = first_step(clipper, grads, jnp.float32(9.0))
        assert clipped.dtype == within.dtype == jnp.float64
        np.testing.assert_allclose(clipped, [0.6, 0.8], rtol=1e-6)
        np.testing.assert_array_equal(within, grads)


def test_one_tree_may_hold_every_dtype():
    grads = [jnp.asarray([12.0], name) for name in ("float32", "float16", "bfloat16", "complex64")]
    updates, _ = first_step(AUTOCLIP, grads, jnp.float32(1.0))
    for update in updates:
        np.testing.assert_array_equal(np.asarray(update, np.complex64), [0.5])
    with pytest.raises(ValueError, match="promotion"):
        optax_clip(grads, jnp.float32(1.0))


def test_complex_gradients_have_the_norm_of_their_magnitudes():
    updates, state = first_step(AUTOCLIP, jnp.asarray([2 + 4j, -4 + 8j]), jnp.float32(1.0))
    np.testing.assert_allclose(state.last.grad_norm, 10.0, rtol=1e-6)
    np.testing.assert_allclose(updates, [0.2 + 0.4j, -0.4 + 0.8j], rtol=1e-6)


@every_clipper
def test_what_is_no_gradient_passes(clipper):
    others = {
        "float0": np.zeros(2, jax.dtypes.float0),
        "int": np.arange(3),
        "key": jax.random.key(0),
        "none": None,
    }
    tree = others | {
        "masked": optax.MaskedNode(),
        "empty": jnp.zeros((0, 2)),
        "scalar": jnp.float32(3.0),
        "vector": jnp.float32([4.0]),
    }
    tx = clipper(1.0)

    @jax.jit
    def update():
        updates, _ = tx.update(tree, tx.init(tree), tree)
        assert all(updates[name] is leaf for name, leaf in others.items())
        return {name: updates[name] for name in tree if name not in others}

    updates = update()
    assert updates["empty"].shape == (0, 2)
    np.testing.assert_allclose([updates["scalar"], *updates["vector"]], [0.6, 0.8], rtol=1e-6)
    with pytest.raises((TypeError, ValueError)):
        optax_clip({"int": jnp.arange(3), "float": jnp.ones(3)}, jnp.float32(1.0))


@every_clipper
def test_constant_gradients_are_never_touched(clipper):
    tx = clipper(max_norm=None)
    sizes = np.float32([0.1, 1 / 3, 7.3e-5, 1.0, 1e4, 1e20, 1e-20])[:, None]
    if clipper is CLIPPERS["agc"]:
        sizes = sizes[:4]

    def scales(size):
        def advance(state, _):
            updates, state = tx.update(size, state, jnp.ones(1))
            return state, (updates, state.last.clip_scale)

        return jax.lax.scan(advance, tx.init(size), length=120)[1]

    updates, scales = jax.jit(jax.vmap(scales))(sizes)
    np.testing.assert_array_equal(scales, np.ones((len(sizes), 120)))
    np.testing.assert_array_equal(updates, np.broadcast_to(sizes[:, None], updates.shape))


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("spread", [0.011, 1e-5])
def test_the_deviation_of_norms_neither_cancels_nor_overflows_nor_vanishes(unit, spread):
    # E[x^2] - E[x]^2 in float32 would be off by a per cent here, and 0 or infinite in other units.
    noise = np.random.default_rng(0).normal(size=800)
    norms = np.float32(unit * (1 + spread * noise))
    tx = smartclip.zscore_clip()

    def advance(state, norm):
        _, state = tx.update(norm, state)
        return state, state.last.clip_threshold

    _, thresholds = jax.jit(lambda norms: jax.lax.scan(advance, tx.init(norms[0]), norms))(norms)
    expected = reference.zscore_thresholds(np.float64(norms) / unit)
    thresholds = reference.unreported(np.float64(thresholds))
    np.testing.assert_allclose(thresholds / unit, expected, rtol=1e-5)


@pytest.mark.parametrize(("size", "dtype"), [(300.0, jnp.float16), (1e18, jnp.float32)])
def test_units_of_agc_are_clipped_and_not_dropped(size, dtype):
    grads = jnp.full((4, 3), size, dtype)
    updates, state = first_step(smartclip.agc, grads, jnp.float32(0.25))
    np.testing.assert_allclose(np.float64(updates), np.full((4, 3), 0.25), rtol=1e-3)
    # In units of the threshold.
    np.testing.assert_allclose(state.last.grad_norm, 2 * size / 0.5, rtol=1e-6)


def test_of_units_in_float16_optax_makes_zeros():
    # When this fails, Optax has mended it.
    grads, params = jnp.full((4, 3), 300.0, jnp.float16), jnp.ones((4, 3), jnp.float16)
    theirs, _ = jax.jit(optax.adaptive_grad_clip(0.25).update)(grads, optax.EmptyState(), params)
    np.testing.assert_array_equal(theirs, np.zeros((4, 3)))


def test_agc_accepts_parameters_without_a_gradient():
    grads, params = {"a": None, "b": jnp.full(4, 8.0)}, {"a": jnp.ones(2), "b": jnp.ones(4)}
    tx = smartclip.agc(0.5)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates["a"] is None
    np.testing.assert_allclose(updates["b"], [0.5] * 4, rtol=1e-6)
    with pytest.raises(ValueError, match=r"structure|Expected None"):
        optax.adaptive_grad_clip(0.5).update(grads, optax.EmptyState(), params)
