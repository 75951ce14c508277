"""Language models of the documentation that ships with Python: an RNN and a transformer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import train_text
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from study.tasks.layers import cross_entropy, dense, dense_init, normalize
from study.training import Optimizer, Task

import optax_smartclip as smartclip

PyTree = Any

CONTEXT = 32
WIDTH = 32
HEADS = 2
LAYERS = 2
BATCH = 8


def draw_windows(
    text: Int[Array, " characters"], key: Key[Array, ""], batch: int, length: int
) -> Int[Array, "batch characters"]:
    """Draws random windows of `length + 1` characters from the text."""
    starts = jax.random.randint(key, (batch,), 0, len(text) - length)
    return text[starts[:, None] + jnp.arange(length + 1)]


def rnn(title: str, optimizer: Optimizer, rates: tuple[float, ...]) -> Task:
    """The demo's model: a recurrent network with ReLU units over 128 characters."""
    corpus = train_text.load_corpus()
    text, held_out = jnp.asarray(corpus.train), jnp.asarray(corpus.held_out)
    graph = nnx.graphdef(train_text.CharacterRNN(corpus.num_characters, nnx.Rngs(0)))

    def init(key: Key[Array, ""]) -> PyTree:
        return nnx.state(train_text.CharacterRNN(corpus.num_characters, nnx.Rngs(key)), nnx.Param)

    def loss(params: PyTree, windows: Int[Array, "batch characters"]) -> Float[Array, ""]:
        return train_text.bits_per_character(nnx.merge(graph, params), windows)

    return Task(
        title=title,
        unit="bits/char",
        steps=400,
        rates=rates,
        optimizer=optimizer,
        init=init,
        batch=lambda key: draw_windows(text, key, train_text.BATCH, train_text.UNROLL),
        loss=loss,
        held_out=lambda params: loss(params, held_out),
    )


def transformer_init(key: Key[Array, ""], num_characters: int) -> PyTree:
    """Draws a decoder with learned positions and a norm before each block, but not of q and k."""
    embed, positions, *keys = jax.random.split(key, 3 + 4 * LAYERS)
    layers = {}
    for number in range(LAYERS):
        qkv, out, up, down = keys[4 * number : 4 * number + 4]
        layers[f"layer{number}"] = {
            "qkv": dense_init(qkv, WIDTH, 3 * WIDTH, 1.0),
            "out": dense_init(out, WIDTH, WIDTH, 1.0 / LAYERS),
            "up": dense_init(up, WIDTH, 4 * WIDTH),
            "down": dense_init(down, 4 * WIDTH, WIDTH, 1.0 / LAYERS),
        }
    return {
        "embed": jax.random.normal(embed, (num_characters, WIDTH)),
        "positions": 0.1 * jax.random.normal(positions, (CONTEXT, WIDTH)),
        "layers": layers,
        "head": dense_init(keys[-1], WIDTH, num_characters, 1.0),
    }


def attend(params: PyTree, x: Float[Array, "*batch time width"]) -> Array:
    """Applies causal attention."""
    qkv = dense(params["qkv"], x).reshape(*x.shape[:-1], 3, HEADS, WIDTH // HEADS)
    q, k, v = (qkv[..., number, :, :] for number in range(3))
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k) * (WIDTH // HEADS) ** -0.5
    causal = jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9).astype(jnp.float32))
    mixed = jnp.einsum("...hqk,...khd->...qhd", weights.astype(x.dtype), v)
    return dense(params["out"], mixed.reshape(x.shape))


def transformer(params: PyTree, text: Int[Array, "*batch time"]) -> Array:
    """Logits of the next character at each time."""
    x = params["embed"][text] + params["positions"]
    for layer in params["layers"].values():
        x = x + attend(layer, normalize(x))
        x = x + dense(layer["down"], jax.nn.gelu(dense(layer["up"], normalize(x))))
    return dense(params["head"], normalize(x))


def language_model(title: str, b2: float, dtype: Any = jnp.float32) -> Task:
    """A transformer language model under AdamW, computed in `dtype` from float32 parameters."""
    corpus = train_text.load_corpus()
    text = jnp.asarray(corpus.train)
    flat = corpus.held_out.reshape(-1)
    held_out = jnp.asarray(flat[: len(flat) // (CONTEXT + 1) * (CONTEXT + 1)])
    held_out = held_out.reshape(-1, CONTEXT + 1)[::4]
    numbers = {"b1": 0.9, "b2": b2, "eps": 1e-8, "weight_decay": 1e-2}

    def loss(params: PyTree, windows: Int[Array, "batch characters"]) -> Float[Array, ""]:
        low = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        logits = transformer(low, windows[:, :-1]).astype(jnp.float32)
        return cross_entropy(logits, windows[:, 1:]) / jnp.log(2.0)

    return Task(
        title=title,
        unit="bits/char",
        steps=400,
        rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        optimizer=lambda schedule: optax.adamw(schedule, **numbers),
        init=lambda key: transformer_init(key, corpus.num_characters),
        batch=lambda key: draw_windows(text, key, BATCH, CONTEXT),
        loss=loss,
        held_out=lambda params: loss(params, held_out),
        stable=lambda schedule: smartclip.stable_adamw(schedule, **numbers),
    )
