"""Trains a character-level language model with several gradient clippers side by side.

The text is the reference documentation that ships with every CPython (`pydoc_data.topics`, about
465 kB of English). The model is a recurrent network with ReLU units, unrolled over 128
characters: its gradient can grow by any factor within one sequence, and does. The learning rate
is the one at which clipped runs end best.

All clippers see the same parameters, batches and seeds, and take turns in blocks of 50 steps, so
that what slows the machine down slows all of them. Prints a table and writes `loss.png`,
`norms.png` and `steps.csv`.

    python examples/train_text.py --clippers=none,autoclip --seeds=1
"""

import csv
import logging
import platform
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm import tqdm

import optax_smartclip as smartclip

mpl.use("Agg")
import matplotlib.pyplot as plt

CLIPPERS = {
    "none": optax.identity,
    "fixed": lambda: optax.clip_by_global_norm(1.0),
    "autoclip": smartclip.autoclip,
    "zscore": smartclip.zscore_clip,
    "agc": smartclip.agc,
}
LABELS = {
    "none": "no clipping",
    "fixed": "clip_by_global_norm(1.0)",
    "autoclip": "autoclip()",
    "zscore": "zscore_clip()",
    "agc": "agc()",
}
# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = {
    "none": "#000000",
    "fixed": "#E69F00",
    "autoclip": "#0072B2",
    "zscore": "#009E73",
    "agc": "#CC79A7",
}

BATCH = 16
UNROLL = 128
HIDDEN = 128
BLOCK = 50
WARMUP_STEPS = 150
RARE = 20

STEPS = flags.DEFINE_integer("steps", 1500, "Training steps of each run.", lower_bound=BLOCK)
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs with each clipper.", lower_bound=1)
CLIPPERS_FLAG = flags.DEFINE_list("clippers", list(CLIPPERS), f"Any of {', '.join(CLIPPERS)}.")
LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-2, "Peak of the schedule.", lower_bound=0.0)
OUT = flags.DEFINE_string("out", "demo", "Folder for the pictures and the CSV.")


class Corpus(NamedTuple):
    """The text as character numbers; 0 stands for all rare characters.

    Attributes:
        train: The first nine tenths, in one sequence.
        held_out: The rest, in windows of `UNROLL + 1` characters.
        num_characters: The size of the vocabulary.
    """

    train: Int[np.ndarray, " characters"]
    held_out: Int[np.ndarray, "windows characters"]
    num_characters: int


def load_corpus() -> Corpus:
    """Reads the text that ships with Python."""
    text = "\n".join(topics[name] for name in sorted(topics))
    counts = Counter(text)
    common = sorted(character for character, count in counts.items() if count >= RARE)
    numbers = {character: number for number, character in enumerate(common, start=1)}
    characters = np.array([numbers.get(character, 0) for character in text], np.int32)
    train, rest = np.split(characters, [9 * len(characters) // 10])
    starts = np.arange(0, len(rest) - UNROLL, UNROLL)
    held_out = rest[starts[:, None] + np.arange(UNROLL + 1)]
    return Corpus(train, held_out, len(common) + 1)


class CharacterRNN(nnx.Module):
    """One recurrent layer, `h = relu(embed(x) + h W + b)`, and a linear head."""

    def __init__(self, num_characters: int, rngs: nnx.Rngs):
        scale = jax.nn.initializers.normal(HIDDEN**-0.5)
        self.embed = nnx.Embed(num_characters, HIDDEN, embedding_init=scale, rngs=rngs)
        orthogonal = jax.nn.initializers.orthogonal()
        self.recur = nnx.Linear(HIDDEN, HIDDEN, kernel_init=orthogonal, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, num_characters, rngs=rngs)

    def __call__(self, text: Int[Array, "batch time"]) -> Float[Array, "time batch characters"]:
        """Logits of the next character at each time."""

        def step(hidden, embedded):
            hidden = jax.nn.relu(embedded + self.recur(hidden))
            return hidden, hidden

        embedded = self.embed(text.T)
        _, hidden = jax.lax.scan(step, jnp.zeros_like(embedded[0]), embedded)
        return self.head(hidden)


def bits_per_character(
    model: CharacterRNN, windows: Int[Array, "batch characters"]
) -> Float[Array, ""]:
    """Mean cross-entropy of predicting each character from those before it."""
    logits = model(windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:].T)
    return losses.mean() / jnp.log(2.0)


class Record(NamedTuple):
    """What is kept of every step.

    Attributes:
        loss: Bits per character on the batch.
        grad_norm: The global norm, before clipping.
        threshold: That of the clipper; for agc(), of the unit furthest over it.
        clipped: Whether anything was.
    """

    loss: Any
    grad_norm: Any
    threshold: Any
    clipped: Any


class Run:
    """One training run: a clipper, a seed, and where it has got to."""

    def __init__(self, name: str, seed: int, corpus: Corpus):
        self.name, self.seed = name, seed
        model = CharacterRNN(corpus.num_characters, nnx.Rngs(seed))
        self.graph, self.params = nnx.split(model, nnx.Param)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, LEARNING_RATE.value, WARMUP_STEPS, max(STEPS.value, WARMUP_STEPS + 1)
        )
        self.tx = optax.chain(CLIPPERS[name](), optax.adamw(schedule, weight_decay=1e-2))
        self.opt_state = self.tx.init(self.params)
        self.blocks: list[Record] = []
        self.seconds: list[float] = []
        self.held_out_loss = float("nan")

    def history(self) -> Record:
        """The record of all steps so far, each field of shape `[steps]`."""
        return Record(*map(np.concatenate, zip(*self.blocks, strict=True)))


