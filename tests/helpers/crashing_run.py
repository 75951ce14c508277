"""A training run that goes on from its newest checkpoint; `test_crash.py` starts and kills it.

The number of a step determines its batch, and whether that is damaged.
"""

import functools
import pickle
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optax_smartclip as smartclip

STEPS = 120
SAVE_EVERY = 5


def make_batch(step):
    """Some batches are large and clipped, some are huge and dropped, and one has a NaN."""
    rng = np.random.default_rng(step)
    inputs = rng.normal(size=(8, 16)).astype(np.float32)
    targets = np.tanh(inputs[:, :4]) + 0.3 * rng.normal(size=(8, 4)).astype(np.float32)
    if step % 17 == 16:
        targets *= 1000
    if step % 11 == 10:
        targets *= 4
    if step == 70:
        targets[0] = np.nan
    return inputs, targets


def loss(params, inputs, targets):
    hidden = jnp.tanh(inputs @ params["body"])
    return jnp.mean(jnp.square(hidden @ params["head"] - targets))


def build():
    """A compiled step that donates parameters and state, and their initial values."""
    clip_and_step = optax.chain(smartclip.autoclip(), optax.adamw(0.01))
    tx = smartclip.skip_spikes(clip_and_step, sigma=50.0, window=32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, inputs, targets):
        value, grads = jax.value_and_grad(loss)(params, inputs, targets)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    params = {
        "body": jnp.float32(0.3 * rng.normal(size=(16, 32))),
        "head": jnp.float32(0.3 * rng.normal(size=(32, 4))),
    }
    return train_step, (params, jax.jit(tx.init)(params))


def train(folder):
    """The parameters and the state after the last step, as NumPy arrays."""
    train_step, run = build()
    options = ocp.CheckpointManagerOptions(max_to_keep=3, enable_async_checkpointing=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        first = manager.latest_step()
        if first is not None:
            run = manager.restore(first, args=ocp.args.StandardRestore(run))
        print("resumed after", first, flush=True)
        for step in range(0 if first is None else first, STEPS):
            run = train_step(*run, *make_batch(step))
            if (step + 1) % SAVE_EVERY == 0:
                manager.save(step + 1, args=ocp.args.StandardSave(run))
    return jax.device_get(run)


def main(folder, result):
    params, state = train(folder)
    # A run without this file has not finished.
    trained = {"params": params, "state": state, "metrics": smartclip.metrics(state)}
    Path(result).write_bytes(pickle.dumps(jax.device_get(trained)))


if __name__ == "__main__":
    main(*sys.argv[1:])
