"""Temporary memory and time of gradients: plain, with checkpoints by hand, and height-compressed.

    python benchmarks/memory.py [--models mlp transformer scan ...] [--repeats 7] [--out memory]

Prints a table for each model, then the targets with the measured values; writes all figures to
`memory.json`. `by hand` has `jax.checkpoint` around each layer, as a user would write it.

- temp: `memory_analysis().temp_size_in_bytes` of the compiled gradient, in MiB.
- predicted: the plan's prediction of temp, in MiB.
- ms: median time in milliseconds. The kinds run in turns, so that other load of the machine affects
  all of them alike.
- ratio: the median over the turns of the time in units of the plain gradient's.
- compile: seconds to trace, plan, lower and compile, once.
- error: the largest difference from the plain gradient, in units of its largest element.

    python benchmarks/memory.py --devices v5e h100 [--models mlp large-mlp ...]

Compiles for devices without the hardware, with the compilers that `make accelerators` installs.
Prints the temporary memory and the prediction, without times and errors. A TPU places arrays in its
fast memory (128 MiB on a v5e) if they fit. XLA does not count that memory as temporary; the large
models exceed it.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from machine import describe_machine

from optax_smartclip.memory import height_compressed_grad


def normal(seed, *shape):
    """Random weights or inputs, scaled by the last axis."""
    return jax.random.normal(jax.random.key(seed), shape) * shape[-1] ** -0.5


def mlp(wrap, batch=1024, width=128, layers=64):
    """A residual MLP."""

    @wrap
    def layer(w, x):
        return x + jnp.tanh(jax.nn.gelu(x @ w))

    def loss(params, x):
        for w in params:
            x = layer(w, x)
        return jnp.mean(x**2)

    return loss, [normal(i, width, width) for i in range(layers)], normal(99, batch, width)


def decoder(batch, length, width, heads):
    """Returns a layer of a decoder, its norm, and a function from a seed to its parameters."""

    def norm(x):
        x = x - jnp.mean(x, -1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def layer(p, x):
        qkv = (norm(x) @ p["qkv"]).reshape(batch, length, 3, heads, width // heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
        mask = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ p["out"]
        return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]

    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width)}
    shapes["down"] = (4 * width, width)

    def init(seed):
        return {k: normal(seed, *s) for k, s in shapes.items()}

    return layer, norm, init


def transformer(wrap, batch=4, length=128, width=128, heads=4, layers=12):
    """A decoder without embeddings."""
    layer, norm, init = decoder(batch, length, width, heads)
    layer = wrap(layer)

    def loss(params, x):
        for p in params:
            x = layer(p, x)
        return jnp.mean(norm(x) ** 4)

    return loss, [init(i) for i in range(layers)], normal(99, batch, length, width)


def scanned_transformer(wrap, batch=4, length=128, width=128, heads=4, layers=24):
    """A decoder that scans over its layers, which are stacked."""
    layer, norm, init = decoder(batch, length, width, heads)
    layer = wrap(layer)

    def loss(params, x):
        x, _ = jax.lax.scan(lambda x, p: (layer(p, x), None), x, params)
        return jnp.mean(norm(x) ** 4)

    params = jax.vmap(init)(jnp.arange(layers))
    return loss, params, normal(99, batch, length, width)


def resnet(wrap, batch=8, size=32, channels=32, layers=12):
    """Residual blocks of two convolutions."""

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def norm(x):
        mean = jnp.mean(x, (0, 1, 2), keepdims=True)
        return (x - mean) * jax.lax.rsqrt(jnp.var(x, (0, 1, 2), keepdims=True) + 1e-5)

    @wrap
    def layer(p, x):
        y = jax.nn.relu(norm(conv(x, p[0])))
        return jax.nn.relu(x + norm(conv(y, p[1])))

    def loss(params, x):
        for p in params:
            x = layer(p, x)
        return jnp.mean(x**2)

    kernels = [[normal(i + j, 3, 3, channels, channels) for j in (0, 50)] for i in range(layers)]
    return loss, kernels, normal(99, batch, size, size, channels)


def rnn(wrap, batch=64, width=128, steps=100):
    """An unrolled gated RNN."""

    @wrap
    def cell(p, h, x):
        gate = jax.nn.sigmoid(h @ p["hg"] + x @ p["xg"])
        return gate * h + (1 - gate) * jnp.tanh(h @ p["h"] + x @ p["x"])

    def loss(params, xs):
        h = jnp.zeros((batch, width))
        for t in range(steps):
            h = cell(params, h, xs[t])
        return jnp.mean(h**2)

    params = {name: normal(i, width, width) for i, name in enumerate(("hg", "xg", "h", "x"))}
    return loss, params, normal(99, steps, batch, width)


MODELS = {
    "mlp": mlp,
    "transformer": transformer,
    "scan": scanned_transformer,
    "resnet": resnet,
    "rnn": rnn,
}
LARGE = {
    "large-mlp": functools.partial(mlp, batch=8192, width=512, layers=24),
    "large-transformer": functools.partial(
        transformer, batch=8, length=512, width=512, heads=8, layers=6
    ),
    "large-scan": functools.partial(
        scanned_transformer, batch=8, length=512, width=512, heads=8, layers=24
    ),
}


def gradients(model):
    """Returns the three kinds of gradient, with parameters and an input."""
    make = {**MODELS, **LARGE}[model]
    plain, params, x = make(lambda layer: layer)
    by_hand, _, _ = make(jax.checkpoint)
    compressed = height_compressed_grad(plain)
    kinds = {"plain": jax.grad(plain), "by hand": jax.grad(by_hand), "compressed": compressed}
    return kinds, params, x


def add_predictions(rows, compressed):
    """Adds the predictions of the plan to the rows."""
    meta = compressed.last_executor.checkpoint_plan.meta
    rows["compressed"]["predicted"] = meta["predicted_peak"] / 2**20
    rows["compressed"]["meta"] = meta
    rows["plain"]["predicted"] = meta["predicted_plain_peak"] / 2**20


def compile_for(device, model):
    """Compiles the three kinds of gradient for a device, which need not be present."""
    kinds, *arguments = gradients(model)
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
    )
    rows = {}
    for kind, gradient in kinds.items():
        program = jax.jit(gradient).lower(*arguments).compile()
        rows[kind] = {"temp": program.memory_analysis().temp_size_in_bytes / 2**20}
    add_predictions(rows, kinds["compressed"])
    return rows


def measure(model, repeats):
    """Compiles and times the three kinds of gradient."""
    kinds, params, x = gradients(model)
    rows, programs, results = {}, {}, {}
    for kind, gradient in kinds.items():
        start = time.perf_counter()
        programs[kind] = jax.jit(gradient).lower(params, x).compile()
        temp = programs[kind].memory_analysis().temp_size_in_bytes / 2**20
        rows[kind] = {"temp": temp, "compile_s": time.perf_counter() - start, "times": []}
        results[kind] = jax.block_until_ready(programs[kind](params, x))
    for _ in range(repeats):
        for kind, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(params, x))
            rows[kind]["times"].append(1e3 * (time.perf_counter() - start))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(results["plain"]))
    for kind, row in rows.items():
        row["ms"] = statistics.median(row["times"])
        row["ratio"] = statistics.median(
            mine / other for mine, other in zip(row["times"], rows["plain"]["times"], strict=True)
        )
        pairs = zip(*(jax.tree.leaves(results[k]) for k in (kind, "plain")), strict=True)
        row["error"] = max(float(jnp.abs(a - b).max()) for a, b in pairs) / largest
    add_predictions(rows, kinds["compressed"])
    return rows


def format_row(model, kind, row):
    """A line of the table."""
    predicted = f"{row['predicted']:.1f}" if "predicted" in row else ""
    line = f"{model:17} {kind:10} {row['temp']:7.1f} {predicted:>9}"
    if "ms" not in row:
        return line
    return (
        f"{line} {row['ms']:8.1f} {row['ratio']:6.2f} {row['compile_s']:9.1f}   {row['error']:.1e}"
    )


def check_targets(figures):
    """Returns a line for each target of the models that were measured."""
    lines = []
    for model, rows in figures.items():
        plain, by_hand, ours = (rows[kind] for kind in ("plain", "by hand", "compressed"))
        targets = []
        # On a TPU, all of the temporary arrays may be in fast memory.
        if ours["temp"] >= 1:
            targets.append(("temp / by hand", 1.1, ours["temp"] / by_hand["temp"]))
            factor = ours["predicted"] / ours["temp"]
            targets.append(("predicted / temp, or its inverse", 2.0, max(factor, 1 / factor)))
        if "error" in ours:
            targets.append(("error", 1e-5, ours["error"]))
            if model in ("mlp", "transformer", "scan"):
                targets.append(("temp / plain", 0.5, ours["temp"] / plain["temp"]))
                targets.append(("time / plain", 1.4, ours["ratio"]))
        for name, limit, value in targets:
            verdict = "met" if value <= limit else "MISSED"
            lines.append(f"{verdict:7} {value:8.2g} <= {limit:<6g} {model}: {name}")
    return lines


def main():
    """Prints the tables and the targets, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *LARGE])
    parser.add_argument("--devices", nargs="+", help="compile for these: v5e, h100")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each kind")
    parser.add_argument("--out", type=Path, default=Path("memory"), help="folder for the file")
    args = parser.parse_args()
    record = {}
    if args.devices:
        # Only compiling for devices needs the accelerators' compilers.
        from accelerators import describe, set_up

        record["compilers"] = set_up()
    record["machine"] = describe_machine(jax)
    print(*reversed(record.values()), sep="\n", flush=True)
    models = args.models or [*MODELS, *(LARGE if args.devices else ())]
    figures = {}
    for device in args.devices or [""]:
        print(f"\n{'model':17} kind          temp predicted", end="")
        print(f"   {device}" if device else "       ms  ratio   compile   error", flush=True)
        figures[device] = {}
        for model in models:
            if device:
                rows = compile_for(describe(device, 1)[0], model)
            else:
                rows = measure(model, args.repeats)
            figures[device][model] = rows
            for kind, row in rows.items():
                print(format_row(model, kind, row), flush=True)
        print("", "Targets", *check_targets(figures[device]), sep="\n", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    name = "memory-devices.json" if args.devices else "memory.json"
    record["models"] = figures if args.devices else figures[""]
    (args.out / name).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
