"""Compares candidates for the default rule of `autoclip()`, without a percentile, by training.

    make study-rules [ARGS="--out rules"]

Trains candidates on half of the tasks with half of the seeds, and compares each with the arms that
`make study` has trained there. In every task and at every rate, a rule should end within 1 % of the
best arm or within noise of it, and should not diverge more often. The choice is made from the first
table. The second one has the same figures of all arms on the other tasks and seeds. Candidates with
stored results are not trained again.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int32
from machine import describe_machine
from study.__main__ import NUM_SEEDS, STORED
from study.arms import AUTO_ARMS, Arm
from study.pictures import of_arms
from study.promise import Figures, judge, print_figures
from study.results import ARM, append, load, summarize
from study.tasks import TASKS
from study.training import train

import optax_smartclip as smartclip
from optax_smartclip.engine.norms import Norms

CHOOSING_TASKS = (
    "rnn-adam",
    "lm-b2-0.95",
    "conv-16",
    "conv-adam",
    "regression",
    "damaged-layer",
    "policy",
    "normalized",
)
CHOOSING_SEEDS = slice(0, NUM_SEEDS // 2)
REPORTING_SEEDS = slice(NUM_SEEDS // 2, NUM_SEEDS)

# A function that returns percentiles, the norm of this step -> the threshold.
Limit = Callable[[Callable[[float], Norms], Norms], Norms]


class RuleState(NamedTuple):
    """The history of norms, the number of recorded norms, and the least threshold so far."""

    history: Any
    num_recorded: Int32[Array, " groups"]
    lowest: Norms


def candidate(
    limit: Limit, *, window: int = 112, early_factor: float = 1.5, falls_for: int = 0
) -> Arm:
    """Makes a clipper with this limit, and a multiple of the median until there are 10 norms.

    Args:
        limit: The threshold.
        window: The number of norms in the history.
        early_factor: The multiple of the median of the first norms.
        falls_for: The number of first steps in which the threshold may not rise.
    """
    history = smartclip.ring_buffer(window)

    def init(num_groups: int) -> RuleState:
        counts = jnp.zeros(num_groups, jnp.int32)
        return RuleState(history.init(num_groups), counts, jnp.full(num_groups, jnp.inf))

    def threshold(state: RuleState, norms: Norms) -> Norms:
        def percentile(percent: float) -> Norms:
            return history.percentile(state.history, percent)

        is_early = state.num_recorded < 10
        limits = jnp.where(is_early, early_factor * percentile(50.0), limit(percentile, norms))
        falls = state.num_recorded < falls_for
        limits = jnp.where(falls, jnp.minimum(limits, state.lowest), limits)
        return jnp.where(limits > 0, limits, jnp.inf)

    def record(state: RuleState, norms: Norms, thresholds: Norms) -> RuleState:
        is_first = state.num_recorded == 0
        lowest = jnp.where(is_first, jnp.inf, jnp.minimum(state.lowest, thresholds))
        return RuleState(history.record(state.history, norms), state.num_recorded + 1, lowest)

    rule = smartclip.ThresholdRule(init, threshold, record)
    return Arm(smartclip.clip_by_rule(rule, warmup_steps=1))


def quantile(percent: float) -> Limit:
    """The percentile itself."""
    return lambda percentile, norms: percentile(percent)


def upper_fence(percentile: Callable[[float], Norms], norms: Norms) -> Norms:
    """Tukey's upper fence: q75 + 1.5 (q75 - q25)."""
    del norms
    return percentile(75.0) + 1.5 * (percentile(75.0) - percentile(25.0))


def lower_half(factor: float) -> Limit:
    """The median plus a multiple of its distance to q25. Norms above the median have no effect."""

    def limit(percentile: Callable[[float], Norms], norms: Norms) -> Norms:
        del norms
        return percentile(50.0) + factor * (percentile(50.0) - percentile(25.0))

    return limit


