"""The run of `make spikes`, in which some batches, examples or layers are damaged."""

from typing import Any

import damaged_text
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from study.tasks.layers import dense_init
from study.tasks.text import draw_windows
from study.training import Task, as_it_is

PyTree = Any

RATE_OF_DAMAGE = damaged_text.DAMAGED
# The factor of the features of a batch that was not divided by 255.
FACTOR = 255.0
NUM_BAD_EXAMPLES = 4
FACTOR_OF_LAYER = 1000.0

BATCH, LAYER, EXAMPLES = "batch", "layer", "examples"


def damaged(title: str, kind: str) -> Task:
    """A network of two hidden layers, trained by AdamW, with damage in 2 % of the steps.

    Args:
        title: The title in a picture.
        kind: The damage. `BATCH`: the features of all examples are 255 times too large;
            `EXAMPLES`: those of 4 in 128; `LAYER`: the gradient of the second layer is 1,000 times
            too large.
    """
    corpus = damaged_text.load_corpus()
    text = jnp.asarray(corpus.train)
    length = damaged_text.CONTEXT
    starts = np.arange(0, len(corpus.held_out) - length, 8)
    held_out = jnp.asarray(corpus.held_out[starts[:, None] + np.arange(length + 1)])

    def init(key: Key[Array, ""]) -> PyTree:
        embed, first, second, head = jax.random.split(key, 4)
        embedding, hidden = damaged_text.EMBEDDING, damaged_text.HIDDEN
        return {
            "embed": {"kernel": jax.random.normal(embed, (corpus.num_characters, embedding))},
            "first": dense_init(first, length * embedding, hidden),
            "second": dense_init(second, hidden, hidden),
            "head": dense_init(head, hidden, corpus.num_characters),
        }

    def batch(key: Key[Array, ""]) -> tuple[Array, Array]:
        draw, hit = jax.random.split(key)
        bad = {BATCH: damaged_text.BATCH, EXAMPLES: NUM_BAD_EXAMPLES, LAYER: 0}[kind]
        is_bad = (jnp.arange(damaged_text.BATCH) < bad) & _is_hit(hit)
        windows = draw_windows(text, draw, damaged_text.BATCH, length)
        return windows, jnp.where(is_bad, FACTOR, 1.0)[:, None]

    def loss(params: PyTree, batch: tuple[Array, Array]) -> Float[Array, ""]:
        return damaged_text.bits_per_character(params, *batch)

    def damage(key: Key[Array, ""], grads: PyTree) -> PyTree:
        factor = jnp.where(_is_hit(key), FACTOR_OF_LAYER, 1.0)
        return {**grads, "second": jax.tree.map(lambda leaf: factor * leaf, grads["second"])}

    return Task(
        title=title,
        unit="bits/char",
        steps=400,
        rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        optimizer=lambda schedule: optax.adamw(schedule, weight_decay=1e-2),
        init=init,
        batch=batch,
        loss=loss,
        held_out=lambda params: damaged_text.bits_per_character(params, held_out),
        damage=damage if kind == LAYER else as_it_is,
    )


def _is_hit(key: Key[Array, ""]) -> Array:
    return jax.random.uniform(key) < RATE_OF_DAMAGE
