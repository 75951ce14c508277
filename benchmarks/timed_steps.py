"""Compiled training steps without a model, timed in pairs.

A step consists of a clipper, an optimizer and `optax.apply_updates`, with parameters and states
donated. All steps on one model share a `World`, so they run one after the other on the same
buffers.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contenders import Wrap
from models import is_shape

Tree = Any
# Parameters, optimizer state, gradients -> parameters, optimizer state.
Step = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]

# The duration, in seconds, of steps that are timed together: long compared with the resolution of
# the clock, and short compared with the noise of the machine.
BATCH = 0.03
MAX_BATCH = 500
COPIED_BYTES = 2**27


def random_tree(shapes: Tree, seed: int, size: float) -> Tree:
    """Draws arrays on the device from a normal distribution."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(np.float32(size) * rng.standard_normal(shape, np.float32)),
        shapes,
        is_leaf=is_shape,
    )


def num_bytes(tree: Tree) -> int:
    """The size of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class World:
    """The buffers that all steps on one model with one optimizer share, one after the other."""

    def __init__(self, shapes: Tree, optimizer: optax.GradientTransformation, alone: bool):
        self.params = random_tree(shapes, 0, 0.02)
        self.grads = random_tree(shapes, 1, 0.01)
        self.shapes, self.parts = shapes, {}
        self.optimizer = optimizer
        self.opt_state = optimizer.init(self.params)
        self.alone = alone

    def grads_of(self, parts: int | None) -> Tree:
        """The gradient, or the given number of gradients, stacked."""
        if parts is None:
            return self.grads
        if parts not in self.parts:
            stacked = jax.tree.map(lambda shape: (parts, *shape), self.shapes, is_leaf=is_shape)
            self.parts[parts] = random_tree(stacked, 1, 0.01)
        return self.parts[parts]


class Program:
    """A step as one compiled program, with its compile times and the size of its own state.

    It shares the state of the world's optimizer with the other steps, unless the transformation
    keeps a different state in its place.
    """

    def __init__(
        self, world: World, wrap: Wrap, shares_state: bool = True, parts: int | None = None
    ):
        self.world = world
        self.grads = world.grads_of(parts)
        self.tx = wrap(world.optimizer)
        # A transformation in place of the optimizer leaves this mark where its state belongs.
        mark = object()
        marked = optax.GradientTransformation(lambda _: mark, world.optimizer.update)
        tx = wrap(marked) if shares_state else self.tx
        self.own, self.structure = jax.tree.flatten(tx.init(world.params))
        self.place = self.own.index(mark) if shares_state else None
        self.state_bytes = sum(leaf.nbytes for leaf in self.own if leaf is not mark)
        self.compile_times: list[float] = []
        self.compile()

    def compile(self) -> None:
        """Compiles the step with empty caches, and records the time."""
        world, tx = self.world, self.tx

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return (updates if world.alone else optax.apply_updates(params, updates)), state

        donated = (1,) if world.alone else (0, 1)
        state = self.full_state()
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=donated).lower(world.params, state, self.grads)
        self.call = lowered.compile()
        self.compile_times.append(time.perf_counter() - start)

    def full_state(self) -> Tree:
        """The clipper's state, with the optimizer's state in its place."""
        leaves = list(self.own)
        if self.place is not None:
            leaves[self.place] = self.world.opt_state
        return jax.tree.unflatten(self.structure, leaves)

    def run(self, steps: int) -> float:
        """Seconds per step."""
        world, call = self.world, self.call
        params, state, grads = world.params, self.full_state(), self.grads
        start = time.perf_counter()
        if world.alone:
            for _ in range(steps):
                updates, state = call(params, state, grads)
            jax.block_until_ready((updates, state))
        else:
            for _ in range(steps):
                params, state = call(params, state, grads)
            jax.block_until_ready((params, state))
        seconds = (time.perf_counter() - start) / steps
        self.own = self.structure.flatten_up_to(state)
        world.params = params
        if self.place is not None:
            world.opt_state = self.own[self.place]
        return seconds


class HostProgram:
    """A step that takes the norm to the host."""

    state_bytes = None
    call = None
    compile_times = ()

    def __init__(self, world: World, make_step: Callable[[optax.GradientTransformation], Step]):
        self.world = world
        self.step = make_step(world.optimizer)

    def run(self, steps: int) -> float:
        """Seconds per step."""
        world = self.world
        start = time.perf_counter()
        for _ in range(steps):
            world.params, world.opt_state = self.step(world.params, world.opt_state, world.grads)
        jax.block_until_ready((world.params, world.opt_state))
        return (time.perf_counter() - start) / steps


class Times(NamedTuple):
    """The times of two programs, pair by pair."""

    own: np.ndarray
    reference: np.ndarray

    def ratio(self) -> np.ndarray:
        """The ratio of the times: median, first and third quartile."""
        return np.percentile(self.own / self.reference, [50, 25, 75])

    def extra(self) -> np.ndarray:
        """The additional seconds: median, first and third quartile."""
        return np.percentile(self.own - self.reference, [50, 25, 75])


def run_pairs(own: Any, reference: Any, repeats: int) -> Times:
    """Times some steps of one program, some of the other, and so on."""
    first = [min(program.run(1) for _ in range(2)) for program in (own, reference)]
    steps = max(1, min(MAX_BATCH, round(BATCH / max(first))))
    pairs = []
    for number in range(repeats):
        order = (own, reference) if number % 2 else (reference, own)
        seconds = {program: program.run(steps) for program in order}
        pairs.append((seconds[own], seconds[reference]))
    return Times(*np.array(pairs).T)


def copy_bandwidth() -> float:
    """Measures bytes per second, read and written, in memory that is already allocated."""
    step = jax.jit(lambda array: array + 1.0, donate_argnums=0)
    array = jnp.zeros(COPIED_BYTES // 4)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        array = step(array).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * COPIED_BYTES / float(np.median(times[2:]))
