"""The log histogram against numpy.percentile over all norms so far."""

import functools
import inspect

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import streams
from breadth import long_but

import optax_smartclip as smartclip
from optax_smartclip.histories.log_histogram import make_levels

PERCENTILES = (0.0, 25.0, 33.3, 50.0, 99.9, 100.0)
LARGEST = float(np.finfo(np.float32).max)
LOWEST, HIGHEST = float(np.float32(1e-12)), float(np.float32(1e12))

# The rounding of the float32 interpolation between two levels.
ROUNDING = 1e-6

# Equal arguments give the same object, which is compiled once.
log_histogram = functools.cache(smartclip.log_histogram)


@functools.cache
def compiled(history, every):
    """A function of norms [blocks * every, groups]: last state, percentiles after each block."""

    def step(state, norms):
        return history.record(state, norms, PERCENTILES), None

    def block(state, norms):
        state, _ = jax.lax.scan(step, state, norms)
        return state, jnp.stack([history.percentile(state, p) for p in PERCENTILES])

    def run(norms):
        blocks = norms.reshape(-1, every, norms.shape[1])
        return jax.lax.scan(block, history.init(norms.shape[1]), blocks)

    return jax.jit(run)


def run(history, norms, every=1):
    state, percentiles = compiled(history, every)(jnp.asarray(norms, jnp.float32))
    return state, np.asarray(percentiles, np.float64)


@functools.cache
def percentile_of(history):
    return jax.jit(history.percentile)


def assert_bounds(actual, expected, relative_error):
    """Never below the expected value, and never above it by more than the error."""
    assert np.all(actual >= expected * (1 - ROUNDING))
    assert np.all(actual <= expected * (1 + relative_error) * (1 + ROUNDING))


def drifting_norms(steps):
    """Norms whose level wanders over 18 decades; one of 50 is zero."""
    generator = np.random.default_rng(0)
    level = 10 ** (9 * np.sin(np.linspace(-1.5, 12, steps)))
    norms = level * generator.lognormal(sigma=0.5, size=steps)
    norms[generator.random(steps) < 0.02] = 0.0
    return np.float32(norms)


@pytest.mark.parametrize("steps", long_but({10_000}, [10_000, 100_000]))
def test_autoclip_is_that_of_the_paper_over_the_whole_run(steps):
    norms = drifting_norms(steps)
    clipper = streams.from_transformation(smartclip.autoclip(10.0, history=log_histogram()))
    clipped, thresholds = clipper(norms)
    sampled = np.unique(np.r_[np.arange(20), np.geomspace(20, steps - 1, 300).astype(int)])
    sampled = sampled[norms[sampled] > 0]
    expected = np.array(
        [
            np.percentile(np.float64(past[past > 0]), 10)
            for past in (norms[: t + 1] for t in sampled)
        ]
    )
    assert_bounds(thresholds[sampled], expected, 0.01)
    assert_bounds(clipped[sampled], np.minimum(norms[sampled], expected), 0.01)


@pytest.mark.parametrize("relative_error", [0.001, 0.1])
def test_percentiles_are_those_of_numpy_or_slightly_larger(relative_error):
    norms = drifting_norms(10_000).reshape(5000, 2)
    _, percentiles = run(log_histogram(relative_error), norms, every=125)
    for block, actual in enumerate(percentiles, 1):
        expected = np.percentile(np.float64(norms[: 125 * block]), PERCENTILES, axis=0)
        assert_bounds(actual, expected, relative_error)


@hypothesis.given(
    st.lists(
        st.floats(LOWEST, HIGHEST, width=32)
        | st.sampled_from([0.0, LOWEST, 1e-6, 1.0, 1.0000001, HIGHEST]),
        min_size=12,
        max_size=12,
    )
)
@hypothesis.example([0.0] * 12)
@hypothesis.example([LOWEST] * 6 + [HIGHEST] * 6)
def test_percentiles_are_within_their_bounds_for_any_norms(norms):
    norms = np.float32(norms)[:, None]
    _, percentiles = run(log_histogram(0.1), norms)
    for count, actual in enumerate(percentiles, 1):
        expected = np.percentile(np.float64(norms[:count]), PERCENTILES, axis=0)
        assert_bounds(actual, expected, 0.1)


