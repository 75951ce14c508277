"""The comparison of clippers on spikes: its marks tell good from bad, its table is right.

Clippers here are NumPy or plain Optax, so that their behavior is known.
"""

import json

import compat
import damaged_text
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import spikes
import streams

import optax_smartclip as smartclip


def clipper(*, limit=2.0, later_limit=None, growth=1.0, per_layer=False):
    """Cuts to `limit`; after a spike, the ordinary to another, with a threshold `growth` times."""

    def run(norms):
        layers = np.reshape(norms, (len(norms), -1))
        whole = np.linalg.norm(layers, axis=1, keepdims=True)
        spikes_before = np.cumsum(whole > 100) - (whole[:, 0] > 100)
        seen = spikes_before[:, None] > 0
        limits = np.where(seen & (whole < 100), later_limit or limit, limit)
        scale = np.minimum(1.0, limits / (layers if per_layer else whole))
        thresholds = np.where(seen, growth * limit, limit)
        clipped = (layers * scale).reshape(norms.shape)
        return clipped, thresholds if np.ndim(norms) == 2 else thresholds[:, 0]

    return run


def failed(result):
    return [name for name, excess in result.excesses.items() if excess > 1]


@pytest.mark.parametrize("stream", ["S11", "S12"])
def test_a_clipper_that_cuts_to_twice_the_median_passes_the_new_streams(stream):
    result = streams.CHECKS[stream](clipper())
    assert result.passed
    out, threshold, extra, *_ = result.figures.values()
    # The whole gradient of S11 has a median of a little over 1.
    assert 1.8 < out <= 2.0
    assert (threshold, extra) == (1.0, 0.0)


@pytest.mark.parametrize("stream", ["S11", "S12"])
@pytest.mark.parametrize(
    ("arguments", "place"),
    [({"limit": 3.5}, 0), ({"growth": 1.2}, 1), ({"later_limit": 1.1}, 2)],
    ids=["lets spikes out", "threshold moved", "clips the ordinary"],
)
def test_each_mark_of_the_new_streams_fails_the_clipper_it_is_meant_for(stream, arguments, place):
    result = streams.CHECKS[stream](clipper(**arguments))
    assert failed(result) == [list(result.figures)[place]]
    assert not result.passed
    assert result.worst == list(result.figures)[place]


def given_by(check):
    """The streams of norms that a check runs a clipper on, and its result."""
    given = []

    def run(norms):
        given.append(norms.copy())
        return clipper()(norms)

    return given, check(run)


def test_one_layer_alone_spikes_and_the_others_are_as_they_were():
    (undisturbed, spiked), _ = given_by(streams.check_layer_spikes)
    assert spiked.shape == (streams.STEPS, streams.LAYERS)
    assert np.median(np.linalg.norm(undisturbed, axis=1)) == pytest.approx(1, abs=0.05)
    steps, layers = np.nonzero(spiked != undisturbed)
    np.testing.assert_array_equal(steps, np.arange(3000, 5000, 100))
    np.testing.assert_allclose(spiked[steps, layers], 1000 * undisturbed[steps, layers])
    assert len(set(layers)) > 4


def test_rest_kept_is_near_zero_for_the_whole_and_one_for_layers():
    whole = streams.check_layer_spikes(clipper())
    single = streams.check_layer_spikes(clipper(limit=1.0, per_layer=True))
    assert 0 < whole.figures["rest kept"] < 0.01
    assert single.figures["rest kept"] == 1.0
    assert single.passed


def test_the_worst_of_several_thresholds_counts():
    def run(norms):
        clipped, thresholds = clipper()(norms)
        thresholds = np.tile(thresholds, streams.LAYERS)
        thresholds[3000:, 5] *= 1.2
        return clipped, thresholds

    result = streams.check_layer_spikes(run)
    assert failed(result) == ["threshold after / before"]
    assert result.figures["threshold after / before"] == pytest.approx(1.2)


def test_the_spikes_at_one_percent_are_one_percent_and_spare_the_start():
    (undisturbed, spiked), _ = given_by(streams.check_frequent_spikes)
    steps = np.flatnonzero(spiked != undisturbed)
    assert np.all(spiked[steps] == 1000)
    assert steps.min() >= 200
    assert len(steps) == pytest.approx(0.01 * streams.STEPS, rel=0.3)


@pytest.mark.parametrize(("stream", "place"), [("S4", 10), ("S13", 1)])
def test_an_early_spike_is_at_its_place_and_has_a_mark_for_itself_and_for_the_threshold(
    stream, place
):
    check = streams.CHECKS[stream]
    (undisturbed, spiked), result = given_by(check)
    assert result.figures == {"out": 2.0, "threshold at 110": 1.0}
    np.testing.assert_array_equal(np.flatnonzero(spiked != undisturbed), [place])
    assert spiked[place] == 1000
    assert check(clipper(limit=5.0, growth=1.5)).passed
    assert failed(check(clipper(limit=5.1))) == ["out"]
    assert failed(check(clipper(growth=1.6))) == ["threshold at 110"]


