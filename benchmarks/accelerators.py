"""The cost of clipping on accelerators, without the hardware: a TPU v5e and an H100.

XLA compiles training steps ahead of time from a description of the device, and this program
analyzes the compiled text. Nothing runs, so any machine will do, and all figures except the time of
compilation are the same everywhere. A step has no model: it consists of the clipper, the optimizer
and `optax.apply_updates`, with parameters and states donated. Prints a table for each model and
device, then the targets with the measured values; writes all figures to `accelerators.json`.

    python benchmarks/accelerators.py [--out accelerators] [--devices v5e h100 v4 v5p v6e]
                                      [--models 185M mlp] [--clippers agc] [--quick] [--swap]

- HBM: the main memory traffic of a step (reads and writes), in units of the size of the parameters
  that a device holds. It is counted from the text of the program (see `program_text.py`), because
  XLA's own analysis includes the bodies of loops and counts prefetched arrays twice.
- apart: the traffic of one iteration of each loop and of the costliest branch of each conditional,
  which do not run in every step.
- kernels: fusions, reductions and copies that run in every step; a GPU launches each of them. The
  asynchronous copies of a TPU from one memory to another are not counted.
- copies: the number of kernels that are copies.
- collectives: the number of all-reduces, all-gathers and so on in every step.
- loops: the number of loops and conditionals.
- temp: temporary memory of the program, in the same units as HBM, without a TPU's fast memory.
- compile: seconds to trace, lower and compile once, after all caches were emptied.

A device holds all parameters, or a quarter of them (`FSDP`): each array, also in the state of the
optimizer, is split along the longest of its axes that are divisible by four.

With `--swap`, a step takes the state before the parameters but returns it after them. JAX assigns
the donated buffers, in the order of the arguments, to results of the same shape, so each buffer
goes to a different array. On a GPU, XLA then copies two arrays for each parameter in every step.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from contenders import (
    ADAM,
    ADAMW,
    ADAPTIVE,
    AGC,
    AUTO,
    FLOOR,
    GIVE_UP,
    GLOBAL,
    KEEP,
    MEAN,
    MICRO,
    NONE,
    OBSERVE,
    OPTIMIZERS,
    PARTS,
    SKIP,
    SPECTRAL,
    STABLE,
    UPDATES,
    ZSCORE,
    Wrap,
    before,
    is_chosen,
)
from contenders import CLIPPERS as CONTENDERS
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from machine import describe_machine
from models import (
    GPT24,
    GPT124,
    GPT185,
    GPT185_STACKED,
    MLP,
    MODELS,
    RESNET,
    is_shape,
)
from program_text import KERNELS, ProgramText, temporary_bytes
from targets import Target, format_targets

import optax_smartclip as smartclip

Tree = Any
# A device, a model, and the number of devices that the model is split over.
Cell = tuple[str, str, int]

# An H100 in XLA's format (the protobuf `GpuTargetConfig`); omitted fields are zero.
H100_CONFIG = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

V5E, H100 = "v5e", "h100"
# Each topology has four chips.
TPUS = {V5E: "v5e:2x2", "v4": "v4:2x2x1", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
DEVICES = (*TPUS, H100)
COMPILERS = ("libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")


def describe(device: str, count: int) -> list[Any]:
    """The given number of devices of one kind, as targets of compilation."""
    if device == H100:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=H100_CONFIG,
            topology=f"1x1x{count}",
        ).devices
    return topologies.get_topology_desc(topology_name=TPUS[device], platform="tpu").devices[:count]


def set_up() -> str:
    """Prepares the compilers to work without devices, and returns their versions."""
    import libtpu

    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_LIBRARY_PATH": libtpu.get_library_path(),
        # Several processes can load libtpu, since none of them uses a device.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    # If JAX looked for a GPU, the CUDA plugin would fail without a driver.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    versions = (f"{name} {metadata.version(name)}" for name in COMPILERS)
    return f"Compiled by {', '.join(versions)}."


AUTO90, AUTO_PER_PARAM = "autoclip(90)", 'autoclip(scope="per_param")'
SKIP_ALONE = "skip_spikes(tx)"
EXTENSIONS = (OBSERVE, UPDATES, STABLE, FLOOR, GIVE_UP, KEEP, MEAN, MICRO, SPECTRAL)
CLIPPERS: dict[str, Wrap] = {
    **{name: CONTENDERS[name] for name in (NONE, GLOBAL, ADAPTIVE, AUTO)},
    AUTO90: before(smartclip.autoclip(90.0)),
    ZSCORE: CONTENDERS[ZSCORE],
    AUTO_PER_PARAM: before(smartclip.autoclip(scope="per_param")),
    AGC: CONTENDERS[AGC],
    SKIP: CONTENDERS[SKIP],
    SKIP_ALONE: smartclip.skip_spikes,
    **{name: CONTENDERS[name] for name in EXTENSIONS},
}

# The clippers to compile, by model and number of devices.
FSDP = 4
CELLS: dict[tuple[str, int], tuple[str, ...]] = {
    (MLP, 1): tuple(CLIPPERS),
    (GPT24, 1): (NONE, AUTO),
    (GPT24, FSDP): (NONE, GLOBAL, AUTO, AUTO_PER_PARAM, SKIP),
    (RESNET, 1): (NONE, AUTO),
    (GPT124, 1): (NONE, AUTO),
    (GPT185, 1): tuple(CLIPPERS),
    (GPT185_STACKED, 1): (NONE, GLOBAL, AUTO, AGC),
}
QUICK = {(MLP, 1): tuple(CLIPPERS)}


class Row(NamedTuple):
    """The figures of one program; sizes in units of the parameters that a device holds."""

    device: str
    model: str
    count: int
    clipper: str
    traffic: float
    apart: float
    kernels: int
    copies: int
    collectives: dict[str, int]
    loops: int
    temp: float
    compile: float

    @property
    def all_reduces(self) -> int:
        """The number of all-reduces in every step."""
        return self.collectives.get("all-reduce", 0)

    @property
    def other_collectives(self) -> int:
        """The number of all-gathers and so on in every step."""
        return sum(self.collectives.values()) - self.all_reduces


def split(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Splits an array along the longest axis that the number of devices divides."""
    count = mesh.devices.size
    axes: list[str | None] = [None] * len(shape)
    can_be = [axis for axis, size in enumerate(shape) if size % count == 0]
    if count > 1 and can_be:
        axes[max(can_be, key=lambda axis: shape[axis])] = mesh.axis_names[0]
    return NamedSharding(mesh, PartitionSpec(*axes))


