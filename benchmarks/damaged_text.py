"""A training run with some damaged batches, which shows how well a clipper protects it.

A small network predicts the next character of English text (`pydoc_data.topics`, which ships with
every CPython) from the 12 before it. It is trained by AdamW. In 2 % of the steps, and in a burst of
8, the batch is damaged in one of two ways that happen in practice:

- garbage: the characters are random, as when a shard is decoded wrongly. Such gradients point in
  a wrong direction, and are up to five times as large as others;
- not normalized: the features (the embedded characters) are 255 times too large, as when a worker
  forgets to divide by 255. These gradients are hundreds of times as large as others.

Both kinds enter Adam's moments and stay there, in the second moment for hundreds of steps.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

CONTEXT = 12
EMBEDDING = 16
HIDDEN = 128
BATCH = 128
RARE = 20

DAMAGED = 0.02
BURST = 8
CLEAN, GARBAGE, NOT_NORMALIZED = range(3)

# Wraps an optimizer in a clipper of its gradients or a guard that drops its steps.
Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]


class Corpus(NamedTuple):
    """The text as numbers; 0 stands for all rare characters."""

    train: np.ndarray
    held_out: np.ndarray
    num_characters: int


class Task(NamedTuple):
    """The initial parameters and the data, which are the same for all clippers.

    Attributes:
        params: The initial parameters, each with a leading axis of seeds.
        windows: CONTEXT characters and the one that follows, [seeds, steps, BATCH, CONTEXT + 1].
        kinds: Whether a batch is clean, garbage or not normalized, [seeds, steps].
        held_out: Windows of text that is not trained on.
    """

    params: dict
    windows: np.ndarray
    kinds: np.ndarray
    held_out: np.ndarray


class Run(NamedTuple):
    """The results of one clipper.

    Attributes:
        held_out: Bits per character at the end, [seeds].
        norms: The norms of the gradients before clipping, [seeds, steps].
    """

    held_out: np.ndarray
    norms: np.ndarray


def load_corpus() -> Corpus:
    """Reads the text; the last tenth is held out."""
    text = "\n".join(topics[name] for name in sorted(topics))
    common = sorted(character for character, count in Counter(text).items() if count >= RARE)
    numbers = {character: number for number, character in enumerate(common, start=1)}
    characters = np.array([numbers.get(character, 0) for character in text], np.int32)
    return Corpus(*np.split(characters, [9 * len(characters) // 10]), len(common) + 1)


def load_task(seeds: int, steps: int, *, damaged: bool = True) -> Task:
    """Draws parameters and batches. Apart from the damage, `damaged` does not change them."""
    corpus = load_corpus()
    span = np.arange(CONTEXT + 1)
    drawn = []
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        params = init_params(corpus.num_characters, generator)
        first = generator.integers(len(corpus.train) - CONTEXT, size=(steps, BATCH, 1))
        windows = corpus.train[first + span]
        kinds = np.full(steps, CLEAN)
        if damaged:
            hit = generator.random(steps) < DAMAGED
            burst = generator.integers(steps // 2, 3 * steps // 4)
            hit[burst : burst + BURST] = True
            kinds[hit] = generator.integers(GARBAGE, NOT_NORMALIZED + 1, hit.sum())
            garbage = kinds == GARBAGE
            windows[garbage] = generator.integers(
                corpus.num_characters, size=windows[garbage].shape
            )
        drawn.append((params, windows, kinds))
    params, windows, kinds = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
    held_out = corpus.held_out[np.arange(0, len(corpus.held_out) - CONTEXT, 2)[:, None] + span]
    return Task(params, windows, kinds, held_out)


def init_params(num_characters: int, generator: np.random.Generator) -> dict:
    """Draws the parameters of an embedding, two hidden layers and a linear head."""
    sizes = {
        "first": (CONTEXT * EMBEDDING, HIDDEN),
        "second": (HIDDEN, HIDDEN),
        "head": (HIDDEN, num_characters),
    }
    params = {"embed": {"kernel": generator.normal(size=(num_characters, EMBEDDING))}}
    for name, shape in sizes.items():
        kernel = generator.normal(size=shape) * (2 / shape[0]) ** 0.5
        params[name] = {"kernel": kernel, "bias": np.zeros(shape[1])}
    return jax.tree.map(np.float32, params)


def bits_per_character(params: dict, windows: jax.Array, scale=1.0):
    """Mean cross-entropy of the last character of each window."""
    embedded = params["embed"]["kernel"][windows[:, :-1]]
    hidden = scale * embedded.reshape(len(windows), -1)
    for name in ("first", "second"):
        hidden = jax.nn.relu(hidden @ params[name]["kernel"] + params[name]["bias"][None])
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, -1])
    return losses.mean() / jnp.log(2.0)


def train(wrap: Wrap, task: Task, learning_rate: float) -> Run:
    """Trains with one clipper, all seeds at once. The loss is passed as Optax's `value`."""
    steps = task.kinds.shape[1]
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    tx = optax.with_extra_args_support(wrap(optax.adamw(schedule, weight_decay=1e-2)))

    def step(carry, batch):
        params, state = carry
        windows, kind = batch
        scale = jnp.where(kind == NOT_NORMALIZED, 255.0, 1.0)
        loss, grads = jax.value_and_grad(bits_per_character)(params, windows, scale)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), optax.tree.norm(grads)

    @jax.jit
    @partial(jax.vmap, in_axes=(Task(0, 0, 0, None),))
    def all_seeds(task):
        start = (task.params, tx.init(task.params))
        (params, _), norms = jax.lax.scan(step, start, (task.windows, task.kinds))
        return bits_per_character(params, task.held_out), norms

    # The task is an argument, because XLA would try to fold constants during compilation.
    return Run(*(np.asarray(field, np.float64) for field in all_seeds(task)))
