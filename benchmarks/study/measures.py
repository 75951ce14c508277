"""Computes the reported figures from the losses of all runs.

Losses are `[rates, seeds]`. A run that does not end better than it began counts with its loss at
the start, so that one such run does not hide the results of the others.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from study.results import Outcome
from study.training import Figures


class Interval(NamedTuple):
    """A mean over seeds, and half the width of its 95 % confidence interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} +- {self.half:.2g}"


def interval(figures: np.ndarray) -> Interval:
    """Student's interval over seeds. For differences between two arms, it is the paired one."""
    num = len(figures)
    half = stats.t.ppf(0.975, num - 1) * np.std(figures, ddof=1) / math.sqrt(num)
    return Interval(float(np.mean(figures)), float(half))


def capped(outcome: Outcome) -> Figures:
    """The final loss, or the loss at the start if a run ended with a worse one or with NaN."""
    return np.where(outcome.final < outcome.start, outcome.final, outcome.start)


def diverged(outcome: Outcome) -> np.ndarray:
    """Which runs diverged: they do not end better than they began, or lose most of their progress.

    A network whose units have died ends at chance, which may be better than its start. Hence a run
    has also diverged if its rate is above the arm's best rate, and it ends with less than half of
    the progress at the best rate.
    """
    losses = capped(outcome)
    means = losses.mean(axis=1)
    is_faster = np.arange(len(means))[:, None] > means.argmin()
    lost_most = losses > (outcome.start + means.min()) / 2
    return ~(outcome.final < outcome.start) | (is_faster & lost_most)


def sensitivity(outcome: Outcome) -> np.ndarray:
    """The expected excess of the loss over its best at a random rate, for each seed.

    Wortsman et al., arXiv 2309.14322: the mean over rates of min(loss, loss at the start), minus
    the least loss.
    """
    losses = capped(outcome)
    return losses.mean(axis=0) - losses.min(axis=0)


def best_of(losses: np.ndarray, trials: int) -> float:
    """The expected least loss of `trials` different settings, drawn at random from `[settings]`.

    Raises:
        ValueError: If there are fewer settings.
    """
    num = len(losses)
    if trials > num:
        raise ValueError(f"`trials` must be at most the number of settings, {num}, got {trials}.")
    ways = [math.comb(num - 1 - rank, trials - 1) for rank in range(num)]
    return float(np.dot(np.sort(losses), ways) / math.comb(num, trials))


def best_at_budget(outcomes: Sequence[Outcome], trials: int) -> np.ndarray:
    """The expected least loss of `trials` trials, for each seed.

    A setting is a rate, or a rate and a norm if the norm of an arm must be tuned.

    Args:
        outcomes: One for each norm of the arm.
        trials: The number of settings to try, drawn at random.
    """
    losses = np.concatenate([capped(outcome) for outcome in outcomes])
    return np.array([best_of(of_seed, trials) for of_seed in losses.T])


def best_progress(outcomes: Mapping[str, Outcome]) -> float:
    """The loss at the start minus the best mean loss of any arm at any rate."""
    start = np.mean([outcome.start.mean() for outcome in outcomes.values()])
    return float(start - min(capped(outcome).mean(axis=1).min() for outcome in outcomes.values()))


def leading_losses(outcomes: Mapping[str, Outcome]) -> Figures:
    """The capped losses of the best arm at each rate."""
    losses = np.stack([capped(outcome) for outcome in outcomes.values()])
    leaders = losses.mean(axis=2).argmin(axis=0)
    return losses[leaders, np.arange(len(leaders))]


def lost_progress(outcomes: Mapping[str, Outcome]) -> dict[str, Figures]:
    """The loss of each run minus the best arm's at its rate, in units of the best progress."""
    leading, unit = leading_losses(outcomes), best_progress(outcomes)
    return {name: (capped(outcome) - leading) / unit for name, outcome in outcomes.items()}
