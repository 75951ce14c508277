"""AutoClip against the paper, the smartclip package, its float64 reference and the ten streams."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import streams
from smartclip.core.autoclip import AutoClip as ReferenceAutoClip

import optax_smartclip as smartclip

NORMS = np.random.default_rng(3).lognormal(sigma=0.4, size=1000)


FENCES = {False: reference.lower_fence_thresholds, True: reference.upper_fence_thresholds}


@pytest.fixture(scope="module")
def auto():
    return streams.from_transformation(smartclip.autoclip())


@pytest.fixture(scope="module")
def modes(auto):
    upper = smartclip.autoclip(outliers_only=True)
    return {False: auto, True: streams.from_transformation(upper)}


of_both_modes = pytest.mark.parametrize("outliers_only", FENCES)


@of_both_modes
@pytest.mark.parametrize("stream", streams.CHECKS)
def test_auto_mode_passes_every_stream(modes, outliers_only, stream):
    result = streams.CHECKS[stream](modes[outliers_only])
    assert result.passed, result.figures


def test_outliers_only_clips_only_outliers(modes):
    clipped = {mode: streams.CHECKS["S1"](clipper).figures for mode, clipper in modes.items()}
    assert clipped[True]["clip %"] < 3
    assert clipped[True]["mean scale"] > 0.997
    assert clipped[False]["clip %"] > 6


@of_both_modes
@pytest.mark.parametrize("norms", [NORMS, streams.heavy_tails()[:1000]], ids=["noise", "tails"])
def test_auto_mode_equals_the_float64_fence(modes, outliers_only, norms):
    norms = np.float32(norms)
    norms[[0, 100, 500, 501]] = [0.0, np.nan, np.inf, 0.0]
    clipped, thresholds = modes[outliers_only](norms)
    expected = FENCES[outliers_only](norms)
    np.testing.assert_allclose(thresholds, expected, rtol=1e-5)
    np.testing.assert_allclose(clipped, reference.clip(norms, expected), rtol=1e-5)


@pytest.mark.parametrize("value", [0, None, "yes", np.float32(1)])
def test_outliers_only_is_true_or_false(value):
    with pytest.raises(ValueError, match="`outliers_only` must be True or False, got"):
        smartclip.autoclip(outliers_only=value)


def test_outliers_only_is_refused_with_a_percentile():
    with pytest.raises(ValueError, match="`outliers_only` must be False with a percentile"):
        smartclip.autoclip(50.0, outliers_only=True)


@pytest.mark.parametrize("percentile", [0.0, 10.0, 33.3, 50.0, 90.0, 100.0])
def test_percentile_mode_with_a_window_as_long_as_the_run_is_that_of_the_paper(percentile):
    history = smartclip.ring_buffer(len(NORMS))
    clipper = streams.from_transformation(smartclip.autoclip(percentile, history=history))
    clipped, thresholds = clipper(NORMS)
    expected = reference.percentile_thresholds(np.float32(NORMS), percentile, len(NORMS))
    np.testing.assert_allclose(thresholds, expected, rtol=1e-5)
    np.testing.assert_allclose(clipped, reference.clip(NORMS, expected), rtol=1e-5)


@pytest.mark.parametrize("size", [10, 64])
def test_percentile_mode_equals_the_smartclip_package_over_a_window(size):
    theirs = ReferenceAutoClip(
        mode="percentile", percentile=80.0, history="window", window_size=size
    )
    expected = []
    for norm in NORMS:
        theirs.observe(float(norm))
        expected.append(theirs.threshold())
    ours = smartclip.autoclip(80.0, history=smartclip.ring_buffer(size))
    _, thresholds = streams.from_transformation(ours)(NORMS)
    np.testing.assert_allclose(thresholds, expected, rtol=1e-5)


def test_percentile_mode_keeps_1024_norms_by_default():
    norms = np.r_[np.full(100, 5.0), np.linspace(1, 2, 1100)]
    _, thresholds = streams.from_transformation(smartclip.autoclip(100.0))(norms)
    assert thresholds[1023] == 5.0
    assert thresholds[1122] == 5.0
    assert thresholds[1123] < 2.0


def test_percentile_mode_follows_a_geometric_quantile():
    history = smartclip.geometric_quantile(0.05)
    clipper = streams.from_transformation(smartclip.autoclip(90.0, history=history))
    _, thresholds = clipper(NORMS)
    expected = reference.geometric_estimates(np.float32(NORMS), 90.0, 0.05)
    np.testing.assert_allclose(thresholds, expected, rtol=1e-4)


def test_auto_mode_does_not_clip_the_first_gradient_of_a_thawed_layer(auto):
    clipped, _ = auto(np.r_[np.zeros(200), np.full(20, 7.0)])
    assert clipped[200] == 7.0


def test_auto_mode_learns_every_group_on_its_own():
    tx = smartclip.autoclip(scope="per_param", warmup_steps=4)
    params = {"large": jnp.zeros(1), "small": jnp.zeros(1)}

    @jax.jit
    def step(state, large, small):
        grads = {"large": large[None], "small": small[None]}
        return tx.update(grads, state)

    state = tx.init(params)
    for large, small in [(100.0, 1.0), (200.0, 2.0)] * 5 + [(250.0, 250.0)]:
        updates, state = step(state, np.float32(large), np.float32(small))
    assert updates["large"][0] == 250.0
    assert updates["small"][0] == pytest.approx(2.75)


@pytest.mark.parametrize("place", range(1, 12))
def test_auto_mode_clips_a_spike_from_the_second_step_on(auto, place):
    norms = streams.noise()
    _, undisturbed = auto(norms)
    norms[place] = 1e6
    clipped, thresholds = auto(norms)
    assert clipped[place] < 4
    # In the first four steps, two spikes are too many for the median.
    assert np.all(thresholds[max(place, 3) + 1 : 10] < 4)
    assert thresholds[110] == pytest.approx(undisturbed[110], rel=0.05)


@pytest.mark.parametrize("percentile", [-1.0, 100.1, float("nan"), True])
def test_percentile_out_of_range_is_an_error(percentile):
    with pytest.raises(ValueError, match=r"`percentile` must be in \[0, 100\].*got"):
        smartclip.autoclip(percentile)


def test_auto_mode_on_a_history_of_one_percentile_is_an_error():
    with pytest.raises(ValueError, match=r"answer 2 percentiles .* got geometric_quantile"):
        smartclip.autoclip(history=smartclip.geometric_quantile())


@pytest.mark.parametrize(("outliers_only", "asked"), [(False, 2), (True, 3)])
def test_auto_mode_needs_a_history_of_two_or_three_percentiles(outliers_only, asked):
    enough, fewer = (
        smartclip.ring_buffer(8)._replace(max_percentiles=most) for most in (asked, asked - 1)
    )
    assert callable(smartclip.autoclip(outliers_only=outliers_only, history=enough).init)
    with pytest.raises(ValueError, match=f"answer {asked} percentiles"):
        smartclip.autoclip(outliers_only=outliers_only, history=fewer)


@pytest.mark.parametrize("percentile", [None, 90.0])
def test_a_history_is_told_the_percentiles_that_it_has_to_answer(percentile):
    ring = smartclip.ring_buffer(8)
    told, asked = set(), set()

    def record(state, norms, percentiles):
        told.update(percentiles)
        return ring.record(state, norms, percentiles)

    def answer(state, percentile):
        asked.add(percentile)
        return ring.percentile(state, percentile)

    tx = smartclip.autoclip(percentile, history=ring._replace(record=record, percentile=answer))
    gradient = np.ones(2, np.float32)
    jax.eval_shape(tx.update, gradient, tx.init(gradient))
    assert told == asked != set()


@pytest.mark.parametrize(("outliers_only", "early_factor"), [(False, 1.5), (True, 3.0)])
def test_zeros_that_an_older_version_has_recorded_clip_nothing(outliers_only, early_factor):
    tx = smartclip.autoclip(outliers_only=outliers_only, warmup_steps=0)
    gradient = np.ones(1, np.float32)
    state = tx.init(gradient)
    history = smartclip.ring_buffer(state.rule.history.ring.shape[1])
    zeros = state.rule.history
    for _ in range(12):
        zeros = history.record(zeros, jnp.zeros(1), (25.0, 50.0, 75.0))
    rule = dataclasses.replace(state.rule, history=zeros, num_recorded=jnp.int32([12]))
    state = dataclasses.replace(state, rule=rule)
    updates, state = tx.update(gradient, state)
    np.testing.assert_array_equal(updates, gradient)
    for _ in range(13):
        _, state = tx.update(gradient, state)
    # The median is 1 now, and the zeros are still in the lower quartile: it counts as in a new run.
    assert smartclip.metrics(state)["clip_threshold"] == early_factor


@of_both_modes
def test_a_norm_whose_multiple_overflows_is_counted_like_any_other(outliers_only):
    tx = smartclip.autoclip(outliers_only=outliers_only)
    norms = np.full((4, 1), 2.5e38, np.float32)
    state, _ = jax.jit(
        lambda norms: jax.lax.scan(
            lambda state, norm: tx.update(norm, state)[::-1], tx.init(norms[0]), norms
        )
    )(norms)
    np.testing.assert_array_equal(state.rule.num_recorded, [4])