@pytest.mark.parametrize("relative_error", [1e-4, 1e-3, 0.01, 0.1, 0.5])
def test_neighboring_levels_differ_by_at_most_the_relative_error(relative_error):
    levels = make_levels(relative_error)
    assert levels.dtype == np.float32
    assert (levels[0], levels[1], levels[-2], levels[-1]) == (0.0, LOWEST, HIGHEST, LARGEST)
    ratios = levels[2:-1].astype(np.float64) / levels[1:-2].astype(np.float64)
    assert ratios.max() <= 1 + relative_error
    assert ratios.min() > 1
    # No level is wasted.
    assert ratios.mean() > 1 + 0.8 * relative_error


@pytest.mark.parametrize("percentile", [None, 33.3, 100.0])
def test_constant_norms_are_never_clipped(percentile):
    tx = smartclip.autoclip(percentile, history=log_histogram())
    result = streams.check_constants(streams.from_transformation(tx))
    assert result.passed, result.figures


def with_counts(history, relative_error, *norms_and_counts):
    """A state that has seen each norm that many times."""
    levels = make_levels(relative_error)
    counts = sum(np.where(levels >= norm, count, 0) for norm, count in norms_and_counts)
    return history.init(1).replace(num_at_most=jnp.asarray(counts[None], jnp.int32))


def test_counts_are_exact_up_to_two_billion():
    history = log_histogram(0.1)
    # The middle one of 2 ** 31 - 1 norms is the last small one, or the first large one.
    for small, expected in ((2**30, 1.0), (2**30 - 1, 100.0)):
        state = with_counts(history, 0.1, (1.0, small), (100.0, 2**31 - 1 - small))
        assert_bounds(np.asarray(percentile_of(history)(state, 50.0)), expected, 0.1)
    state = with_counts(history, 0.1, (1.0, 2**31 - 2), (100.0, 1))
    assert_bounds(np.asarray(percentile_of(history)(state, 100.0)), 100.0, 0.1)


def test_counts_stop_at_the_largest_integer():
    history = log_histogram(0.1)
    state = with_counts(history, 0.1, (1.0, 2**31 - 3))
    totals = []
    record = jax.jit(lambda state, norms: history.record(state, norms, ()))
    for norm in (0.5, 2.0, 0.5, 2.0, 1e30):
        state = record(state, np.full(1, norm, np.float32))
        totals.append(int(state.num_at_most[0, -1]))
    assert totals == [2**31 - 2] + 4 * [2**31 - 1]
    # The first norm is counted, and the later ones are not.
    num_at_most = np.asarray(state.num_at_most)
    assert np.max(num_at_most[0, :-1]) == 2**31 - 1
    assert np.any(num_at_most == 1)
    assert_bounds(np.asarray(percentile_of(history)(state, 0.0)), 0.5, 0.1)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [(1e-20, LOWEST), (1e-37, LOWEST), (2e12, LARGEST), (1e30, LARGEST), (LARGEST, LARGEST)],
)
def test_norms_outside_the_levels_are_counted_at_their_end(norm, expected):
    history = log_histogram(0.1)
    state, percentiles = run(history, np.full((12, 1), norm))
    np.testing.assert_array_equal(percentiles, expected)
    assert int(state.num_at_most[0, -1]) == 12
    # Norms within the levels are still found among them.
    _, percentiles = run(history, [[3.0]] * 11 + [[norm]])
    assert_bounds(percentiles[-1, PERCENTILES.index(50.0)], 3.0, 0.1)
    # Norms outside are counted at the end of the levels where they belong.
    assert percentiles[-1, PERCENTILES.index(100.0 if norm > 3 else 0.0)] == expected


