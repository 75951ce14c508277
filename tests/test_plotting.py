"""The artists on the axes show the metrics that were passed."""

import functools
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import optax_smartclip as smartclip
from optax_smartclip import plotting

STEPS = 60
PARAMS = {"body": jnp.zeros(2), "head": jnp.zeros(2)}
NAN, INF, LARGEST = float("nan"), float("inf"), float(np.finfo(np.float32).max)

SIZES = np.random.default_rng(0).lognormal(sigma=0.1, size=STEPS)
SIZES[[20, 40]] = 100.0
SIZES[[25, 45]] = NAN, INF
SIZES[30] = 0.0


def new_axes():
    """Axes without a backend."""
    return Figure(figsize=(8, 3.5)).subplots()


def collect_seeds(tx, sizes):
    """The metrics of a clipper, stacked over steps, for each seed.

    Sizes are [seeds, steps], or [seeds, steps, leaves].
    """

    def step(state, sizes):
        grads = {"body": jnp.array([sizes[0], 0]), "head": jnp.array([0, sizes[1]])}
        _, state = tx.update(grads, state, PARAMS)
        return state, smartclip.metrics(state)

    run = jax.jit(lambda sizes: jax.lax.scan(step, tx.init(PARAMS), sizes)[1])
    sizes = np.float32(sizes).reshape(*np.shape(sizes)[:2], -1)
    sizes = np.broadcast_to(sizes, (*sizes.shape[:2], 2))
    with jax.numpy_dtype_promotion("standard"):
        return [jax.device_get(run(of_seed)) for of_seed in sizes]


def collect(tx, sizes):
    """The metrics of one seed. Sizes are [steps], or [steps, leaves]."""
    return collect_seeds(tx, np.asarray(sizes)[None])[0]


def unstack(stacked):
    return [
        {name: values[step] for name, values in stacked.items()}
        for step in range(len(stacked["num_steps"]))
    ]


@pytest.fixture(scope="module")
def plain():
    return collect(smartclip.zscore_clip(warmup_steps=5), SIZES)


@pytest.fixture(scope="module")
def with_skips():
    return collect(smartclip.skip_spikes(smartclip.zscore_clip(1.0, warmup_steps=5)), SIZES)


@pytest.fixture(scope="module")
def grouped():
    sizes = np.stack([SIZES, np.roll(SIZES, 7)], axis=1)
    return collect(smartclip.zscore_clip(scope="per_param", warmup_steps=5), sizes)


def drawn(ax):
    """The points of each line and of each kind of mark, by label, [points, 2]."""
    found = {}
    for line in ax.get_lines():
        name = line.get_label().partition(":")[0]
        assert name not in found
        found[name] = line.get_xydata()
    return found


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def only_drawable(values):
    """On a logarithmic axis."""
    values = np.float64(values)
    return np.where((values > 0) & (values < LARGEST), values, NAN)


def test_norm_and_threshold_are_those_of_the_metrics_with_gaps_at_missing_numbers(plain):
    lines = drawn(plotting.plot_norms(plain, ax=new_axes()))
    steps = np.arange(1, STEPS + 1)
    for name, field in (("norm", "grad_norm"), ("threshold", "clip_threshold")):
        np.testing.assert_array_equal(lines[name][:, 0], steps)
        np.testing.assert_array_equal(lines[name][:, 1], only_drawable(plain[field]))
    assert np.flatnonzero(np.isnan(lines["norm"][:, 1])).tolist() == [25, 30, 45]
    # Warm-up.
    assert np.flatnonzero(np.isnan(lines["threshold"][:, 1])).tolist() == [0, 1, 2, 3, 4]


