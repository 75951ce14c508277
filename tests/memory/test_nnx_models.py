"""Flax NNX: modules with random keys and statistics, split as in docs/memory.md."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trees import assert_close

from optax_smartclip.memory import height_compressed_grad, height_compressed_value_and_grad

INPUTS = np.random.default_rng(0).normal(size=(3, 8, 4)).astype(np.float32)


class Net(nnx.Module):
    """Parameters, statistics, a random key and its count."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.body = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, inputs):
        return self.head(self.dropout(jnp.tanh(self.norm(self.body(inputs)))))


def loss_of(model, inputs):
    return jnp.mean(jnp.square(model(inputs) - jnp.sum(inputs, axis=1, keepdims=True)))


def split_value_and_grad(model, inputs):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, inputs):
        model = nnx.merge(graphdef, params, rest)
        return loss_of(model, inputs), nnx.state(model, nnx.Not(nnx.Param))

    value_and_grad = height_compressed_value_and_grad(loss, has_aux=True)
    (value, rest), grads = value_and_grad(params, rest, inputs)
    nnx.update(model, rest)
    assert value_and_grad.last_executor is not None
    return value, grads


def train(value_and_grad):
    """The losses of some steps, and the last state of the module."""
    model = Net()

    @nnx.jit
    def step(model, inputs):
        value, grads = value_and_grad(model, inputs)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, params, grads))
        return value

    losses = [step(model, inputs) for inputs in INPUTS]
    assert model.dropout.rngs.count[...] == len(INPUTS)
    return losses, nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))


def test_a_module_with_dropout_trains_like_with_nnx():
    actual, expected = train(split_value_and_grad), train(nnx.value_and_grad(loss_of))
    assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", [height_compressed_grad, height_compressed_value_and_grad])
def test_a_whole_module_with_dropout_is_refused_with_a_recipe(transform):
    with pytest.raises(TypeError, match="got uint32") as error:
        transform(loss_of)(Net(), INPUTS[0])
    recipe = "`graphdef, params, rest = nnx.split(model, nnx.Param, ...)`"
    assert recipe in "".join(error.value.__notes__)


def test_a_missing_argument_is_refused_without_advice_on_integers():
    with pytest.raises((TypeError, ValueError)) as error:
        height_compressed_grad(loss_of, argnums=5)(Net(), INPUTS[0])
    assert "integers" not in "".join(getattr(error.value, "__notes__", []))
