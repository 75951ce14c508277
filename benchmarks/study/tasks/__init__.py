"""The tasks of the study, by name: `TASKS[name]()` makes one.

Each is small enough to be trained a thousand times on two cores. Its data is generated or ships
with a package.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from study.tasks import cartpole, damaged, digits, points, text
from study.training import Task

THREE_DECADES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
MOMENTUM = 0.9


def _momentum(schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.sgd(schedule, momentum=MOMENTUM)


def _conv(batch: int, steps: int) -> Callable[[], Task]:
    title = f"convolutions, batch {batch:,}"
    return lambda: digits.digits(title, _momentum, THREE_DECADES, batch=batch, steps=steps)


TASKS: dict[str, Callable[[], Task]] = {
    "rnn-adam": lambda: text.rnn(
        "recurrent, Adam", optax.adam, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    ),
    "rnn-sgd": lambda: text.rnn(
        "recurrent, SGD", optax.sgd, (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
    ),
    "lm-b2-0.95": lambda: text.language_model("transformer, b2 = 0.95", 0.95),
    "lm-b2-0.999": lambda: text.language_model("transformer, b2 = 0.999", 0.999),
    "lm-bf16": lambda: text.language_model("transformer, bfloat16", 0.95, jnp.bfloat16),
    "conv-16": _conv(16, 800),
    "conv-128": _conv(128, 400),
    "conv-1024": _conv(1024, 200),
    "conv-adam": lambda: digits.digits(
        "convolutions, Adam", optax.adam, THREE_DECADES, batch=128, steps=400
    ),
    "regression": lambda: points.regression("regression, heavy tails"),
    "damaged-batch": lambda: damaged.damaged("damaged batches", damaged.BATCH),
    "damaged-layer": lambda: damaged.damaged("damage in one layer", damaged.LAYER),
    "damaged-examples": lambda: damaged.damaged("damaged examples", damaged.EXAMPLES),
    "policy": lambda: cartpole.cartpole("policy gradient"),
    "diffusion": lambda: points.diffusion("diffusion, long run"),
    "normalized": lambda: digits.normalized_with_decay("normalized, weight decay"),
}
