"""The table of `make bench`: one row for each clipper on one model with one optimizer."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax
from contenders import ALONE, GLOBAL, NONE, OPTIMIZERS, Wrap
from models import MODELS, TOY, is_shape
from program_text import temporary_bytes, usual_bytes, xla_bytes
from timed_steps import HostProgram, Program, Step, Times, World, num_bytes, run_pairs


class Contenders(NamedTuple):
    """The steps that the rows of the tables compare, by name.

    Attributes:
        wraps: Steps that are one program.
        own_state: Those of `wraps` that cannot share the optimizer's state with other steps.
        parts: The number of parts that the gradient of a step consists of, if it is stacked.
        host_steps: Functions from an optimizer to a step of more than one program.
        references: The step that a step is compared with, if not with a fixed limit.
        compilations: The number of compilations by model, optimizer and name, if not one.
    """

    wraps: Mapping[str, Wrap]
    own_state: Collection[str]
    parts: Mapping[str, int]
    host_steps: Mapping[str, Callable[[optax.GradientTransformation], Step]]
    references: Mapping[str, str]
    compilations: Mapping[tuple[str, str, str], int]

    def names(self) -> tuple[str, ...]:
        """The names of all steps, in the order of the rows."""
        return (*self.wraps, *self.host_steps)

    def program(self, world: World, name: str) -> Program | HostProgram:
        """Compiles the step of that name."""
        if name in self.host_steps:
            return HostProgram(world, self.host_steps[name])
        shares_state = name not in self.own_state
        return Program(world, self.wraps[name], shares_state, self.parts.get(name))


class Row(NamedTuple):
    """The figures of one clipper; times in seconds, sizes in units of the parameters' size.

    Attributes:
        ratio: Time divided by the reference's: median and quartiles.
        extra: Time minus the reference's: median and quartiles.
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
    contenders: Contenders,
    model: str,
    optimizer: str,
    labels: Iterable[str],
    repeats: int,
    bandwidth: float,
) -> list[Row]:
    """Measures all clippers on one model with one optimizer."""
    world = World(MODELS[model](), OPTIMIZERS[optimizer](), optimizer == ALONE)
    size = num_bytes(world.params)
    pairs = {label: contenders.references.get(label, GLOBAL) for label in labels if label != GLOBAL}
    # References also have rows.
    pairs = {**{label: GLOBAL for label in pairs.values() if label != GLOBAL}, **pairs}
    needed = [label for label in contenders.names() if label in {GLOBAL, *pairs}]
    programs = {label: contenders.program(world, label) for label in needed}
    again = {
        label: contenders.compilations.get((model, optimizer, label), 1) - 1 for label in programs
    }
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
    # We use ratios, which hold even if the machine was slower during some of the pairs.
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
    """Formats a number; a missing one is a dash."""
    return "-" if value is None else format(value, form)


def format_cell(contenders: Contenders, rows: list[Row]) -> str:
    """Formats the table of one model and optimizer."""
    micro = rows[0].model == TOY
    unit = 1e6 if micro else 1e3
    width = max(map(len, contenders.names())) + 1
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
