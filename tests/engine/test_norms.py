"""Group norms against float64 NumPy, for every dtype, and where squares over- or underflow."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compat import enable_x64

from optax_smartclip.engine.dtypes import is_inexact, working_dtype
from optax_smartclip.engine.norms import (
    group_norms,
    has_gradient,
    learnable,
    norms_in_range,
    safe_hypot,
)
from optax_smartclip.engine.partitions import Leaves, Units

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module", params=["cpu", "default"])
def platform(request):
    """Runs on this CPU the code for CPUs, and the code for GPUs and TPUs."""

    def choose(*arguments, **choices):
        return choices[request.param](*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", choose)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


def norms_by_leaf(arrays, group=None, num_groups=1):
    """The norms of groups of whole arrays, compiled."""
    partition = Leaves((0,) * len(arrays) if group is None else tuple(group), num_groups)
    return jax.jit(lambda arrays: group_norms(arrays, partition))(arrays)


@jax.jit
def norm_of_one(array):
    return group_norms([array], Leaves((0,), 1))[0]


def normal(shape, dtype):
    values = RANDOM.normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1j * RANDOM.normal(size=shape)
    return jnp.asarray(values).astype(dtype)


@pytest.mark.parametrize(
    "dtype",
    [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64, jnp.float8_e4m3fn, jnp.float8_e5m2],
)
def test_groups_of_any_dtype_have_the_norms_of_float64_numpy(dtype):
    shapes = [(40, 30), (), (0, 3), (7,), (2, 1, 5)]
    arrays = [normal(shape, dtype) for shape in shapes]
    norms = norms_by_leaf(arrays, [0, 1, 1, 2, 0], 3)
    expected = [
        reference.norm([arrays[0], arrays[4]]),
        reference.norm([arrays[1], arrays[2]]),
        reference.norm(arrays[3]),
    ]
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_doubles_are_summed_in_double_and_rounded_to_single_precision(dtype):
    # One square is 1e8, and float32 would lose each of the others next to it.
    values = np.r_[1e4, np.ones(4096)]
    with enable_x64(True):
        (norm,) = norms_by_leaf([jnp.asarray(part).astype(dtype) for part in np.split(values, 17)])
    assert norm.dtype == jnp.float64
    assert float(norm) == np.float32(np.sqrt(1e8 + 4096))


@pytest.mark.parametrize("size", [1e39, 1e200, 1e-50, 1e-200])
def test_doubles_have_norms_that_no_single_precision_can_hold(size):
    with enable_x64(True):
        (norm,) = norms_by_leaf([jnp.asarray(size * np.ones(4)), jnp.ones(0, jnp.float32)])
        np.testing.assert_allclose(norm, 2 * size, rtol=1e-15)


def test_leaves_of_several_dtypes_share_a_norm():
    # These dtypes have no common one under strict promotion.
    dtypes = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64, jnp.float8_e4m3fn)
    arrays = [normal((5, 4), dtype) for dtype in dtypes]
    np.testing.assert_allclose(norms_by_leaf(arrays), [reference.norm(arrays)], rtol=1e-6)


def test_integers_and_keys_have_no_norm_but_floats_of_every_width_do():
    assert all(is_inexact(leaf) for leaf in (1.0, 1j, np.float16(1), jnp.zeros(2, jnp.bfloat16)))
    assert not any(
        is_inexact(leaf)
        for leaf in (1, True, jnp.zeros(2, int), jax.random.key(0), np.zeros((), jax.dtypes.float0))
    )


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (jnp.float8_e4m3fn, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (np.float64, np.float64),
        (jnp.complex64, jnp.complex64),
    ],
)
def test_values_are_computed_in_float32_at_least(dtype, expected):
    assert working_dtype(dtype) == expected


@pytest.mark.parametrize("size", [1e20, 1e30, 3e38, 1e-25, 1e-30, 1e-37])
def test_finite_gradients_have_finite_norms_though_their_squares_do_not(size):
    array = jnp.float32(size) * jnp.asarray([0.6, 0.0, -0.8], jnp.float32)
    np.testing.assert_allclose(norm_of_one(array), reference.norm(array), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_other_dtypes_with_the_range_of_float32_are_rescued_too(dtype, size):
    array = jnp.asarray([0.6 * size, -0.8 * size]).astype(dtype)
    np.testing.assert_allclose(norms_by_leaf([array])[0], reference.norm(array), rtol=1e-6)


def test_a_sum_can_overflow_where_no_square_does():
    array = jnp.full(400, 1.8e19, jnp.float32)
    assert np.isfinite(np.float32(1.8e19) ** 2)
    np.testing.assert_allclose(norm_of_one(array), 3.6e20, rtol=1e-6)


@pytest.mark.parametrize(("large", "number"), [(1.6e-19, 10_000), (3e-18, 100_000)])
def test_squares_that_are_lost_next_to_one_that_is_not_are_counted(platform, large, number):
    # The first square is above the smallest normal number, all others are below it.
    array = np.r_[large, np.full(number, 1e-19)].astype(np.float32)
    # Without the others, the norm would be 0.016 and 0.1 of this. With several accumulators, the
    # CPU rounds more than in a pairwise sum.
    rtol = 1e-6 if platform == "cpu" else 1e-3
    np.testing.assert_allclose(norm_of_one(array), reference.norm(array), rtol=rtol)


@pytest.mark.parametrize("sizes", [(1e30, 1.0, 1e-30), (1.0, 1e-30, 0.0), (np.inf, 1e25, np.nan)])
def test_only_some_of_the_groups_need_the_second_read(sizes):
    arrays = [jnp.full(4, size, jnp.float32) for size in sizes]
    np.testing.assert_allclose(
        norms_by_leaf(arrays, [0, 1, 2], 3), 2 * np.float32(sizes), rtol=1e-6
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_or_inf_anywhere_makes_the_norm_non_finite(bad):
    array = jnp.asarray([1e30, bad, 0.0, 1e-30], jnp.float32)
    assert not np.isfinite(norm_of_one(array))
    assert np.isnan(norm_of_one(array)) == np.isnan(bad)


def test_a_tree_without_groups_has_no_norms():
    assert norms_by_leaf([], [], 0).shape == (0,)
    assert group_norms([], Units(())) == []


@pytest.mark.parametrize("arrays", [[], [jnp.zeros((0, 3))], [jnp.zeros(3), jnp.zeros(())]])
def test_nothing_and_zeros_have_the_norm_zero(arrays):
    np.testing.assert_array_equal(norms_by_leaf(arrays), [0.0])


def test_a_group_without_members_has_the_norm_zero():
    arrays = [jnp.full(4, 2.0), jnp.full(4, 3.0)]
    np.testing.assert_array_equal(norms_by_leaf(arrays, [0, 2], 3), [4.0, 0.0, 6.0])


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 2), (0, 1, 2)])
def test_units_are_summed_over_their_axes_and_keep_their_dimensions(axes):
    array = normal((3, 4, 2), jnp.float32)
    (norms,) = jax.jit(lambda array: group_norms([array], Units((axes,))))(array)
    expected = np.sqrt(np.sum(np.float64(array) ** 2, axis=axes, keepdims=True))
    assert norms.shape == expected.shape
    np.testing.assert_allclose(norms, expected, rtol=1e-6)


def test_norms_in_range_are_right_within_it_and_safe_outside():
    rows = np.float32([[3e18, 4e18], [3.0, 4.0], [3e-9, 4e-9], [3e-30, 4e-30], [3e30, 0.0]])
    (norms,) = jax.jit(lambda rows: norms_in_range([rows], Units(((1,),))))(rows)
    np.testing.assert_allclose(norms[:3, 0], [5e18, 5.0, 5e-9], rtol=1e-6)
    assert 0 <= norms[3, 0] <= 5e-30
    assert norms[4, 0] == np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_or_inf_makes_the_norms_of_its_unit_not_finite(bad):
    rows = jnp.float32([[1.0, bad], [3.0, 4.0]])
    (norms,) = norms_in_range([rows], Units(((1,),)))
    assert not np.isfinite(norms[0, 0])
    np.testing.assert_allclose(norms[1, 0], 5.0)


@pytest.mark.parametrize("batch", [jax.vmap, lambda f: lambda rows: jax.lax.map(f, rows)])
def test_the_derivative_is_zero_at_zero_and_the_direction_elsewhere(batch):
    # vmap turns the condition between the two reads into a select, so neither may yield a NaN.
    rows = np.float32([[0.0, 0.0], [3.0, 4.0], [3e30, -4e30], [3e-30, -4e-30]])
    slopes = jax.jit(batch(jax.grad(norm_of_one)))(rows)
    expected = [[0.0, 0.0], [0.6, 0.8], [0.6, -0.8], [0.6, -0.8]]
    np.testing.assert_allclose(slopes, expected, rtol=1e-6)


@pytest.mark.parametrize("first", [np.nan, np.inf, 0.0, 1.0])
def test_the_derivative_of_a_norm_does_not_depend_on_the_other_norms(first):
    arrays = [jnp.float32([first, 0.0]), jnp.float32([3.0, 4.0]), jnp.float32([30.0, -40.0])]
    partition = Leaves((0, 1, 2), 3)
    for group, expected in ((1, [0.6, 0.8]), (2, [0.6, -0.8])):
        slopes = jax.jit(
            jax.grad(lambda arrays, group=group: group_norms(arrays, partition)[group])
        )(arrays)
        for number, slope in enumerate(slopes):
            np.testing.assert_allclose(slope, expected if number == group else [0, 0], rtol=1e-6)


def test_vmap_rescues_single_members_of_a_batch():
    batch = np.float32([[3.0, 4.0], [3e30, 4e30], [0.0, 0.0], [3e-30, 4e-30], [np.nan, 1.0]])
    norms = jax.jit(jax.vmap(norm_of_one))(batch)
    np.testing.assert_allclose(norms, [5.0, 5e30, 0.0, 5e-30, np.nan], rtol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e25, 1e-30])
def test_a_norm_is_summed_over_named_axes(size):
    parts = np.float32(size) * RANDOM.normal(size=(2, 3, 8)).astype(np.float32)

    def local(part):
        return group_norms([part], Leaves((0,), 1), axis_name=("rows", "columns"))[0]

    norms = jax.jit(jax.vmap(jax.vmap(local, axis_name="columns"), axis_name="rows"))(parts)
    np.testing.assert_allclose(norms, np.full((2, 3), reference.norm(parts)), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e15])
def test_in_the_ordinary_range_the_norm_is_the_plain_one(size):
    array = jnp.float32(size) * normal((1000,), jnp.float32)
    plain = jax.jit(lambda x: jnp.sqrt(jnp.sum(jnp.square(x))))(array)
    # The compiler may order the additions of the two programs differently.
    np.testing.assert_allclose(norm_of_one(array), plain, rtol=2e-6)


@pytest.mark.parametrize("pieces", [1, 2, 64])
def test_the_norm_does_not_depend_on_how_a_tree_is_split_into_leaves(pieces):
    values = np.random.default_rng(1).normal(size=4096).astype(np.float32)
    norm = jax.jit(lambda arrays: group_norms(arrays, Leaves((0,) * pieces, 1))[0])
    for size in (1.0, 1e30):
        scaled = np.float32(size) * values
        np.testing.assert_allclose(
            norm(np.split(scaled, pieces)), reference.norm(scaled), rtol=1e-6
        )


def test_a_group_has_the_same_bits_next_to_other_groups_and_in_another_program():
    arrays = [normal((17,), jnp.float32) for _ in range(9)]
    alone = norms_by_leaf(arrays)
    between = [item for array in arrays for item in (jnp.full(3, 1e3), array)]
    np.testing.assert_array_equal(norms_by_leaf(arrays), alone)
    np.testing.assert_array_equal(norms_by_leaf(between, [1, 0] * 9, 2)[0], alone[0])


def test_a_norm_in_float64_is_the_float32_that_a_history_would_hold():
    with enable_x64(True):
        norm = np.asarray(group_norms([jnp.asarray([0.1], jnp.float64)], Leaves((0,), 1)))
        (large,) = group_norms([jnp.full((2, 2), 1e200, jnp.float64)], Units(((0,),)))
    assert norm.dtype == jnp.float64
    assert norm[0] == np.float64(np.float32(0.1))
    np.testing.assert_allclose(large, np.full((1, 2), 2**0.5 * 1e200), rtol=1e-12)


def test_a_history_holds_norms_of_any_size_in_float32():
    smallest, largest = 2.0**-126, 2.0**126
    norms = [1e-300, smallest, 1e-20, 1.1, 1e30, largest, 1e38, 1e300]
    expected = [smallest, smallest, 1e-20, 1.1, 1e30, largest, largest, largest]
    with enable_x64(True):
        found = learnable(jnp.asarray(norms, jnp.float64))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.float32(expected))
    as_they_are = jnp.asarray([1e-38, 3e38], jnp.float32)
    np.testing.assert_array_equal(learnable(as_they_are), as_they_are)


def test_zero_nan_and_inf_are_no_norms_to_learn_from():
    found = has_gradient(jnp.asarray([0.0, 1e-30, 0.5, 1.0, 3e38, np.inf, np.nan]))
    assert found.tolist() == [False, True, True, True, True, False, False]


def test_one_program_serves_all_gradients():
    traces = []

    @jax.jit
    def norms(arrays):
        traces.append(1)
        return group_norms(arrays, Leaves((0, 1), 2))

    for size in (1.0, 1e30, 0.0, np.nan):
        norms([jnp.full(3, size, jnp.float32), jnp.full(2, 1.0, jnp.float32)])
    assert len(traces) == 1


@pytest.mark.parametrize("axis_name", ["batch", ["batch"], ("batch",)])
def test_mapped_axes_may_be_named_by_a_string_a_list_or_a_tuple(axis_name):
    arrays = jnp.asarray([[3.0], [4.0]], jnp.float32)

    def norm(array):
        return group_norms([array], Leaves((0,), 1), axis_name=axis_name)[0]

    np.testing.assert_allclose(jax.vmap(norm, axis_name="batch")(arrays), [5.0, 5.0], rtol=1e-6)


SIDES = st.floats(0, float(np.finfo(np.float32).max) / 2, width=32)


@hypothesis.given(SIDES, SIDES)
@hypothesis.example(0.0, 0.0)
@hypothesis.example(1e30, 1e30)
@hypothesis.example(1e-30, 1e-30)
def test_the_root_of_the_sum_of_squares_has_no_square_that_overflows_or_is_lost(x, y):
    exact = np.hypot(np.float64(x), np.float64(y))
    tiny = float(np.finfo(np.float32).tiny)
    found = jax.jit(safe_hypot)(jnp.float32([x]), jnp.float32([-y]))
    np.testing.assert_allclose(found, [exact], 1e-6, tiny)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0, 0, (0, 0)),
        (3, -4, (0.6, -0.8)),
        (5, 0, (1, 0)),
        (3e-30, -4e-30, (0.6, -0.8)),
        (3e-25, 4e30, (0, 1)),
        (3e38, 4e-38, (1, 0)),
    ],
)
def test_the_root_of_the_sum_of_squares_has_a_derivative_everywhere(x, y, expected):
    slopes = jax.grad(lambda x, y: safe_hypot(x, y)[0], (0, 1))(jnp.float32([x]), jnp.float32([y]))
    np.testing.assert_allclose(jnp.concatenate(slopes), expected, rtol=1e-6)
