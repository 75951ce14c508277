"""Compares the cost of clippers: time, memory traffic, memory and compilation.

Times compiled training steps without a model: the gradient is random and always the same, so a step
consists of the clipper, the optimizer and `optax.apply_updates`, with parameters and states
donated. Prints a table for each model and optimizer, then the targets with the measured values;
writes all figures to `bench.json`.

    python benchmarks/bench.py [--out bench] [--models 24M toy] [--clippers agc] [--repeats 15]
                               [--quick]

Each clipper is compared with one other, its reference, in pairs: some steps of one, some steps of
the other, in alternating order, on the same buffers. `ratio` is the median over the pairs, with
quartiles, so it hardly depends on the other load of the machine.

- step: median time in milliseconds (microseconds on the toy model).
- floor: the time of a step in units of a lower bound, in which the norm costs only one read of the
  gradient: the optimizer's own time plus that read at the machine's copy bandwidth.
- bytes: XLA's count of bytes read and written by the step, in units of the size of the parameters.
  XLA counts one iteration of a loop and the costlier branch of a conditional. Our figure excludes
  the loop in which a gradient is read again if its squares overflow or underflow, and counts the
  cheaper branch. XLA's own count follows in brackets if it differs.
- temp: temporary memory of the program, in units of the size of the parameters. On a CPU, a program
  takes it from the system again in each step. With pages of 4 kB, this costs more than the traffic;
  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment shows how much.
- compile: seconds to trace, lower and compile after all caches were emptied. It is measured once,
  except for the steps of `COMPILATIONS`: there it is the median of three, taken in turns.
- state: bytes of the clipper's state, including the moments if it is an optimizer itself.

Two rows show where the rest of the cost is: `min(1, 1 / norm)` is minimal clipping, and
`clip_by_rule, fixed` runs this library without a threshold that adapts. Two more, of the toy model,
carry the state of a clipper and only add one to it. Another row is `agc()` without its metrics
about the units.

Two of the other clippers take the norm to the host in every step. `smartclip 0.1.1` runs eagerly,
with warm-up off and with `jax.tree_map` restored, which newer JAX has removed. `norm on the host`
follows PyTorch's `clip_grad_norm_`: the norm in one program, `float()`, the scaling in another.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import smartclip as smartclip_011
from contenders import (
    ADAMW,
    ADAPTIVE,
    AGC,
    ALONE,
    AUTO,
    FLOOR,
    GIVE_UP,
    GLOBAL,
    KEEP,
    MEAN,
    MICRO,
    NONE,
    OBSERVE,
    PARTS,
    PER_PARAM,
    SGD,
    SKIP,
    SPECTRAL,
    STABLE,
    UPDATES,
    WINDOW128,
    WINDOW1024,
    WINDOW65536,
    WITH_OWN_STATE,
    Wrap,
    before,
    is_chosen,
)
from contenders import CLIPPERS as CONTENDERS
from cost_table import Contenders, Row, format_cell, measure_cell
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
)
from smartclip.backends.jax import apply_grads as apply_grads_011
from targets import Target, format_targets
from timed_steps import Program, Step, World, copy_bandwidth

import optax_smartclip as smartclip
from optax_smartclip.clippers import agc

Tree = Any

REPEATS = 15
QUICK_REPEATS = 5

# Parts of clippers.


def state_alone(clipper: optax.GradientTransformation) -> Wrap:
    """Clips at a fixed limit and adds one to the clipper's state: the cost of carrying it."""
    fixed = optax.clip_by_global_norm(1.0)

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        updates, _ = fixed.update(updates, fixed.init(params), params)
        return updates, jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), state)

    return before(optax.GradientTransformation(clipper.init, update))


