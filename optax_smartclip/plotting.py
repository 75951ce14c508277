"""Pictures of what a clipper did, from metrics that were collected over the steps.

These are what `smartclip.metrics` returned: a list with one dictionary for each step, or a single
one with a leading axis of steps, as `jax.lax.scan` returns. What else is in them is ignored. Of
runs that were vmapped over seeds, median and spread are drawn. Needs Matplotlib, which the extra
`plotting` brings.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from optax_smartclip.engine import checks
from optax_smartclip.engine.norms import LARGEST

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
except ImportError as error:
    raise ImportError(
        "optax_smartclip.plotting needs Matplotlib: pip install 'optax-smartclip[plotting]'"
    ) from error

Metrics = Mapping[str, Any] | Sequence[Any]
# Without an axis of seeds, there is one.
Record = dict[str, Shaped[np.ndarray, "steps _ seeds"]]
Steps = Float[np.ndarray, " steps"]
OfSeeds = Float[np.ndarray, "*steps seeds"]

_SEED_HINT = (
    " (For seeds under vmap, pass seed_axis=0 with the shape [seeds, steps], or seed_axis=1 with "
    "[steps, seeds].)"
)

_CLIP_FIELDS = ("grad_norm", "clip_threshold", "clip_scale", "num_steps")
_SKIP_FIELDS = ("skip_norm", "skip_norm_threshold", "skipped", "num_skipped")
_SHARE_FIELDS = ("norm_share",)

# Okabe and Ito's colors, for any color vision. Marks differ in shape as well, for print in gray.
_STYLES: dict[str, dict[str, Any]] = {
    "norm": {"color": "#0072B2", "linewidth": 0.8},
    "threshold": {"color": "#E69F00", "linewidth": 1.8, "zorder": 3},
    "skip threshold": {"color": "#009E73", "linewidth": 1.2, "linestyle": "--"},
    "clipped": {"color": "#D55E00", "marker": "v", "markersize": 4.5},
    "skipped": {"color": "#009E73", "marker": "s", "markersize": 7, "markerfacecolor": "none"},
    "not finite": {"color": "black", "marker": "x"},
    "zero": {"color": "black", "marker": "+"},
}

# One of two neighboring areas is darker than the other.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#56B4E9", "#CC79A7")

# As much as a picture has room for. A column of a heat map is a pixel wide at least, so that no
# clipped step is lost.
_NUM_BINS, _MAX_MARKS, _NUM_COLUMNS, _MAX_LABELS = 2000, 400, 500, 40

# Percentiles over the seeds: the edges of the band, and the line in it.
_LOW, _MEDIAN, _HIGH = 10.0, 50.0, 90.0


def plot_norms(
    metrics: Metrics,
    *,
    clipper: str | None = None,
    group: int | None = None,
    seed_axis: int | None = None,
    steps: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws norm and threshold over the steps, and marks those that were clipped or dropped.

    Infinite thresholds, as in warm-up, leave a gap. NaN and Inf norms are marked at the upper
    edge, zero norms at the lower one. Steps that `skip_spikes` dropped are marked, and its
    threshold is drawn. Micro-steps of `optax.MultiSteps`, in which no clipper runs, are left out.

    Every spike stays visible in a long run: of more than 4,000 steps, the least and the largest
    value in each of 2,000 bins are drawn, and of more than 400 marks of a kind, the highest in each
    of 400 bins. The legend counts all.

    Of several seeds, each line is their median, in a band from their 10th to their 90th percentile.
    Marks stand at the norm of the seed that they belong to, and the legend counts those of all
    seeds and steps.

    Args:
        metrics: One dictionary of `smartclip.metrics` for each step, or a single one whose values
            have the shape `[steps]` or `[steps, groups]`; with an axis of seeds as well, see
            `seed_axis`.
        clipper: If there are several clippers, the place of one: `"0"` for `"0/grad_norm"`.
        group: If there are several groups, the number of one.
        seed_axis: Which axis counts the seeds of runs under `jax.vmap`, if there is one: 0 for
            `[seeds, steps]` and `[seeds, steps, groups]`, as a vmapped run returns, 1 for
            `[steps, seeds]` and `[steps, seeds, groups]`, as vmapped steps return.
        steps: The number of each step, of shape `[steps]`, increasing; by default 1, 2, ...
        ax: Where to draw; by default, in a new figure of `matplotlib.pyplot`.

    Returns:
        The axes, with a logarithmic axis of norms.

    Raises:
        ValueError: If an argument is not as described here.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from optax_smartclip import plotting
        >>> logs = {"grad_norm": [1.0, 9.0], "clip_threshold": [3.0, 3.0]}
        >>> logs |= {"clip_scale": [1.0, 1 / 3], "num_steps": [1, 2]}  # [steps]
        >>> ax = plotting.plot_norms(logs, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['norm', 'threshold', 'clipped: 1 (50 %)']
    """
    x, clip, skip = _read(metrics, clipper, seed_axis, steps)
    _, num_groups, num_seeds = clip["grad_norm"].shape
    if group not in (range(num_groups) if num_groups > 1 else (None, 0)):
        hint = _SEED_HINT if seed_axis is None else ""
        raise ValueError(f"`group` must be an int from 0 to {num_groups - 1}, got {group!r}.{hint}")
    norm, threshold, ran = (clip[k][:, group or 0] for k in ("grad_norm", "clip_threshold", "ran"))
    # One group among several has no record in a step that its clipper did not see.
    known = ran | (num_groups == 1)
    lines, marks = {"norm": norm}, {}
    if ran.any():
        lines["threshold"] = threshold
        marks["clipped"] = ran & np.isfinite(norm) & (norm > threshold)
    if skip:
        marks["skipped"] = skip["dropped"][:, 0]
        if num_groups == 1:
            lines["skip threshold"] = skip["skip_norm_threshold"][:, 0]
    rare = {"not finite": known & ~np.isfinite(norm), "zero": known & (norm == 0)}
    marks |= {name: mask for name, mask in rare.items() if mask.any()}

    ax = _new_axes() if ax is None else ax
    ax.set(xlabel="step", ylabel="gradient norm", yscale="log")
    for name, values in lines.items():
        y = np.where(np.isfinite(values) & (values > 0), values, np.nan)
        low, median, high = _percentiles(y, (_LOW, _MEDIAN, _HIGH))
        kept = _extremes(median)
        ax.plot(x[kept], median[kept], label=name, **_STYLES[name])
        if num_seeds > 1:
            kept = np.union1d(_extremes(low), _extremes(high))
            band = {"color": _STYLES[name]["color"], "alpha": 0.25, "linewidth": 0}
            ax.fill_between(x[kept], low[kept], high[kept], label=f"_{name}", **band)
    for name, mask in marks.items():
        label = f"{name}: {np.count_nonzero(mask):,} ({100 * mask.mean():.3g} %)"
        kept, y = np.nonzero(mask)[0], norm[mask]
        if len(kept) > _MAX_MARKS:
            bins = kept * _MAX_MARKS // len(mask)
            order = np.lexsort((y, bins))
            highest = order[np.append(np.diff(bins[order]) > 0, True)]
            kept, y = kept[highest], y[highest]
        inside = np.isfinite(y) & (y > 0)
        style = {"linestyle": "none", **_STYLES[name]}
        ax.plot(x[kept[inside]], y[inside], label=label, **style)
        edge, at_edge = np.where(y == 0, 0.03, 0.97), ax.get_xaxis_transform()
        ax.plot(x[kept[~inside]], edge[~inside], label=f"_{name}", transform=at_edge, **style)
    title = f"{num_seeds} seeds: median,\n10th to 90th percentile" if num_seeds > 1 else None
    style = {"fontsize": "small", "title_fontsize": "small", "frameon": False}
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title=title, **style)
    return ax


