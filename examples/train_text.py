"""Trains a character-level language model with several gradient clippers side by side.

The text is the reference documentation that ships with every CPython (`pydoc_data.topics`, about
465 kB of English). The model is a recurrent network with ReLU units, unrolled over 128
characters, so its gradient can grow by any factor within one sequence, and does. The learning rate
is high: with clipping, runs end about as well at twice this rate.

All clippers see the same parameters and batches. All seeds of a clipper train at once, in one
compiled program. Training is chaotic: another processor, or another version of JAX, rounds
differently, and every run then ends at another loss. The table therefore gives means with
intervals. Prints the table and writes `loss.png`, `norms.png` and `steps.csv`.

    python examples/train_text.py --clippers=none,autoclip --seeds=4
"""

import csv
import logging
import sys
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
from scipy import stats
from tqdm import tqdm

import optax_smartclip as smartclip

mpl.use("Agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from machine import describe_machine

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
# Okabe and Ito's colors, which can be told apart with any color vision.
COLORS = {
    "none": "#000000",
    "fixed": "#E69F00",
    "autoclip": "#0072B2",
    "zscore": "#009E73",
    "agc": "#CC79A7",
}

BATCH = 8
UNROLL = 128
HIDDEN = 64
BLOCK = 50
WARMUP_STEPS = 150
RARE = 20
LOSSES_SHOWN = (2.0, 4.5)

STEPS = flags.DEFINE_integer("steps", 800, "Training steps, in blocks of 50.", lower_bound=BLOCK)
SEEDS = flags.DEFINE_integer("seeds", 12, "Runs with each clipper.", lower_bound=2)
CLIPPERS_FLAG = flags.DEFINE_list("clippers", list(CLIPPERS), f"Any of {', '.join(CLIPPERS)}.")
LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-2, "Peak of the schedule.", lower_bound=0.0)
OUT = flags.DEFINE_string("out", "demo", "Folder for the pictures and the CSV.")


class Corpus(NamedTuple):
    """The text as character numbers; 0 stands for all rare characters.

    Attributes:
        train: The first nine tenths, as one sequence.
        held_out: The rest, as windows of `UNROLL + 1` characters.
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
        """Returns the logits of the next character at each time."""

        def step(hidden, embedded):
            hidden = jax.nn.relu(embedded + self.recur(hidden))
            return hidden, hidden

        embedded = self.embed(text.T)
        _, hidden = jax.lax.scan(step, jnp.zeros_like(embedded[0]), embedded)
        return self.head(hidden)


def bits_per_character(
    model: CharacterRNN, windows: Int[Array, "batch characters"]
) -> Float[Array, ""]:
    """Mean cross-entropy of each character, predicted from those before it."""
    logits = model(windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:].T)
    return losses.mean() / jnp.log(2.0)


class Record(NamedTuple):
    """The record of one step.

    Attributes:
        loss: Bits per character on the batch.
        grad_norm: The global norm before clipping.
        threshold: The clipper's threshold; 1 for agc(), which has one for each unit.
        clipped: Whether the gradient was clipped; for agc(), the share of clipped units.
    """

    loss: Any
    grad_norm: Any
    threshold: Any
    clipped: Any


class Runs(NamedTuple):
    """All runs with one clipper.

    Attributes:
        steps: The records, each field of shape `[seeds, steps]`.
        held_out: Bits per character at the end, `[seeds]`.
    """

    steps: Record
    held_out: np.ndarray


def train(name: str, corpus: Corpus, progress: tqdm) -> Runs:
    """Trains with one clipper, all seeds at once."""
    graph = nnx.graphdef(CharacterRNN(corpus.num_characters, nnx.Rngs(0)))
    text, held_out = jnp.asarray(corpus.train), jnp.asarray(corpus.held_out)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE.value, WARMUP_STEPS, max(STEPS.value, WARMUP_STEPS + 1)
    )
    tx = optax.chain(CLIPPERS[name](), optax.adamw(schedule, weight_decay=1e-2))

    def loss(params, windows):
        return bits_per_character(nnx.merge(graph, params), windows)

    def init(seed):
        model = CharacterRNN(corpus.num_characters, nnx.Rngs(jax.random.key(seed)))
        params = nnx.state(model, nnx.Param)
        return params, tx.init(params)

    def step(carry, key):
        params, opt_state = carry
        starts = jax.random.randint(key, (BATCH,), 0, len(text) - UNROLL)
        windows = text[starts[:, None] + jnp.arange(UNROLL + 1)]
        value, grads = jax.value_and_grad(loss)(params, windows)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        grad_norm = optax.tree.norm(grads)
        fixed = jnp.float32(1.0 if name == "fixed" else jnp.inf)
        metrics = smartclip.metrics(opt_state)
        record = Record(
            loss=value,
            grad_norm=grad_norm,
            threshold=metrics.get("clip_threshold", fixed),
            clipped=metrics.get("clipped", grad_norm > fixed),
        )
        return (params, opt_state), record

    def block(carry, seed, first):
        steps = first + jnp.arange(BLOCK)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), steps)
        return jax.lax.scan(step, carry, keys)

    seeds = jnp.arange(SEEDS.value)
    carry = jax.jit(jax.vmap(init))(seeds)
    train_block = jax.jit(jax.vmap(block, in_axes=(0, 0, None)))
    records = []
    for first in range(0, STEPS.value - BLOCK + 1, BLOCK):
        carry, record = train_block(carry, seeds, first)
        records.append(jax.device_get(record))
        progress.update(BLOCK)
    params, _ = carry
    evaluate = jax.jit(jax.vmap(loss, in_axes=(0, None)))
    steps = jax.tree.map(lambda *blocks: np.concatenate(blocks, axis=1), *records)
    return Runs(steps, np.asarray(evaluate(params, held_out), np.float64))


def margin(values: np.ndarray) -> float:
    """Half the width of a 95 % interval for the mean of the same number of new runs.

    The new mean is as uncertain as this one, so the standard error of their difference is larger
    by the root of 2.
    """
    error = values.std(ddof=1) / len(values) ** 0.5
    return 2**0.5 * stats.t.ppf(0.975, len(values) - 1) * error


def print_table(results: dict[str, Runs]) -> None:
    """Prints a row for each clipper."""
    print(
        f"\n{'clipper':26}{'held-out bits/char':>20}{'lowest':>8}{'highest':>9}"
        f"{'worst spike':>13}{'clipped':>9}"
    )
    for name, runs in results.items():
        losses, norms = runs.held_out, runs.steps.grad_norm
        spike = np.max(norms / np.median(norms, axis=1, keepdims=True))
        print(
            f"{LABELS[name]:26}{f'{losses.mean():.2f} +- {margin(losses):.2f}':>20}"
            f"{losses.min():8.2f}{losses.max():9.2f}{spike:13.2g}{runs.steps.clipped.mean():9.1%}"
        )
    print(
        f"+-: in 19 of 20 cases, the mean of {SEEDS.value} new runs lies within this interval; "
        "worst spike: largest norm / median norm"
    )


def write_csv(results: dict[str, Runs], path: Path) -> None:
    """Writes one line for every step of every run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clipper", "seed", "step", *Record._fields])
        for name, runs in results.items():
            for (seed, step), _ in np.ndenumerate(runs.steps.loss):
                values = (field[seed, step] for field in runs.steps)
                writer.writerow([name, seed, step, *(f"{value:.6g}" for value in values)])


