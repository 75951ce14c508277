"""Trains an arm at all learning rates and with all seeds in one compiled program.

Arms are paired: with the same seed, all of them start from the same parameters and see the same
batches, at every rate.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, Num
from study.arms import Arm, Optimizer, last_scale

PyTree = Any
# A figure for each run of an arm.
Figures = Float[np.ndarray, "rates seeds"]


def as_it_is(key: Key[Array, ""], grads: PyTree) -> PyTree:
    """Returns the gradient without damage."""
    del key
    return grads


class Task(NamedTuple):
    """A model, its data and its training.

    Attributes:
        title: The title in a picture.
        unit: The unit of the reported loss.
        steps: The number of updates of a run.
        rates: Peak learning rates.
        optimizer: Makes the optimizer from a schedule.
        init: Key -> parameters.
        batch: Key -> the batch of one step.
        loss: Parameters, batch -> the loss to differentiate.
        held_out: Parameters -> the reported loss; lower is better.
        damage: Key, gradient -> gradient, which may be damaged.
        stable: Makes StableAdamW from a schedule, with the parameters of `optimizer`, if that is
            AdamW.
    """

    title: str
    unit: str
    steps: int
    rates: tuple[float, ...]
    optimizer: Optimizer
    init: Callable[[Key[Array, ""]], PyTree]
    batch: Callable[[Key[Array, ""]], PyTree]
    loss: Callable[[PyTree, PyTree], Float[Array, ""]]
    held_out: Callable[[PyTree], Float[Array, ""]]
    damage: Callable[[Key[Array, ""], PyTree], PyTree] = as_it_is
    stable: Optimizer | None = None


class Runs(NamedTuple):
    """The results of all runs of an arm.

    Attributes:
        start: The reported loss before training.
        final: The reported loss after training; NaN if parameters were not finite.
        losses: Training loss of each step.
        scales: The factor by which the norm of each gradient was scaled.
    """

    start: Figures
    final: Figures
    losses: Float[np.ndarray, "rates seeds steps"]
    scales: Float[np.ndarray, "rates seeds steps"]


def train(
    task: Task, arm: Arm, seeds: Sequence[int], factors: Num[np.ndarray, "rates seeds"]
) -> Runs:
    """Trains with the rates of the task, each multiplied by its factor."""
    rates = np.float32(np.array(task.rates)[:, None] * factors)
    return Runs(*map(np.asarray, _program(task, arm)(jnp.array(seeds), rates.T)))


# The cache holds the programs of the last arm and of no clipping, which trains all controls.
@functools.lru_cache(maxsize=2)
def _program(task: Task, arm: Arm) -> Callable[..., tuple[Array, ...]]:
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, task.steps // 10, task.steps)

    def run(seed, rate):
        key = jax.random.key(seed)
        params = task.init(jax.random.fold_in(key, task.steps))
        optimizer = task.stable if arm.stable else task.optimizer
        tx = arm.around(optimizer, lambda count: rate * shape(count))

        def step(carry, number):
            params, state = carry
            batch_key, damage_key = jax.random.split(jax.random.fold_in(key, number))
            loss, grads = jax.value_and_grad(task.loss)(params, task.batch(batch_key))
            grads = task.damage(damage_key, grads)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), (loss, last_scale(state))

        start = task.held_out(params)
        carry = params, tx.init(params)
        (params, _), (losses, scales) = jax.lax.scan(step, carry, jnp.arange(task.steps))
        # The held-out loss may be finite even if the parameters are not.
        is_finite = jnp.isfinite(optax.tree.norm(params))
        return start, jnp.where(is_finite, task.held_out(params), jnp.nan), losses, scales

    # A batch depends only on its seed, so it is drawn once for all rates. Seeds run one after the
    # other, since the activations of all runs together do not fit into a processor's cache. This
    # trains the recurrent network 2.5 times as fast, and the transformer 1.7 times.
    all_rates = jax.vmap(run, in_axes=(None, 0))

    def all_runs(seeds, rates):
        runs = jax.lax.map(lambda pair: all_rates(*pair), (seeds, rates))
        return tuple(jnp.swapaxes(figures, 0, 1) for figures in runs)

    return jax.jit(all_runs)
