"""A linear regression trained by a loop in JAX, and by one in float64 NumPy that clips by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference

import optax_smartclip as smartclip

RATE = 0.1
WINDOW = 5

rng = np.random.default_rng(0)
PARAMS = {"b": np.float32(rng.normal(size=2)), "w": np.float32(rng.normal(size=(3, 2)))}
# Twelve batches; the targets of the sixth are large and give a spike.
INPUTS = rng.normal(size=(12, 8, 3)).astype(np.float32)
TARGETS = rng.normal(size=(12, 8, 2)).astype(np.float32)
TARGETS[5] *= 100


def loss(params, inputs, targets):
    predictions = inputs @ params["w"] + params["b"][None]
    return jnp.mean(jnp.sum(jnp.square(predictions - targets), axis=1))


def residuals(params, inputs, targets):
    return inputs @ params["w"] + params["b"] - targets


def value(params, inputs, targets):
    """The loss, in NumPy."""
    return np.mean(np.sum(np.square(residuals(params, inputs, targets)), axis=1))


def gradient(params, inputs, targets):
    """The gradient of the loss, in NumPy."""
    errors = residuals(params, inputs, targets)
    return {"b": 2 * errors.mean(axis=0), "w": 2 * inputs.T @ errors / len(inputs)}


def give_value(value, grads, batch):
    del grads, batch
    return {"value": value}


def train(
    tx,
    inputs=INPUTS,
    targets=TARGETS,
    params=PARAMS,
    fast=lambda params: params,
    extra_args=give_value,
):
    """A training loop. Returns the parameters and the optimizer's state after each step."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, *batch):
        value, grads = jax.value_and_grad(loss)(fast(params), *batch)
        updates, state = tx.update(grads, state, params, **extra_args(value, grads, batch))
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    history = []
    for batch in zip(inputs, targets, strict=True):
        params, state = step(params, state, *batch)
        history.append((params, state))
    return history


class Autoclip:
    """By hand: the threshold is the median of the last five norms, including the current one."""

    factory = staticmethod(
        lambda **kwargs: smartclip.autoclip(50.0, history=smartclip.ring_buffer(WINDOW), **kwargs)
    )

    def __init__(self):
        self.norms = []

    def __call__(self, grads, params):
        self.norms.append(reference.norm(grads))
        self.limit = reference.percentile_thresholds(self.norms, 50.0, WINDOW)[-1]
        over = self.norms[-1] > self.limit
        scale = self.limit / self.norms[-1] if over else 1.0
        return jax.tree.map(lambda grad: grad * scale, grads)


class Agc:
    """By hand: clips each column of a matrix, and each vector, to a tenth of its weights' norm."""

    factory = staticmethod(lambda **kwargs: smartclip.agc(0.1, **kwargs))

    def __call__(self, grads, params):
        def clip(grad, weight):
            norm, weight_norm = (np.linalg.norm(x, axis=0) for x in (grad, weight))
            return grad * np.minimum(1, 0.1 * np.maximum(weight_norm, 1e-3) / norm)

        return jax.tree.map(clip, grads, params)


BY_HAND = {"autoclip": Autoclip, "agc": Agc}


def train_by_hand(update, inputs=INPUTS, targets=TARGETS):
    """The parameters after each step; `update` maps the gradient and the parameters to a step."""
    params = jax.tree.map(np.float64, PARAMS)
    history = []
    for batch in zip(inputs, targets, strict=True):
        updates = update(gradient(params, *batch), params)
        params = jax.tree.map(np.add, params, updates)
        history.append(params)
    return history


def descend(grads):
    return jax.tree.map(lambda grad: -RATE * grad, grads)


def assert_same_params(history, expected):
    for (params, _), expected_params in zip(history, expected, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5),
            params,
            expected_params,
        )
