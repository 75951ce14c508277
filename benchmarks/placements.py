"""Compares a clipper before and after each optimizer, for one spike of the gradient.

A stream has random points of a quadratic and the gradients at them, so the points do not depend on
the optimizer. One gradient is multiplied by 100. Prints a table:

    x 0.1    the length of updates if all gradients are multiplied by 0.1, in units of their
             original length
    starves  the norm of the gradient, a power of 10, at which updates are less than half as long
             as at a norm of 1; "-" if updates are proportional to the gradient
    spike    the length of the update of the spike, in units of that without the spike
    steps    the number of steps, from the spike on, in which updates differ by 10 % or more from
             those of the same chain without the spike

    python benchmarks/placements.py [--steps 5000] [--seeds 3]

Each number is the median over the seeds. Optimizers have Optax's default parameters. `lbfgs` runs
without a line search, which would need the function. Optax has neither Shampoo nor SOAP.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from machine import describe_machine
from optax import contrib

import optax_smartclip as smartclip

RATE = 0.01
OPTIMIZERS = {
    "sgd": optax.sgd(RATE),
    "sgd, momentum 0.9": optax.sgd(RATE, momentum=0.9),
    "adam": optax.adam(RATE),
    "adamw": optax.adamw(RATE),
    "lion": optax.lion(RATE),
    "contrib.muon": contrib.muon(RATE),
    # Optax does not factor small matrices by default.
    "adafactor": optax.adafactor(RATE, min_dim_size_to_factor=8),
    "lbfgs": optax.lbfgs(1.0, linesearch=None),
}
PLACES: dict[str, Callable[[optax.GradientTransformation], optax.GradientTransformation]] = {
    "no clipping": lambda optimizer: optimizer,
    "before": lambda optimizer: optax.chain(smartclip.autoclip(), optimizer),
    "after": lambda optimizer: optax.chain(optimizer, smartclip.autoclip()),
}
SIZE = 16
SPIKE = 100.0
# By then, the history of `autoclip()` is full and the momentum of all optimizers is stationary.
STEPS_BEFORE = 500
# Updates that differ by less than this count as equal.
TOLERANCE = 0.1
# A few steps are enough for the columns about scale.
FIRST_STEPS = 20
NUM_POWERS = 20
HALF = 0.5

Steps = Float[Array, "steps size size"]


class Stream(NamedTuple):
    """Points and the gradients at them."""

    points: Steps
    gradients: Steps

    def times(self, factor: float | Array) -> "Stream":
        """The stream of a function that is `factor` times this one."""
        return self._replace(gradients=factor * self.gradients)

    def with_spike(self) -> "Stream":
        """The stream with one gradient multiplied by 100."""
        return self._replace(gradients=self.gradients.at[STEPS_BEFORE].multiply(SPIKE))


class Row(NamedTuple):
    """The figures of one optimizer, described above. The last two are by place of the clipper."""

    scaled: float
    starves: float
    spike: dict[str, float]
    steps: dict[str, float]


def make_stream(seed: int, steps: int) -> Stream:
    """Draws a stream of `steps` steps; the spread of the points is as large as their mean."""
    rng = np.random.default_rng(seed)
    points = 1.0 + rng.normal(size=(steps, SIZE, SIZE))
    curvatures = np.exp(rng.uniform(-1.0, 1.0, (SIZE, SIZE)))
    return Stream(*(jnp.asarray(array, jnp.float32) for array in (points, curvatures * points)))


def updates_of(optimizer: optax.GradientTransformation, stream: Stream) -> Steps:
    """The updates of an optimizer along a stream."""

    def step(state: optax.OptState, inputs: Stream) -> tuple[optax.OptState, Array]:
        update, state = optimizer.update(inputs.gradients, state, inputs.points)
        return state, update

    return jax.lax.scan(step, optimizer.init(stream.points[0]), stream)[1]


def lengths(updates: Steps) -> Float[Array, " steps"]:
    """The norm of each update."""
    return jnp.linalg.norm(updates, axis=(1, 2))


def updates_along(optimizer: optax.GradientTransformation, *streams: Stream) -> Array:
    """The updates of one optimizer along several streams, compiled as one program."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *streams)
    return jax.vmap(lambda stream: updates_of(optimizer, stream))(stacked)