def test_marks_stand_at_the_clipped_the_nonfinite_and_the_zero_steps(plain):
    ax = plotting.plot_norms(plain, ax=new_axes())
    marks = drawn(ax)
    clipped = np.flatnonzero(plain["clipped"])
    assert {20, 40} <= set(clipped)
    np.testing.assert_array_equal(marks["clipped"][:, 0], clipped + 1)
    np.testing.assert_array_equal(marks["clipped"][:, 1], plain["grad_norm"][clipped])
    # Marks at the edges have their height in axes coordinates.
    np.testing.assert_allclose(marks["_not finite"], [[26, 0.97], [46, 0.97]])
    np.testing.assert_allclose(marks["_zero"], [[31, 0.03]])
    heights = {line.get_label(): line.get_transform() for line in ax.get_lines()}
    assert heights["_zero"] == ax.get_xaxis_transform()
    low, high = ax.get_ylim()
    assert 0 < low < np.nanmin(only_drawable(plain["grad_norm"]))
    assert 100 < high < 1000
    rate = 100 * len(clipped) / STEPS
    assert legend(ax) == [
        "norm",
        "threshold",
        f"clipped: {len(clipped)} ({rate:.3g} %)",
        "not finite: 2 (3.33 %)",
        "zero: 1 (1.67 %)",
    ]


def test_the_kinds_of_marks_differ_in_shape_and_in_color(with_skips):
    lines = plotting.plot_norms(with_skips, ax=new_axes()).get_lines()
    marks = [line for line in lines if line.get_linestyle() == "None" and ":" in line.get_label()]
    assert len(marks) == 4
    assert len({line.get_marker() for line in marks}) == 4
    assert all(line.get_linestyle() == "None" or line.get_marker() == "None" for line in lines)


def test_a_list_of_steps_is_drawn_as_stacked_metrics(with_skips, grouped):
    for stacked, options in ((with_skips, {}), (grouped, {"group": 1})):
        as_list = [{"loss": "ignored", **step} for step in unstack(stacked)]
        first = plotting.plot_norms(stacked, **options, ax=new_axes())
        second = plotting.plot_norms(as_list, **options, ax=new_axes())
        assert legend(first) == legend(second)
        jax.tree.map(np.testing.assert_array_equal, drawn(first), drawn(second))
    first, second = (
        plotting.plot_groups(logs, ax=new_axes()).collections[0].get_array()
        for logs in (grouped, unstack(grouped))
    )
    np.testing.assert_array_equal(first.filled(-1), second.filled(-1))


def test_a_dropped_step_is_drawn_with_its_own_norm_and_not_with_the_clippers_old_record(with_skips):
    lines = drawn(plotting.plot_norms(with_skips, ax=new_axes()))
    dropped = [20, 25, 40, 45]
    assert np.flatnonzero(with_skips["skipped"]).tolist() == dropped
    np.testing.assert_allclose(lines["norm"][:, 1], only_drawable(SIZES * 2**0.5), rtol=1e-6)
    np.testing.assert_array_equal(lines["skipped"][:, 0], [21, 41])
    np.testing.assert_array_equal(lines["_skipped"][:, 0], [26, 46])
    threshold = only_drawable(with_skips["skip_norm_threshold"])
    np.testing.assert_array_equal(lines["skip threshold"][:, 1], threshold)
    # The clipper's own counts agree.
    assert len(lines["clipped"]) == with_skips["num_clipped"][-1]
    assert not {21, 41} & set(lines["clipped"][:, 0])


def test_without_a_clipper_the_record_of_skip_spikes_is_drawn(with_skips):
    logs = {name: values for name, values in with_skips.items() if "skip" in name}
    ax = plotting.plot_norms(logs, ax=new_axes())
    assert [text.partition(":")[0] for text in legend(ax)] == [
        "norm",
        "skip threshold",
        "skipped",
        "not finite",
        "zero",
    ]
    assert len(drawn(ax)["norm"]) == STEPS
    with pytest.raises(ValueError, match="`metrics` must have steps of a clipper"):
        plotting.plot_groups(logs, ax=new_axes())


def test_micro_steps_are_left_out():
    tx = optax.MultiSteps(smartclip.zscore_clip(), every_k_schedule=3)
    logs = collect(tx.gradient_transformation(), np.arange(1.0, 13.0))
    lines = drawn(plotting.plot_norms(logs, ax=new_axes()))
    # The steps are the means of 1 to 3, 4 to 6 and so on.
    expected = np.stack([[3, 6, 9, 12], 2**0.5 * np.array([2, 5, 8, 11])], axis=1)
    np.testing.assert_allclose(lines["norm"], expected, rtol=1e-6)