def test_excess_is_the_distance_from_the_ideal_in_units_of_the_limits():
    assert streams.Mark(4, ideal=1).excess(2.5) == pytest.approx(0.5, abs=1e-5)
    assert streams.Mark(0.85, ideal=1).excess(0.7) == pytest.approx(2, abs=1e-5)
    assert streams.Mark(3, ideal=1).excess(0.2) == 0
    assert streams.Mark(0).excess(0) == 0
    assert streams.Mark(0).excess(1) == np.inf
    assert streams.Mark(3).excess(np.nan) == np.inf
    assert streams.Mark(3).excess(3.000001) <= 1 < streams.Mark(3).excess(3.001)


def test_a_transformation_is_given_the_layers_as_layers():
    norms = streams.layer_noise()[:50]
    norms[[20, 30], [3, 5]] *= 1000
    norms[40, 1] = np.nan
    by_layer = streams.from_transformation(
        smartclip.autoclip(50.0, scope="per_layer", nonfinite="propagate")
    )
    clipped, thresholds = by_layer(norms)
    assert clipped.shape == thresholds.shape == norms.shape
    for layer in (0, 3):
        past = np.float32(norms[:, layer])
        medians = np.array([np.median(past[: step + 1]) for step in range(50)])
        np.testing.assert_allclose(thresholds[:, layer], medians, rtol=1e-5)
        np.testing.assert_allclose(clipped[:, layer], np.minimum(past, medians), rtol=1e-5)
    np.testing.assert_array_equal(np.argwhere(np.isnan(clipped)), [[40, 1]])


def test_a_transformation_of_the_whole_keeps_the_direction_of_layers():
    norms = streams.layer_noise()[:50]
    norms[20, 3] *= 1000
    fixed = streams.from_transformation(optax.clip_by_global_norm(1.0), 1.0)
    clipped, thresholds = fixed(norms)
    whole = np.linalg.norm(norms, axis=1, keepdims=True)
    np.testing.assert_allclose(clipped, norms / np.maximum(whole, 1), rtol=1e-5)
    np.testing.assert_array_equal(thresholds, np.ones((50, 1)))
    # The same from a clipper that knows single norms only.
    lifted = streams.global_scope(lambda norms: (np.minimum(norms, 1), np.ones(len(norms))))
    np.testing.assert_allclose(lifted(norms)[0], clipped, rtol=1e-5)
    assert lifted(norms)[1].shape == (50, 1)
    np.testing.assert_array_equal(lifted(np.array([0.5, 2.0]))[0], [0.5, 1.0])


@pytest.fixture(scope="module")
def damaged():
    return damaged_text.load_task(2, 60)


def test_damaged_batches_are_the_undamaged_ones_but_for_the_garbage(damaged):
    clean = damaged_text.load_task(2, 60, damaged=False)
    assert not clean.kinds.any()
    np.testing.assert_array_equal(
        damaged.params["first"]["kernel"], clean.params["first"]["kernel"]
    )
    changed = (damaged.windows != clean.windows).any(axis=(2, 3))
    np.testing.assert_array_equal(changed, damaged.kinds == damaged_text.GARBAGE)
    for kinds in damaged.kinds:
        hit = np.flatnonzero(kinds)
        assert damaged_text.BURST <= len(hit) < 20
        # A burst: eight in a row somewhere.
        assert np.max(np.convolve(kinds > 0, np.ones(damaged_text.BURST))) == damaged_text.BURST


def test_features_that_are_not_normalized_give_large_gradients_and_ruin_training(damaged):
    clean = damaged_text.load_task(2, 60, damaged=False)
    ruined, spared = (damaged_text.train(compat.lenient, task, 1e-2) for task in (damaged, clean))
    median = np.median(spared.norms)
    assert spared.norms.max() < 20 * median
    assert ruined.norms[damaged.kinds == damaged_text.NOT_NORMALIZED].min() > 50 * median
    assert np.all(ruined.held_out > spared.held_out + 0.3)
    assert np.all(spared.held_out < 6)


