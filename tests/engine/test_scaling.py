"""The scale and its product with a gradient: exact if nothing is clipped, and always finite."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compat import enable_x64

from optax_smartclip.engine import scaling
from optax_smartclip.engine.partitions import Leaves, Units
from optax_smartclip.engine.scaling import limit_threshold, signed_scale

DTYPES = [
    jnp.float16,
    jnp.bfloat16,
    jnp.float32,
    jnp.complex64,
    jnp.float8_e4m3fn,
    jnp.float8_e5m2,
]
scale_array = jax.jit(scaling.scale_array, static_argnums=2)


@partial(jax.jit, static_argnums=(1, 4))
def clip_arrays(arrays, partition, norms, limits, nonfinite):
    scales = jax.tree.map(scaling.signed_scale, norms, limits)
    return scaling.scale_arrays(arrays, partition, scales, nonfinite)


LARGEST = float(np.finfo(np.float32).max)

# norm, threshold, min(1, threshold / norm), and its slopes in norm and threshold
POINTS = [
    (0.5, 1.0, 1.0, 0.0, 0.0),
    (1.0, 1.0, 1.0, 0.0, 0.0),
    (0.0, 0.0, 1.0, 0.0, 0.0),
    (0.0, 1.0, 1.0, 0.0, 0.0),
    (0.0, np.inf, 1.0, 0.0, 0.0),
    (3.0, np.inf, 1.0, 0.0, 0.0),
    (LARGEST, LARGEST, 1.0, 0.0, 0.0),
    (4.0, 1.0, 0.25, -1 / 16, 0.25),
    (2.0, 0.0, 0.0, 0.0, 0.5),
    (1e-30, 0.0, 0.0, 0.0, 1e30),
    (1e25, 1e20, 1e-5, -1e-30, 1e-25),
    (1e-25, 1e-26, 0.1, -1e24, 1e25),
]


def test_the_scale_is_the_formula_and_exactly_one_within_the_threshold():
    norms, thresholds, expected, _, _ = np.float32(POINTS).T
    scales = np.asarray(jax.jit(signed_scale)(norms, thresholds))
    np.testing.assert_allclose(scales, expected, rtol=1e-6)
    assert np.array_equal(scales == 1.0, norms <= thresholds)


@pytest.mark.parametrize("limit", [0.0, 1.0, np.inf])
def test_the_scale_is_negative_where_the_norm_is_not_finite(limit):
    norms = jnp.array([np.nan, np.inf])
    assert np.all(jax.jit(signed_scale)(norms, jnp.full(2, limit)) < 0)


def test_the_scale_never_lets_rounding_touch_a_norm_at_its_threshold():
    norms = np.random.default_rng(0).lognormal(sigma=5, size=1000).astype(np.float32)
    scale = jax.jit(signed_scale)
    assert np.all(scale(norms, norms) == 1.0)
    assert np.all(scale(norms, np.nextafter(norms, np.float32(np.inf))) == 1.0)
    assert np.all(scale(norms, np.nextafter(norms, np.float32(0))) <= 1.0)


def test_the_slopes_of_the_scale_are_finite_at_every_corner():
    norms, thresholds, _, *expected = np.float32(POINTS).T
    slopes = jax.jit(jax.vmap(jax.grad(signed_scale, argnums=(0, 1))))(norms, thresholds)
    np.testing.assert_allclose(slopes, expected, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize(
    ("threshold", "observed", "warmup_steps", "max_norm", "expected"),
    [
        (2.0, 0, 0, None, 2.0),
        (2.0, 4, 5, None, LARGEST),
        (2.0, 5, 5, None, 2.0),
        (2.0, 5, 4, 1.0, 1.0),
        (0.5, 5, 4, 1.0, 0.5),
        (2.0, 0, 1, 1.0, 1.0),
        (2.0, 0, 1, np.inf, LARGEST),
        (np.inf, 5, 0, None, LARGEST),
        (np.inf, 5, 0, 3.0, 3.0),
        (np.nan, 5, 0, None, LARGEST),
        (np.nan, 5, 0, 3.0, 3.0),
        (-1.0, 5, 0, None, 0.0),
        (-np.inf, 5, 0, 3.0, 0.0),
        (-1.0, 5, 6, None, LARGEST),
        (0.0, 5, 0, 3.0, 0.0),
        (2.0, 2**31 - 1, 2**31 - 1, None, 2.0),
        (2.0, 999_999, 1_000_000, None, LARGEST),
        (2.0, 2, 2.5, None, LARGEST),
        (2.0, 3, 2.5, None, 2.0),
    ],
)
def test_warm_up_lifts_the_threshold_and_max_norm_always_holds(
    threshold, observed, warmup_steps, max_norm, expected
):
    thresholds = jnp.asarray([threshold, 7.0], jnp.float32)
    observed = jnp.asarray([observed, 0], jnp.int32)
    limits = limit_threshold(thresholds, observed, warmup_steps, max_norm)
    assert limits.dtype == jnp.float32
    assert float(limits[0]) == expected


@pytest.mark.parametrize("warmup_dtype", [jnp.int32, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("norm_dtype", [jnp.float32, jnp.bfloat16])
def test_warm_up_and_ceiling_may_be_traced_in_any_dtype(warmup_dtype, norm_dtype):
    limits = jax.jit(limit_threshold)(
        jnp.asarray([4.0, 4.0, 1.0], jnp.float32),
        jnp.asarray([2, 3, 3], jnp.int32),
        jnp.asarray(3, warmup_dtype),
        jnp.asarray(2.0, norm_dtype),
    )
    np.testing.assert_array_equal(limits, [2.0, 2.0, 1.0])
    assert limits.dtype == jnp.float32


def test_a_threshold_beyond_which_a_history_holds_no_norms_limits_nothing_in_float64():
    largest = 2.0**126
    with enable_x64(True):
        thresholds = jnp.asarray([1.0, largest / 2, largest, 2 * largest], jnp.float32)
        limits = limit_threshold(thresholds, jnp.ones(4, jnp.int32), 1, None, jnp.float64)
    assert limits.dtype == jnp.float64
    unlimited = np.finfo(np.float64).max
    np.testing.assert_array_equal(limits, [1.0, largest / 2, unlimited, unlimited])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
def test_arrays_keep_their_dtype_and_are_multiplied_exactly(dtype, nonfinite):
    values = jnp.asarray([1.0, -3.0, 0.0, -0.0, 12.0]).astype(dtype)
    scaled = scale_array(values, jnp.float32(0.25), nonfinite)
    assert scaled.dtype == dtype
    expected = np.asarray([0.25, -0.75, 0.0, -0.0, 3.0], np.complex128)
    np.testing.assert_array_equal(np.asarray(scaled).astype(np.complex128), expected)
    signs = np.signbit(np.asarray(scaled.real, np.float32))
    np.testing.assert_array_equal(signs, [False, True, False, True, False])


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_doubles_stay_doubles(dtype):
    with enable_x64(True):
        values = jnp.asarray([1.0, 1 / 3]).astype(dtype)
        scaled = scale_array(values, jnp.float32(0.5), "zero")
    assert scaled.dtype == dtype
    np.testing.assert_array_equal(scaled, [0.5, 1 / 6])


def test_the_product_is_rounded_once_from_float32():
    # In float16, the scale itself would lose 1 %.
    values = jnp.asarray([6e4], jnp.float16)
    scaled = scale_array(values, jnp.float32(1e-6), "zero")
    np.testing.assert_allclose(np.float64(scaled), np.float64(values) * 1e-6, rtol=5e-4)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not jnp.float8_e4m3fn])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_group_becomes_zeros_or_stays_as_it_was(dtype, bad):
    values = jnp.asarray([bad, 2.0, -0.0]).astype(dtype)
    zeros, same = (
        scale_array(values, jnp.float32(-1.0), nonfinite) for nonfinite in ("zero", "propagate")
    )
    assert zeros.dtype == same.dtype == dtype
    assert not np.any(np.asarray(zeros).astype(np.complex64))
    np.testing.assert_array_equal(same.astype(jnp.complex64), values.astype(jnp.complex64))


@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
def test_a_finite_group_with_a_threshold_of_zero_becomes_zeros(nonfinite):
    scaled = scale_array(jnp.asarray([3.0, -2.0]), jnp.float32(0.0), nonfinite)
    np.testing.assert_array_equal(scaled, [0.0, 0.0])


def test_a_finite_group_passes_bit_for_bit_at_scale_one():
    bits = np.random.default_rng(0).integers(0, 2**16, 4096).astype(np.uint16)
    values = bits.view(jnp.bfloat16)
    values = values[np.abs(values.astype(np.float32)) >= np.finfo(np.float32).tiny]
    scaled = scale_array(jnp.asarray(values), jnp.float32(1.0), "zero")
    np.testing.assert_array_equal(np.asarray(scaled).view(np.uint16), values.view(np.uint16))


def test_the_result_of_a_weak_type_is_strong():
    weak = jnp.asarray(2.0)
    assert weak.weak_type
    scaled = scale_array(weak, jnp.float32(0.5), "propagate")
    assert not scaled.weak_type
    assert scaled.dtype == jnp.float32


@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
def test_leaves_are_scaled_by_their_group_and_rows_by_their_own(nonfinite):
    arrays = [jnp.full((2, 2), 8.0), jnp.full(3, 8.0), jnp.full((2, 2), 8.0)]
    norms, limits = jnp.asarray([4.0, jnp.inf]), jnp.asarray([1.0, 1.0])
    clipped = clip_arrays(arrays, Leaves((0, 1, 0), 2), norms, limits, nonfinite)
    other = 0.0 if nonfinite == "zero" else 8.0
    for array, expected in zip(clipped, [2.0, other, 2.0], strict=True):
        np.testing.assert_array_equal(array, np.full(array.shape, expected))

    norms, limits = [jnp.asarray([[4.0], [jnp.nan]])], [jnp.asarray([[1.0], [1.0]])]
    (rows,) = clip_arrays(arrays[:1], Units(((1,),)), norms, limits, nonfinite)
    np.testing.assert_array_equal(rows, [[2.0, 2.0], [other, other]])


@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
def test_each_array_is_clipped_by_the_norm_and_the_limit_of_its_group(nonfinite):
    norms = np.array([0.5, 2.0, 1.0, np.inf, np.nan, 0.0], np.float32)
    limits = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0], np.float32)
    arrays = [jnp.full(3, place + 1.0) for place in range(6)]
    clipped = clip_arrays(
        arrays, Leaves(tuple(range(6)), 6), jnp.asarray(norms), jnp.asarray(limits), nonfinite
    )
    kept = 0.0 if nonfinite == "zero" else 1.0
    scales = [1.0, 0.5, 1.0, kept, kept, 1.0]
    expected = [np.full(3, scale * (place + 1)) for place, scale in enumerate(scales)]
    np.testing.assert_array_equal(clipped, expected)