def least() -> optax.GradientTransformation:
    """Minimal clipping to a norm of 1: nothing is learned or recorded, nor is overflow handled."""

    def update(updates: Tree, state: optax.EmptyState, params: Tree = None) -> tuple[Tree, Tree]:
        del params
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(updates)))
        scale = jnp.minimum(1.0, 1.0 / norm)
        return jax.tree.map(lambda leaf: scale * leaf, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def agc_without_report() -> Wrap:
    """`agc()` without its metrics about the units."""
    with mock.patch.object(agc, "report_units", lambda previous, *_: previous):
        return before(smartclip.agc())


def norm_on_the_host(optimizer: optax.GradientTransformation) -> Step:
    """A step in the manner of PyTorch's `clip_grad_norm_`."""
    norm_of, optimize = jax.jit(optax.tree.norm), scaled_step(optimizer)

    def step(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        scale = min(1.0, 1.0 / (float(norm_of(grads)) + 1e-6))
        return optimize(params, state, grads, scale)

    return step


def eager_smartclip(optimizer: optax.GradientTransformation) -> Step:
    """A step of the package smartclip, which runs eagerly."""
    jax.tree_map = jax.tree.map
    clipper = smartclip_011.AutoClip(warmup_steps=0, min_history=0)
    optimize = scaled_step(optimizer)

    def step(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        return optimize(params, state, apply_grads_011(grads, params, clipper), 1.0)

    return step


def scaled_step(optimizer: optax.GradientTransformation) -> Any:
    """A compiled step that multiplies the gradient by a number from the host."""

    def apply(params: Tree, state: Tree, grads: Tree, scale: Any) -> tuple[Tree, Tree]:
        grads = jax.tree.map(lambda grad: scale * grad, grads)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(apply, donate_argnums=(0, 1))


# The engine without a history.
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
HOST_STEPS = {FETCHED: norm_on_the_host, EAGER: eager_smartclip}
LESS_THAN_AGC = ("agc(), no report",)
# `spectral_clip()` takes seconds on a CPU, since it multiplies square matrices.
ON_SOME_MODELS = (*LESS_THAN_AGC, PER_LAYER, STACKS, SPECTRAL)
REFERENCES = {
    WINDOW65536: WINDOW128,
    OBSERVE: AUTO,
    UPDATES: AUTO,
    SPECTRAL: UPDATES,
    FLOOR: AUTO,
    STABLE: NONE,
    KEEP: NONE,
    GIVE_UP: SKIP,
    MICRO: MEAN,
    **dict.fromkeys((AGC, *LESS_THAN_AGC), ADAPTIVE),
}

# The clippers that are measured by default, by model and optimizer.
CELLS: dict[tuple[str, str], tuple[str, ...]] = {
    (TOY, ADAMW): (
        *(name for name in CLIPPERS if name not in ON_SOME_MODELS),
        SPECTRAL,
        *HOST_STEPS,
    ),
    (GPT24, ADAMW): (
        *(name for name in CLIPPERS if "alone" not in name and name not in ON_SOME_MODELS),
        *HOST_STEPS,
    ),
    (GPT24, SGD): (NONE, "clip_by_block_rms(1)", AUTO, OBSERVE, AGC, *LESS_THAN_AGC),
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
# The number of compilations of some steps. The others are compiled once, because they take long or
# do not have a target.
COMPILATIONS = {(GPT24, ADAMW, label): 3 for label in (GLOBAL, LEAST, ENGINE, AUTO)} | {
    (model, ADAMW, STACKS): 3 for model in (STACK128, STACK4)
}
COMPARED = Contenders(CLIPPERS, WITH_OWN_STATE, PARTS, HOST_STEPS, REFERENCES, COMPILATIONS)


def check_targets(rows: list[Row]) -> list[Target]:
    """The targets whose rows have been measured."""
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

    # These clippers need more temporary memory. With a window for each leaf, some of it is for the
    # windows. Updates that are judged after they are computed must be held until then.
    larger = (PER_PARAM, UPDATES, SPECTRAL, STABLE, KEEP)
    excess = {
        row: row.temp - by_name[row.model, row.optimizer, row.reference].temp
        for row in rows
        if row.model != TOY and row.clipper not in larger and row.temp is not None
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
    """Selects the cells and clippers whose names contain one of the given words."""
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
    # The first compilation includes imports and set-up, which must not count for any clipper.
    Program(World(MODELS[TOY](), optax.adamw(1.0), False), CLIPPERS[AUTO])

    rows: list[Row] = []
    for (model, optimizer), labels in cells.items():
        measured = measure_cell(COMPARED, model, optimizer, labels, repeats, bandwidth)
        print(format_cell(COMPARED, measured), flush=True)
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
