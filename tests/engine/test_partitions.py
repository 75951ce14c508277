"""Partitions: sums by group, and values by group back to leaves, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_smartclip.engine.partitions import Leaves, Units

RANDOM = np.random.default_rng(0)
ARRAYS = [
    RANDOM.normal(size=shape).astype(np.float32) for shape in [(3, 2), (4,), (), (0, 3), (2, 3, 4)]
]


@pytest.mark.parametrize("group", [(1, 0, 1, 2, 0), (1, 0, 1, 3, 0), (0, 0, 0, 0, 0)])
def test_whole_leaves_are_summed_by_group(group):
    partition = Leaves(group, 5)
    plain, squares = jax.jit(partition.group_sums)([(array, array**2) for array in ARRAYS])
    for totals, power in ((plain, 1), (squares, 2)):
        sums = [np.sum(np.float64(array) ** power) for array in ARRAYS]
        expected = np.bincount(group, sums, minlength=5)
        np.testing.assert_allclose(totals, expected, rtol=1e-5)


def test_units_are_summed_by_their_axes_and_single_ones_come_first():
    partition = Units(((0,), None, None, (1,), (0, 2)))
    plain, squares = jax.jit(partition.group_sums)([(array, array**2) for array in ARRAYS])
    for totals, power in ((plain, 1), (squares, 2)):
        powers = [np.float64(array) ** power for array in ARRAYS]
        expected = [
            [np.sum(powers[1]), powers[2]],
            np.sum(powers[0], axis=0, keepdims=True),
            np.sum(powers[3], axis=1, keepdims=True),
            np.sum(powers[4], axis=(0, 2), keepdims=True),
        ]
        assert len(totals) == len(expected)
        for actual, wanted in zip(totals, expected, strict=True):
            assert actual.shape == np.shape(wanted)
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", [[1, 1, 1], [1, 0.5, 1], [0.1, 0.2, 0.3], [np.nan, 0.5, np.inf]])
def test_each_leaf_gets_the_value_of_its_group(values):
    spread = jax.jit(Leaves((2, 0, 1, 2), 3).per_array)(jnp.float32(values))
    np.testing.assert_array_equal(spread, np.float32(values)[[2, 0, 1, 2]])


def test_each_array_gets_the_values_of_its_units():
    partition = Units((None, (0,), None))
    units = jnp.float32([[3.0, 4.0]])
    first, rows, last = jax.jit(partition.per_array)([jnp.float32([1.0, 2.0]), units])
    np.testing.assert_array_equal([first, last], [1.0, 2.0])
    np.testing.assert_array_equal(rows, units)
    np.testing.assert_array_equal(Units(((0,),)).per_array([units])[0], units)


def test_equal_partitions_have_equal_hashes_so_that_a_compiled_function_is_reused():
    assert len({Leaves((0, 1), 2), Leaves((0, 1), 2), Leaves((1, 0), 2)}) == 2
    assert len({Units(((0,), None)), Units(((0,), None)), Units((None, (0,)))}) == 2