def test_each_of_several_clippers_is_drawn_by_its_place(plain):
    first = {**plain, "grad_norm": plain["grad_norm"] / 2}
    logs = {f"0/{name}": values for name, values in first.items()}
    logs |= {f"inner/1/{name}": values for name, values in plain.items()}
    for place in ("0", "inner/1"):
        lines = drawn(plotting.plot_norms(logs, clipper=place, ax=new_axes()))
        norms = only_drawable(logs[f"{place}/grad_norm"])
        np.testing.assert_array_equal(lines["norm"][:, 1], norms)
    for clipper in (None, "2"):
        message = f"`clipper` must be one of '0', 'inner/1', got {clipper!r}"
        with pytest.raises(ValueError, match=message):
            plotting.plot_norms(logs, clipper=clipper, ax=new_axes())
    # A single clipper needs no place, whatever prefix its names have.
    one = {f"train/{name}": values for name, values in plain.items()}
    assert len(drawn(plotting.plot_norms(one, ax=new_axes()))["norm"]) == STEPS


def test_one_of_several_groups_is_drawn_by_its_number(grouped):
    for group in range(2):
        lines = drawn(plotting.plot_norms(grouped, group=group, ax=new_axes()))
        norms = only_drawable(grouped["grad_norm"][:, group])
        np.testing.assert_array_equal(lines["norm"][:, 1], norms)
        assert len(lines["clipped"]) == grouped["num_clipped"][-1, group]
    for group in (None, 2, -1):
        with pytest.raises(ValueError, match=f"`group` must be an int from 0 to 1, got {group!r}"):
            plotting.plot_norms(grouped, group=group, ax=new_axes())


def test_one_group_has_a_gap_in_a_step_that_its_clipper_did_not_see(grouped, with_skips):
    skips = {name: values for name, values in with_skips.items() if "skip" in name}
    seen = np.arange(1, STEPS + 1) - skips["num_skipped"]
    logs = {**grouped, **skips, "num_steps": np.stack([seen, seen], axis=1)}
    lines = drawn(plotting.plot_norms(logs, group=0, ax=new_axes()))
    assert np.flatnonzero(np.isnan(lines["norm"][:, 1])).tolist() == [20, 25, 30, 40, 45]
    assert not {"skip threshold", "not finite"} & set(lines)
    np.testing.assert_array_equal(lines["_skipped"][:, 0], [21, 26, 41, 46])
    # The heat map has no column for them.
    values = plotting.plot_groups(logs, ax=new_axes()).collections[0].get_array()
    assert values.shape == (2, STEPS - 4)


def test_a_long_run_is_drawn_at_once_and_keeps_every_spike():
    steps = 1_000_000
    rng = np.random.default_rng(1)
    norms = rng.lognormal(sigma=0.2, size=steps)
    spikes = np.sort(rng.choice(steps, 50, replace=False))
    norms[spikes] = rng.uniform(50, 100, size=50)
    logs = {
        "grad_norm": norms,
        "clip_threshold": np.full(steps, 10.0),
        "clip_scale": np.minimum(1, 10 / norms),
        "num_steps": np.arange(1, steps + 1),
    }
    ax = new_axes()
    start = time.process_time()
    plotting.plot_norms(logs, ax=ax)
    ax.figure.canvas.draw()
    assert time.process_time() - start < 10
    lines = drawn(ax)
    assert len(lines["norm"]) <= 4000
    assert set(spikes + 1) <= set(lines["norm"][:, 0])
    np.testing.assert_array_equal(lines["clipped"], np.stack([spikes + 1, norms[spikes]], axis=1))
    # The lower edge of the band is the minimum of each bin of 500.
    least = norms.reshape(2000, 500).min(axis=1)
    assert set(least) <= set(lines["norm"][:, 1])

    # With every step clipped, the marks are the maximum of each 400th part.
    crowded = drawn(plotting.plot_norms({**logs, "clip_threshold": np.zeros(steps)}, ax=new_axes()))
    highest = norms.reshape(400, -1).max(axis=1)
    np.testing.assert_array_equal(crowded["clipped"][:, 1], highest)


