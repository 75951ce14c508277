"""Handwritten digits of 8 by 8 pixels, which ship with scikit-learn."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key
from study.tasks.layers import cross_entropy, dense, dense_init, normalize
from study.training import Optimizer, Task

PyTree = Any
Images = Float[Array, "batch height width"]
Labels = Int[Array, " batch"]

NUM_TRAIN = 1400
CHANNELS = (8, 16)
HIDDEN = 64


def load_digits() -> tuple[Images, Labels]:
    """Loads all images in an order that mixes the writers; pixels have mean 0 and variance 1."""
    # Slow to import, and the other tasks do not need it.
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = (images - images.mean()) / images.std()
    return jnp.float32(images[order].reshape(-1, 8, 8)), jnp.int32(labels[order])


def patches(x: Float[Array, "batch height width channels"]) -> Array:
    """The 3 by 3 neighborhood of every second pixel, which turns a convolution into a product.

    XLA's CPU compiler is slow at convolutions whose weights differ between runs.
    """
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, -1)


def conv_init(key: Key[Array, ""]) -> PyTree:
    """Draws two convolutions of stride 2 and a linear head, without normalization."""
    first, second, head = jax.random.split(key, 3)
    return {
        "conv0": dense_init(first, 9, CHANNELS[0]),
        "conv1": dense_init(second, 9 * CHANNELS[0], CHANNELS[1]),
        "head": dense_init(head, 4 * CHANNELS[1], 10, 1.0),
    }


def conv(params: PyTree, images: Images) -> Float[Array, "batch classes"]:
    """Logits."""
    x = images[..., None]
    for name in ("conv0", "conv1"):
        x = jax.nn.relu(dense(params[name], patches(x)))
    return dense(params["head"], x.reshape(len(x), -1))


def normalized_init(key: Key[Array, ""]) -> PyTree:
    """Draws two hidden layers and a linear head."""
    first, second, head = jax.random.split(key, 3)
    return {
        "layer0": dense_init(first, 64, HIDDEN),
        "layer1": dense_init(second, HIDDEN, HIDDEN),
        "head": dense_init(head, HIDDEN, 10, 1.0),
    }


def normalized(params: PyTree, images: Images) -> Float[Array, "batch classes"]:
    """Logits. Each layer's output is normalized, so the scale of its weights has no effect."""
    x = images.reshape(len(images), -1)
    for name in ("layer0", "layer1"):
        x = jax.nn.relu(normalize(dense(params[name], x)))
    return dense(params["head"], x)


def digits(
    title: str,
    optimizer: Optimizer,
    rates: tuple[float, ...],
    *,
    batch: int,
    steps: int,
    model: Any = (conv_init, conv),
) -> Task:
    """Classifies digits; a quarter of the images is held out."""
    images, labels = load_digits()
    init, apply = model

    def loss(params: PyTree, numbers: Int[Array, " batch"]) -> Float[Array, ""]:
        return cross_entropy(apply(params, images[numbers]), labels[numbers])

    return Task(
        title=title,
        unit="nats",
        steps=steps,
        rates=rates,
        optimizer=optimizer,
        init=init,
        batch=lambda key: jax.random.randint(key, (batch,), 0, NUM_TRAIN),
        loss=loss,
        held_out=lambda params: loss(params, jnp.arange(NUM_TRAIN, len(images))),
    )


def normalized_with_decay(title: str) -> Task:
    """Classifies digits with normalized layers, weight decay and a cosine schedule.

    The norms of gradients rise as the rate falls.
    """
    return digits(
        title,
        lambda schedule: optax.chain(
            optax.trace(0.9),
            optax.add_decayed_weights(5e-3),
            optax.scale_by_learning_rate(schedule),
        ),
        (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        batch=64,
        steps=1000,
        model=(normalized_init, normalized),
    )
