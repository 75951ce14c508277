"""The table of all runs: a CSV file for each task. Each arm is added when it is done.

append(path, machine, ("autoclip()", ARM), rates, seeds, outcome)
table = load(path)
table.outcomes["autoclip()", ARM].final  # [rates, seeds]
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from study.training import Figures, Runs

# The kinds of rows: an arm, or no clipping at the rate times the mean scale of the arm's run.
ARM, CONTROL = "arm", "control"
SPIKE_SIGMAS = 7.0
SPIKE_WINDOW = 64


class Outcome(NamedTuple):
    """The figures of the runs of an arm.

    Attributes:
        start: Loss before training.
        final: Loss at the end; NaN if parameters were not finite.
        spikes: Share of steps whose training loss is over 7 standard deviations from the mean of
            the 64 before (OLMo 2, arXiv 2501.00656, with a shorter window).
        clipped: Share of steps with a scale below 1.
        scale: Mean scale.
    """

    start: Figures
    final: Figures
    spikes: Figures
    clipped: Figures
    scale: Figures


class Table(NamedTuple):
    """All runs of a task."""

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    outcomes: dict[tuple[str, str], Outcome]


def summarize(runs: Runs) -> Outcome:
    """Reduces the figures of each step to one figure for each run."""
    return Outcome(
        start=runs.start,
        final=runs.final,
        spikes=spike_score(runs.losses),
        clipped=np.mean(runs.scales < 1 - 1e-6, axis=-1),
        scale=np.mean(runs.scales, axis=-1),
    )


def spike_score(losses: np.ndarray) -> np.ndarray:
    """The share of values, after the first window, that stand out from the window before.

    A value that is not finite stands out, and so does the value after a window that has one.
    """
    before = np.lib.stride_tricks.sliding_window_view(losses[..., :-1], SPIKE_WINDOW, axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(losses[..., SPIKE_WINDOW:] - before.mean(-1))
        stands_out = ~(distance <= SPIKE_SIGMAS * before.std(-1))
    return np.mean(stands_out, axis=-1)


COLUMNS = ("arm", "kind", "rate", "seed", *Outcome._fields)


def append(
    path: Path,
    machine: str,
    name: tuple[str, str],
    rates: Sequence[float],
    seeds: Sequence[int],
    outcome: Outcome,
) -> None:
    """Adds all runs of an arm in one write, so that an incomplete arm is never read."""
    lines = [f"# {machine}", ",".join(COLUMNS)] if not path.exists() else []
    for i, rate in enumerate(rates):
        for j, seed in enumerate(seeds):
            figures = (f"{figure[i, j]:.6g}" for figure in outcome)
            arm, kind = name
            lines.append(",".join([f'"{arm}"', kind, f"{rate:g}", f"{seed}", *figures]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")


def load(path: Path) -> Table:
    """Reads a file; the table is empty if it does not exist.

    Raises:
        ValueError: If an arm lacks some of the runs that others have.
    """
    if not path.exists():
        return Table((), (), {})
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    rates = tuple(sorted({float(row["rate"]) for row in rows}))
    seeds = tuple(sorted({int(row["seed"]) for row in rows}))
    outcomes: dict[tuple[str, str], Outcome] = {}
    for row in rows:
        name = row["arm"], row["kind"]
        if name not in outcomes:
            empty = (np.full((len(rates), len(seeds)), -np.inf) for _ in Outcome._fields)
            outcomes[name] = Outcome(*empty)
        place = rates.index(float(row["rate"])), seeds.index(int(row["seed"]))
        for field, figure in zip(Outcome._fields, outcomes[name], strict=True):
            figure[place] = float(row[field])
    for name, outcome in outcomes.items():
        if np.any(outcome.start == -np.inf):
            raise ValueError(f"{path} lacks runs of {name}.")
    return Table(rates, seeds, outcomes)
