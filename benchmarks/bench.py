"""What clipping costs: time, memory traffic, memory and compilation, next to what others cost.

Times compiled training steps without a model: the gradient is random and always the same, so that
a step is the clipper, the optimizer and `optax.apply_updates`, with parameters and states donated.
Prints a table for each model and optimizer, then the targets with what was measured; writes all
figures to `bench.json`.

    python benchmarks/bench.py [--out bench] [--models 24M toy] [--clippers agc] [--repeats 15]
                               [--quick]

Each clipper is compared with one other, its reference, in pairs: some steps of one, some steps of
the other, in an order that changes each time, on the same buffers. `ratio` is the median over the
pairs, with quartiles, so that it hardly depends on what else the machine does.

- step: median time in milliseconds (microseconds on the toy model).
- floor: step in units of what it would take if the norm cost no more than to read the gradient: the
  optimizer's own time plus one read at the bandwidth at which this machine copies.
- bytes: what XLA says the step reads and writes, in units of the size of the parameters. XLA counts
  one round of a loop, and the costlier branch of a conditional; this is without the loop in which a
  gradient is read again if its squares overflow or underflow, and with the cheaper branch. In
  brackets, where it differs: as XLA counts.
- temp: temporary memory of the program, in units of the size of the parameters. On a CPU, a program
  takes it from the system anew in each step, which with pages of 4 kB costs more than its traffic:
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment shows how much.
- compile: seconds to trace, lower and compile, after all caches were emptied: once, but the median
  of three, in turns, for the steps of `COMPILATIONS`.
- state: bytes that the clipper keeps.

Two rows show where the rest of the cost is: `min(1, 1 / norm)` is as little as clipping can be, and
`clip_by_rule, fixed` has all of this library but something that learns. Two more, of the toy model,
carry the state of a clipper and do nothing with it but add one. One has `agc()` without what its
metrics say of the units.

Two of the others take the norm to the host in every step: `smartclip 0.1.1` runs eagerly (with
warm-up off and `jax.tree_map`, which newer JAX has no more, put back), and `norm on the host` is
what users of PyTorch's `clip_grad_norm_` write: norm in one program, `float()`, scale in another.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import smartclip as smartclip_011
from contenders import (
    ADAMW,
    ADAPTIVE,
    AGC,
    ALONE,
    AUTO,
    GLOBAL,
    NONE,
    OPTIMIZERS,
    PER_PARAM,
    SGD,
    WINDOW128,
    WINDOW1024,
    WINDOW65536,
    Wrap,
    before,
    is_chosen,
)
from contenders import CLIPPERS as CONTENDERS
from machine import describe_machine
from models import (
    GPT24,
    GPT124,
    LAYERS32,
    LEAVES300,
    LEAVES2000,
    MODELS,
    RESNET,
    STACK4,
    STACK128,
    TOY,
    is_shape,
)
from program_text import temporary_bytes, usual_bytes, xla_bytes
from smartclip.backends.jax import apply_grads as apply_grads_011
from targets import Target, format_targets

import optax_smartclip as smartclip
from optax_smartclip.clippers import agc

Tree = Any

# Of steps that are timed together, in seconds: long beside the clock and short beside the noise.
BATCH = 0.03
MAX_BATCH = 500
REPEATS = 15
QUICK_REPEATS = 5
COPIED_BYTES = 2**27


def random_tree(shapes: Tree, seed: int, size: float) -> Tree:
    """Arrays on the device, normally distributed."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(np.float32(size) * rng.standard_normal(shape, np.float32)),
        shapes,
        is_leaf=is_shape,
    )


