"""Ranks against exact fractions."""

from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_smartclip.histories.ranks import rank

LARGEST = 2**31 - 2
LASTS = st.lists(st.integers(0, LARGEST), min_size=4, max_size=4)

# One unit in the last place of a float32 below 1: a compiler may divide by a constant with an
# error of more than half of it.
ROUNDING = Fraction(1, 2**24)


def error(percentile, last):
    """By how much each rank is wrong, and the exact ones."""
    index, fraction = rank(percentile, jnp.asarray(last, jnp.int32))
    assert index.dtype == jnp.int32
    assert fraction.dtype == jnp.float32
    assert np.all((fraction >= 0) & (fraction < 1))
    exact = [Fraction(float(percentile)) / 100 * value for value in last]
    ranks = [Fraction(int(i)) + Fraction(float(f)) for i, f in zip(index, fraction, strict=True)]
    return [abs(ours - true) for ours, true in zip(ranks, exact, strict=True)], index, exact


@hypothesis.given(parts=st.integers(0, 100 * 256), last=LASTS)
@hypothesis.example(parts=100 * 256, last=[LARGEST, 0, 1, 2**24 + 1])
@hypothesis.example(parts=100 * 256 - 1, last=[LARGEST, LARGEST - 1, 2**16 - 1, 2**16])
@hypothesis.example(parts=50 * 256, last=[9, LARGEST - 1, 2**24 + 1, 2**30 + 1])
@hypothesis.example(parts=1, last=[25_600, 25_599, 25_601, 2**31 - 26_000])
def test_multiples_of_a_256th_are_exact(parts, last):
    errors, index, exact = error(parts / 256, last)
    np.testing.assert_array_equal(index, [int(true) for true in exact])
    assert max(errors) <= ROUNDING


@hypothesis.given(
    percentile=st.sampled_from([33.3, 99.9, 66.67, 0.1, 0.66, 87.171]) | st.floats(0, 100),
    last=LASTS,
)
@hypothesis.example(percentile=0.66, last=[LARGEST, LARGEST - 1000, LARGEST - 2**20, 2**30])
def test_others_are_right_to_six_roundings_of_the_part_below_a_256th(percentile, last):
    errors, _, _ = error(percentile, last)
    for wrong, value in zip(errors, last, strict=True):
        assert wrong <= Fraction(6, 2**24) * Fraction(value, 100 * 256) + 3 * ROUNDING


@pytest.mark.parametrize("percentile", [0, 25, 50, 100])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int32])
def test_a_traced_percentile_is_as_exact_as_a_number(percentile, dtype):
    last = jnp.asarray([9, 2**24 + 1, LARGEST], jnp.int32)
    index, fraction = jax.jit(rank)(jnp.asarray(percentile, dtype), last)
    expected_index, expected_fraction = rank(float(percentile), last)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_allclose(fraction, expected_fraction, rtol=0, atol=2.0**-24)


def test_ranks_are_those_of_numpys_percentiles():
    for last in (0, 1, 9, 1000):
        ascending = np.arange(last + 1, dtype=np.float64)
        for percentile in (0.0, 10.0, 33.3, 50.0, 99.9, 100.0):
            index, fraction = rank(percentile, jnp.full(1, last, jnp.int32))
            expected = np.percentile(ascending, percentile)
            assert int(index[0]) + float(fraction[0]) == pytest.approx(expected, rel=1e-6, abs=1e-6)
