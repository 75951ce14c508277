"""Measures how well each arm keeps the promise of a good default.

At every rate of every task, it ends within 1 % of the best arm or within noise of it, and it does
not diverge more often than any other.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from study.measures import best_progress, capped, diverged, interval, leading_losses
from study.results import Outcome

WITHIN = 1.0


class Figures(NamedTuple):
    """How well an arm keeps the promise, over the rates of a task.

    Attributes:
        kept: Share of rates at which it is within 1 % of the best arm, or within noise.
        lost: Mean over rates of its loss above the best arm's, in % of the best progress.
        worst: The largest of these losses.
        diverged: Share of runs that diverge.
        at_best: Its loss above the best arm's, in the same unit, both at their own best rates.
    """

    kept: float
    lost: float
    worst: float
    diverged: float
    at_best: float


def judge(outcome: Outcome, arms: Mapping[str, Outcome], seeds: slice) -> Figures:
    """Compares an arm with the best arm at each rate, paired over these seeds."""
    arms = {name: _of_seeds(other, seeds) for name, other in arms.items()}
    outcome = _of_seeds(outcome, seeds)
    gaps = 100 * (capped(outcome) - leading_losses(arms)) / best_progress(arms)
    found = [interval(of_rate) for of_rate in gaps]
    kept = [lost.mean <= max(WITHIN, lost.half) for lost in found]
    losses = [max(lost.mean, 0.0) for lost in found]
    return Figures(
        float(np.mean(kept)),
        float(np.mean(losses)),
        float(np.max(losses)),
        float(np.mean(diverged(outcome))),
        100 * (_best(outcome) - min(map(_best, arms.values()))) / best_progress(arms),
    )


def _best(outcome: Outcome) -> float:
    """The least mean loss over rates."""
    return float(capped(outcome).mean(axis=1).min())


def _of_seeds(outcome: Outcome, seeds: slice) -> Outcome:
    num_seeds = range(outcome.final.shape[1])[seeds]
    return Outcome(*(figure[:, num_seeds] for figure in outcome))


def print_figures(title: str, figures: Mapping[str, Mapping[str, Figures]]) -> None:
    """Prints a line for each rule. Those that keep the promise most often come first."""
    tasks = list(next(iter(figures.values())))
    print(f"\n{title}: {', '.join(tasks)}")
    print(f"{'':36}{'kept':>7}{'lost %':>8}{'worst %':>9}{'diverge':>9}", end="")
    print(f"{'at best %':>11}{'worst %':>9}   lost % in each")

    def of(rule: str) -> np.ndarray:
        return np.array(list(figures[rule].values()))

    for rule in sorted(figures, key=lambda rule: (-of(rule)[:, 0].mean(), of(rule)[:, 1].mean())):
        kept, lost, worst, diverge, at_best = of(rule).T
        each = "".join(f"{figure:6.1f}" for figure in lost)
        print(
            f"{rule:36}{kept.mean():7.0%}{lost.mean():8.2f}{worst.max():9.1f}"
            f"{diverge.mean():9.1%}{at_best.mean():11.2f}{at_best.max():9.1f}  {each}"
        )
