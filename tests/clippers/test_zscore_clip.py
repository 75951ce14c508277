"""Z-score clipping against its float64 reference, the ten streams and its own limits."""

import numpy as np
import pytest
import reference
import streams

import optax_smartclip as smartclip

NORMS = np.random.default_rng(4).lognormal(sigma=0.3, size=3000)


@pytest.fixture(scope="module")
def default():
    return streams.from_transformation(smartclip.zscore_clip())


@pytest.mark.parametrize("stream", [name for name in streams.CHECKS if name != "S8"])
def test_passes_all_streams_but_heavy_tails(default, stream):
    result = streams.CHECKS[stream](default)
    assert result.passed, result.figures


@pytest.mark.parametrize(("zmax", "decay"), [(3.0, 0.99), (0.5, 0.9), (6.0, 0.999), (2.0, 0.0)])
def test_equals_the_float64_reference(zmax, decay):
    norms = np.float32(NORMS)
    norms[[50, 51, 700, 900]] = [0.0, np.nan, 1e10, np.inf]
    clipper = streams.from_transformation(smartclip.zscore_clip(zmax, decay=decay))
    clipped, thresholds = clipper(norms)
    expected = reference.zscore_thresholds(norms, zmax, decay)
    np.testing.assert_allclose(thresholds, expected, rtol=1e-4)
    np.testing.assert_allclose(clipped, reference.clip(norms, expected), rtol=1e-4)


def test_first_spike_after_warmup_does_not_raise_its_own_threshold(default):
    norms = np.r_[NORMS[:20], 1e6]
    _, thresholds = default(norms)
    assert thresholds[20] < 3


@pytest.mark.parametrize("zmax", [0.0, 0.5, 1.0, 3.0, 10.0])
def test_a_lasting_rise_is_followed_with_any_zmax(zmax):
    norms = np.r_[NORMS[:1000], 100 * NORMS[1000:2000]]
    _, thresholds = streams.from_transformation(smartclip.zscore_clip(zmax))(norms)
    assert np.median(thresholds[-200:]) > 50


def test_a_rise_after_constant_norms_is_followed(default):
    clipped, _ = default(np.r_[np.ones(2000), np.full(1000, 10.0)])
    assert clipped[-1] == 10.0


def test_zeros_leave_the_threshold_where_it_is(default):
    _, thresholds = default(np.r_[NORMS[:500], np.zeros(2000), 1.0])
    assert thresholds[-1] == thresholds[501]


def test_nothing_can_be_compared_with_zeros(default):
    clipped, thresholds = default(np.r_[np.zeros(20), 7.0, 7.0])
    np.testing.assert_array_equal(thresholds[:21], np.inf)
    np.testing.assert_array_equal(clipped[20:], 7.0)


@pytest.mark.parametrize("scale", [1e-34, 1e-30, 1e30, 1e37])
def test_moments_neither_overflow_nor_underflow(scale):
    _, small = streams.from_transformation(smartclip.zscore_clip())(NORMS[:500])
    _, scaled = streams.from_transformation(smartclip.zscore_clip())(scale * NORMS[:500])
    np.testing.assert_allclose(scaled[10:], scale * small[10:], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"zmax": -1.0}, r"`zmax` must be >= 0, got -1.0"),
        ({"zmax": float("nan")}, r"`zmax` must be >= 0, got nan"),
        ({"decay": 1.0}, r"`decay` must be in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, r"`decay` must be in \[0, 1\), got -0.1"),
    ],
)
def test_numbers_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        smartclip.zscore_clip(**arguments)
