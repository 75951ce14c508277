"""The two pictures of the study: loss against rate, and an overview of all arms and tasks."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from study.arms import AUTO, NONE, fixed
from study.measures import capped, diverged, lost_progress
from study.results import ARM, Outcome, Table
from study.training import Task

mpl.use("Agg")
import matplotlib.pyplot as plt

# The arms with their own colours; the others are grey.
COLOURS = {
    NONE: "black",
    fixed(1.0): "tab:blue",
    AUTO: "tab:red",
    "autoclip(50)": "tab:orange",
    "zclip()": "tab:green",
    "agc()": "tab:purple",
}
COLUMNS = 4
MIN_WIDTH = 7.0


def of_arms(table: Table) -> dict[str, Outcome]:
    """The outcomes of the arms, without their controls."""
    return {arm: outcome for (arm, kind), outcome in table.outcomes.items() if kind == ARM}


def draw_rates(path: Path, tasks: Mapping[str, Task], tables: Mapping[str, Table]) -> None:
    """Draws loss against peak learning rate, a panel for each task, with crosses for divergence."""
    rows = -(-len(tables) // COLUMNS)
    columns = min(COLUMNS, len(tables))
    size = max(3.4 * columns, MIN_WIDTH), 2.7 * rows + 0.8
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=False):
        _draw_task(axis, tasks[name], table)
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    arms = {arm for table in tables.values() for arm in of_arms(table)}
    handles = {arm: plt.Line2D([], [], color=COLOURS[arm]) for arm in COLOURS if arm in arms}
    if arms - COLOURS.keys():
        handles["other clippers"] = plt.Line2D([], [], color="lightgrey")
    handles["diverges"] = plt.Line2D([], [], color="grey", marker="x", linestyle="")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_task(axis: plt.Axes, task: Task, table: Table) -> None:
    outcomes = of_arms(table)
    for arm in sorted(outcomes, key=lambda arm: arm in COLOURS):
        outcome, colour = outcomes[arm], COLOURS.get(arm, "lightgrey")
        losses = capped(outcome).mean(axis=1)
        axis.plot(table.rates, losses, color=colour, linewidth=1.5 if arm in COLOURS else 0.8)
        share = diverged(outcome).mean(axis=1)
        some = share > 0
        axis.scatter(
            np.array(table.rates)[some], losses[some], 60 * share[some], colour, marker="x"
        )
    axis.set(xscale="log", title=task.title, xlabel="peak learning rate", ylabel=task.unit)


def draw_overview(path: Path, tasks: Mapping[str, Task], tables: Mapping[str, Table]) -> None:
    """Draws a heat map of the progress that each arm loses to the best, as a mean over rates."""
    arms = list(dict.fromkeys(arm for table in tables.values() for arm in of_arms(table)))
    lost = np.full((len(arms), len(tables)), np.nan)
    for column, table in enumerate(tables.values()):
        for arm, figures in lost_progress(of_arms(table)).items():
            lost[arms.index(arm), column] = 100 * figures.mean()
    figure, axis = plt.subplots(
        figsize=(0.62 * len(tables) + 4.6, 0.34 * len(arms) + 2.2), layout="constrained"
    )
    image = axis.imshow(lost, cmap="Reds", norm=mpl.colors.PowerNorm(0.5, 0, 50), aspect="auto")
    for (row, column), figure_lost in np.ndenumerate(lost):
        if np.isfinite(figure_lost):
            colour = "white" if figure_lost > 25 else "black"
            text = f"{figure_lost:.0f}" if figure_lost >= 9.5 else f"{figure_lost:.1f}"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    titles = [tasks[name].title for name in tables]
    axis.set_xticks(range(len(tables)), titles, rotation=40, ha="right")
    axis.set_yticks(range(len(arms)), arms)
    figure.colorbar(image, label="% of progress lost")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(folder: Path, tasks: Mapping[str, Task], tables: Mapping[str, Table]) -> Iterable[Path]:
    """Draws both pictures, and yields their paths."""
    for name, draw_one in (("rates.png", draw_rates), ("overview.png", draw_overview)):
        draw_one(folder / name, tasks, tables)
        yield folder / name
