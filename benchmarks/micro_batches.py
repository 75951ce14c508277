"""Measures the gain from clipping before the mean is taken, if a few examples are damaged.

This is the run of `make study` with damaged examples: in 2 % of the steps, the features of 4 of the
128 examples are 255 times too large. `autoclip()` clips the mean gradient of the batch, that of
each micro-batch, or that of each example. In some arms, it then clips the mean as well. Examples
come in random order, so the damaged ones are in several micro-batches. All runs with the same seed
start from the same parameters and see the same batches, with damage and without.

    PYTHONPATH=benchmarks:examples python benchmarks/micro_batches.py [--examples] [--seeds 4]

Prints the held-out loss at the end, and by how much it is below the loss with a clipped batch:
means over seeds, with 95 % intervals. "Damage costs" is the loss minus that of the same arm without
damage.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import damaged_text
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from machine import describe_machine
from scipy import stats
from study.tasks import damaged
from study.training import Task

import optax_smartclip as smartclip

PyTree = Any
Losses = Float[np.ndarray, " seeds"]


class Arm(NamedTuple):
    """The clipper of the parts of a batch, the number of parts, and the clipper of their mean."""

    of_part: optax.GradientTransformation
    parts: int = 1
    of_mean: optax.GradientTransformation = optax.identity()


AUTO = smartclip.autoclip()
MEAN = "the batch"
# The others are compared with the first one.
ARMS: dict[str, Arm] = {
    MEAN: Arm(AUTO),
    "nothing": Arm(optax.identity()),
    "the batch, at the best fixed norm": Arm(optax.clip_by_global_norm(1.0)),
    "8 micro-batches": Arm(AUTO, parts=8),
    "8 micro-batches, and the batch": Arm(AUTO, parts=8, of_mean=AUTO),
}
EXAMPLES = {"128 examples": Arm(AUTO, parts=damaged_text.BATCH)}


def train(task: Task, arm: Arm, rate: float, seeds: Sequence[int]) -> Losses:
    """Trains with the peak learning rate `rate`; returns the held-out losses at the end."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, task.steps // 10, task.steps)
    tx = optax.chain(arm.of_mean, task.optimizer(schedule))

    def run(seed: Array) -> Array:
        key = jax.random.key(seed)
        params = task.init(jax.random.fold_in(key, task.steps))

        def step(carry: PyTree, number: Array) -> tuple[PyTree, None]:
            params, of_part, state = carry

            # clip_micro_batches does the same for all parts at once; a loop is faster on a CPU.
            def add(carry: PyTree, part: PyTree) -> tuple[PyTree, None]:
                total, of_part = carry
                grads = jax.grad(task.loss)(params, part)
                clipped, of_part = arm.of_part.update(grads, of_part, params)
                return (jax.tree.map(jnp.add, total, clipped), of_part), None

            zeros = jax.tree.map(jnp.zeros_like, params)
            batch = task.batch(jax.random.fold_in(key, number))
            parts = jax.tree.map(lambda leaf: leaf.reshape(arm.parts, -1, leaf.shape[1]), batch)
            (total, of_part), _ = jax.lax.scan(add, (zeros, of_part), parts)
            mean = jax.tree.map(lambda leaf: leaf / arm.parts, total)
            updates, state = tx.update(mean, state, params)
            return (optax.apply_updates(params, updates), of_part, state), None

        start = params, arm.of_part.init(params), tx.init(params)
        (params, *_), _ = jax.lax.scan(step, start, jnp.arange(task.steps))
        return task.held_out(params)

    losses = jax.jit(lambda seeds: jax.lax.map(run, seeds))(jnp.asarray(seeds))
    return np.asarray(losses, np.float64)


def load_task(*, has_damage: bool) -> Task:
    """Makes the task of the study, with its examples in random order."""
    task = damaged.damaged("damaged examples", damaged.EXAMPLES)

    def batch(key: Key[Array, ""]) -> PyTree:
        windows, factors = task.batch(key)
        order = jax.random.permutation(jax.random.fold_in(key, 1), len(windows))
        return windows[order], factors[order] if has_damage else jnp.ones_like(factors)

    return task._replace(batch=batch)


def interval(values: Losses) -> str:
    """Formats the mean and half of its 95 % interval."""
    error = values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.4f} +- {stats.t.ppf(0.975, len(values) - 1) * error:.4f}"


def main() -> None:
    """Trains the arms and prints the row of each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--examples", action="store_true", help="clip each example, too: three times as long"
    )
    parser.add_argument("--seeds", type=int, default=4, help="runs of each arm, at least 2")
    parser.add_argument("--steps", type=int, default=400, help="updates of each run")
    parser.add_argument("--rate", type=float, default=1e-2, help="the peak learning rate")
    arguments = parser.parse_args()
    start = time.perf_counter()
    print(describe_machine(jax, optax))
    tasks = [load_task(has_damage=has_damage) for has_damage in (True, False)]
    tasks = [task._replace(steps=arguments.steps) for task in tasks]
    print(f"{'clipped':34}{'held-out loss':>16}{'below the batch':>24}{'damage costs':>24}")
    losses: dict[str, Losses] = {}
    for name, arm in {**ARMS, **(EXAMPLES if arguments.examples else {})}.items():
        seeds = range(arguments.seeds)
        losses[name], undamaged = (train(task, arm, arguments.rate, seeds) for task in tasks)
        paired = "" if name == MEAN else interval(losses[MEAN] - losses[name])
        cost = interval(losses[name] - undamaged)
        print(f"{name:34}{losses[name].mean():16.4f}{paired:>24}{cost:>24}", flush=True)
    print(
        f"{tasks[0].unit}; {arguments.seeds} seeds, {arguments.steps} steps, rate "
        f"{arguments.rate:g}; {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
