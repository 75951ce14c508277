"""Moments against NumPy in float64, also where rounding could spoil them."""

from inspect import signature

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from clipper_table import CLIPPERS

import optax_smartclip as smartclip
from optax_smartclip.histories.moments import (
    above_mean,
    averaging_weight,
    init_moments,
    new_weight,
    update_moments,
)


@jax.jit
def moments(values, weights):
    """Mean and standard deviation after all of `values` [steps], each with its weight."""

    def step(carry, value_and_weight):
        return update_moments(*carry, *value_and_weight), None

    start = jnp.zeros(1, jnp.float32), jnp.zeros(1, jnp.float32)
    (mean, std), _ = jax.lax.scan(step, start, (values[:, None], weights[:, None]))
    return mean[0], std[0]


def plain_weights(count):
    return np.float32(1 / np.arange(1, count + 1))


@hypothesis.given(
    st.lists(st.floats(0, 2.0**100, width=32, allow_subnormal=False), min_size=20, max_size=20)
)
@hypothesis.example([1e30] * 20)
@hypothesis.example([3.4e38, 0.0] * 10)
def test_weights_of_one_over_n_give_the_mean_and_standard_deviation(values):
    values = np.float32(values)
    mean, std = moments(values, plain_weights(20))
    largest = float(values.max())
    expected = np.float64(values)
    assert float(mean) == pytest.approx(expected.mean(), rel=1e-5)
    # The error is relative to the largest value.
    assert float(std) == pytest.approx(expected.std(), rel=1e-5, abs=1e-6 * largest)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_a_constant_weight_gives_weights_that_fall_by_the_decay(decay):
    values = np.random.default_rng(1).lognormal(size=1000).astype(np.float32)
    mean, std = moments(values, np.full(1000, 1 - decay, np.float32))
    shares = (1 - decay) * decay ** np.arange(1000)[::-1].astype(np.float64)
    # The rest of the weight is on the initial zero.
    expected = np.sum(shares * values)
    variance = np.sum(shares * (values - expected) ** 2) + (1 - shares.sum()) * expected**2
    assert float(mean) == pytest.approx(expected, rel=1e-4)
    assert float(std) == pytest.approx(np.sqrt(variance), rel=1e-4)


def test_std_does_not_cancel_when_the_mean_is_ten_thousand_times_larger():
    values = np.float32(1e4 + np.random.default_rng(0).normal(size=500))
    weights = np.maximum(np.float32(0.01), plain_weights(500))
    mean, std = moments(values, weights)
    expected_mean, expected_variance = np.float64(0), np.float64(0)
    for value, weight in zip(values.astype(np.float64), weights.astype(np.float64), strict=True):
        delta = value - expected_mean
        expected_mean += weight * delta
        expected_variance = (1 - weight) * (expected_variance + weight * delta**2)
    assert float(mean) == pytest.approx(expected_mean, rel=1e-6)
    assert float(std) == pytest.approx(np.sqrt(expected_variance), rel=0.01)


@pytest.mark.parametrize("constant", [1e-37, 0.1, 1 / 3, 1e4, 3.4e38])
def test_a_constant_has_itself_as_mean_and_no_deviation(constant):
    values = np.full(500, constant, np.float32)
    mean, std = moments(values, plain_weights(500))
    assert float(mean) == values[0]
    assert float(std) == 0.0


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**120])
def test_a_power_of_two_changes_no_other_bit(scale):
    values = np.random.default_rng(2).lognormal(size=500).astype(np.float32)
    mean, std = moments(values, plain_weights(500))
    scaled_mean, scaled_std = moments(values * np.float32(scale), plain_weights(500))
    assert float(scaled_mean) == float(mean) * scale
    assert float(scaled_std) == float(std) * scale


def test_the_moments_of_no_norms_are_zero():
    # Starting with ones would lose norms that are small next to one.
    for leaf in jax.tree.leaves(init_moments(2)):
        np.testing.assert_array_equal(leaf, [0, 0])


def test_a_deviation_counts_as_at_least_a_hundredth_of_the_mean():
    state = init_moments(2).replace(
        mean=jnp.asarray([4.0, 4.0], jnp.float32), std=jnp.asarray([0.001, 2.0], jnp.float32)
    )
    np.testing.assert_allclose(above_mean(state, 3.0), [4.12, 10.0], rtol=1e-6)


def test_the_weight_of_a_plain_average_is_finite_before_the_first_value_and_after_the_last():
    counts = jnp.asarray([0, 1, 4, 2**31 - 1], jnp.int32)
    np.testing.assert_allclose(averaging_weight(counts), [1, 1, 0.25, 2.0**-31], rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.97, 0.99, 0.9999])
def test_the_weight_of_a_new_value_is_what_the_decay_leaves(decay):
    for given in (decay, np.float64(decay), jnp.float32(decay)):
        assert float(new_weight(given)) == pytest.approx(1 - decay, rel=1e-3)
    assert float(new_weight(decay)) == np.float32(1 - decay)


@pytest.mark.parametrize(
    ("decay", "dtype"), [(0.999, jnp.bfloat16), (0.9999, jnp.float16), (1 - 1e-8, jnp.float32)]
)
def test_a_decay_rounded_to_one_is_the_nearest_that_could_have_been_meant(decay, dtype):
    rounded = jnp.asarray(decay, dtype)
    assert rounded == 1
    weight = float(new_weight(rounded))
    assert jnp.asarray(1 - 0.99 * weight, dtype) == 1
    assert jnp.asarray(1 - 2.01 * weight, dtype) < 1


AVERAGING = [name for name, make in CLIPPERS.items() if "decay" in signature(make).parameters]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", AVERAGING)
def test_a_decay_rounded_to_one_still_learns(name, dtype):
    decay = jnp.asarray(0.9999 if dtype == jnp.float16 else 0.999, dtype)
    tx = CLIPPERS[name](decay=decay, warmup_steps=4)
    state, update = tx.init(jnp.zeros(())), jax.jit(tx.update)
    for _ in range(4):
        _, state = update(jnp.ones(()), state)
    # A state after a long run, when the plain average of all norms has no effect any more.
    old = state.replace(rule=state.rule.replace(num_recorded=jnp.full(1, 2**31 - 2, jnp.int32)))
    _, state = update(jnp.asarray(0.98, jnp.float32), old)
    before, after = (
        getattr(rule, "mean", None) if hasattr(rule, "mean") else rule.average
        for rule in (old.rule, state.rule)
    )
    assert after[0] < before[0]


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("spread", [0.011, 1e-5])
def test_the_deviation_of_norms_neither_cancels_nor_overflows_nor_vanishes(unit, spread):
    # E[x^2] - E[x]^2 in float32 would be off by a per cent here, and 0 or infinite in other units.
    noise = np.random.default_rng(0).normal(size=800)
    norms = np.float32(unit * (1 + spread * noise))
    expected = reference.zscore_thresholds(np.float64(norms) / unit)
    thresholds = reference.unreported(np.float64(zscore_thresholds(norms)))
    np.testing.assert_allclose(thresholds / unit, expected, rtol=1e-5)


@jax.jit
def zscore_thresholds(norms):
    tx = smartclip.zscore_clip()

    def step(state, norm):
        _, state = tx.update(norm, state)
        return state, state.last.clip_threshold

    return jax.lax.scan(step, tx.init(norms[0]), norms)[1]