def to_median(percentile: Callable[[float], Norms], norms: Norms) -> Norms:
    """The median, for norms above the upper fence only."""
    return jnp.where(norms > upper_fence(percentile, norms), percentile(50.0), norms)


def reciprocal(percentile: Callable[[float], Norms], norms: Norms) -> Norms:
    """Cuts norms above the upper fence, larger ones to lower values, down to the median (ZClip)."""
    fence = upper_fence(percentile, norms)
    cut = jnp.maximum(percentile(50.0), fence * fence / norms)
    return jnp.where(norms > fence, cut, norms)


def root(percent: float) -> Limit:
    """The geometric mean of the norm and a percentile, at most the upper fence."""

    def limit(percentile: Callable[[float], Norms], norms: Norms) -> Norms:
        level = percentile(percent)
        return jnp.minimum(
            upper_fence(percentile, norms), jnp.sqrt(level * jnp.maximum(norms, level))
        )

    return limit


# Two more candidates are trained by `make study`: the rules of AUTO (the median plus 2.5 times its
# distance to q25, of 48 norms) and of OUTLIERS_ONLY (the upper fence of 112).
CANDIDATES: dict[str, Arm] = {
    "upper fence, falls for 112": candidate(upper_fence, early_factor=1.0, falls_for=112),
    "upper fence of 32": candidate(upper_fence, early_factor=3.0, window=32),
    "q75": candidate(quantile(75.0)),
    "median": candidate(quantile(50.0), early_factor=1.0),
    "q25": candidate(quantile(25.0), early_factor=1.0),
    "above upper fence, to median": candidate(to_median, early_factor=3.0),
    "above upper fence, reciprocal": candidate(reciprocal, early_factor=3.0),
    "root from median": candidate(root(50.0), early_factor=1.0),
    "lower half, 1.5": candidate(lower_half(1.5)),
    "lower half, 2": candidate(lower_half(2.0)),
    "lower half, 1.5, of 64": candidate(lower_half(1.5), window=64),
}


def train_candidates(folder: Path) -> None:
    """Trains the candidates that are missing in the files."""
    seeds = range(NUM_SEEDS)[CHOOSING_SEEDS]
    for name in CHOOSING_TASKS:
        task, path = TASKS[name](), folder / f"{name}.csv"
        for rule, arm in CANDIDATES.items():
            if (rule, ARM) in load(path).outcomes:
                continue
            start = time.perf_counter()
            outcome = summarize(train(task, arm, seeds, np.ones((len(task.rates), len(seeds)))))
            append(path, describe_machine(jax, optax), (rule, ARM), task.rates, seeds, outcome)
            print(f"{name}: {rule}, after {time.perf_counter() - start:.0f} s", flush=True)


def main(args: list[str] | None = None) -> int:
    """Trains the candidates and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=STORED, help="of make study")
    parser.add_argument("--out", type=Path, default=STORED / "rules", help="of the candidates")
    options = parser.parse_args(args)

    train_candidates(options.out)
    found: dict[str, dict[str, Figures]] = {}
    for name in CHOOSING_TASKS:
        arms = of_arms(load(options.results / f"{name}.csv"))
        # The arms of AUTO are also compared with the others only, as the candidates are.
        others = {arm: outcome for arm, outcome in arms.items() if arm not in AUTO_ARMS}
        candidates = of_arms(load(options.out / f"{name}.csv"))
        for rule, outcome in (arms | candidates).items():
            found.setdefault(rule, {})[name] = judge(outcome, others, CHOOSING_SEEDS)
    print_figures("Chosen on", found)

    reported: dict[str, dict[str, Figures]] = {}
    for name in [name for name in TASKS if name not in CHOOSING_TASKS]:
        arms = of_arms(load(options.results / f"{name}.csv"))
        for arm, outcome in arms.items():
            reported.setdefault(arm, {})[name] = judge(outcome, arms, REPORTING_SEEDS)
    print_figures("Reported on", reported)
    return 0


if __name__ == "__main__":
    sys.exit(main())