@pytest.fixture(scope="module")
def training():
    """Training in which the loss of a clipper is how far, in factors of ten, it cuts from 0.3."""
    gradient = jnp.float32(1e4)

    def train(wrap, task, learning_rate):
        tx = wrap(optax.identity())
        out, _ = tx.update(gradient, tx.init(gradient), gradient)
        by_seed = np.linspace(0, 0.1, len(task.kinds))
        return damaged_text.Run(abs(np.log10(float(out) / 0.3)) + by_seed, np.empty(0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(damaged_text, "train", train)
        wraps = {
            spikes.OURS: spikes.before(optax.clip_by_global_norm(30.0)),
            spikes.NONE: spikes.CLIPPERS[spikes.NONE],
        }
        return spikes.run_training(wraps, seeds=4, steps=50)


@pytest.fixture(scope="module")
def results(training):
    """Everybody clips well but for no clipping and the fixed norm that is far too high."""
    clippers = dict.fromkeys(training.losses, clipper())
    clippers[spikes.NONE] = clippers["clip_by_global_norm(100 best)"] = clipper(limit=1e9)
    return {
        label: {name: streams.CHECKS[name](run) for name in ("S11", "S12")}
        for label, run in clippers.items()
    }


def test_the_best_fixed_norm_is_chosen_by_its_loss_and_the_bad_ones_are_multiples_of_it(training):
    assert training.best == 0.3
    means = {label: losses.mean() - 0.05 for label, losses in training.losses.items()}
    expected = {
        spikes.OURS: 2.0,
        spikes.NONE: np.log10(1e4 / 0.3),
        spikes.BEST: 0.0,
        "clip_by_global_norm(best / 10)": 1.0,
        "clip_by_global_norm(100 best)": 2.0,
    }
    assert means == pytest.approx(expected, abs=1e-5)


def test_differences_are_paired():
    losses = {"a": np.array([1.0, 2.0, 4.0]), "b": np.array([1.5, 2.6, 4.4])}
    training = spikes.Training(losses, {}, 1.0, np.zeros(3))
    mean, error = training.compare("b", "a")
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(0.1 / np.sqrt(3))


def test_the_loss_may_be_one_percent_behind_the_best_fixed_norm(training):
    best = training.losses[spikes.BEST].mean()
    assert spikes.excess_of_loss(training, spikes.BEST) == 0
    excess = spikes.excess_of_loss(training, spikes.OURS)
    assert excess == pytest.approx(2.0 / (0.01 * best), rel=1e-4)
    losses = {spikes.BEST: training.losses[spikes.BEST], "lost": np.full(4, np.nan)}
    assert spikes.excess_of_loss(training._replace(losses=losses), "lost") == np.inf


def test_the_table_has_a_row_for_each_clipper_and_the_failures_below(results, training):
    table = {line[:31].strip(): line[31:].split() for line in
             spikes.format_table(results, training).splitlines()[2:]}  # fmt: skip
    assert table.keys() == training.losses.keys()
    assert table[spikes.OURS][:3] == ["yes", "yes", "0.01"]
    assert table[spikes.NONE][:3] == ["-", "-", "1.00"]
    assert table[spikes.NONE][3:9] == ["4.573", "+-", "0.022", "+2.5229", "+-", "0.0000"]
    failures = spikes.format_failures(results).splitlines()
    assert len(failures) == 4
    assert failures[1].startswith(spikes.NONE)
    assert failures[1].endswith("S12  largest out 1e+03 (3)")


def test_all_figures_are_in_the_json(results, training):
    figures = json.loads(json.dumps(spikes.as_json("versions", results, training)))
    assert figures["streams"][spikes.NONE]["S12"]["figures"]["largest out"] == 1000
    assert figures["streams"][spikes.NONE]["S12"]["passed"] is False
    assert figures["training"]["best_norm"] == 0.3
    assert len(figures["training"]["losses"][spikes.OURS]) == 4
    gap = figures["training"]["less_best_fixed"][spikes.OURS]
    assert gap["mean"] == pytest.approx(2.0, abs=1e-5)


def test_a_cell_has_a_tick_or_the_worst_figure(results):
    assert spikes.short(results[spikes.OURS]["S12"]) == "✓"
    assert spikes.short(results[spikes.NONE]["S12"]) == "out 1000"
    large = streams.Result({"out": 54321.0}, streams.SPIKE_MARKS | {"out": streams.Mark(3)})
    marks = {"out": streams.Mark(3)}
    assert spikes.short(large._replace(marks=marks)) == "out 5e4"
    assert spikes.short(streams.Result({"scale": 0.5}, {"scale": streams.Mark(0.85, 1)})) == "x0.5"


def test_every_stream_has_a_title_and_every_clipper_wraps_an_optimizer():
    assert spikes.STREAMS.keys() == streams.CHECKS.keys()
    assert not spikes.CLIPPERS.keys() & spikes.FIXED.keys()
    gradient = {"layer": jnp.ones((2, 2))}
    for wrap in spikes.CLIPPERS.values():
        tx = wrap(optax.identity())
        jax.eval_shape(tx.update, gradient, tx.init(gradient), gradient)


def test_streams_run_with_no_clipping_and_with_the_fixed_norms():
    wraps = {spikes.NONE: spikes.CLIPPERS[spikes.NONE]}
    results = spikes.run_streams(wraps, names=["S12"])
    out = {label: row["S12"].figures["largest out"] for label, row in results.items()}
    expected = {
        spikes.NONE: 1000.0,
        spikes.BEST: 3.0,
        "clip_by_global_norm(best / 10)": 0.3,
        "clip_by_global_norm(100 best)": 300.0,
    }
    assert out == pytest.approx(expected, rel=1e-5)
    assert list(results) == [*spikes.FIXED, spikes.NONE]
