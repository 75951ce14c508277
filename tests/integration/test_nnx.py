"""Flax NNX: `nnx.Optimizer` passes variables to `init` and arrays to `update`.

The expected results are those of a plain Optax loop over dictionaries, whose paths are the same in
both.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from trees import assert_close

import optax_smartclip as smartclip
from optax_smartclip import masks

rng = np.random.default_rng(0)
INPUTS = np.float32(rng.normal(size=(14, 8, 3)))
TARGETS = np.float32(rng.normal(size=(14, 8, 2)))
TARGETS[12] *= 1000
ROUNDING = {"rtol": 1e-5, "atol": 1e-7}


class Model(nnx.Module):
    """Two layers; `head` is the last."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.body = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, inputs):
        return self.head(jnp.tanh(self.body(inputs)))


def model_loss(model, inputs, targets):
    return jnp.mean(jnp.square(model(inputs) - targets))


def plain_loss(params, inputs, targets):
    """The same loss for a dictionary."""
    for name in ("body", "head"):
        layer = params[name]
        inputs = inputs @ layer["kernel"] + layer["bias"][None]
        inputs = jnp.tanh(inputs) if name == "body" else inputs
    return jnp.mean(jnp.square(inputs - targets))


def kernels(body, head):
    """A mask without the biases."""
    return {
        "body": {"kernel": body, "bias": False},
        "head": {"kernel": head, "bias": False},
    }


# The same clipper for variables, with paths, and for dictionaries, with trees. Some patterns match
# the end of a path, where variables and arrays differ.
CLIPPERS = {
    "per_layer": (
        lambda: smartclip.autoclip(scope="per_layer"),
        lambda: smartclip.autoclip(scope={"body": "body", "head": "head"}),
    ),
    "agc": (
        lambda: smartclip.agc(mask=masks.except_paths("^head/", "bias$")),
        lambda: optax.masked(optax.adaptive_grad_clip(0.01), kernels(True, False)),
    ),
    "masked": (
        lambda: optax.masked(
            smartclip.autoclip(scope="per_param", max_norm=0.1), masks.except_paths("bias$")
        ),
        lambda: optax.masked(
            smartclip.autoclip(scope="per_param", max_norm=0.1), kernels(True, True)
        ),
    ),
}


def train_plainly(clipper):
    """The parameters and the metrics after each step of a plain loop."""
    tx = optax.chain(clipper, optax.sgd(0.1, momentum=0.9))

    @jax.jit
    def step(params, state, inputs, targets):
        grads = jax.grad(plain_loss)(params, inputs, targets)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = nnx.to_pure_dict(nnx.state(Model(), nnx.Param))
    state = tx.init(params)
    history = []
    for batch in zip(INPUTS, TARGETS, strict=True):
        params, state = step(params, state, *batch)
        history.append((params, smartclip.metrics(state)))
    return history


@pytest.mark.parametrize(("clipper", "plain_clipper"), CLIPPERS.values(), ids=CLIPPERS)
def test_nnx_optimizer_trains_like_a_plain_loop(clipper, plain_clipper):
    model = Model()
    tx = optax.chain(clipper(), optax.sgd(0.1, momentum=0.9))
    trainer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, trainer, inputs, targets):
        grads = nnx.grad(model_loss)(model, inputs, targets)
        trainer.update(model, grads)
        return smartclip.metrics(trainer.opt_state)

    batches = zip(INPUTS, TARGETS, strict=True)
    for batch, (params, plain) in zip(batches, train_plainly(plain_clipper()), strict=True):
        inside = step(model, trainer, *batch)
        assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, **ROUNDING)
        outside = smartclip.metrics(trainer.opt_state)
        assert_close(inside, outside, **ROUNDING)
        if plain:  # Optax's AGC keeps no record.
            assert_close(inside, plain, **ROUNDING)
    assert np.any(inside["num_clipped"] > 0)
    for field, value in inside.items():
        np.testing.assert_allclose(optax.tree.get(trainer.opt_state, field)[...], value, rtol=1e-6)


def test_masks_select_the_same_leaves_of_variables_and_of_arrays():
    variables = nnx.state(Model(), nnx.Param)
    arrays = nnx.to_pure_dict(variables)
    for mask in (masks.except_paths("kernel$"), masks.except_paths("^head/"), masks.except_vectors):
        of_variables = jax.tree.leaves(mask(variables))
        assert of_variables == jax.tree.leaves(mask(arrays))
        assert sorted(set(of_variables)) == [False, True]