def compile_block(run: Run, train: Int[Array, " characters"]):
    """Compiles `BLOCK` training steps of a clipper into one program."""
    graph, tx = run.graph, run.tx

    def loss(params, windows):
        return bits_per_character(nnx.merge(graph, params), windows)

    def step(carry, key):
        params, opt_state = carry
        starts = jax.random.randint(key, (BATCH,), 0, len(train) - UNROLL)
        windows = train[starts[:, None] + jnp.arange(UNROLL + 1)]
        value, grads = jax.value_and_grad(loss)(params, windows)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        grad_norm = optax.tree.norm(grads)
        fixed = jnp.float32(1.0 if run.name == "fixed" else jnp.inf)
        metrics = smartclip.metrics(opt_state)
        record = Record(
            loss=value,
            grad_norm=grad_norm,
            threshold=metrics.get("clip_threshold", fixed),
            clipped=metrics.get("clipped", grad_norm > fixed),
        )
        return (params, opt_state), record

    @jax.jit
    def block(params, opt_state, seed, first):
        keys = jax.vmap(lambda step: jax.random.fold_in(jax.random.key(seed), step))(
            first + jnp.arange(BLOCK)
        )
        return jax.lax.scan(step, (params, opt_state), keys)

    return block


def train(corpus: Corpus, names: list[str]) -> list[Run]:
    """Trains every clipper with every seed."""
    text = jnp.asarray(corpus.train)
    held_out = jnp.asarray(corpus.held_out)
    runs = []
    blocks = {}
    evaluate = jax.jit(
        lambda graph, params: bits_per_character(nnx.merge(graph, params), held_out),
        static_argnums=0,
    )
    num_blocks = STEPS.value // BLOCK
    total = SEEDS.value * len(names) * num_blocks * BLOCK
    with tqdm(total=total, unit="step", smoothing=0.05) as progress:
        for seed in range(SEEDS.value):
            in_turn = [Run(name, seed, corpus) for name in names]
            for number in range(num_blocks):
                for run in in_turn:
                    if run.name not in blocks:
                        progress.set_description(f"compile {run.name}")
                        block = compile_block(run, text)
                        arguments = (run.params, run.opt_state, seed, 0)
                        blocks[run.name] = block.lower(*arguments).compile()
                    progress.set_description(f"{run.name}, seed {seed}")
                    start = time.perf_counter()
                    (run.params, run.opt_state), record = jax.block_until_ready(
                        blocks[run.name](run.params, run.opt_state, seed, number * BLOCK)
                    )
                    run.seconds.append(time.perf_counter() - start)
                    run.blocks.append(jax.tree.map(np.asarray, record))
                    progress.update(BLOCK)
            for run in in_turn:
                run.held_out_loss = float(evaluate(run.graph, run.params))
            runs += in_turn
    return runs


def print_table(runs: list[Run], names: list[str]) -> None:
    """Prints a row for each clipper; means over the seeds, the spread where it matters."""
    seconds = {name: np.array([run.seconds for run in runs if run.name == name]) for name in names}
    base = names[0] if "none" not in names else "none"
    print(
        f"\n{'clipper':26}{'held-out bits/char':>20}{'each seed':>22}"
        f"{'worst spike':>13}{'clipped':>9}{'speed':>7}"
    )
    for name in names:
        mine = [run for run in runs if run.name == name]
        losses = np.array([run.held_out_loss for run in mine])
        spread = losses.std(ddof=1) if len(losses) > 1 else 0.0
        norms = [run.history().grad_norm for run in mine]
        spike = max(np.max(norm) / np.median(norm) for norm in norms)
        clipped = np.mean([run.history().clipped for run in mine])
        # The same block of the same seed, one after the other: a ratio that outlasts noise.
        speed = np.median(seconds[base] / seconds[name])
        print(
            f"{LABELS[name]:26}{f'{losses.mean():.3f} +- {spread:.3f}':>20}"
            f"{' '.join(f'{loss:.3f}' for loss in losses):>22}"
            f"{spike:13.2g}{clipped:9.1%}{speed:7.2f}"
        )
    print(
        f"worst spike: largest norm / median norm; speed: steps per second relative to "
        f"{LABELS[base]}"
    )
    means = {
        name: np.mean([run.held_out_loss for run in runs if run.name == name]) for name in names
    }
    best = min(means, key=lambda name: np.nan_to_num(means[name], nan=np.inf))
    print(f"Best held-out loss on average: {LABELS[best]}.")