def plot_groups(
    metrics: Metrics,
    *,
    clipper: str | None = None,
    labels: Sequence[str] | None = None,
    seed_axis: int | None = None,
    steps: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the clip scale of each group over the steps: the darker, the further it was clipped.

    NaN and Inf norms are gray, with a cross. Of more than 500 steps, a column shows the darkest of
    several. Steps in which the clipper did not run are left out.

    Of several seeds, a shade is the median of their scales. A cross says that a norm of one of them
    was not finite, and gray that those of all were.

    Args:
        metrics: As for `plot_norms`; so are `clipper`, `seed_axis`, `steps` and `ax`.
        clipper: If there are several clippers, the place of one.
        labels: The name of each group, from `smartclip.group_labels`; by default 0, 1, ...
        seed_axis: Which axis counts the seeds, if one does: 0 or 1.
        steps: The number of each step.
        ax: Where to draw.

    Returns:
        The axes. Its figure has a color bar.

    Raises:
        ValueError: If an argument is not as described here.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from optax_smartclip import plotting
        >>> logs = {"grad_norm": [[1.0, 8.0]], "clip_threshold": [[2.0, 2.0]]}
        >>> logs |= {"clip_scale": [[1.0, 0.25]], "num_steps": [[1, 1]]}  # [steps, groups]
        >>> ax = plotting.plot_groups(logs, labels=("body", "head"), ax=Figure().subplots())
        >>> print(ax.collections[0].get_array().T)
        [[1.   0.25]]
    """
    x, clip, _ = _read(metrics, clipper, seed_axis, steps)
    drawn = clip["ran"].any(axis=(1, 2))
    if not drawn.any():
        raise ValueError(f"`metrics` must have steps of a clipper, got {reprlib.repr(metrics)}.")
    x, ran, norm, scale = (
        a[drawn] for a in (x, clip["ran"], clip["grad_norm"], clip["clip_scale"])
    )
    _, num_groups, num_seeds = norm.shape
    finite = ran & np.isfinite(norm)
    (scale,) = _percentiles(np.where(finite, scale, np.nan), (_MEDIAN,))
    labels = _check_labels(labels, num_groups)
    starts = _columns(x)
    least = np.fmin.reduceat(scale, starts).T
    crossed, gray = (
        np.logical_or.reduceat(mask, starts).T
        for mask in ((ran & ~finite).any(axis=2), ~finite.any(axis=2))
    )
    edges = _edges(x, starts)

    ax = _new_axes() if ax is None else ax
    y, shades = np.arange(num_groups + 1) - 0.5, np.ma.masked_where(gray, least)
    colors = plt.get_cmap("Blues_r").with_extremes(bad="0.75")
    image = ax.pcolormesh(edges, y, shades, cmap=colors, clim=(0.0, 1.0), rasterized=True)
    label = "clip scale" if num_seeds == 1 else f"clip scale, median of {num_seeds} seeds"
    ax.figure.colorbar(image, ax=ax, label=label, pad=0.02)
    rows, columns = np.nonzero(crossed)
    ax.plot((edges[:-1] + edges[1:])[columns] / 2, rows, linestyle="none", **_STYLES["not finite"])
    shown = range(0, num_groups, -(-num_groups // _MAX_LABELS))
    ax.set_yticks(list(shown), [labels[number] for number in shown])
    ax.set(xlabel="step", ylabel="group", ylim=(num_groups - 0.5, -0.5))
    return ax


def plot_shares(
    metrics: Metrics,
    *,
    labels: Sequence[str] | None = None,
    top: int = 6,
    seed_axis: int | None = None,
    steps: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws who held the norm over the steps: the share of each group in the squared norm, stacked.

    The groups with the largest share in any step have a color each, that with the largest mean at
    the bottom; the others together are gray. A step whose gradient was zero is a gap.

    Of more than 500 steps, a column shows one of several: that whose shares are furthest from the
    mean ones. Of several seeds, shares are their mean.

    Args:
        metrics: As for `plot_norms`, with the record of one `observe_norms`; so are `seed_axis`,
            `steps` and `ax`.
        labels: The name of each group, from `smartclip.group_labels`; by default 0, 1, ...
        top: How many groups have a color of their own, from 1 to 7.
        seed_axis: Which axis counts the seeds, if one does: 0 or 1.
        steps: The number of each step.
        ax: Where to draw.

    Returns:
        The axes, with a legend.

    Raises:
        ValueError: If an argument is not as described here.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from optax_smartclip import plotting
        >>> logs = {"norm_share": [[0.2, 0.7, 0.1], [0.1, 0.9, 0.0]]}  # [steps, groups]
        >>> labels = ("body", "head", "neck")
        >>> ax = plotting.plot_shares(logs, labels=labels, top=1, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['other: 2', 'head']
    """
    x, (records,) = _read_records(metrics, [_SHARE_FIELDS], seed_axis, steps)
    if len(records) > 1:
        raise ValueError(
            f"`metrics` must have the record of one observe_norms, got those of {list(records)}."
        )
    (shares,) = (record["norm_share"].mean(axis=2) for record in records.values())
    num_groups = shares.shape[1]
    labels = _check_labels(labels, num_groups)
    if top not in range(1, len(_COLORS) + 1):
        raise ValueError(f"`top` must be an int from 1 to {len(_COLORS)}, got {top!r}.")

    # A spike of one step has the largest share and hardly a mean.
    largest = np.argsort(-shares.max(axis=0), kind="stable")[:top]
    largest = largest[np.argsort(-shares.mean(axis=0)[largest], kind="stable")]
    names = [labels[group] for group in largest]
    starts = _columns(x)
    distance = np.abs(shares - shares.mean(axis=0)).sum(axis=1)
    parts = np.split(np.arange(len(x)), starts[1:])
    columns = shares[[part[distance[part].argmax()] for part in parts]]
    areas = columns[:, largest]
    if num_groups > top:
        names.append(f"other: {num_groups - top}")
        areas = np.column_stack([areas, np.delete(columns, largest, axis=1).sum(axis=1)])

    ax = _new_axes() if ax is None else ax
    # The last column a second time: it ends where the next would begin.
    heights, colors = np.vstack([areas, areas[-1:]]).T, [*_COLORS[: len(largest)], "0.8"]
    ax.stackplot(_edges(x, starts), heights, labels=names, colors=colors, step="post", linewidth=0)
    ax.set(xlabel="step", ylabel="share of the squared norm", ylim=(0, 1))
    ax.margins(x=0)
    # From above, as they are stacked.
    style = {"fontsize": "small", "frameon": False, "reverse": True}
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), **style)
    return ax


