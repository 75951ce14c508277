"""Compares clippers on spikes: thirteen streams of norms, and training with damaged batches.

Runs each clipper over the streams of `streams.py`, each with marks to pass, and through the
training run of `damaged_text.py`. The training is paired: all clippers see the same parameters and
batches. Prints a table, then the figures beyond their marks; writes all figures to `spikes.json`
and a picture of the table, `spikes.png`.

    python benchmarks/spikes.py [--out spikes] [--seeds 12] [--steps 1000]

`clip_by_global_norm` is shown at its best. In the streams, its norm is 3, as the median norm of
most of them is 1. In training, it is the norm of a grid that ends with the lowest mean loss over
the reported seeds, which a user cannot know in advance. A tenth of that and 100 times that stand
for norms taken from another model. `agc()` has weights of norm 200 per unit in the streams, so it
clips at 2, and those of the network in training. A step that `skip_spikes` drops counts as clipped
to 0.

The mark of training is a loss at most 1 % above that of `clip_by_global_norm` at its best. "Rest
kept" has no mark: it is the mean scale of the seven other layers when one layer spikes (S11).
"""

import argparse
import json
import platform
import sys
import textwrap
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import damaged_text
import jax
import numpy as np
import optax
import streams
from cell_colors import text_color
from damaged_text import Wrap

import optax_smartclip as smartclip

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from clipper_table import SPIKES, rows_of

# The rate from 0.001 to 0.03 at which the runs with fixed clipping end best.
LEARNING_RATE = 1e-2
GRID = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FIXED_IN_STREAMS = 3.0
# The loss of a clipper may exceed that of the best fixed norm by this share.
MARK_OF_LOSS = 0.01
BEST = "clip_by_global_norm(best)"
FIXED = {BEST: 1.0, "clip_by_global_norm(best / 10)": 0.1, "clip_by_global_norm(100 best)": 100.0}
OURS = "autoclip()"
NONE = "no clipping"
WORKERS = 2
# The width of the labels in the picture, in characters.
LABEL_WIDTH = 34


def before(clipper: optax.GradientTransformation) -> Wrap:
    """Puts a clipper before an optimizer."""
    return lambda optimizer: optax.chain(clipper, optimizer)


CLIPPERS: dict[str, Wrap] = {
    **{row.label: before(row.factory()) for row in rows_of(SPIKES).values()},
    "skip_spikes(tx)": smartclip.skip_spikes,
    "skip_spikes(chain(autoclip(), tx))": lambda optimizer: smartclip.skip_spikes(
        optax.chain(smartclip.autoclip(), optimizer)
    ),
    NONE: lambda optimizer: optimizer,
}

# How the picture abbreviates a figure.
SHORT = {
    "clip %": "{} %",
    "extra clip %": "+{} %",
    "out": "out {}",
    "largest out": "out {}",
    "threshold / level": "T x{}",
    "threshold after / before": "T x{}",
    "threshold at 110": "T x{}",
    "threshold / without spikes": "T x{}",
    "updates not zero": "{} not 0",
    "others changed": "others",
    "steps to recover": "{} st.",
    "relative error": "{}",
    "changed": "{} st.",
}
STREAMS = {
    "S1": "noise",
    "S2": "drift",
    "S3": "a spike",
    "S4": "early spike",
    "S5": "burst",
    "S6": "NaN, Inf",
    "S7": "level shift",
    "S8": "heavy tails",
    "S9": "other scales",
    "S10": "constants",
    "S11": "one layer",
    "S12": "1 % spikes",
    "S13": "second norm",
}


class Difference(NamedTuple):
    """The difference of two clippers, seed by seed: the mean and its standard error."""

    mean: float
    error: float


Streams = dict[str, dict[str, streams.Result]]


def run_streams(wraps: dict[str, Wrap], names: Iterable[str] = STREAMS) -> Streams:
    """Runs every clipper over every stream."""

    def run(label: str) -> dict[str, streams.Result]:
        if label in FIXED:
            norm = FIXED[label] * FIXED_IN_STREAMS
            clipper = streams.from_transformation(optax.clip_by_global_norm(norm), norm)
        else:
            tx = wraps[label](optax.identity())
            clipper = streams.from_transformation(tx, float("inf"))
        return {name: streams.CHECKS[name](clipper) for name in names}

    # The row without clipping comes last, below the fixed norms.
    labels = sorted([*wraps, *FIXED], key=NONE.__eq__)
    # A clipper compiles while another one runs.
    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(labels, pool.map(run, labels), strict=True))


