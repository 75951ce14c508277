"""The two pictures of the study: loss against rate, and an overview of all arms and tasks."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from cell_colors import text_color
from study.arms import AUTO, NONE, fixed
from study.measures import capped, diverged, lost_progress
from study.results import ARM, Outcome, Table
from study.training import Task

mpl.use("Agg")
import matplotlib.pyplot as plt

# The arms with their own colors; the others are gray.
COLORS = {
    NONE: "black",
    fixed(1.0): "tab:blue",
    AUTO: "tab:red",
    "autoclip(50)": "tab:orange",
    "zclip()": "tab:green",
    "agc()": "tab:purple",
}
COLUMNS = 4
MIN_WIDTH = 7.0
# A page shows each picture at the same width, so that a wide one needs larger text.
WIDE = {"font.size": 13.5, "lines.markersize": 8}


def of_arms(table: Table) -> dict[str, Outcome]:
    """The outcomes of the arms, without their controls."""
    return {arm: outcome for (arm, kind), outcome in table.outcomes.items() if kind == ARM}


def draw_rates(path: Path, tasks: Mapping[str, Task], tables: Mapping[str, Table]) -> None:
    """Draws loss against peak learning rate, a panel for each task, with crosses for divergence."""
    rows = -(-len(tables) // COLUMNS)
    columns = min(COLUMNS, len(tables))
    size = max(3.4 * columns, MIN_WIDTH), 2.7 * rows + 0.8
    with plt.rc_context(WIDE if columns == COLUMNS else {}):
        figure = _panels(rows, columns, size, tasks, tables)
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _panels(
    rows: int,
    columns: int,
    size: tuple[float, float],
    tasks: Mapping[str, Task],
    tables: Mapping[str, Table],
) -> plt.Figure:
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=False):
        _draw_task(axis, tasks[name], table)
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    arms = {arm for table in tables.values() for arm in of_arms(table)}
    handles = {arm: plt.Line2D([], [], color=COLORS[arm]) for arm in COLORS if arm in arms}
    if arms - COLORS.keys():
        handles["other clippers"] = plt.Line2D([], [], color="lightgray")
    handles["diverges"] = plt.Line2D([], [], color="gray", marker="x", linestyle="")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    figure.supxlabel("peak learning rate", fontsize="medium")
    return figure


def _draw_task(axis: plt.Axes, task: Task, table: Table) -> None:
    outcomes = of_arms(table)
    for arm in sorted(outcomes, key=lambda arm: arm in COLORS):
        outcome, color = outcomes[arm], COLORS.get(arm, "lightgray")
        losses = capped(outcome).mean(axis=1)
        axis.plot(table.rates, losses, color=color, linewidth=1.5 if arm in COLORS else 0.8)
        share = diverged(outcome).mean(axis=1)
        some = share > 0
        axis.scatter(np.array(table.rates)[some], losses[some], 60 * share[some], color, marker="x")
    axis.set(xscale="log", title=task.title, ylabel=task.unit)
    axis.title.set_fontsize("medium")


def draw_overview(path: Path, tasks: Mapping[str, Task], tables: Mapping[str, Table]) -> None:
    """Draws a heat map of the progress that each arm loses to the best, as a mean over rates."""
    arms = list(dict.fromkeys(arm for table in tables.values() for arm in of_arms(table)))
    lost = np.full((len(arms), len(tables)), np.nan)
    for column, table in enumerate(tables.values()):
        for arm, figures in lost_progress(of_arms(table)).items():
            lost[arms.index(arm), column] = 100 * figures.mean()
    with plt.rc_context(WIDE):
        figure = _heat_map(lost, arms, [tasks[name].title for name in tables])
        figure.savefig(path, dpi=150)
    plt.close(figure)


def _heat_map(lost: np.ndarray, arms: Sequence[str], titles: Sequence[str]) -> plt.Figure:
    rows, columns = lost.shape
    size = 0.62 * columns + 4.6, 0.38 * rows + 2.6
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(lost, cmap="Reds", norm=mpl.colors.PowerNorm(0.5, 0, 50), aspect="auto")
    for (row, column), figure_lost in np.ndenumerate(lost):
        if np.isfinite(figure_lost):
            color = text_color(image.to_rgba(figure_lost))
            text = f"{figure_lost:.0f}" if figure_lost >= 9.5 else f"{figure_lost:.1f}"
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize="small")
    axis.set_xticks(range(columns), titles, rotation=40, ha="right")
    axis.set_yticks(range(rows), arms)
    figure.colorbar(image, label="% of progress lost", pad=0.01, extend="max")
    return figure


def draw(folder: Path, tasks: Mapping[str, Task], tables: Mapping[str, Table]) -> Iterable[Path]:
    """Draws both pictures, and yields their paths."""
    for name, draw_one in (("rates.png", draw_rates), ("overview.png", draw_overview)):
        draw_one(folder / name, tasks, tables)
        yield folder / name
