"""ZClip against the published equations in float64, the ten streams, and how it locks up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import streams
from breadth import each_value

import optax_smartclip as smartclip

TEN = [f"S{number}" for number in range(1, 11)]


@functools.cache
def zclip(**arguments):
    """Without a ceiling unless one is given: it would hide the learned threshold."""
    return streams.from_transformation(smartclip.zclip(**{"max_norm": None} | arguments))


FORMS = {
    "published": ({}, ["S4", "S7"]),
    "ceiling": ({"max_norm": 1.0}, ["S1", "S7", "S8", "S9"]),
    "mean": ({"clip_to": "mean"}, ["S4", "S7", "S8"]),
    "max": ({"clip_to": "max"}, ["S4", "S5"]),
    "record_limit": ({"record_limit": 3.0}, ["S4", "S5"]),
}


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    arguments, failures = FORMS[request.param]
    return zclip(**arguments), failures


@pytest.fixture(scope="module")
def published():
    return zclip()


@pytest.fixture(scope="module")
def mended():
    return zclip(record_limit=3.0)


@pytest.mark.parametrize("stream", TEN)
def test_passes_and_fails_the_streams_that_it_is_known_to(form, stream):
    clipper, failures = form
    result = streams.CHECKS[stream](clipper)
    assert result.passed == (stream not in failures), result.figures


def long_stream():
    """Noise, spikes, slow drift, a jump by half, a fall to a tenth, NaN, Inf, zeros."""
    generator = np.random.default_rng(7)
    norms = np.exp(0.3 * generator.normal(size=6000)) * np.geomspace(1, 5, 6000)
    norms[generator.integers(0, 6000, 60)] *= 100
    norms[2000:4000] *= 1.5
    norms[4000:] *= 0.1
    norms[[3, 4, 5, 700, 900, 2500]] = [np.nan, 0.0, np.inf, np.nan, np.inf, 0.0]
    return np.float32(norms)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"zmax": 0.5, "decay": 0.9},
        {"zmax": 4.0, "decay": 0.999, "warmup_steps": 200},
        {"zmax": 0.0, "decay": 0.0, "warmup_steps": 1},
        {"clip_factor": 0.5, "warmup_steps": 2},
        {"clip_to": "mean"},
        {"clip_to": "max", "decay": 0.99},
        {"record_limit": 3.0},
        {"record_limit": 1.0, "zmax": 3.0, "clip_factor": 0.8},
        {"record_limit": 5.0, "clip_to": "mean", "warmup_steps": 0},
        {"max_norm": 1.5, "clip_to": "max"},
    ],
    ids=str,
)
def test_equals_the_published_equations_in_float64(arguments):
    norms = long_stream()
    clipped, thresholds = zclip(**arguments)(norms)
    equations = {name: value for name, value in arguments.items() if name != "max_norm"}
    equations["warmup_steps"] = max(1, equations.get("warmup_steps", 25))
    expected, edges = reference.zclip_thresholds(norms, **equations)
    expected = np.minimum(expected, arguments.get("max_norm", np.inf))
    np.testing.assert_allclose(thresholds, expected, rtol=1e-4)
    np.testing.assert_allclose(clipped, reference.clip(norms, expected), rtol=1e-4)
    # With this seed, no norm is so close to the edge of outliers that float32 could decide
    # differently. The recorded norm would then jump.
    finite, known = np.isfinite(norms), np.isfinite(expected)
    distance = np.abs(norms[finite] / edges[finite] - 1).min()
    assert distance > np.abs(thresholds[known] / expected[known] - 1).max()


def test_warmup_averages_the_raw_norms_and_only_the_ceiling_holds():
    norms = np.r_[np.arange(1.0, 25.0), 100.0, 1.0]
    clipped, thresholds = zclip(max_norm=30.0)(norms)
    np.testing.assert_allclose(clipped[:25], np.minimum(norms[:25], 30.0), rtol=1e-6)
    assert thresholds[24] == 30.0
    _, thresholds = zclip()(norms)
    expected = norms[:25].mean() + 2.5 * norms[:25].std()
    assert thresholds[25] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("dropped", "places"),
    each_value([np.nan, np.inf, 0.0], [[0, 1, 10], [24, 24, 25], [25, 26, 500]]),
    ids=str,
)
def test_nan_inf_and_zero_leave_no_trace(mended, dropped, places):
    norms = streams.noise()[:1000]
    disturbed = np.insert(norms, places, dropped)
    rest = np.insert(np.ones(1000, bool), places, False)
    for actual, expected in zip(mended(disturbed), mended(norms), strict=True):
        np.testing.assert_array_equal(actual[rest], expected)


def rise(factor, spread, steps=3000):
    """Noise with a coefficient of variation of `spread` that jumps by a factor after 1000 norms."""
    norms = np.exp(spread * np.random.default_rng(1).normal(size=1000 + steps))
    norms[1000:] *= factor
    return norms


@pytest.mark.parametrize(("factor", "spread"), [(10.0, 0.2), (2.0, 0.1), (10.0, 0.0)])
def test_published_form_cuts_every_norm_after_an_abrupt_rise(published, factor, spread):
    norms = rise(factor, spread)
    clipped, thresholds = published(norms)
    assert np.all(clipped[1000:] < 0.9 * norms[1000:])
    assert thresholds[-1] < 2


# The last step in which a norm at the new level is cut to less than 0.9 of its size.
@pytest.mark.parametrize(("spread", "steps"), [(0.0, 60), (0.05, 60), (0.1, 65), (0.2, 65)])
@pytest.mark.parametrize("clip_to", ["reciprocal", "mean", "max"])
def test_record_limit_follows_a_tenfold_rise(spread, steps, clip_to):
    norms = rise(10.0, spread)
    clipped, thresholds = zclip(record_limit=3.0, clip_to=clip_to)(norms)
    scale = clipped / norms
    medians = np.array([np.median(scale[t - 24 : t + 25]) for t in range(1000 + steps, 3900)])
    assert np.median(scale[1000:1010]) < 0.5
    assert medians.min() > 0.9
    assert np.median(thresholds[-200:]) > 9.9


def test_clipping_to_max_recovers_if_norms_vary_and_not_if_they_were_constant():
    clipper = zclip(clip_to="max")
    clipped, _ = clipper(rise(10.0, 0.2))
    assert np.mean(clipped[1100:] / rise(10.0, 0.2)[1100:]) > 0.98
    clipped, _ = clipper(rise(10.0, 0.0))
    np.testing.assert_array_equal(clipped[1000:], 1.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4, 1e30])
def test_scale_of_the_norms_does_not_matter(published, scale):
    norms = streams.noise()[:2000]
    norms[[500, 700]] = 100.0
    clipped, thresholds = published(norms)
    scaled_clipped, scaled_thresholds = published(scale * norms)
    np.testing.assert_allclose(scaled_clipped, scale * clipped, rtol=1e-4)
    np.testing.assert_allclose(scaled_thresholds[25:], scale * thresholds[25:], rtol=1e-4)


@pytest.mark.parametrize("constant", [1e-30, 0.1, 1 / 3, 7e29])
def test_constant_norms_are_never_clipped(published, mended, constant):
    norms = np.full(3000, np.float32(constant))
    for clipper in (published, mended):
        clipped, _ = clipper(norms)
        np.testing.assert_array_equal(clipped, norms)


@pytest.mark.parametrize("clip_to", ["reciprocal", "mean", "max"])
def test_derivatives_at_a_zero_gradient_are_finite(clip_to):
    tx = smartclip.zclip(clip_to=clip_to)
    update = jax.jit(tx.update)
    derivative = jax.jit(jax.grad(lambda *step: jnp.sum(tx.update(*step)[0])))
    for past in ([], [0.0] * 3, [0.7] * 40, [0.1, 0.2] * 20):
        zeros = np.zeros(2, np.float32)
        state = tx.init(zeros)
        for norm in past:
            _, state = update(np.full(2, norm, np.float32), state)
        np.testing.assert_array_equal(derivative(zeros, state), 1.0)


@functools.cache
def scalar_zclip():
    """A clipper of one number: `init`, compiled `update` and its compiled derivative."""
    tx = smartclip.zclip(max_norm=None)
    return tx.init, jax.jit(tx.update), jax.jit(jax.grad(lambda *step: tx.update(*step)[0]))


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_the_derivative_of_the_reciprocal_is_right_at_any_scale(size):
    init, update, derivative = scalar_zclip()
    state = init(np.float32(0))
    for norm in [1.0, 2.0] * 20:
        _, state = update(np.float32(size * norm), state)
    mean, std = 1.5, 0.5
    # The derivative of mean + (zmax std) ** 2 / (norm - mean); the moments are almost these.
    expected = -((2.5 * std) ** 2) / (5 - mean) ** 2
    assert derivative(np.float32(5 * size), state) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"zmax": -1.0}, "`zmax` must be >= 0, got -1.0."),
        ({"zmax": float("nan")}, "`zmax` must be >= 0, got nan."),
        ({"decay": 1.0}, "`decay` must be in [0, 1), got 1.0."),
        (
            {"clip_to": "median"},
            "`clip_to` must be one of 'reciprocal', 'mean', 'max', got 'median'.",
        ),
        ({"clip_factor": 0.0}, "`clip_factor` must be in (0, 1], got 0.0."),
        ({"clip_factor": 1.1}, "`clip_factor` must be in (0, 1], got 1.1."),
        (
            {"record_limit": 0.0},
            "`record_limit` must be positive, or None to record clipped norms, got 0.0.",
        ),
        (
            {"warmup_steps": -1},
            "`warmup_steps` must be a number of steps from 0 to 2147483647, got -1.",
        ),
        ({"max_norm": 0.0}, "`max_norm` must be positive, or None for no ceiling, got 0.0."),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match="must be") as error:
        smartclip.zclip(**arguments)
    assert str(error.value) == message
