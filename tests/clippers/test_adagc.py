"""AdaGC against the published equations in float64, the ten streams, and how slowly it rises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import streams
from breadth import each_value
from trees import assert_same_bits

import optax_smartclip as smartclip

TEN = [f"S{number}" for number in range(1, 11)]

# Gradients of norm 1 for the tensors of a tree.
DIRECTIONS = {
    "bias": np.float32([2, -1, 2]) / np.float32(3),
    "kernel": np.float32([[0.5, -0.5], [0.5, 0.5]]),
    "temperature": np.float32(1),
}
NUM_TENSORS = len(DIRECTIONS)


@functools.cache
def tree_clipper(**arguments):
    """A function from norms [steps, tensors] to clipped norms and thresholds."""
    tx = smartclip.adagc(**arguments)

    def step(state, norms):
        grads = {
            name: norm * direction
            for norm, (name, direction) in zip(norms, DIRECTIONS.items(), strict=True)
        }
        updates, state = tx.update(grads, state)
        clipped = [jnp.sum(updates[name] * direction) for name, direction in DIRECTIONS.items()]
        return state, (jnp.stack(clipped), jnp.atleast_1d(state.last.clip_threshold))

    @jax.jit
    def run(norms):
        return jax.lax.scan(step, tx.init(DIRECTIONS), norms)[1]

    def clip(norms):
        clipped, thresholds = map(np.asarray, run(jnp.asarray(norms, jnp.float32)))
        return clipped, reference.unreported(thresholds)

    return clip


def tree_stream():
    """Three tensors of unequal noise, size and drift, with spikes, jumps, NaN, Inf and zeros."""
    generator = np.random.default_rng(5)
    noise = np.exp(generator.normal(size=(4000, NUM_TENSORS)) * [0.1, 0.3, 0.6])
    norms = noise * np.geomspace([0.1, 0.5, 0.5], [0.3, 0.1, 0.8], 4000)
    norms[generator.integers(0, 4000, 60), generator.integers(0, NUM_TENSORS, 60)] *= 1000
    norms[1500:, 0] *= 2
    norms[2500:, 1] *= 0.2
    for places, value in (([0, 7, 80, 600], np.nan), ([20, 1000], np.inf), ([1, 90, 2000], 0.0)):
        norms[places, generator.integers(0, NUM_TENSORS, len(places))] = value
    norms[[30, 700]] = 0.0
    return np.float32(norms)


SETTINGS = [
    {},
    {"absolute_clip": None},
    {"absolute_clip": 0.05, "warmup_steps": 20},
    {"absolute_clip": 1e3, "relative_clip": 2.0, "decay": 0.9},
    {"relative_clip": 1.5, "decay": 0.0, "warmup_steps": 0},
    {"decay": 0.999, "warmup_steps": 1000},
    {"record_limit": 3.0},
    {"record_limit": 1.2, "relative_clip": 1.5, "absolute_clip": None},
    {"max_norm": 0.3},
]


# The rule is continuous, so a close decision that float32 takes differently does not matter.
@pytest.mark.parametrize(
    ("arguments", "scope"),
    [(arguments, "per_param") for arguments in SETTINGS]
    + [(arguments, "global") for arguments in SETTINGS[::3]],
    ids=str,
)
def test_equals_the_published_equations_in_float64(arguments, scope):
    norms = tree_stream()
    groups = norms if scope == "per_param" else np.linalg.norm(np.float64(norms), axis=1)[:, None]
    equations = {name: value for name, value in arguments.items() if name != "max_norm"}
    equations["warmup_steps"] = max(1, equations.get("warmup_steps", 100))
    expected = reference.adagc_thresholds(groups, **equations)
    expected = np.minimum(expected, arguments.get("max_norm", np.inf))
    clipped, thresholds = tree_clipper(scope=scope, **arguments)(norms)
    np.testing.assert_allclose(thresholds, expected, rtol=1e-4)
    with np.errstate(invalid="ignore"):
        scale = np.where(groups > 0, reference.clip(groups, expected) / groups, 1.0)
        kept = np.where(np.isfinite(groups), norms * scale, 0.0)
    np.testing.assert_allclose(clipped, kept, rtol=1e-4)


def test_warmup_cuts_the_whole_gradient_and_keeps_the_smallest_norms():
    norms = np.tile([[3.0, 4.0, 12.0]], (5, 1))
    norms[3] = [0.2, 0.1, 0.1]
    norms[4] = 100.0
    clipped, thresholds = tree_clipper(warmup_steps=4, absolute_clip=1.3)(norms)
    np.testing.assert_allclose(clipped[:3], np.tile([[0.3, 0.4, 1.2]], (3, 1)), rtol=1e-6)
    np.testing.assert_allclose(clipped[3], norms[3], rtol=1e-6)
    np.testing.assert_array_equal(thresholds[3], np.inf)
    np.testing.assert_allclose(thresholds[4], [1.04 * 0.2, 1.04 * 0.1, 1.04 * 0.1], rtol=1e-6)


def test_the_smallest_norm_of_warmup_may_be_the_first_one():
    _, thresholds = tree_clipper(warmup_steps=2, absolute_clip=None)(
        np.array([[1.0, 3.0, 1.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    )
    np.testing.assert_allclose(thresholds[2], [1.04, 1.04, 1.04], rtol=1e-6)


def test_a_zero_gradient_in_warmup_makes_no_nan():
    tx = smartclip.adagc()
    zeros = jax.tree.map(np.zeros_like, DIRECTIONS)
    with jax.debug_nans(True):
        updates, _ = tx.update(zeros, tx.init(zeros))
    assert_same_bits(updates, zeros)


@pytest.mark.parametrize("dropped", [np.nan, np.inf, 0.0])
def test_steps_of_nan_inf_or_zero_leave_no_trace(dropped):
    norms = np.nan_to_num(tree_stream(), nan=1.0, posinf=1.0)[:500]
    places = [0, 1, 99, 100, 101, 300]
    rest = np.insert(np.ones(500, bool), places, False)
    clipper = tree_clipper()
    for actual, expected in zip(
        clipper(np.insert(norms, places, dropped, axis=0)), clipper(norms), strict=True
    ):
        np.testing.assert_array_equal(actual[rest], expected)


FORMS = {
    "published": ({}, ["S1", "S2", "S7", "S8", "S9"]),
    "no_absolute_clip": ({"absolute_clip": None}, ["S1", "S2", "S4", "S7", "S8"]),
    "record_limit": ({"record_limit": 3.0}, ["S1", "S2", "S7", "S8", "S9"]),
}


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    arguments, failures = FORMS[request.param]
    return streams.from_transformation(smartclip.adagc(**arguments)), failures


@pytest.fixture(scope="module")
def published():
    return streams.from_transformation(smartclip.adagc(absolute_clip=None))


@pytest.fixture(scope="module")
def mended():
    return streams.from_transformation(smartclip.adagc(absolute_clip=None, record_limit=3.0))


@pytest.mark.parametrize("stream", TEN)
def test_passes_and_fails_the_streams_that_it_is_known_to(form, stream):
    clipper, failures = form
    result = streams.CHECKS[stream](clipper)
    assert result.passed == (stream not in failures), result.figures


@pytest.mark.parametrize(("spread", "percent"), [(0.05, 26), (0.1, 49), (0.2, 68), (0.3, 75)])
def test_cuts_many_ordinary_norms_and_not_only_rare_events(published, spread, percent):
    norms = np.exp(spread * np.random.default_rng(0).normal(size=6000))
    clipped, _ = published(norms)
    assert 100 * np.mean((clipped < norms * (1 - 1e-6))[1000:]) == pytest.approx(percent, abs=2)


def rise(factor, spread=0.0, steps=10_000):
    """Noise with a coefficient of variation of `spread` that jumps by a factor after 1000 norms."""
    norms = np.exp(spread * np.random.default_rng(0).normal(size=1000 + steps))
    norms[1000:] *= factor
    return norms


def steps_of_growth(factor):
    """The number of steps of growth by 1 + 0.04 * 0.01, the most that the published form allows."""
    return np.log(factor) / np.log(1.0004)


@pytest.mark.parametrize("factor", [10.0, 50.0])
def test_published_form_rises_by_at_most_a_25th_of_a_percent_a_step(published, factor):
    norms = rise(factor)
    clipped, thresholds = published(norms)
    growth = thresholds[1001:] / thresholds[1000:-1]
    assert growth.max() == pytest.approx(1.0004, rel=3e-7)
    # The threshold started 4 % higher: 5,660 steps for a factor of 10, 9,684 for one of 50.
    cut = np.flatnonzero(clipped < norms)
    np.testing.assert_array_equal(cut, 1000 + np.arange(len(cut)))
    assert len(cut) == pytest.approx(steps_of_growth(factor / 1.04), abs=3)
    # The threshold itself has grown tenfold after 5,758 steps.
    tenfold = np.searchsorted(thresholds[1000:], 10.4)
    assert tenfold == (10_000 if factor == 10.0 else pytest.approx(5758, abs=3))


def test_after_warmup_thresholds_grow_from_the_absolute_clip():
    norms = np.full(11_000, 50.0)
    for record_limit, expected in ((None, steps_of_growth(50 / 1.04)), (3.0, 426)):
        tx = smartclip.adagc(record_limit=record_limit)
        clipped, _ = streams.from_transformation(tx)(norms)
        assert np.count_nonzero(clipped[100:] < norms[100:]) == pytest.approx(expected, abs=3)


# The steps until the median scale of 50 norms is above 0.9.
@pytest.mark.parametrize(("spread", "steps"), [(0.05, 238), (0.1, 229), (0.2, 213)])
def test_record_limit_follows_a_tenfold_rise_in_some_250_steps(published, mended, spread, steps):
    norms = rise(10.0, spread)
    scale = mended(norms)[0] / norms
    medians = np.array([np.median(scale[t - 49 : t + 1]) for t in range(1000, 2000)])
    assert np.flatnonzero(medians <= 0.9)[-1] == pytest.approx(steps, abs=3)
    assert np.max(published(norms)[0][1000:4000] / norms[1000:4000]) < 0.9


def test_record_limit_follows_a_tenfold_rise_of_constant_norms(mended):
    norms = rise(10.0)
    clipped, _ = mended(norms)
    # The cap is three times the average, which grows by 2 % a step until ten is below the cap.
    steps = np.log(10 / 3) / np.log(1.02) + np.log((10 - 10 / 3) / (10 - 10 / 1.04)) / -np.log(0.99)
    assert np.count_nonzero(clipped < norms) == pytest.approx(steps, abs=3)
    np.testing.assert_array_equal(clipped[1400:], 10.0)


@pytest.mark.parametrize(
    ("scale", "absolute_clip"), each_value([1e-30, 1e30, 1e-6, 1e4], [None, 1.0])
)
def test_scale_of_the_norms_does_not_matter(scale, absolute_clip):
    norms = np.nan_to_num(tree_stream(), nan=1.0, posinf=1.0)
    clipped, thresholds = tree_clipper(absolute_clip=absolute_clip)(norms)
    # The only argument in the unit of the norms.
    scaled_clip = None if absolute_clip is None else scale * absolute_clip
    scaled = tree_clipper(absolute_clip=scaled_clip)(scale * norms)
    np.testing.assert_allclose(scaled[0], scale * clipped, rtol=1e-4)
    np.testing.assert_allclose(scaled[1], scale * thresholds, rtol=1e-4)


@pytest.mark.parametrize("constant", [1e-30, 0.1, 1 / 3, 7e29])
def test_constant_norms_are_never_clipped(published, mended, constant):
    norms = np.full(3000, np.float32(constant))
    for clipper in (published, mended):
        np.testing.assert_array_equal(clipper(norms)[0], norms)


@pytest.mark.parametrize("absolute_clip", [None, 0.01])
def test_derivatives_at_a_zero_gradient_are_finite(absolute_clip):
    tx = smartclip.adagc(absolute_clip=absolute_clip, warmup_steps=3)
    total = jax.jit(jax.grad(lambda *step: sum(jax.tree.leaves(tx.update(*step)[0]))))
    update = jax.jit(tx.update)
    zeros = {"a": np.float32(0), "b": np.float32(0)}
    for past in ([], [0.0] * 3, [1.0], [1.0] * 10):
        state = tx.init(zeros)
        for norm in past:
            _, state = update({**zeros, "a": np.float32(norm)}, state)
        derivatives = total(zeros, state)
        assert derivatives == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("relative_clip", 0.0, "positive"),
        ("decay", 1.0, "in [0, 1)"),
        ("decay", float("nan"), "in [0, 1)"),
        ("absolute_clip", -1.0, "positive, or None to cut nothing in warm-up"),
        ("record_limit", 0.0, "positive, or None to record clipped norms"),
        ("warmup_steps", -1, "a number of steps from 0 to 2147483647"),
        ("max_norm", 0.0, "positive, or None for no ceiling"),
    ],
)
def test_arguments_out_of_range_are_errors(name, value, allowed):
    with pytest.raises(ValueError, match="must be") as error:
        smartclip.adagc(**{name: value})
    assert str(error.value) == f"`{name}` must be {allowed}, got {value}."


def test_a_norm_of_1e38_in_warmup_does_not_set_the_thresholds_to_zero():
    tx = smartclip.adagc(warmup_steps=3)
    step = jax.jit(tx.update)
    state = tx.init({"b": np.float32(0), "w": np.float32(0)})
    for size in (1.0, 1e38, 1.0, 1.0):
        grads = {"b": np.float32(0.6 * size), "w": np.float32(0.8 * size)}
        updates, state = step(grads, state)
    assert updates["b"] == pytest.approx(0.6, rel=1e-6)
    assert updates["w"] == pytest.approx(0.8, rel=1e-6)
    np.testing.assert_allclose(state.last.clip_threshold, [1.04 * 0.6, 1.04 * 0.8], rtol=1e-6)


def test_a_gradient_of_exactly_the_absolute_clip_is_not_cut():
    _, thresholds = tree_clipper(scope="global", absolute_clip=2.0)(
        np.tile([[2.0, 0.0, 0.0]], (2, 1))
    )
    np.testing.assert_array_equal(thresholds, np.inf)
