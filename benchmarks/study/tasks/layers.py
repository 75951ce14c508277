"""The layers of the study's small models."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

PyTree = Any


def dense_init(
    key: Key[Array, ""], inputs: int, outputs: int, gain: float = 2.0
) -> dict[str, Float[Array, "..."]]:
    """Draws normal weights of variance `gain / inputs`; the bias is zero."""
    kernel = jax.random.normal(key, (inputs, outputs)) * (gain / inputs) ** 0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def dense(
    params: dict[str, Float[Array, "..."]], x: Float[Array, "*batch inputs"]
) -> Float[Array, "*batch outputs"]:
    """Applies a linear layer."""
    return x @ params["kernel"] + params["bias"]


def mlp_init(key: Key[Array, ""], *sizes: int) -> dict[str, PyTree]:
    """Draws linear layers of these sizes; the last one has half the variance."""
    keys = jax.random.split(key, len(sizes) - 1)
    gains = [2.0] * (len(sizes) - 2) + [1.0]
    layers = zip(keys, sizes, sizes[1:], gains, strict=False)
    return {f"layer{number}": dense_init(*layer) for number, layer in enumerate(layers)}


def mlp(params: dict[str, PyTree], x: Float[Array, "*batch inputs"]) -> Array:
    """Applies linear layers with ReLU between them."""
    first, *others = params.values()
    x = dense(first, x)
    for layer in others:
        x = dense(layer, jax.nn.relu(x))
    return x


def normalize(x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
    """Applies layer normalization without parameters."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]
) -> Float[Array, ""]:
    """Mean cross-entropy in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
