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
    """No damage."""
    del key
    return grads


class Task(NamedTuple):
    """A model, its data, and how it is trained.

    Attributes:
        title: What it is, in a picture.
        unit: That of the loss that is reported.
        steps: How many updates a run has.
        rates: Peak learning rates.
        optimizer: From a schedule, the optimizer.
        init: Key -> parameters.
        batch: Key -> what the loss of one step is computed from.
        loss: Parameters, batch -> what is differentiated.
        held_out: Parameters -> the loss that is reported. The lower the better.
        damage: Key, gradient -> gradient, if some arrive damaged.
        stable: From a schedule, StableAdamW with the numbers of `optimizer`, if that is AdamW.
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
    """What became of all runs of an arm.

    Attributes:
        start: The loss that is reported, before training.
        final: The same at its end; NaN if parameters were not finite.
        losses: Training loss of each step.
        scales: By which factor the norm of each gradient was scaled.
    """

    start: Figures
    final: Figures
    losses: Float[np.ndarray, "rates seeds steps"]
    scales: Float[np.ndarray, "rates seeds steps"]


def train(
    task: Task, arm: Arm, seeds: Sequence[int], factors: Num[np.ndarray, "rates seeds"]
) -> Runs:
    """Trains with the rates of the task, each times its factor."""
    rates = np.float32(np.array(task.rates)[:, None] * factors)
    return Runs(*map(np.asarray, _program(task, arm)(jnp.array(seeds), rates.T)))


# Of the last arm, and of no clipping, which trains the controls of all arms.
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
        # Where nothing was left to be computed, the loss may be finite all the same.
        is_finite = jnp.isfinite(optax.tree.norm(params))
        return start, jnp.where(is_finite, task.held_out(params), jnp.nan), losses, scales

    # A batch depends on its seed only: it is drawn once for all rates. Seeds come one after the
    # other, since the activations of all runs together do not fit into a processor's cache: the
    # recurrent network trains 2.5 times as fast so, and the transformer 1.7 times.
    all_rates = jax.vmap(run, in_axes=(None, 0))

    def all_runs(seeds, rates):
        runs = jax.lax.map(lambda pair: all_rates(*pair), (seeds, rates))
        return tuple(jnp.swapaxes(figures, 0, 1) for figures in runs)

    return jax.jit(all_runs)
