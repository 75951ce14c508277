"""The ring buffer against numpy.percentile over the same window."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_smartclip as smartclip

PERCENTILES = (0.0, 10.0, 25.0, 33.3, 50.0, 75.0, 99.9, 100.0)


def record_all(history, norms):
    """The last state, and the percentiles after each of `norms` [steps, groups]."""
    norms = jnp.asarray(norms, jnp.float32)
    return compiled(history)(history.init(norms.shape[1]), norms)


@functools.cache
def compiled(history):
    def step(state, norm):
        state = history.record(state, norm, PERCENTILES)
        return state, jnp.stack([history.percentile(state, p) for p in PERCENTILES])

    return jax.jit(lambda state, norms: jax.lax.scan(step, state, norms))


# One object for each size, which is compiled once.
ring_buffer = functools.cache(smartclip.ring_buffer)


def expected_percentiles(norms, size):
    norms = np.asarray(norms, np.float32).astype(np.float64)
    return np.stack(
        [
            np.percentile(norms[max(0, t + 1 - size) : t + 1], PERCENTILES, axis=0)
            for t in range(len(norms))
        ]
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_equals_numpy_over_the_window_while_it_fills_and_when_it_is_full(size):
    norms = np.random.default_rng(size).lognormal(sigma=2.0, size=(2 * size + 50, 3))
    _, percentiles = record_all(smartclip.ring_buffer(size), norms)
    np.testing.assert_allclose(percentiles, expected_percentiles(norms, size), rtol=1e-6)


@hypothesis.given(
    size=st.sampled_from([1, 4, 5]),
    norms=st.lists(
        st.sampled_from([0.0, 1e-38, 1.0, 1.0000001, 2.0, 1e30, 3.4028235e38]),
        min_size=12,
        max_size=12,
    ),
)
def test_equals_numpy_with_ties_zeros_and_the_largest_float(size, norms):
    norms = np.float32(norms)[:, None]
    _, percentiles = record_all(ring_buffer(size), norms)
    expected = expected_percentiles(norms, size)
    np.testing.assert_allclose(percentiles, expected, rtol=1e-6, atol=1e-38)


def test_equals_numpy_in_a_window_of_100_000_norms():
    size = 100_000
    norms = np.random.default_rng(0).lognormal(size=size + 1000).astype(np.float32)
    history = smartclip.ring_buffer(size)
    # Starts from a full window: to record 100,000 norms would take long.
    state = history.init(1).replace(
        ring=jnp.asarray(norms[None, :size]),
        ordered=jnp.asarray(np.sort(norms[None, :size])),
        length=jnp.full(1, size, jnp.int32),
    )
    steps = jnp.asarray(norms[size:, None])

    def step(state, norm):
        return history.record(state, norm, ()), None

    state = jax.jit(lambda state, steps: jax.lax.scan(step, state, steps)[0])(state, steps)
    found = jax.jit(lambda state: [history.percentile(state, p)[0] for p in PERCENTILES])(state)
    expected = np.percentile(norms[-size:].astype(np.float64), PERCENTILES)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_percentile_may_be_a_bfloat16_array():
    history = ring_buffer(5)
    norms = np.float32([5.0] * 8 + [1.0, 3.0, 2.0, 4.0])[:, None]
    state, _ = record_all(history, norms)
    percentile = jax.jit(history.percentile)
    assert percentile(state, jnp.asarray(25, jnp.bfloat16))[0] == 2.0
    assert percentile(state, jnp.asarray(75, jnp.int32))[0] == 4.0


def test_empty_places_hold_a_finite_number():
    state = smartclip.ring_buffer(3).init(2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_step_does_not_sort():
    history = smartclip.ring_buffer(64)
    program = jax.jit(history.record).lower(history.init(2), jnp.ones(2), ()).as_text()
    assert "stablehlo.sort" not in program


def test_a_state_of_another_size_is_refused():
    state = smartclip.ring_buffer(3).init(1)
    with pytest.raises(ValueError, match=r"'ring' of shape \(1, 4\), .*, got \(1, 3\)"):
        smartclip.ring_buffer(4).record(state, jnp.ones(1), ())