def num_bytes(tree: Tree) -> int:
    """Of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# Clippers taken apart.


def state_alone(clipper: optax.GradientTransformation) -> Wrap:
    """A fixed limit, which adds one to whatever the clipper would keep: what it costs to carry."""
    fixed = optax.clip_by_global_norm(1.0)

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        updates, _ = fixed.update(updates, fixed.init(params), params)
        return updates, jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), state)

    return before(optax.GradientTransformation(clipper.init, update))


def least() -> optax.GradientTransformation:
    """As little as clipping to a norm of 1 can be: nothing is learnt, recorded or made safe."""

    def update(updates: Tree, state: optax.EmptyState, params: Tree = None) -> tuple[Tree, Tree]:
        del params
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(updates)))
        scale = jnp.minimum(1.0, 1.0 / norm)
        return jax.tree.map(lambda leaf: scale * leaf, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def agc_without_report() -> Wrap:
    """`agc()` without what its metrics say of the units."""
    with mock.patch.object(agc, "report_units", lambda previous, *_: previous):
        return before(smartclip.agc())


# The engine alone.
FIXED = smartclip.ThresholdRule(
    init=jnp.ones, threshold=lambda limits, _: limits, record=lambda limits, *_: limits
)

LEAST, ENGINE = "min(1, 1 / norm)", "clip_by_rule, fixed"
PER_LAYER, STACKS = "autoclip(per_layer)", "autoclip(per_layer, stacked)"
EAGER, FETCHED = "smartclip 0.1.1", "norm on the host"
CLIPPERS: dict[str, Wrap] = {
    **CONTENDERS,
    LEAST: before(least()),
    ENGINE: before(smartclip.clip_by_rule(FIXED)),
    "state of autoclip() alone": state_alone(smartclip.autoclip()),
    "state of window=1024 alone": state_alone(smartclip.autoclip(90.0)),
    "agc(), no report": agc_without_report(),
    PER_LAYER: before(smartclip.autoclip(scope="per_layer")),
    STACKS: before(smartclip.autoclip(scope="per_layer", stacked={"layers": 0})),
}
ON_THE_HOST = (FETCHED, EAGER)
LESS_THAN_AGC = ("agc(), no report",)
ON_SOME_MODELS = (*LESS_THAN_AGC, PER_LAYER, STACKS)
REFERENCES = {WINDOW65536: WINDOW128} | dict.fromkeys((AGC, *LESS_THAN_AGC), ADAPTIVE)

# What is measured by default: which clippers, on which model, before which optimizer.
CELLS: dict[tuple[str, str], tuple[str, ...]] = {
    (TOY, ADAMW): (*(name for name in CLIPPERS if name not in ON_SOME_MODELS), *ON_THE_HOST),
    (GPT24, ADAMW): (
        *(name for name in CLIPPERS if "alone" not in name and name not in ON_SOME_MODELS),
        *ON_THE_HOST,
    ),
    (GPT24, SGD): (NONE, "clip_by_block_rms(1)", AUTO, AGC, *LESS_THAN_AGC),
    (GPT24, ALONE): (AUTO, AGC),
    (RESNET, SGD): (NONE, AUTO, AGC, *LESS_THAN_AGC),
    (LEAVES300, ADAMW): (NONE, AUTO, PER_PARAM),
    (GPT124, ADAMW): (NONE, AUTO),
    (LEAVES2000, ADAMW): (PER_PARAM,),
    (LAYERS32, ADAMW): (PER_LAYER,),
    (STACK128, ADAMW): (AUTO, STACKS),
    (STACK4, ADAMW): (AUTO, STACKS),
}
QUICK = {(TOY, ADAMW): (NONE, AUTO, WINDOW1024), (GPT24, ADAMW): (NONE, AUTO)}
# Compiled so often; of the others once, because they take long or no target asks for them.
COMPILATIONS = {(GPT24, ADAMW, label): 3 for label in (GLOBAL, LEAST, ENGINE, AUTO)} | {
    (model, ADAMW, STACKS): 3 for model in (STACK128, STACK4)
}


# Steps.


class World:
    """What all steps on one model with one optimizer work on, one after the other."""

    def __init__(self, shapes: Tree, optimizer: optax.GradientTransformation, alone: bool):
        self.params = random_tree(shapes, 0, 0.02)
        self.grads = random_tree(shapes, 1, 0.01)
        self.optimizer = optimizer
        self.opt_state = optimizer.init(self.params)
        self.alone = alone


class Program:
    """A step as one compiled program, and what is known of it without running it."""

    def __init__(self, world: World, wrap: Wrap):
        self.world = world
        self.tx = wrap(world.optimizer)
        # The optimizer's state goes where a transformation in its place leaves this mark.
        mark = object()
        marked = wrap(optax.GradientTransformation(lambda _: mark, world.optimizer.update))
        own, self.structure = jax.tree.flatten(marked.init(world.params))
        self.place = own.index(mark)
        self.own = own
        self.state_bytes = sum(leaf.nbytes for leaf in own if leaf is not mark)
        self.compile_times: list[float] = []
        self.compile()

    def compile(self) -> None:
        """Anew."""
        world, tx = self.world, self.tx

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return (updates if world.alone else optax.apply_updates(params, updates)), state

        donated = (1,) if world.alone else (0, 1)
        state = self.full_state()
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=donated).lower(world.params, state, world.grads)
        self.call = lowered.compile()
        self.compile_times.append(time.perf_counter() - start)

    def full_state(self) -> Tree:
        """The clipper's state together with the optimizer's."""
        leaves = list(self.own)
        leaves[self.place] = self.world.opt_state
        return jax.tree.unflatten(self.structure, leaves)

    def run(self, steps: int) -> float:
        """Seconds per step."""
        world, call = self.world, self.call
        params, state, grads = world.params, self.full_state(), world.grads
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
        world.params, world.opt_state = params, self.own[self.place]
        return seconds


class HostProgram:
    """A step that takes the norm to the host."""

    state_bytes = None
    call = None
    compile_times = ()

    def __init__(self, world: World, label: str):
        self.world = world

        def apply(params, state, grads, scale):
            grads = jax.tree.map(lambda grad: scale * grad, grads)
            updates, state = world.optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        optimize = jax.jit(apply, donate_argnums=(0, 1))

        if label == FETCHED:
            norm_of = jax.jit(optax.tree.norm)

            def step(params, state, grads):
                scale = min(1.0, 1.0 / (float(norm_of(grads)) + 1e-6))
                return optimize(params, state, grads, scale)
        else:
            jax.tree_map = jax.tree.map
            clipper = smartclip_011.AutoClip(warmup_steps=0, min_history=0)

            def step(params, state, grads):
                return optimize(params, state, apply_grads_011(grads, params, clipper), 1.0)

        self.step = step

    def run(self, steps: int) -> float:
        """Seconds per step."""
        world = self.world
        start = time.perf_counter()
        for _ in range(steps):
            world.params, world.opt_state = self.step(world.params, world.opt_state, world.grads)
        jax.block_until_ready((world.params, world.opt_state))
        return (time.perf_counter() - start) / steps


class Times(NamedTuple):
    """Of two programs, pair by pair."""

    own: np.ndarray
    reference: np.ndarray

    def ratio(self) -> np.ndarray:
        """Median, first and third quartile."""
        return np.percentile(self.own / self.reference, [50, 25, 75])

    def extra(self) -> np.ndarray:
        """Seconds that it takes longer: median, first and third quartile."""
        return np.percentile(self.own - self.reference, [50, 25, 75])


def run_pairs(own: Any, reference: Any, repeats: int) -> Times:
    """Some steps of one, some of the other, and so on."""
    first = [min(program.run(1) for _ in range(2)) for program in (own, reference)]
    steps = max(1, min(MAX_BATCH, round(BATCH / max(first))))
    pairs = []
    for number in range(repeats):
        order = (own, reference) if number % 2 else (reference, own)
        seconds = {program: program.run(steps) for program in order}
        pairs.append((seconds[own], seconds[reference]))
    return Times(*np.array(pairs).T)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, in memory that is already there."""
    step = jax.jit(lambda array: array + 1.0, donate_argnums=0)
    array = jnp.zeros(COPIED_BYTES // 4)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        array = step(array).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * COPIED_BYTES / float(np.median(times[2:]))


# The table.


class Row(NamedTuple):
    """The figures of one clipper; times in seconds, sizes in units of the parameters' size.

    Attributes:
        ratio, extra: Time in units of the reference's and less the reference's: median, quartiles.
    """

    model: str
    optimizer: str
    clipper: str
    reference: str
    steps_timed: int
    step: float
    floor: float | None
    ratio: tuple[float, ...]
    extra: tuple[float, ...]
    xla_bytes: float | None
    bytes: float | None
    temp: float | None
    compile: float | None
    state_bytes: int | None


def measure_cell(
    model: str, optimizer: str, labels: Iterable[str], repeats: int, bandwidth: float
) -> list[Row]:
    """All clippers on one model with one optimizer."""
    world = World(MODELS[model](), OPTIMIZERS[optimizer](), optimizer == ALONE)
    size = num_bytes(world.params)
    pairs = {label: REFERENCES.get(label, GLOBAL) for label in labels if label != GLOBAL}
    # A reference has a row, too.
    pairs = {**{label: GLOBAL for label in pairs.values() if label != GLOBAL}, **pairs}
    needed = [label for label in (*CLIPPERS, *ON_THE_HOST) if label in {GLOBAL, *pairs}]
    programs = {
        label: HostProgram(world, label)
        if label in ON_THE_HOST
        else Program(world, CLIPPERS[label])
        for label in needed
    }
    again = {label: COMPILATIONS.get((model, optimizer, label), 1) - 1 for label in programs}
    for number in range(max(again.values())):
        for label in programs:
            if number < again[label]:
                programs[label].compile()
    times = {
        label: run_pairs(programs[label], programs[reference], repeats)
        for label, reference in pairs.items()
    }
    by_global = [
        times[label].reference for label, reference in pairs.items() if reference == GLOBAL
    ]
    times[GLOBAL] = Times(np.concatenate(by_global), np.concatenate(by_global))
    # By ratios, which hold also where the machine was slower for one pair than for another.
    relative = {GLOBAL: 1.0}
    for label, reference in pairs.items():
        relative[label] = times[label].ratio()[0] * relative[reference]
    read = size / bandwidth / np.median(times[GLOBAL].own)
    rows = []
    for label, program in programs.items():
        compiled = program.call

        def in_sizes(number: float | None) -> float | None:
            return None if number is None else number / size

        rows.append(
            Row(
                model,
                optimizer,
                label,
                pairs.get(label, GLOBAL),
                len(times[label].own),
                float(np.median(times[label].own)),
                relative[label] / (relative[NONE] + read) if NONE in relative else None,
                tuple(times[label].ratio()),
                tuple(times[label].extra()),
                in_sizes(compiled and xla_bytes(compiled)),
                in_sizes(compiled and usual_bytes(compiled)),
                in_sizes(compiled and temporary_bytes(compiled)),
                float(np.median(program.compile_times)) if program.compile_times else None,
                program.state_bytes,
            )
        )
    return rows


def number(value: float | None, form: str) -> str:
    """A dash where there is none."""
    return "-" if value is None else format(value, form)


def format_cell(rows: list[Row]) -> str:
    """The table of one model and optimizer."""
    micro = rows[0].model == TOY
    unit = 1e6 if micro else 1e3
    width = max(map(len, (*CLIPPERS, *ON_THE_HOST))) + 1
    head = f"{'step us' if micro else 'step ms':>9}{'floor':>8}{'ratio (quartiles)':>24}  "
    head += f"{'to':<25}{'bytes':>24}{'temp':>10}{'compile':>9}{'state':>10}"
    shapes = jax.tree.leaves(MODELS[rows[0].model](), is_leaf=is_shape)
    total = sum(map(math.prod, shapes))
    title = f"{rows[0].model}, {rows[0].optimizer}"
    lines = [f"\n{title}: {total:,} parameters in {len(shapes)} leaves", f"{'':{width}}{head}"]
    for row in rows:
        line = f"{row.clipper:{width}}{unit * row.step:9.2f}{number(row.floor, '.2f'):>8}"
        if row.clipper == GLOBAL:
            line += f"{'1':>24}  {'':25}"
        else:
            median, low, high = row.ratio
            line += f"{f'{median:.3f} ({low:.3f}-{high:.3f})':>24}  {row.reference:25}"
        counted = number(row.bytes, ".2f")
        if row.bytes is not None and row.xla_bytes - row.bytes > 0.005:
            counted += f" ({row.xla_bytes:.2f})"
        line += f"{counted:>24}{number(row.temp, '.2f'):>10}{number(row.compile, '.2f'):>9}"
        lines.append(line + f"{number(row.state_bytes, 'd'):>10}")
    return "\n".join(lines)


# The targets.


def check_targets(rows: list[Row]) -> list[Target]:
    """Those whose rows have been measured."""
    by_name = {(row.model, row.optimizer, row.clipper): row for row in rows}
    targets: list[Target] = []

    def time_of(limit: float, *name: str) -> None:
        if name in by_name:
            row = by_name[name]
            text = f"{row.clipper} / {row.reference}, {row.model}, {row.optimizer}: time"
            targets.append(Target(text, limit, row.ratio[0], row.ratio[1:]))

    def ratio_of(figure: str, limit: float, *name: str) -> None:
        if name in by_name:
            row = by_name[name]
            own, theirs = (
                getattr(by_name[*name[:2], label], figure) for label in (row.clipper, row.reference)
            )
            if own is not None:
                text = f"{row.clipper} / {row.reference}, {row.model}, {row.optimizer}: {figure}"
                targets.append(Target(text, limit, own / theirs))

    time_of(0.95, GPT24, ADAMW, AUTO)
    if {(GPT24, ADAMW, AUTO), (GPT24, ADAMW, NONE)} <= by_name.keys():
        own, alone = (by_name[GPT24, ADAMW, label].bytes for label in (AUTO, NONE))
        if own is not None:
            text = f"{AUTO} less {NONE}, {GPT24}, {ADAMW}: bytes in parameter sizes"
            targets.append(Target(text, 1.0, round(own - alone, 2)))
    ratio_of("compile", 1.3, GPT24, ADAMW, AUTO)
    for label in (AUTO, WINDOW1024):
        if (TOY, ADAMW, label) in by_name:
            row = by_name[TOY, ADAMW, label]
            median, low, high = (1e6 * seconds for seconds in row.extra)
            text = f"{label} less {row.reference}, {TOY}, {ADAMW}: microseconds"
            targets.append(Target(text, 15.0, median, (low, high)))
    time_of(1.15, LEAVES300, ADAMW, PER_PARAM)
    time_of(1.25, LEAVES2000, ADAMW, PER_PARAM)
    ratio_of("compile", 1.5, LEAVES2000, ADAMW, PER_PARAM)
    if {(STACK4, ADAMW, STACKS), (STACK128, ADAMW, STACKS)} <= by_name.keys():
        few, many = (by_name[model, ADAMW, STACKS].compile for model in (STACK4, STACK128))
        text = f"{STACKS}, {ADAMW}, {STACK128} / {STACK4}: compile"
        targets.append(Target(text, 1.2, many / few))
    for model in (GPT24, RESNET):
        time_of(1.05, model, SGD, AGC)
        ratio_of("bytes", 1.0, model, SGD, AGC)
    time_of(1.2, GPT24, ADAMW, WINDOW65536)

    # Where each leaf has a window, some of it is for the windows.
    excess = {
        row: row.temp - by_name[row.model, row.optimizer, row.reference].temp
        for row in rows
        if row.model != TOY and row.clipper != PER_PARAM and row.temp is not None
    }
    if excess:
        worst = max(excess, key=excess.get)
        text = f"{worst.clipper} less {worst.reference}, {worst.model}, {worst.optimizer}: "
        text += "temporary memory in parameter sizes; the others need less"
        targets.append(Target(text, 0.01, excess[worst]))
    return targets


def select_cells(
    models: list[str] | None, clippers: list[str] | None, quick: bool
) -> dict[tuple[str, str], tuple[str, ...]]:
    """What the options leave of the table: names that contain one of the given words."""
    cells = {}
    for (model, optimizer), labels in (QUICK if quick else CELLS).items():
        left = tuple(label for label in labels if label == NONE or is_chosen(label, clippers))
        if is_chosen(model, models) and (clippers is None or set(left) - {NONE}):
            cells[model, optimizer] = left
    return cells


def main() -> None:
    """Measures, prints the table, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for the file")
    parser.add_argument("--models", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--clippers", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--repeats", type=int, help="pairs of timings for each clipper")
    parser.add_argument("--quick", action="store_true", help="two models, few clippers and repeats")
    arguments = parser.parse_args()
    repeats = arguments.repeats or (QUICK_REPEATS if arguments.quick else REPEATS)
    cells = select_cells(arguments.models, arguments.clippers, arguments.quick)
    if not cells:
        parser.error("no model and clipper has such a name")
    jax.config.update("jax_enable_compilation_cache", False)
    begin = time.perf_counter()
    print(describe_machine(jax, optax), flush=True)
    bandwidth = copy_bandwidth()
    print(f"It copies {bandwidth / 1e9:.1f} GB/s, reads and writes together.", flush=True)
    # What is imported or set up in the first compilation is nobody's cost.
    Program(World(MODELS[TOY](), optax.adamw(1.0), False), CLIPPERS[AUTO])

    rows: list[Row] = []
    for (model, optimizer), labels in cells.items():
        measured = measure_cell(model, optimizer, labels, repeats, bandwidth)
        print(format_cell(measured), flush=True)
        rows += measured
    targets = check_targets(rows)
    print(format_targets(targets))

    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = {
        "machine": describe_machine(jax, optax),
        "copy_bandwidth": bandwidth,
        "rows": [row._asdict() for row in rows],
        "targets": [{**target._asdict(), "met": target.met} for target in targets],
    }
    (arguments.out / "bench.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\nWrote bench.json to {arguments.out}/ after {time.perf_counter() - begin:.0f} s.")


if __name__ == "__main__":
    main()