def test_steps_may_be_numbered(plain, grouped):
    numbers = np.arange(10, 10 * STEPS + 1, 10)
    lines = drawn(plotting.plot_norms(plain, steps=numbers, ax=new_axes()))
    np.testing.assert_array_equal(lines["norm"][:, 0], numbers)
    mesh = plotting.plot_groups(grouped, steps=numbers, ax=new_axes()).collections[0]
    edges = mesh.get_coordinates()[0, :, 0]
    np.testing.assert_array_equal(edges, np.arange(5, 10 * STEPS + 6, 10))
    for bad in (numbers[1:], numbers[::-1], np.zeros(STEPS), [[1]]):
        with pytest.raises(ValueError, match=f"`steps` must be {STEPS} increasing numbers, got"):
            plotting.plot_norms(plain, steps=bad, ax=new_axes())


def test_the_heat_map_has_the_clip_scale_of_each_group_and_crosses_at_nonfinite_norms(
    grouped,
):
    labels = smartclip.group_labels("per_param", PARAMS)
    ax = plotting.plot_groups(grouped, labels=labels, ax=new_axes())
    values = ax.collections[0].get_array()
    nonfinite = grouped["grad_norm"].T == LARGEST
    np.testing.assert_array_equal(values.mask, nonfinite)
    np.testing.assert_array_equal(values[~nonfinite], grouped["clip_scale"].T[~nonfinite])
    assert values.min() < 0.1 < values.max() == 1
    groups, steps = np.nonzero(nonfinite)
    np.testing.assert_array_equal(
        ax.get_lines()[0].get_xydata(), np.stack([steps + 1, groups], axis=1)
    )
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["body", "head"]
    assert ax.get_ylim() == (1.5, -0.5)  # the first group on top
    assert ax.figure.axes[1].get_ylabel() == "clip scale"


