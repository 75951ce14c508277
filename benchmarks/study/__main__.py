"""Compares clippers over learning rates: all arms on all tasks, paired over seeds.

    make study [ARGS="--task rnn-adam conv-16 --arm 'autoclip()' --seeds 12 --quick --out study"]

Each arm of each task is trained at seven peak rates over three decades and with twelve seeds, in
one compiled program. With the same seed, all arms start from the same parameters and see the same
batches. Each run of an arm has a control: no clipping, at the rate times the mean scale of that
run. If an arm is not better than its control, its only effect is a smaller step.

The results of an arm are added to `OUT/TASK.csv` when it is done. Arms in the file are not trained
again, so a stopped run resumes where it was. After training, tables are printed and pictures drawn.
`--quick` trains three arms at three rates with four seeds, and compares the signs of their
differences with the stored results. Without `--task`, all tasks are trained, which takes hours.

Before the study was run, we stated the results that would refute claims of the literature:

- AGC helps at large batches and without normalization (arXiv 2102.06171): `agc()` diverges at
  conv-1024 at every rate where no clipping diverges; or it gains as much at conv-16.
- ZClip widens the range of rates (2504.02507): the sensitivity of `zclip()` on lm-b2-0.95 is not
  below that of `clip_by_global_norm(1)`.
- AdaGC needs a threshold for each tensor (2502.11034): `adagc()` is not better than `zclip()`
  where one layer is damaged.
- AutoClip's percentile of 10 is a good default (Seetharaman et al., 2020): `autoclip(10)` ends
  worse than `autoclip(50)` by more than noise on most of the tasks, each at its best rate.
- Clipping is essential in policy gradients: no clipping at its best rate is within noise of the
  best arm on policy.
- Clipping only makes the step smaller: the controls end within noise of their arms on most tasks.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from machine import describe_machine
from study import pictures
from study.arms import ARMS, AUTO, FIXED_NORMS, NONE, Arm, fixed
from study.measures import (
    best_at_budget,
    best_progress,
    capped,
    diverged,
    interval,
    lost_progress,
    sensitivity,
)
from study.promise import judge, print_figures
from study.results import ARM, CONTROL, Table, append, load, summarize
from study.tasks import TASKS
from study.training import Task, train

STORED = Path(__file__).parent / "results"
NUM_SEEDS = 12
# The number of settings that a user is expected to try.
TRIALS = 3
SHARES = ("diverge %", "spikes %", "clipped %")
QUICK_ARMS = (NONE, fixed(1.0), AUTO)
QUICK_SEEDS = 4
# Every third rate: low, middle, high.
QUICK_STRIDE = 3


def run_task(
    name: str, task: Task, arms: Mapping[str, Arm], seeds: Sequence[int], path: Path
) -> Table:
    """Trains the arms that are missing in the file, one by one, and then their controls."""
    machine = describe_machine(jax, optax)
    for kind, arm in itertools.product((ARM, CONTROL), arms):
        done = load(path)
        # Without clipping, an arm is its own control.
        if (arm, kind) in done.outcomes or (kind == CONTROL and arm == NONE):
            continue
        if kind == CONTROL:
            trained, factors = ARMS[NONE], done.outcomes[arm, ARM].scale
        else:
            trained, factors = arms[arm], np.ones((len(task.rates), len(seeds)))
        start = time.perf_counter()
        outcome = summarize(train(task, trained, seeds, factors))
        append(path, machine, (arm, kind), task.rates, seeds, outcome)
        seconds = time.perf_counter() - start
        print(f"{name}: {arm}, {kind}, after {seconds:.0f} s", flush=True)
    return load(path)


def print_table(task: Task, table: Table) -> None:
    """Prints the losses at each rate, then the measures of each arm, as means over seeds."""
    outcomes = pictures.of_arms(table)
    lost = lost_progress(outcomes)
    print(f"\n{task.title}: {task.unit} at the end, {len(table.seeds)} seeds")
    print_row("at the rate", [f"{rate:g}" for rate in table.rates])
    for arm, outcome in outcomes.items():
        print_row(arm, map(interval, capped(outcome)))

    print_row(
        "", ["sensitivity", f"best of {TRIALS}", "lost %", "over control %", *SHARES, "scale"]
    )
    for arm, outcome in outcomes.items():
        shares = (diverged(outcome), outcome.spikes, outcome.clipped)
        measures = [
            interval(sensitivity(outcome)),
            interval(best_at_budget([outcome], TRIALS)),
            interval(100 * lost[arm].mean(axis=0)),
            over_control(table, arm),
            *[interval(100 * share.mean(axis=0)) for share in shares],
            interval(outcome.scale.mean(axis=0)),
        ]
        print_row(arm, measures)
    settings = [outcomes[fixed(norm)] for norm in FIXED_NORMS if fixed(norm) in outcomes]
    if len(settings) == len(FIXED_NORMS):
        print_row(
            "clip_by_global_norm, norm tuned", ["", interval(best_at_budget(settings, TRIALS))]
        )


def print_row(name: str, cells: Iterable[object]) -> None:
    """Prints a line of a table."""
    print(f"{name:38}" + "".join(f"{cell!s:19}" for cell in cells).rstrip())


def over_control(table: Table, arm: str) -> str:
    """The loss minus that of the control, in % of the best progress."""
    if (arm, CONTROL) not in table.outcomes:
        return "-"
    losses, of_control = (capped(table.outcomes[arm, kind]) for kind in (ARM, CONTROL))
    unit = best_progress(pictures.of_arms(table))
    return str(interval(100 * (losses - of_control).mean(axis=0) / unit))


def print_promise(tables: Mapping[str, Table]) -> None:
    """Prints how often each arm is as good as the best, if all tasks have the same arms."""
    arms = {name: pictures.of_arms(table) for name, table in tables.items()}
    if len({frozenset(outcomes) for outcomes in arms.values()}) > 1:
        return
    figures = {
        arm: {name: judge(outcomes[arm], outcomes, slice(None)) for name, outcomes in arms.items()}
        for arm in next(iter(arms.values()))
    }
    print_figures("All rates and seeds", figures)


def compare_signs(table: Table, stored: Table) -> list[str]:
    """Lists the differences from no clipping whose sign differs in the stored results.

    Only clear differences in the stored results count: paired over all of their seeds, the mean is
    farther from zero than the width of its interval.
    """
    here, there = pictures.of_arms(table), pictures.of_arms(stored)
    wrong = []
    for row, rate in enumerate(table.rates):
        old_row = stored.rates.index(rate)
        for arm in [arm for arm in here if arm in there and arm != NONE]:
            old = interval(capped(there[arm])[old_row] - capped(there[NONE])[old_row])
            new = np.mean(capped(here[arm])[row] - capped(here[NONE])[row])
            if abs(old.mean) > 2 * old.half and new * old.mean <= 0:
                wrong.append(f"{arm} less {NONE} at {rate:g}: {new:.3g}, stored {old}")
    return wrong


def main(args: Sequence[str] | None = None) -> int:
    """Trains the arms, prints the tables, draws the pictures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("study"))
    options = parser.parse_args(args)

    tasks = {name: TASKS[name]() for name in options.task}
    names, seeds = options.arm, range(options.seeds)
    if options.quick:
        names, seeds = QUICK_ARMS, range(QUICK_SEEDS)
        tasks = {
            name: task._replace(rates=task.rates[::QUICK_STRIDE]) for name, task in tasks.items()
        }
    arms = {arm: ARMS[arm] for arm in names}
    tables, wrong = {}, []
    for name, task in tasks.items():
        tables[name] = run_task(name, task, arms, seeds, options.out / f"{name}.csv")
        print_table(task, tables[name])
        stored = load(STORED / f"{name}.csv")
        if options.quick and stored.outcomes:
            wrong += [f"{name}: {line}" for line in compare_signs(tables[name], stored)]
    print_promise(tables)
    for path in pictures.draw(options.out, tasks, tables):
        print(f"Wrote {path}.")
    print("\n".join(["Signs that differ from the stored results:", *wrong]) if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
