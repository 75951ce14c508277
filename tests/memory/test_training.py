"""A model with a clipper trains the same with planned gradients and with those of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compat import lenient

import optax_smartclip as smartclip
from optax_smartclip.memory import height_compressed_value_and_grad

NUM_STEPS = 30


def loss_of(params, batch):
    x, y = batch
    for kernel in params["hidden"]:
        x = x + jnp.tanh(x @ kernel)
    return jnp.mean((x @ params["out"] - y) ** 2)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    hidden = [rng.normal(size=(8, 8)).astype(np.float32) / 8 for _ in range(6)]
    params = {"hidden": hidden, "out": np.zeros((8, 1), np.float32)}
    x = rng.normal(size=(NUM_STEPS, 32, 8)).astype(np.float32)
    # Some batches are spikes, which are clipped.
    scale = np.where(np.arange(NUM_STEPS) % 10 == 9, np.float32(30), np.float32(1))
    return params, (x, np.sin(x[:, :, :1]) * scale[:, None, None])


def train(value_and_grad, params, batches):
    tx = lenient(optax.chain(smartclip.autoclip(), optax.adamw(1e-2)))

    @jax.jit
    def step(carry, batch):
        params, state = carry
        loss, grads = value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return jax.lax.scan(step, (params, tx.init(params)), batches)


def test_autoclip_and_adamw_train_like_with_jax(problem):
    compressed = height_compressed_value_and_grad(loss_of, block_size=4)
    (params, state), losses = train(compressed, *problem)
    (plain_params, plain_state), plain_losses = train(jax.value_and_grad(loss_of), *problem)
    assert compressed.last_executor.checkpoint_plan.meta["num_recomputed"] > 2
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-5)
    for leaf, plain in zip(jax.tree.leaves(params), jax.tree.leaves(plain_params), strict=True):
        np.testing.assert_allclose(leaf, plain, rtol=0, atol=1e-5)
    ordinary = np.arange(NUM_STEPS) % 10 != 9
    assert np.mean(losses[ordinary][-5:]) < 0.5 * losses[0]
    metrics, plain = smartclip.metrics(state), smartclip.metrics(plain_state)
    assert metrics["num_steps"] == plain["num_steps"] == NUM_STEPS
    assert metrics["num_clipped"] == plain["num_clipped"] > 0
