"""Tasks on generated data: regression with heavy-tailed noise, and a diffusion model of points."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key
from study.tasks.layers import mlp, mlp_init
from study.training import Task

PyTree = Any
Points = Float[Array, "batch 2"]

DIMENSIONS = 32
DEGREES_OF_FREEDOM = 1.5
BATCH = 64
HIDDEN = 64
NUM_HELD_OUT = 2048


def regression(title: str) -> Task:
    """Linear regression by SGD. The variance of the noise is infinite; the optimum is all ones."""

    def batch(key: Key[Array, ""]) -> tuple[Array, Array]:
        inputs, noise = jax.random.split(key)
        x = jax.random.normal(inputs, (16, DIMENSIONS))
        return x, x.sum(-1) + jax.random.t(noise, DEGREES_OF_FREEDOM, (16,))

    def loss(params: PyTree, batch: tuple[Array, Array]) -> Float[Array, ""]:
        x, y = batch
        return 0.5 * jnp.mean(jnp.square(x @ params["w"] - y))

    return Task(
        title=title,
        unit="excess loss",
        steps=1000,
        rates=(1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        optimizer=optax.sgd,
        init=lambda key: {"w": jnp.zeros(DIMENSIONS)},
        batch=batch,
        loss=loss,
        held_out=lambda params: 0.5 * jnp.sum(jnp.square(params["w"] - 1.0)),
    )


def draw_spiral(key: Key[Array, ""], count: int) -> Points:
    """Draws points near two spirals."""
    angle, arm, noise = jax.random.split(key, 3)
    turn = 3 * jnp.pi * jnp.sqrt(jax.random.uniform(angle, (count, 1)))
    sign = jnp.where(jax.random.bernoulli(arm, 0.5, (count, 1)), 1.0, -1.0)
    spiral = sign * turn / (3 * jnp.pi) * jnp.hstack([jnp.cos(turn), jnp.sin(turn)])
    return 2 * spiral + 0.03 * jax.random.normal(noise, (count, 2))


def denoising_loss(params: PyTree, key: Key[Array, ""], points: Points) -> Float[Array, ""]:
    """Mean squared error of the predicted noise, at random times of a cosine schedule."""
    times, noises = jax.random.split(key)
    time = jax.random.uniform(times, (len(points), 1))
    noise = jax.random.normal(noises, points.shape)
    level = 0.5 * jnp.pi * time
    noisy = jnp.cos(level) * points + jnp.sin(level) * noise
    waves = level * 2.0 ** jnp.arange(4)
    features = jnp.hstack([noisy, jnp.cos(waves), jnp.sin(waves)])
    return jnp.mean(jnp.square(mlp(params, features) - noise))


def diffusion(title: str) -> Task:
    """A long run of a diffusion model, in which the gradient becomes small."""
    held_out_key, points_key = jax.random.split(jax.random.key(-1))
    held_out = draw_spiral(points_key, NUM_HELD_OUT)

    def loss(params: PyTree, key: Key[Array, ""]) -> Float[Array, ""]:
        points, noise = jax.random.split(key)
        return denoising_loss(params, noise, draw_spiral(points, BATCH))

    return Task(
        title=title,
        unit="error",
        steps=2000,
        rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        optimizer=optax.adam,
        init=lambda key: mlp_init(key, 10, HIDDEN, HIDDEN, 2),
        batch=lambda key: key,
        loss=loss,
        held_out=lambda params: denoising_loss(params, held_out_key, held_out),
    )