class Training(NamedTuple):
    """The held-out losses of the training runs in bits per character, [seeds].

    Attributes:
        losses: The losses of each clipper.
        grid: The losses of `clip_by_global_norm`, by norm.
        best: The norm of the grid that ended with the lowest loss.
        undamaged: The losses without clipping, on the same batches before they were damaged.
    """

    losses: dict[str, np.ndarray]
    grid: dict[float, np.ndarray]
    best: float
    undamaged: np.ndarray

    def compare(self, label: str, other: str) -> Difference:
        """The losses of `label` minus those of `other`."""
        return mean_and_error(self.losses[label] - self.losses[other])


def run_training(wraps: dict[str, Wrap], seeds: int, steps: int) -> Training:
    """Trains with every clipper, and with the grid of fixed norms."""
    task = damaged_text.load_task(seeds, steps)
    undamaged = damaged_text.load_task(seeds, steps, damaged=False)

    def train(wrap: Wrap, task: damaged_text.Task = task) -> np.ndarray:
        return damaged_text.train(wrap, task, LEARNING_RATE).held_out

    def train_fixed(norm: float) -> np.ndarray:
        return train(before(optax.clip_by_global_norm(norm)))

    with ThreadPoolExecutor(WORKERS) as pool:
        grid = dict(zip(GRID, pool.map(train_fixed, GRID), strict=True))
        best = min(grid, key=lambda norm: np.nan_to_num(grid[norm], nan=np.inf).mean())
        others = {label: factor * best for label, factor in FIXED.items() if factor != 1}
        losses = dict(zip(wraps, pool.map(train, wraps.values()), strict=True))
        losses[BEST] = grid[best]
        losses |= zip(others, pool.map(train_fixed, others.values()), strict=True)
        reference = train(lambda optimizer: optimizer, undamaged)
    return Training(losses, grid, best, reference)


