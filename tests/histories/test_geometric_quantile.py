"""The geometric quantile against its float64 definition, and its bounds."""

import functools

import jax
import numpy as np
import pytest
import reference

import optax_smartclip as smartclip


@functools.cache
def compiled(percentile, rate):
    """A function from norms [steps] to the estimate after each of them."""
    history = smartclip.geometric_quantile(rate)

    def step(state, norm):
        state = history.record(state, norm[None], (percentile,))
        return state, history.percentile(state, percentile)[0]

    return jax.jit(lambda norms: jax.lax.scan(step, history.init(1), norms)[1])


def estimates(norms, percentile, rate):
    return np.asarray(compiled(percentile, rate)(np.float32(norms)))


@pytest.mark.parametrize(("percentile", "rate"), [(50.0, 0.02), (95.0, 0.02), (10.0, 0.2)])
def test_equals_the_float64_reference_on_a_long_stream(percentile, rate):
    generator = np.random.default_rng(0)
    norms = generator.lognormal(sigma=0.5, size=20_000)
    norms[generator.integers(0, 20_000, 50)] = 1e30
    expected = reference.geometric_estimates(np.float32(norms), percentile, rate)
    np.testing.assert_allclose(estimates(norms, percentile, rate), expected, rtol=1e-3)


@pytest.mark.parametrize("percentile", [5.0, 50.0, 95.0])
def test_settles_at_the_percentile(percentile):
    norms = np.random.default_rng(1).lognormal(sigma=0.5, size=40_000)
    final = estimates(norms, percentile, 0.01)[20_000:]
    above = np.mean(norms[20_000:] > final)
    assert above == pytest.approx(1 - percentile / 100, abs=0.01)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_scale_of_the_norms_does_not_matter(scale):
    norms = np.random.default_rng(2).lognormal(sigma=0.3, size=300)
    ratio = estimates(scale * norms, 90.0, 0.05) / estimates(norms, 90.0, 0.05)
    np.testing.assert_allclose(ratio, scale, rtol=1e-4)


def test_one_norm_moves_the_estimate_by_one_factor_however_large():
    calm = [1.0, 2.0] * 50
    before, after = estimates([*calm, 1e38], 95.0, 0.02)[-2:]
    assert after / before == pytest.approx(np.exp(0.02 * 0.95), rel=1e-5)


def test_three_spikes_among_the_first_norms_do_not_reach_the_estimate():
    norms = [1000.0, 1.0, 1000.0, 1.1, 0.9, 1000.0, 1.0, 1.05]
    assert estimates(norms, 95.0, 0.02)[-1] < 1.2


def test_rests_at_a_constant_norm():
    final = estimates([3.0] * 30, 95.0, 0.1)
    np.testing.assert_array_equal(final, np.float32(3.0))


def test_lets_everything_pass_before_the_first_norm():
    history = smartclip.geometric_quantile()
    assert history.percentile(history.init(2), 95.0).min() == np.finfo(np.float32).max


def test_follows_one_percentile_only():
    assert smartclip.geometric_quantile().max_percentiles == 1