@pytest.mark.parametrize("decay", [0.5, 0.98, 0.9999])
def test_decaying_counts_are_those_of_weighted_norms(decay):
    norms = np.float32(np.random.default_rng(3).lognormal(sigma=2.0, size=(3000, 1)))
    norms[[100, 2990], 0] = 0.0
    _, percentiles = run(log_histogram(0.05, decay=decay), norms, every=150)
    for block, actual in enumerate(percentiles, 1):
        for percentile, value in zip(PERCENTILES, actual, strict=True):
            # Counts in float32 are rounded, so the percentile may be slightly higher or lower.
            low, high = (
                reference.fading_percentile(
                    np.float64(norms[: 150 * block, 0]), np.clip(percentile + shift, 0, 100), decay
                )
                for shift in (-1e-3, 1e-3)
            )
            assert low * (1 - ROUNDING) <= value[0] <= high * 1.05 * (1 + ROUNDING)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_groups_are_separate_and_an_empty_one_clips_nothing(decay):
    history = log_histogram(0.1, decay=decay)
    empty = percentile_of(history)(history.init(3), 50.0)
    np.testing.assert_array_equal(empty, [LARGEST] * 3)
    _, percentiles = run(history, [[1.0, 1e6, 0.0], [2.0, 1e6, 0.0]] * 6)
    for group, norms in enumerate(([1.0, 2.0] * 6, [1e6] * 12, [0.0] * 12)):
        _, alone = run(history, np.asarray(norms)[:, None])
        np.testing.assert_array_equal(percentiles[:, :, group], alone[:, :, 0])


@pytest.mark.parametrize("decay", [None, 0.9])
def test_percentile_may_be_a_bfloat16_array(decay):
    history = log_histogram(0.1, decay=decay)
    state, _ = run(history, np.arange(1.0, 13.0)[:, None])
    for percentile in (0, 25, 75, 100):
        expected = percentile_of(history)(state, float(percentile))
        for dtype in (jnp.bfloat16, jnp.int32):
            actual = percentile_of(history)(state, jnp.asarray(percentile, dtype))
            np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_a_state_of_other_levels_is_refused():
    state = smartclip.log_histogram(0.1).init(1)
    theirs, ours = make_levels(0.1).size, make_levels(0.01).size
    with pytest.raises(ValueError, match="must have 'num_at_most'") as error:
        smartclip.log_histogram(0.01).record(state, jnp.ones(1, jnp.float32), ())
    assert str(error.value) == (
        f"The state must have 'num_at_most' of shape (1, {ours}) and dtype int32, as this history "
        f"is a log_histogram(0.01, decay=None), got (1, {theirs}) and int32, as from another run's "
        "checkpoint."
    )
    with pytest.raises(ValueError, match=r"dtype float32, .*, got .* and int32"):
        smartclip.log_histogram(0.1, decay=0.99).record(state, jnp.ones(1, jnp.float32), ())


def test_an_array_cannot_set_the_shape_of_the_state():
    # Users run the function without type checks.
    factory = inspect.unwrap(smartclip.log_histogram)
    with pytest.raises(ValueError, match="`relative_error` must be a Python number"):
        factory(jnp.float32(0.1))


SETS_SHAPE = "a Python number from 0.0001 to 0.5 (it sets the shape of the state)"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("relative_error", 9e-5, SETS_SHAPE),
        ("relative_error", 0.51, SETS_SHAPE),
        ("decay", 0.0, "in (0, 0.9999999], or None to forget nothing"),
        ("decay", 1 - 1e-9, "in (0, 0.9999999], or None to forget nothing"),
    ],
)
def test_arguments_out_of_range_are_errors(name, value, allowed):
    with pytest.raises(ValueError, match="must be") as error:
        smartclip.log_histogram(**{name: value})
    assert str(error.value) == f"`{name}` must be {allowed}, got {value}."