def write_csv(runs: list[Run], path: Path) -> None:
    """Writes one line for every step of every run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clipper", "seed", "step", *Record._fields])
        for run in runs:
            for step, values in enumerate(zip(*run.history(), strict=True)):
                writer.writerow([run.name, run.seed, step, *(f"{value:.6g}" for value in values)])


def smooth(values: np.ndarray, steps: int = 25) -> np.ndarray:
    """A running mean over `steps`, shorter at the start."""
    sums = np.cumsum(np.r_[0.0, values])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - steps, 0)
    return (sums[last] - sums[first]) / (last - first)


def plot_loss(runs: list[Run], names: list[str], path: Path) -> None:
    """Training loss over steps: each seed a thin line, the mean of the seeds a thick one."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in names:
        curves = np.array([smooth(run.history().loss) for run in runs if run.name == name])
        held_out = np.mean([run.held_out_loss for run in runs if run.name == name])
        for curve in curves:
            axes.plot(curve, color=COLOURS[name], linewidth=0.5, alpha=0.4)
        label = f"{LABELS[name]}: {held_out:.2f}"
        axes.plot(curves.mean(axis=0), color=COLOURS[name], linewidth=1.8, label=label)
    axes.set(xlabel="step", ylabel="training loss (bits per character)", ylim=(1.7, 4.5))
    axes.set_title("A character-level RNN on Python's documentation", loc="left")
    axes.legend(title="held-out loss at the end", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_norms(runs: list[Run], names: list[str], path: Path) -> None:
    """Norm and threshold over steps in the first seed, a panel for each clipper."""
    shown = [run for run in runs if run.seed == 0]
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(8, 1.6 * len(shown) + 0.6), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for run, axes in zip(shown, panels[:, 0], strict=True):
        record = run.history()
        steps = np.arange(len(record.loss))
        axes.plot(steps, record.grad_norm, color=COLOURS[run.name], linewidth=0.8, label="norm")
        # The threshold of agc() is that of one unit, and has no place on this axis.
        if run.name not in ("none", "agc"):
            finite = np.where(np.isfinite(record.threshold), record.threshold, np.nan)
            axes.plot(steps, finite, color="#D55E00", linewidth=1.2, label="threshold")
            clipped = np.flatnonzero(record.clipped)
            axes.plot(
                clipped, record.grad_norm[clipped], "v", color="#D55E00", markersize=3.5,
                markeredgewidth=0, label="clipped",
            )  # fmt: skip
        axes.set(yscale="log", ylabel="norm")
        axes.set_title(LABELS[run.name], loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if run.name == "autoclip":
            axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper right")
    panels[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    """Trains, prints the table, writes the files."""
    if arguments[1:]:
        raise app.UsageError(f"Unexpected arguments: {arguments[1:]}.")
    names = CLIPPERS_FLAG.value
    unknown = sorted(set(names) - set(CLIPPERS))
    if unknown or not names:
        raise app.UsageError(f"--clippers must be any of {', '.join(CLIPPERS)}, got {unknown}.")
    # Otherwise JAX reports, on every machine without one, that it has found no TPU.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    start = time.perf_counter()
    corpus = load_corpus()
    print(
        f"{len(corpus.train):,} characters to train on, {corpus.held_out.size:,} held out; "
        f"AdamW at {LEARNING_RATE.value:g}, {STEPS.value} steps, {SEEDS.value} seeds"
    )
    runs = train(corpus, names)
    print_table(runs, names)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(runs, out / "steps.csv")
    plot_loss(runs, names, out / "loss.png")
    plot_norms(runs, names, out / "norms.png")
    print(
        f"Wrote loss.png, norms.png and steps.csv to {out}/ after "
        f"{time.perf_counter() - start:.0f} s. Python {platform.python_version()}, "
        f"jax {jax.__version__}, optax {optax.__version__}, flax {flax.__version__}, "
        f"{platform.machine()}, {jax.default_backend()}."
    )


if __name__ == "__main__":
    app.run(main)
