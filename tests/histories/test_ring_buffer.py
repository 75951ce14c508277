"""The ring buffer against numpy.percentile over the same window."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_smartclip as smartclip

PERCENTILES = (0.0, 10.0, 25.0, 33.3, 50.0, 75.0, 99.9, 100.0)


def record_all(history, norms):
    """All states after each of `norms` [steps, groups], and their percentiles."""

    def step(state, norm):
        state = history.record(state, norm, PERCENTILES)
        return state, jnp.stack([history.percentile(state, p) for p in PERCENTILES])

    norms = jnp.asarray(norms, jnp.float32)
    return jax.jit(lambda norms: jax.lax.scan(step, history.init(norms.shape[1]), norms))(norms)


def expected_percentiles(norms, size):
    norms = np.asarray(norms, np.float32).astype(np.float64)
    return np.stack(
        [
            np.percentile(norms[max(0, t + 1 - size) : t + 1], PERCENTILES, axis=0)
            for t in range(len(norms))
        ]
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_equals_numpy_over_the_window_while_filling_and_when_full(size):
    norms = np.random.default_rng(size).lognormal(sigma=2.0, size=(2 * size + 50, 3))
    _, percentiles = record_all(smartclip.ring_buffer(size), norms)
    np.testing.assert_allclose(percentiles, expected_percentiles(norms, size), rtol=2e-6)


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
    _, percentiles = record_all(smartclip.ring_buffer(size), norms)
    expected = expected_percentiles(norms, size)
    np.testing.assert_allclose(percentiles, expected, rtol=1e-6, atol=1e-38)
