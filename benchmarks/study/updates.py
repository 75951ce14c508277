"""Compares clipping of updates with clipping of gradients, which may come too late.

    make study-updates [ARGS="--task lm-b2-0.999 --arm 'stable_adamw()'"]

With a large b2, Adam's second moment lags when gradients grow. Its update can then be too long in a
step whose gradient norm does not stand out (Bai et al., arXiv 2506.04805). The arms here clip
Adam's step, or are StableAdamW, or cut singular values. They are trained on the transformers of the
study, with its rates and the first of its seeds.

In the names of arms, `tx` is the optimizer with its learning rate, and `step` is the optimizer
without it.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax
from study.__main__ import STORED, print_row, run_task
from study.arms import ARMS, AUTO, NONE, Arm
from study.measures import Interval, best_progress, capped, diverged, interval
from study.results import ARM, CONTROL, Outcome, Table
from study.tasks import TASKS

import optax_smartclip as smartclip

UPDATE_TASKS = ("lm-b2-0.999", "lm-b2-0.95")
NUM_SEEDS = 6
STABLE = "stable_adamw()"
UPDATE_ARMS: dict[str, Arm] = {
    NONE: ARMS[NONE],
    AUTO: ARMS[AUTO],
    "chain(tx, autoclip())": Arm(optax.identity(), after_rate=smartclip.autoclip()),
    "chain(step, autoclip(), rate)": Arm(optax.identity(), after_step=smartclip.autoclip()),
    STABLE: Arm(optax.identity(), stable=True),
    "chain(autoclip(), stable_adamw())": Arm(smartclip.autoclip(), stable=True),
    "chain(spectral_clip(), tx)": Arm(smartclip.spectral_clip()),
    "chain(step, spectral_clip(), rate)": Arm(
        optax.identity(), after_step=smartclip.spectral_clip()
    ),
    "chain(spectral_clip(limit=0.1), tx)": Arm(smartclip.spectral_clip(limit=0.1)),
    **{
        f"chain(step, spectral_clip(limit={limit}), rate)": Arm(
            optax.identity(), after_step=smartclip.spectral_clip(limit=limit)
        )
        for limit in (3, 10)
    },
}


class Gain(NamedTuple):
    """Losses of other arms minus those of an arm, in % of the best progress, paired over seeds.

    Attributes:
        over_none: The gain over no clipping, as a mean over rates.
        over_auto: The gain over `autoclip()` before the optimizer, as a mean over rates.
        at_best: The gain over no clipping, each at its own best rate. The rates of the controls
            count among those of no clipping, since controls do not clip either.
        over_control: The gain over no clipping at the rate times the mean scale of the arm's run,
            as a mean over rates; None if those runs do not exist.
    """

    over_none: Interval
    over_auto: Interval
    at_best: Interval
    over_control: Interval | None


def gain(table: Table, arm: str) -> Gain:
    """Compares an arm with no clipping, with `autoclip()` and with its control."""
    unit = best_progress({name: run for (name, kind), run in table.outcomes.items() if kind == ARM})

    def losses(name: str, kind: str = ARM) -> np.ndarray:
        return 100 * capped(table.outcomes[name, kind]) / unit

    def at_best(losses: np.ndarray) -> np.ndarray:
        return losses[losses.mean(axis=1).argmin()]

    def over(other: np.ndarray) -> Interval:
        return interval((other - losses(arm)).mean(axis=0))

    controls = [losses(arm, CONTROL)] if (arm, CONTROL) in table.outcomes else []
    without_clipping = np.concatenate([losses(NONE), *controls])
    return Gain(
        over(losses(NONE)),
        over(losses(AUTO)),
        interval(at_best(without_clipping) - at_best(losses(arm))),
        over(controls[0]) if controls else None,
    )


def print_gains(title: str, table: Table) -> None:
    """Prints the loss minus that of no clipping at each rate, then the gains."""
    outcomes = {name: run for (name, kind), run in table.outcomes.items() if kind == ARM}
    none = outcomes.pop(NONE)
    print(f"\n{title}: bits/char less those of no clipping, {len(table.seeds)} seeds")
    print_row("at the rate", [f"{rate:g}" for rate in table.rates])
    print_row(NONE, map(interval, capped(none)))
    for arm, outcome in outcomes.items():
        print_row(arm, map(interval, capped(outcome) - capped(none)))

    names = ["over none %", "over autoclip() %", "at best %", "over control %"]
    print_row("gain", [*names, "diverge %", "spikes %", "clipped %", "scale"])
    for arm, outcome in {NONE: none, **outcomes}.items():
        print_row(arm, [figure or "-" for figure in gain(table, arm)] + shares(outcome))


def shares(outcome: Outcome) -> list[Interval]:
    """The % of runs that diverge, of steps with a spike and of clipped steps; the mean scale."""
    figures = (100 * diverged(outcome), 100 * outcome.spikes, 100 * outcome.clipped, outcome.scale)
    return [interval(figure.mean(axis=0)) for figure in figures]


def main(args: list[str] | None = None) -> int:
    """Trains the arms and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--task", nargs="+", choices=UPDATE_TASKS, default=UPDATE_TASKS, metavar="TASK"
    )
    parser.add_argument(
        "--arm", nargs="+", choices=UPDATE_ARMS, default=list(UPDATE_ARMS), metavar="ARM"
    )
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    parser.add_argument("--out", type=Path, default=STORED / "updates")
    options = parser.parse_args(args)

    arms = {arm: UPDATE_ARMS[arm] for arm in dict.fromkeys((NONE, AUTO, *options.arm))}
    for name in options.task:
        task = TASKS[name]()
        path = options.out / f"{name}.csv"
        print_gains(task.title, run_task(name, task, arms, range(options.seeds), path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