def _check_labels(labels: Sequence[str] | None, num_groups: int) -> Sequence[str]:
    """One label for each group, by default its number."""
    labels = [str(number) for number in range(num_groups)] if labels is None else labels
    if len(labels) != num_groups:
        raise ValueError(f"`labels` must have {num_groups} entries, one a group, got {labels!r}.")
    return labels


def _columns(x: Steps) -> Int[np.ndarray, " columns"]:
    """The first step of each column."""
    return np.arange(0, len(x), -(-len(x) // _NUM_COLUMNS))


def _edges(x: Steps, starts: Int[np.ndarray, " columns"]) -> Float[np.ndarray, " edges"]:
    """Where each column begins, and where the last one ends."""
    width = x[-1] - x[-2] if len(x) > 1 else 1.0
    return np.append(x[starts], x[-1] + width) - width / 2


def _steps_first(
    array: Float[np.ndarray, "..."], seed_axis: int | None
) -> Shaped[np.ndarray, "steps groups seeds"]:
    seeds_last = array[..., None] if seed_axis is None else np.moveaxis(array, seed_axis, -1)
    num_steps, *groups, num_seeds = seeds_last.shape
    (num_groups,) = groups or (1,)
    return seeds_last.reshape(num_steps, num_groups, num_seeds)


def _check_axes(clip: Record, skip: Record, seed_axis: int | None) -> None:
    """Raises ValueError if the counts say that another axis has the steps."""
    # A step is counted by the clipper or, if it was dropped, by `skip_spikes`.
    steps = clip["num_steps"]
    grows, seeds_grow = (
        np.any(np.diff(steps + skip.get("num_skipped", 0), axis=axis) > 0) for axis in (0, 2)
    )
    groups_differ = np.any(np.diff(steps, axis=1) != 0)
    skip_has_groups = skip and skip["num_skipped"].shape[1] > 1
    if groups_differ or skip_has_groups or (seeds_grow and not grows):
        raise ValueError(
            f"`metrics` must have the steps along axis {int(seed_axis == 0)} if {seed_axis=}, but "
            f"counts grow along another one.{_SEED_HINT}"
        )


def _new_axes() -> Axes:
    """In a figure of 800 by 350 pixels. Steps are whole numbers."""
    ax = plt.subplots(figsize=(8, 3.5), layout="constrained")[1]
    ax.locator_params(axis="x", integer=True)
    return ax


def _percentiles(
    values: OfSeeds, percentiles: tuple[float, ...]
) -> Sequence[Float[np.ndarray, "*steps"]]:
    """Percentiles over the seeds that have a number; NaN where none has."""
    # numpy.nanpercentile goes through the steps one by one, and takes minutes for a long run.
    ascending = np.sort(values, axis=-1)  # NaN comes last
    last = np.maximum(np.count_nonzero(~np.isnan(values), axis=-1, keepdims=True) - 1, 0)
    found = []
    for percentile in percentiles:
        place = last * percentile / 100
        below, above = (
            np.take_along_axis(ascending, to_int(place).astype(int), axis=-1)
            for to_int in (np.floor, np.ceil)
        )
        found.append((below + place % 1 * (above - below))[..., 0])
    return found


def _extremes(values: Steps) -> Int[np.ndarray, " kept"]:
    """Where the least and the largest value of each bin are."""
    width = -(-len(values) // _NUM_BINS)
    bins = np.pad(values, (0, -len(values) % width), constant_values=np.nan).reshape(-1, width)
    least = np.where(np.isnan(bins), np.inf, bins).argmin(axis=1)
    largest = np.where(np.isnan(bins), -np.inf, bins).argmax(axis=1)
    first = np.arange(0, len(values), width)
    return np.unique(np.concatenate([first + least, first + largest]))


def _records(arrays: Record, fields: tuple[str, ...]) -> dict[str, Record]:
    """The records with these fields, by place: `"0"` for `"0/grad_norm"`."""
    places = [name.removesuffix(fields[0]) for name in arrays if name.endswith(fields[0])]
    return {place[:-1]: {field: arrays[place + field] for field in fields} for place in places}


def _read_records(
    metrics: Metrics, kinds: Sequence[tuple[str, ...]], seed_axis: int | None, steps: Any
) -> tuple[Steps, list[dict[str, Record]]]:
    """The numbers of the steps, and the records of each kind, given by its fields, by place."""
    if seed_axis not in (None, 0, 1):
        raise ValueError(f"`seed_axis` must be None, 0 or 1, got {seed_axis!r}.")
    try:
        if not isinstance(metrics, Mapping):
            metrics = {name: [step[name] for step in metrics] for name in metrics[0]}
        known = [name for name in metrics if name.rpartition("/")[2] in sum(kinds, ())]
        arrays = {name: np.asarray(metrics[name], np.float64) for name in known}
        # The largest float32 stands for a threshold that there is not, or a norm that is none.
        arrays = {k: np.where(array < LARGEST, array, np.inf) for k, array in arrays.items()}
        arrays = {name: _steps_first(array, seed_axis) for name, array in arrays.items()}
        ((total, _),) = {(len(array), array.shape[2]) for array in arrays.values()}
        records = [_records(arrays, fields) for fields in kinds]
        if not any(records):
            raise KeyError(kinds)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "`metrics` must be a dictionary of arrays with a leading axis of steps, or a sequence "
            "of dictionaries with the same names and shapes, as smartclip.metrics returns, got "
            f"{reprlib.repr(metrics)}.{_SEED_HINT}"
        ) from error
    x = np.arange(1.0, total + 1) if steps is None else np.asarray(steps, np.float64)
    if x.shape != (total,) or not np.all(np.diff(x) > 0):
        raise ValueError(f"`steps` must be {total} increasing numbers, got {steps!r}.")
    return x, records


def _read(
    metrics: Metrics, clipper: str | None, seed_axis: int | None, steps: Any
) -> tuple[Steps, Record, Record]:
    """The numbers of the steps that renewed a record, that of a clipper and that of `skip_spikes`.

    `ran` is False, and the norm is the dropped one, where the clipper did not see a dropped step.
    """
    x, (clips, skips) = _read_records(metrics, (_CLIP_FIELDS, _SKIP_FIELDS), seed_axis, steps)
    if clipper is not None or len(clips) > 1:
        checks.check_choice("clipper", clipper, tuple(clips))
    fields = next(iter((clips | skips).values()))
    shape = next(iter(fields.values())).shape
    nothing = dict.fromkeys(_CLIP_FIELDS, np.full((len(x), 1, shape[2]), np.nan))
    clip = clips[clipper] if clipper is not None else next(iter(clips.values()), nothing)
    skip = next(iter(skips.values()), {})
    _check_axes(clip, skip, seed_axis)
    # A count that did not change belongs to a record that was not renewed.
    clip["ran"] = (np.diff(clip["num_steps"], axis=0, prepend=0) != 0) & bool(clips)
    renewed = clip["ran"]
    if skip:
        rises = np.diff(skip["num_skipped"], axis=0, prepend=0) != 0
        skip["dropped"] = rises & (skip["skipped"] > 0)
        instead = skip["skip_norm"] if clip["ran"].shape[1] == 1 else np.nan
        clip["grad_norm"] = np.where(clip["ran"], clip["grad_norm"], instead)
        renewed = renewed | skip["dropped"] | (not clips)
    drawn = renewed.any(axis=(1, 2))
    if not drawn.any():
        raise ValueError(f"`metrics` must have at least one step, got {reprlib.repr(metrics)}.")
    clip, skip = ({k: v[drawn] for k, v in record.items()} for record in (clip, skip))
    return x[drawn], clip, skip