def mean_and_error(values: np.ndarray) -> Difference:
    """Returns the mean and its standard error."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Difference(float(values.mean()), float(error))


def format_table(results: Streams, training: Training) -> str:
    """Formats a row for each clipper."""
    width = max(map(len, results)) + 1
    names = next(iter(results.values())).keys()
    head = f"{'':{width}}" + "".join(f"{name:>4}" for name in names)
    lines = [
        f"{'':{width + 4 * len(names)}}{'rest':>6}{'held-out':>18}{'less that of':>20}",
        f"{head}{'kept':>6}{'loss':>18}{OURS:>20}",
    ]
    for label, row in results.items():
        marks = "".join(f"{'yes' if row[name].passed else '-':>4}" for name in names)
        loss = mean_and_error(training.losses[label])
        line = f"{label:{width}}{marks}{row['S11'].figures['rest kept']:6.2f}"
        line += f"{f'{loss.mean:.3f} +- {loss.error:.3f}':>18}"
        if label != OURS:
            paired = training.compare(label, OURS)
            line += f"{f'{paired.mean:+.4f} +- {paired.error:.4f}':>20}"
        lines.append(line)
    return "\n".join(lines)


def format_failures(results: Streams) -> str:
    """Formats the figures beyond their marks."""
    lines = []
    for label, row in results.items():
        for stream, result in row.items():
            failed = [name for name, excess in result.excesses.items() if excess > 1]
            listed = ", ".join(
                f"{name} {result.figures[name]:.3g} ({result.marks[name].limit:g})"
                for name in failed
            )
            if failed:
                lines.append(f"{label:42}{stream:4} {listed}")
    return "\n".join(lines)


def short(result: streams.Result) -> str:
    """A tick, or the worst figure."""
    if result.passed:
        return "✓"
    figure = result.figures[result.worst]
    digits = f"{figure:.2g}" if figure < 10 else f"{figure:.0f}"
    if 1e4 <= figure < np.inf:
        digits = f"{figure:.0e}".replace("e+0", "e")
    return SHORT.get(result.worst, "x{}").format(digits)


def excess_of_loss(training: Training, label: str) -> float:
    """How far the loss is above that of the best fixed norm, in units of the mark."""
    gap = training.compare(label, BEST).mean
    excess = gap / (MARK_OF_LOSS * training.losses[BEST].mean())
    return max(0.0, excess) if np.isfinite(excess) else np.inf


def plot(results: Streams, training: Training, path: Path) -> None:
    """Draws the table in colors: blue within the mark, red beyond it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    titles = [f"{name} {title}" for name, title in STREAMS.items()]
    titles += ["rest kept in S11", "training"]
    excess = np.full((len(results), len(titles)), np.nan)
    texts = np.full(excess.shape, "", object)
    for row, (label, checked) in enumerate(results.items()):
        for column, name in enumerate(STREAMS):
            excess[row, column] = max(checked[name].excesses.values())
            texts[row, column] = short(checked[name])
        texts[row, -2] = f"{checked['S11'].figures['rest kept']:.2f}"
        excess[row, -1] = excess_of_loss(training, label)
        texts[row, -1] = f"{training.losses[label].mean():.3f}"
    shown = np.log10(np.clip(excess, 0.1, 10))

    figure, axes = plt.subplots(figsize=(10, 0.26 * len(results) + 1.9), layout="constrained")
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-1.5, vmax=1.5, aspect="auto")
    for (row, column), text in np.ndenumerate(texts):
        color = text_color(image.to_rgba(shown[row, column]))
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7.5)
    axes.set_xticks(range(len(titles)), titles, rotation=40, ha="left", rotation_mode="anchor")
    # Long labels are wrapped, since they would leave less width for the cells.
    labels = [textwrap.fill(label, LABEL_WIDTH) for label in results]
    axes.set_yticks(range(len(results)), labels, fontsize=8)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xticks(np.arange(len(titles) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(results) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0, top=False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.ax.set_xlim(-1, 1)
    bar.set_ticks([-1, 0, 1], labels=["a tenth of the mark", "the mark", "10 times the mark"])
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def as_json(versions: str, results: Streams, training: Training) -> dict:
    """All figures, in the structure of the JSON file."""
    return {
        "versions": versions,
        "streams": {
            label: {
                name: {
                    "passed": result.passed,
                    "figures": result.figures,
                    "marks": {figure: mark.limit for figure, mark in result.marks.items()},
                    "excesses": result.excesses,
                }
                for name, result in row.items()
            }
            for label, row in results.items()
        },
        "training": {
            "learning_rate": LEARNING_RATE,
            "best_norm": training.best,
            "undamaged": training.undamaged.tolist(),
            "grid": {norm: losses.tolist() for norm, losses in training.grid.items()},
            "losses": {label: losses.tolist() for label, losses in training.losses.items()},
            "less_best_fixed": {
                label: training.compare(label, BEST)._asdict() for label in training.losses
            },
        },
    }


def main() -> None:
    """Runs both parts, prints the table, writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("spikes"), help="folder for the files")
    parser.add_argument("--seeds", type=int, default=12, help="training runs with each clipper")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each training run")
    arguments = parser.parse_args()
    start = time.perf_counter()
    libraries = f"jax {jax.__version__}, optax {optax.__version__}"
    machine = f"{platform.machine()}, {jax.default_backend()}"
    versions = f"Python {platform.python_version()}, {libraries}, {machine}"
    print(versions, flush=True)

    results = run_streams(CLIPPERS)
    streams_done = time.perf_counter()
    training = run_training(CLIPPERS, arguments.seeds, arguments.steps)
    print(format_table(results, training))
    grid = {norm: mean_and_error(losses) for norm, losses in training.grid.items()}
    listed = ", ".join(
        f"{norm:g}: {loss.mean:.4f} +- {loss.error:.4f}" for norm, loss in grid.items()
    )
    reference = mean_and_error(training.undamaged)
    print(
        f"Held-out loss in bits per character, mean of {arguments.seeds} seeds +- standard error.\n"
        f"Without damage, not clipped: {reference.mean:.4f} +- {reference.error:.4f}.\n"
        f"clip_by_global_norm by norm: {listed}.\n\nBeyond the mark (in brackets):\n"
        f"{format_failures(results)}"
    )

    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = as_json(versions, results, training)
    (arguments.out / "spikes.json").write_text(json.dumps(figures, indent=1) + "\n")
    plot(results, training, arguments.out / "spikes.png")
    print(
        f"\nWrote spikes.json and spikes.png to {arguments.out}/ after "
        f"{time.perf_counter() - start:.0f} s ({streams_done - start:.0f} s for the streams)."
    )


if __name__ == "__main__":
    main()
