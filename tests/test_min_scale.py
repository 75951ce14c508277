"""`min_scale`: a finite gradient is never multiplied by less, for any threshold and `max_norm`."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clipper_table import CLIPPERS, FUNCTIONS

import optax_smartclip as smartclip
from optax_smartclip.engine.scaling import keep_share, signed_scale

WEIGHTS = {"kernel": jnp.full((3, 2), 20.0), "bias": jnp.full(2, 5.0)}
MAX_NORM = 1.0
SIZES = np.array([0.05, 0.2, 0.1, 0.15, 0.05, 0.2, 1e3, 0.1, np.nan, np.inf, 1e7, 0.1])
MIN_SCALES = np.float32([0.0, 1e-3, 0.5, 1.0])


def gradients():
    rng = np.random.default_rng(0)
    return {
        name: np.float32(rng.normal(size=(len(SIZES), *leaf.shape)).T * SIZES).T
        for name, leaf in WEIGHTS.items()
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_smaller_scales_are_raised_to_it_and_the_history_stays_the_same(name):
    grads = gradients()

    @jax.jit
    @jax.vmap
    def run(min_scale):
        tx = CLIPPERS[name](min_scale=min_scale, max_norm=MAX_NORM)

        def step(state, grads):
            updates, state = tx.update(grads, state, WEIGHTS)
            return state, (updates, smartclip.metrics(state)["clip_scale"])

        return jax.lax.scan(step, tx.init(WEIGHTS), grads)

    state, (updates, reported) = run(MIN_SCALES)
    finite = np.isfinite(SIZES)
    for leaf, clipped in zip(jax.tree.leaves(grads), jax.tree.leaves(updates), strict=True):
        assert not np.any(clipped[:, ~finite])
        scales = np.float64(clipped[:, finite]) / np.float64(leaf[finite])
        floors = MIN_SCALES.reshape(-1, *[1] * leaf.ndim)
        assert np.min(scales[0]) < 1e-6
        np.testing.assert_allclose(scales, np.maximum(scales[0], floors), rtol=1e-6)
    # One number for each step or for each group. For units, it is the smallest scale.
    reported = np.asarray(reported)[:, finite]
    floors = MIN_SCALES.reshape(-1, *[1] * (reported.ndim - 1))
    np.testing.assert_allclose(reported, np.maximum(reported[0], floors), rtol=1e-6)
    for leaf in jax.tree.leaves((state.rule, state.num_observed)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))


@jax.jit
def scale_and_limit(norm, limit, min_scale):
    limit = keep_share(limit, norm, min_scale)
    return signed_scale(norm, limit), limit


POSITIVE = st.floats(2.0**-60, 2.0**60, width=32)


@hypothesis.given(norm=POSITIVE, limit=POSITIVE, min_scale=st.floats(0.0, 1.0, width=16))
@hypothesis.example(norm=3.0, limit=1.0, min_scale=1.0)
def test_the_scale_is_the_larger_one_of_the_floor_and_the_formula(norm, limit, min_scale):
    scale, raised = scale_and_limit(np.float32(norm), np.float32(limit), np.float32(min_scale))
    expected = max(min_scale, min(1.0, limit / norm))
    np.testing.assert_allclose(scale, expected, rtol=3e-7)
    np.testing.assert_allclose(raised, max(limit, min_scale * norm), rtol=1e-7)
    assert scale <= 1
    assert (scale == 1) == (norm <= limit or min_scale == 1)


@pytest.mark.parametrize("min_scale", [0.0, 0.5])
def test_a_norm_that_is_not_finite_keeps_its_threshold_and_has_no_scale(min_scale):
    norms = np.float32([np.nan, np.inf])
    scales, limits = scale_and_limit(norms, np.float32([2.0, 0.25]), np.float32(min_scale))
    assert np.all(scales < 0)
    np.testing.assert_array_equal(limits, [2.0, 0.25])


def test_it_overrides_max_norm_in_the_update_and_in_the_record():
    tx = smartclip.autoclip(max_norm=1.0, min_scale=0.25)
    grads = {"w": jnp.float32([0.0, 8.0])}
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["w"], [0.0, 2.0])
    record = smartclip.metrics(state)
    assert (record["clip_threshold"], record["clip_scale"], record["clipped"]) == (2.0, 0.25, True)


def test_it_may_be_injected_and_its_derivative_is_that_of_a_factor():
    tx = optax.inject_hyperparams(smartclip.autoclip)(max_norm=1.0, min_scale=0.25)

    def clipped(size):
        grads = {"w": size * jnp.float32([0.6, 0.8])}
        return tx.update(grads, tx.init(grads))[0]["w"][1]

    value, slope = jax.jit(jax.value_and_grad(clipped))(8.0)
    np.testing.assert_allclose([value, slope], [0.25 * 0.8 * 8.0, 0.25 * 0.8], rtol=1e-6)