def smooth(values: np.ndarray, steps: int = 25) -> np.ndarray:
    """A running mean over `steps`, shorter at the start."""
    # We compute each mean separately: after a huge loss, differences of a running sum would be
    # nothing but rounding errors.
    return np.array([values[max(0, end - steps) : end].mean() for end in range(1, len(values) + 1)])


def plot_loss(results: dict[str, Runs], path: Path) -> None:
    """Plots the training loss over steps, and the held-out loss of every run at the end."""
    figure, (curves, ends) = plt.subplots(
        1, 2, figsize=(9, 4.5), width_ratios=[5, 2], layout="constrained"
    )
    for place, (name, runs) in enumerate(results.items()):
        smoothed = np.array([smooth(loss) for loss in runs.steps.loss])
        curves.plot(smoothed.T, color=COLORS[name], linewidth=0.4, alpha=0.3)
        mean, interval = runs.held_out.mean(), margin(runs.held_out)
        label = f"{LABELS[name]}: {mean:.2f} ± {interval:.2f}"
        curves.plot(smoothed.mean(axis=0), color=COLORS[name], linewidth=1.8, label=label)
        places = np.full(len(runs.held_out), place)
        ends.plot(places, runs.held_out, "o", color=COLORS[name], markersize=4, alpha=0.3)
        ends.errorbar(
            place + 0.3, mean, interval, fmt="_", color=COLORS[name], capsize=3, markersize=7
        )
    curves.set(xlabel="step", ylabel="training loss (bits per character)", ylim=LOSSES_SHOWN)
    curves.set_title("A character-level RNN on Python's documentation", loc="left")
    curves.legend(title="held-out loss at the end", frameon=False)
    ends.set(ylabel="held-out loss at the end", xlabel="seeds; mean ± interval", xticks=[])
    for axes in (curves, ends):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_norms(results: dict[str, Runs], path: Path) -> None:
    """Plots norm and threshold over steps for the first seed, one panel for each clipper."""
    figure, panels = plt.subplots(
        len(results), 1, figsize=(8, 1.6 * len(results) + 0.6), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (name, runs), axes in zip(results.items(), panels[:, 0], strict=True):
        record = Record(*(field[0] for field in runs.steps))
        axes.plot(record.grad_norm, color=COLORS[name], linewidth=0.8, label="norm")
        # A threshold of agc() applies to one unit, so it does not belong on this axis.
        if name not in ("none", "agc"):
            known = record.threshold < np.finfo(np.float32).max
            learned = np.where(known, record.threshold, np.nan)
            axes.plot(learned, color="#D55E00", linewidth=1.2, label="threshold")
            clipped = np.flatnonzero(record.clipped)
            axes.plot(
                clipped, record.grad_norm[clipped], "v", color="#D55E00", markersize=3.5,
                markeredgewidth=0, label="clipped",
            )  # fmt: skip
        axes.set(yscale="log", ylabel="norm")
        axes.set_title(LABELS[name], loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "autoclip":
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
    # Otherwise JAX reports that it has not found a TPU, on every machine without one.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    start = time.perf_counter()
    corpus = load_corpus()
    print(
        f"{len(corpus.train):,} characters to train on, {corpus.held_out.size:,} held out; "
        f"AdamW at {LEARNING_RATE.value:g}, {STEPS.value} steps, {SEEDS.value} seeds"
    )
    results = {}
    with tqdm(total=len(names) * STEPS.value, unit="step", smoothing=0.05) as progress:
        for name in names:
            progress.set_description(LABELS[name])
            results[name] = train(name, corpus, progress)
    print_table(results)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(results, out / "steps.csv")
    plot_loss(results, out / "loss.png")
    plot_norms(results, out / "norms.png")
    print(
        f"Wrote loss.png, norms.png and steps.csv to {out}/ after "
        f"{time.perf_counter() - start:.0f} s. {describe_machine(jax, optax, flax)}"
    )


if __name__ == "__main__":
    app.run(main)