def scaled_by(optimizer: optax.GradientTransformation, stream: Stream, factor: float) -> Array:
    """The median ratio of the lengths of updates if gradients are multiplied by `factor`."""
    usual, scaled = updates_along(optimizer, stream, stream.times(factor))
    return jnp.median(lengths(scaled) / lengths(usual))


def starves_at(optimizer: optax.GradientTransformation, stream: Stream) -> Array:
    """The largest power of 10, as a norm of gradients, at which updates fall below a half."""
    unit = stream.times(1.0 / jnp.median(lengths(stream.gradients)))
    powers = 10.0 ** -jnp.arange(1.0, NUM_POWERS + 1)
    ratios = jax.vmap(lambda power: scaled_by(optimizer, unit, power))(powers)
    return jnp.max(jnp.where(ratios < HALF, powers, 0.0))


def effect_of_spike(optimizer: optax.GradientTransformation, stream: Stream) -> tuple[Array, Array]:
    """The relative length of the spike's update, and the number of steps that it affects."""
    both = updates_along(optimizer, stream, stream.with_spike())
    usual, spiked = both[:, STEPS_BEFORE:]
    differs = lengths(spiked - usual) >= TOLERANCE * lengths(usual)
    num_steps = jnp.max(jnp.where(differs, jnp.arange(1, len(differs) + 1), 0))
    return lengths(spiked)[0] / lengths(usual)[0], num_steps


def measure(optimizer: optax.GradientTransformation, steps: int, seeds: int) -> Row:
    """Measures an optimizer: medians over the seeds, with `steps` steps from the spike on."""
    streams = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(make_stream(seed, STEPS_BEFORE + steps) for seed in range(seeds)),
    )
    first = jax.tree.map(lambda leaf: leaf[:, :FIRST_STEPS], streams)

    def median(function: Callable[[Stream], Any], streams: Stream) -> Any:
        return jax.tree.map(
            lambda values: float(np.median(values)), jax.jit(jax.vmap(function))(streams)
        )

    spikes = {
        name: median(partial(effect_of_spike, place(optimizer)), streams)
        for name, place in PLACES.items()
    }
    return Row(
        scaled=median(lambda stream: scaled_by(optimizer, stream, 0.1), first),
        starves=median(partial(starves_at, optimizer), first),
        spike={name: spike for name, (spike, _) in spikes.items()},
        steps={name: steps for name, (_, steps) in spikes.items()},
    )


def format_row(name: str, row: Row) -> str:
    """Formats a line of the table."""
    is_proportional = row.scaled < HALF
    starves = "-" if is_proportional else f"{row.starves:.0e}" if row.starves else "never"
    places = "".join(f"{row.spike[place]:13.2f}{row.steps[place]:7.0f}" for place in PLACES)
    return f"{name:20}{row.scaled:7.2f}{starves:>9}{places}"


def format_head() -> str:
    """Formats the two lines above the rows."""
    places = "".join(f"{place:>20}" for place in PLACES)
    columns = f"{'spike':>13}{'steps':>7}" * len(PLACES)
    return f"{'':36}{places}\n{'':20}{'x 0.1':>7}{'starves':>9}{columns}"


def main() -> None:
    """Prints the table, each row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="steps from the spike on")
    parser.add_argument("--seeds", type=int, default=3, help="streams")
    arguments = parser.parse_args()
    print(describe_machine(jax, optax))
    print(format_head())
    for name, optimizer in OPTIMIZERS.items():
        print(format_row(name, measure(optimizer, arguments.steps, arguments.seeds)), flush=True)


if __name__ == "__main__":
    main()