def test_a_column_of_a_long_heat_map_is_the_minimum_of_its_steps():
    steps, groups = 10_000, 60
    scale = np.random.default_rng(2).uniform(0.5, 1, size=(steps, groups))
    norms = np.ones((steps, groups))
    norms[777, 3] = NAN
    logs = {
        "grad_norm": norms,
        "clip_threshold": norms,
        "clip_scale": scale,
        "num_steps": np.broadcast_to(np.arange(1, steps + 1)[:, None], (steps, groups)),
    }
    ax = plotting.plot_groups(logs, ax=new_axes())
    values = ax.collections[0].get_array()
    expected = scale.reshape(500, 20, groups).min(axis=1).T
    assert np.argwhere(values.mask).tolist() == [[3, 777 // 20]]
    np.testing.assert_array_equal(values[~values.mask], expected[~values.mask])
    assert len(ax.get_yticks()) <= 40


SEEDS = 7


@pytest.fixture(scope="module")
def seeded():
    """Metrics [seeds, steps]; one seed drops its step 10."""
    sizes = SIZES * np.random.default_rng(3).lognormal(sigma=0.2, size=(SEEDS, STEPS))
    sizes[2, 10] = 1e4
    tx = smartclip.skip_spikes(smartclip.zscore_clip(1.0, warmup_steps=5))
    return stack_seeds(collect_seeds(tx, sizes))


@pytest.fixture(scope="module")
def seeded_groups():
    """Metrics [seeds, steps, groups]."""
    sizes = np.random.default_rng(4).lognormal(sigma=0.3, size=(SEEDS, STEPS, 2))
    sizes[:, 20, 0] *= 100
    sizes[:, 25, 1], sizes[3, 30, 0], sizes[3, 32, 0] = NAN, NAN, 50.0
    tx = smartclip.zscore_clip(scope="per_param", warmup_steps=5)
    return stack_seeds(collect_seeds(tx, sizes))


def stack_seeds(logs):
    return {name: np.stack([of_seed[name] for of_seed in logs]) for name in logs[0]}


def steps_before_seeds(logs):
    return {name: np.swapaxes(values, 0, 1) for name, values in logs.items()}


def percentiles_by_hand(values, percentiles):
    """Percentiles of [seeds, steps] over the seeds that can be drawn; NaN if there are none."""
    columns = [column[np.isfinite(column)] for column in only_drawable(values).T]
    nothing = np.full(len(percentiles), NAN)
    return np.stack([np.percentile(c, percentiles) if len(c) else nothing for c in columns], axis=1)


def bands(ax):
    """The lower and upper edges at each step, by label."""
    found = {}
    for band in ax.collections:
        x, y = np.concatenate([path.vertices for path in band.get_paths()]).T
        steps = np.arange(1, STEPS + 1)
        edges = [(y[x == step].min(), y[x == step].max()) if step in x else (NAN, NAN)
                 for step in steps]  # fmt: skip
        found[band.get_label()] = np.transpose(edges)
    return found


def test_several_seeds_are_drawn_as_their_median_in_a_band(seeded):
    ax = plotting.plot_norms(seeded, seed_axis=0, ax=new_axes())
    lines, areas = drawn(ax), bands(ax)
    # A dropped step has its own norm, and the threshold of the step before.
    norms = np.where(seeded["skipped"] > 0, seeded["skip_norm"], seeded["grad_norm"])
    values = {
        "norm": norms,
        "threshold": seeded["clip_threshold"],
        "skip threshold": seeded["skip_norm_threshold"],
    }
    for name, of_seeds in values.items():
        low, median, high = percentiles_by_hand(of_seeds, [10, 50, 90])
        np.testing.assert_allclose(lines[name][:, 1], median)
        inside = np.isfinite(low)
        for edge, expected in zip(areas[f"_{name}"], (low, high), strict=True):
            np.testing.assert_allclose(edge[inside], expected[inside])
    title = ax.get_legend().get_title().get_text()
    assert title.split() == f"{SEEDS} seeds: median, 10th to 90th percentile".split()


def test_marks_are_those_of_each_seed_and_the_legend_counts_all(seeded):
    ax = plotting.plot_norms(seeded, seed_axis=0, ax=new_axes())
    lines = drawn(ax)
    assert [11, seeded["skip_norm"][2, 10]] in lines["skipped"].tolist()
    total = SEEDS * STEPS
    counts = {
        "clipped": seeded["num_clipped"][:, -1].sum(),
        "skipped": seeded["num_skipped"][:, -1].sum(),
    }
    for name, count in counts.items():
        assert count > SEEDS
        assert f"{name}: {count} ({100 * count / total:.3g} %)" in legend(ax)
        inside, at_edge = lines[name], lines[f"_{name}"]
        assert len(inside) + len(at_edge) == count


@pytest.mark.parametrize("draw", [plotting.plot_norms, plotting.plot_groups])
def test_seeds_may_be_counted_by_either_axis_and_steps_be_a_list(draw, seeded, seeded_groups):
    logs = seeded if draw is plotting.plot_norms else seeded_groups
    swapped = steps_before_seeds(logs)
    first, *others = (
        draw(logs, seed_axis=axis, ax=new_axes())
        for logs, axis in ((logs, 0), (swapped, 1), (unstack(swapped), 1))
    )
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, drawn(first), drawn(other))
        for mine, its in zip(first.collections, other.collections, strict=True):
            np.testing.assert_array_equal(mine.get_array(), its.get_array())


def test_one_group_of_several_seeds_is_drawn_by_its_number(seeded_groups):
    for group in range(2):
        lines = drawn(plotting.plot_norms(seeded_groups, seed_axis=0, group=group, ax=new_axes()))
        (median,) = percentiles_by_hand(seeded_groups["grad_norm"][..., group], [50])
        np.testing.assert_allclose(lines["norm"][:, 1], median)


def test_the_heat_map_of_several_seeds_has_their_median(seeded_groups):
    ax = plotting.plot_groups(seeded_groups, seed_axis=0, ax=new_axes())
    values = ax.collections[0].get_array()
    finite = np.isfinite(seeded_groups["grad_norm"])
    scales = np.where(finite, seeded_groups["clip_scale"], NAN)
    # Gray if no seed has a norm, a cross if one seed has none.
    assert np.argwhere(values.mask).tolist() == [[1, 25]]
    assert drawn(ax)["_child1"].tolist() == [[31, 0], [26, 1]]
    for group, row in enumerate(values):
        (median,) = percentiles_by_hand(scales[..., group], [50])
        np.testing.assert_allclose(row.filled(NAN), median)
    # All seeds were clipped in step 21, one of them in step 33.
    assert values[0, 20] < 0.1
    assert values[0, 32] > seeded_groups["clip_scale"][3, 32, 0]
    assert ax.figure.axes[1].get_ylabel() == f"clip scale, median of {SEEDS} seeds"


@pytest.mark.parametrize("draw", [plotting.plot_norms, plotting.plot_groups])
def test_a_missing_or_wrong_axis_of_seeds_is_an_error(draw, seeded, seeded_groups, grouped):
    without_skips = {name: values for name, values in seeded.items() if "skip" not in name}
    skips_alone = {name: values for name, values in seeded.items() if "skip" in name}
    alike = {name: np.tile(values[:1], (SEEDS, 1)) for name, values in seeded.items()}
    for logs, axis in (
        (seeded, None),
        (without_skips, None),
        (skips_alone, None),
        (alike, None),
        (steps_before_seeds(seeded), None),
        (seeded, 1),
        (seeded_groups, 1),
        (seeded_groups, None),
        (steps_before_seeds(seeded), 0),
        (steps_before_seeds(seeded_groups), 0),
        (grouped, 0),
    ):
        with pytest.raises(ValueError, match=r"seed_axis=0 with the shape \[seeds, steps\]"):
            draw(logs, seed_axis=axis, ax=new_axes())
    with pytest.raises(ValueError, match="`seed_axis` must be None, 0 or 1, got 2"):
        draw(seeded_groups, seed_axis=2, ax=new_axes())


def share_logs(steps=STEPS, groups=5):
    """Shares with most of the last group, except in one step of a spike in the second group."""
    squares = np.random.default_rng(5).lognormal(sigma=0.3, size=(steps, groups))
    squares[:, -1] *= 9
    squares[steps // 2, 1] *= 1000
    return {"norm_share": squares / squares.sum(axis=1, keepdims=True), "loss": np.ones(steps)}


def areas(ax):
    """The height of each area in each column, by label, and the edges of the columns."""
    found = {}
    for area in ax.collections:
        x, y = area.get_paths()[0].vertices.T
        edges = np.unique(x)
        is_level, left = np.diff(x) != 0, np.minimum(x[:-1], x[1:])
        levels = [y[:-1][is_level & (left == edge)] for edge in edges[:-1]]
        assert {len(level) for level in levels} == {2}  # the lower and the upper one
        found[area.get_label()] = np.ptp(levels, axis=1)
    return found, edges


def test_the_shares_of_the_groups_that_ever_held_the_most_are_stacked_on_each_other():
    logs = share_logs()
    shares = logs["norm_share"]
    ax = plotting.plot_shares(logs, labels="abcde", top=2, ax=new_axes())
    found, edges = areas(ax)
    assert list(found) == ["e", "b", "other: 3"]
    np.testing.assert_array_equal(edges, np.arange(0.5, STEPS + 1))
    for label, expected in (("e", shares[:, 4]), ("b", shares[:, 1])):
        np.testing.assert_allclose(found[label], expected, atol=1e-6)
    np.testing.assert_allclose(found["other: 3"], shares[:, [0, 2, 3]].sum(axis=1), atol=1e-6)
    assert legend(ax) == ["other: 3", "b", "e"]
    assert ax.get_ylim() == (0, 1)
    colors = [tuple(area.get_facecolor()[0]) for area in ax.collections]
    assert len(set(colors)) == 3


def test_few_groups_all_have_a_color_and_their_numbers_as_names():
    logs = share_logs(groups=3)
    as_list = [{"norm_share": row} for row in logs["norm_share"]]
    numbers = np.arange(10, 10 * STEPS + 1, 10)
    found, edges = areas(plotting.plot_shares(as_list, steps=numbers, ax=new_axes()))
    assert sorted(found) == ["0", "1", "2"]
    np.testing.assert_array_equal(edges, np.arange(5, 10 * STEPS + 6, 10))
    np.testing.assert_allclose(found["0"], logs["norm_share"][:, 0], atol=1e-6)


def test_shares_of_several_seeds_are_their_mean():
    runs = [share_logs()["norm_share"], np.roll(share_logs()["norm_share"], 3, axis=0)]
    mean = (runs[0] + runs[1]) / 2
    for axis in (0, 1):
        logs = {"0/norm_share": np.stack(runs, axis=axis)}
        ax = plotting.plot_shares(logs, seed_axis=axis, ax=new_axes())
        np.testing.assert_allclose(areas(ax)[0]["4"], mean[:, 4], atol=1e-6)


def test_a_column_of_a_long_run_of_shares_is_its_most_unusual_step():
    logs = share_logs(steps=10_000)
    found, _ = areas(plotting.plot_shares(logs, top=1, labels="abcde", ax=new_axes()))
    assert list(found) == ["b", "other: 4"]
    assert len(found["b"]) == 500
    np.testing.assert_allclose(found["b"][250], logs["norm_share"][5000, 1], atol=1e-6)
    assert np.max(np.delete(found["b"], 250)) < 0.5 < found["b"][250]


def test_shares_of_another_form_are_refused(plain):
    logs = share_logs()
    draw = functools.partial(plotting.plot_shares, ax=new_axes())
    for bad in (plain, {"norm_share": np.ones((2, 3, 4))}, [], {"norm_share": 1.0}):
        with pytest.raises(ValueError, match="`metrics` must be a dictionary of arrays with"):
            draw(bad)
    two = {f"{place}/norm_share": logs["norm_share"] for place in range(2)}
    with pytest.raises(ValueError, match=r"of one observe_norms, got those of \['0', '1'\]"):
        draw(two)
    for top in (0, 8):
        with pytest.raises(ValueError, match=f"`top` must be an int from 1 to 7, got {top}"):
            draw(logs, top=top)
    with pytest.raises(ValueError, match="`labels` must have 5 entries, one a group, got"):
        draw(logs, labels=["a"])
    with pytest.raises(ValueError, match=f"`steps` must be {STEPS} increasing numbers"):
        draw(logs, steps=[1])


def test_draws_on_the_given_axes_and_changes_no_setting(plain, grouped):
    before = dict(mpl.rcParams)
    backend = mpl.get_backend()
    plt.switch_backend("Agg")
    try:
        for draw, logs in (
            (plotting.plot_norms, plain),
            (plotting.plot_groups, grouped),
            (plotting.plot_shares, share_logs()),
        ):
            mine = new_axes()
            assert draw(logs, ax=mine) is mine
            assert plt.get_fignums() == []
            new = draw(logs)
            assert [new.figure.number] == plt.get_fignums()
            np.testing.assert_array_equal(new.figure.get_size_inches() * 100, [800, 350])
            new.set_xlim(0.5, 4.5)
            assert np.all(new.get_xticks() % 1 == 0)
            plt.close(new.figure)
    finally:
        plt.switch_backend(backend)
    assert dict(mpl.rcParams) == before


def test_metrics_of_another_form_are_refused(plain, grouped):
    last = {name: values[-1] for name, values in plain.items()}
    ragged = [{**last}, {**last, "grad_norm": np.ones(2)}]
    short = {**plain, "clip_scale": plain["clip_scale"][1:]}
    deep = {name: np.broadcast_to(v[:, None, None], (STEPS, 2, 2)) for name, v in plain.items()}
    state = smartclip.autoclip().init(PARAMS)
    bad = [
        last,
        {},
        [],
        [{}],
        {"loss": np.ones(3)},
        [last, {}],
        [1.0],
        (state,),
        ragged,
        short,
        deep,
        {"grad_norm": plain["grad_norm"]},
        {"num_steps": plain["num_steps"]},
    ]
    for metrics in bad:
        for draw in (plotting.plot_norms, plotting.plot_groups):
            with pytest.raises(ValueError, match="`metrics` must be a dictionary of arrays with"):
                draw(metrics, ax=new_axes())
    before_the_first_step = [smartclip.metrics(state)]
    with pytest.raises(ValueError, match="`metrics` must have at least one step, got"):
        plotting.plot_norms(before_the_first_step, ax=new_axes())
    with pytest.raises(ValueError, match=r"`labels` must have 2 entries, one a group, got \['a'\]"):
        plotting.plot_groups(grouped, labels=["a"], ax=new_axes())


def test_the_package_does_not_import_matplotlib_and_this_module_names_its_extra():
    program = """
import sys
import optax_smartclip
print(any(name.partition(".")[0] == "matplotlib" for name in sys.modules))
sys.modules["matplotlib"] = None
try:
    from optax_smartclip import plotting
except ImportError as error:
    print(error)
"""
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    message = "optax_smartclip.plotting needs Matplotlib: pip install 'optax-smartclip[plotting]'"
    assert printed.splitlines() == ["False", message]