def compile_step(
    model: str,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    swap: bool,
    parts: int | None = None,
) -> tuple[Any, int, float]:
    """Returns the program, the bytes of parameters on a device, and seconds of compilation."""
    shapes = jax.tree.leaves(MODELS[model](), is_leaf=is_shape)
    shardings = {shape: split(shape, mesh) for shape in shapes}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def param(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[shape])

    def in_state(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # An array of the optimizer is split like its parameter.
        sharding = shardings.get(leaf.shape, everywhere)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.map(param, MODELS[model](), is_leaf=is_shape)

    def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if parts is None:
            return leaf
        sharding = NamedSharding(mesh, PartitionSpec(None, *leaf.sharding.spec))
        return jax.ShapeDtypeStruct((parts, *leaf.shape), leaf.dtype, sharding=sharding)

    grads = jax.tree.map(stacked, params)
    state = jax.tree.map(in_state, jax.eval_shape(tx.init, params))

    def step(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def swapped(state: Tree, params: Tree, grads: Tree) -> tuple[Tree, Tree]:
        return step(params, state, grads)

    jitted = jax.jit(
        swapped if swap else step,
        donate_argnums=(0, 1),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, (params, state)),
    )
    arguments = (state, params, grads) if swap else (params, state, grads)
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jitted.trace(*arguments).lower().compile()
    seconds = time.perf_counter() - start
    held = sum(4 * math.prod(shardings[shape].shard_shape(shape)) for shape in shapes)
    return compiled, held, seconds


def measure(device: str, model: str, count: int, clipper: str, swap: bool) -> Row:
    """Compiles a step and analyzes the program."""
    mesh = Mesh(np.array(describe(device, count)), ("devices",))
    tx = CLIPPERS[clipper](OPTIMIZERS[optimizer_of(model)]())
    compiled, held, seconds = compile_step(model, tx, mesh, swap, PARTS.get(clipper))
    program = ProgramText(compiled.as_text())
    operations = program.operations()
    return Row(
        device,
        model,
        count,
        clipper,
        program.traffic() / held,
        program.traffic_apart() / held,
        sum(operations[kind] for kind in KERNELS),
        operations["copy"],
        dict(program.collectives()),
        operations["while"] + operations["conditional"],
        temporary_bytes(compiled) / held,
        seconds,
    )


WIDTH = max(map(len, CLIPPERS)) + 1


def optimizer_of(model: str) -> str:
    """The optimizer of a model: Adam for the agent's, AdamW for the others."""
    return ADAM if model == MLP else ADAMW


def place(device: str, model: str, count: int) -> str:
    """The model and the devices, in words."""
    return f"{model}, {device}" if count == 1 else f"{model}, FSDP over {count} {device}"


def title(device: str, model: str, count: int) -> str:
    """The heading of a table."""
    shapes = jax.tree.leaves(MODELS[model](), is_leaf=is_shape)
    return (
        f"\n{place(device, model, count)}, {optimizer_of(model)}: "
        f"{sum(map(math.prod, shapes)):,} parameters in {len(shapes)} leaves\n"
        f"{'':{WIDTH}}{'HBM':>7}{'apart':>7}{'kernels':>9}{'copies':>8}"
        f"{'collectives':>13}{'loops':>7}{'temp':>8}{'compile':>9}"
    )


def format_row(row: Row) -> str:
    """A line of a table."""
    kinds = " ".join(f"{count} {kind}" for kind, count in row.collectives.items())
    return (
        f"{row.clipper:{WIDTH}}{row.traffic:7.2f}{row.apart:7.2f}{row.kernels:9}{row.copies:8}"
        f"{sum(row.collectives.values()):13}{row.loops:7}{row.temp:8.2f}{row.compile:9.1f}"
        f"{'  ' + kinds if kinds else ''}"
    )


# The names of figures in the texts of targets.
NAMES = {
    "traffic": "HBM in parameter sizes",
    "kernels": "kernels",
    "temp": "temporary memory in parameter sizes",
    "compile": "time of compilation",
    "all_reduces": "all-reduces",
    "other_collectives": "other collectives",
}


def check_targets(rows: Iterable[Row]) -> list[Target]:
    """The targets whose rows have been measured."""
    found = {(row.device, row.model, row.count, row.clipper): row for row in rows}
    targets: list[Target] = []

    def compare(cell: Cell, own: str, other: str, figure: str, ratio: bool, limit: float) -> None:
        if {(*cell, own), (*cell, other)} <= found.keys():
            ours, theirs = (getattr(found[*cell, label], figure) for label in (own, other))
            value = ours / theirs if ratio else round(ours - theirs, 2)
            text = f"{own} {'/' if ratio else 'less'} {other}, {place(*cell)}: {NAMES[figure]}"
            targets.append(Target(text, limit, value))

    def look_at(cell: Cell, own: str, figure: str, limit: float) -> None:
        if (*cell, own) in found:
            value = round(getattr(found[*cell, own], figure), 2)
            targets.append(Target(f"{own}, {place(*cell)}: {NAMES[figure]}", limit, value))

    for device in DEVICES:
        cell = (device, GPT185, 1)
        compare(cell, AUTO, NONE, "traffic", False, 1.0 if device == H100 else 1.15)
        compare(cell, SKIP, NONE, "traffic", False, 1.3)
        look_at(cell, SKIP, "temp", 0.3)
        compare(cell, AGC, ADAPTIVE, "kernels", True, 1.1)
        compare(cell, AGC, ADAPTIVE, "compile", True, 1.5)
    for clipper in (AUTO, AUTO90, ZSCORE):
        compare((H100, MLP, 1), clipper, GLOBAL, "kernels", False, 8)
    for device in DEVICES:
        cell = (device, GPT24, FSDP)
        for clipper in (AUTO, AUTO_PER_PARAM, SKIP):
            compare(cell, clipper, GLOBAL, "all_reduces", False, 0)
            look_at(cell, clipper, "other_collectives", 0)
    return targets


def select_cells(
    models: list[str] | None, clippers: list[str] | None, quick: bool
) -> dict[tuple[str, int], tuple[str, ...]]:
    """Selects the cells and clippers whose names contain one of the given words."""
    cells = {}
    for (model, count), labels in (QUICK if quick else CELLS).items():
        left = tuple(label for label in labels if is_chosen(label, clippers))
        if is_chosen(model if count == 1 else f"{model}, FSDP", models) and left:
            cells[model, count] = left
    return cells


def main() -> None:
    """Compiles, prints the tables, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("accelerators"), help="folder for the file"
    )
    parser.add_argument("--models", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--clippers", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=[V5E, H100])
    parser.add_argument("--quick", action="store_true", help="the smallest model alone")
    parser.add_argument("--swap", action="store_true", help="take the state before the parameters")
    arguments = parser.parse_args()
    cells = select_cells(arguments.models, arguments.clippers, arguments.quick)
    if not cells:
        parser.error("no model and clipper has such a name")
    compilers = set_up()
    begin = time.perf_counter()
    print(describe_machine(jax, optax), compilers, sep="\n", flush=True)
    rows = []
    for (model, count), labels in cells.items():
        for device in arguments.devices:
            print(title(device, model, count), flush=True)
            for label in labels:
                rows.append(measure(device, model, count, label, arguments.swap))
                print(format_row(rows[-1]), flush=True)
    targets = check_targets(rows)
    print(format_targets(targets))

    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = {
        "machine": describe_machine(jax, optax),
        "compilers": compilers,
        "rows": [row._asdict() for row in rows],
        "targets": [{**target._asdict(), "met": target.met} for target in targets],
    }
    (arguments.out / "accelerators.json").write_text(json.dumps(figures, indent=1) + "\n")
    seconds = time.perf_counter() - begin
    print(f"\nWrote accelerators.json to {arguments.out}/ after {seconds:.0f} s.")


if __name__ == "__main__":
    main()
