"""One of two processes that train together; `test_two_processes.py` starts it.

As in a run over several hosts, each process has half of the devices and half of the parameters.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_smartclip as smartclip

CLIPPERS = {
    "autoclip": functools.partial(smartclip.autoclip, warmup_steps=4),
    "autoclip per_param": functools.partial(smartclip.autoclip, scope="per_param", warmup_steps=4),
    "agc": functools.partial(smartclip.agc, 0.1),
}

rng = np.random.default_rng(0)
PARAMS = {
    "bias": np.float32(rng.normal(size=8)),
    "kernel": np.float32(rng.normal(size=(16, 8))),
}
INPUTS = rng.normal(size=(8, 16, 16)).astype(np.float32)
TARGETS = rng.normal(size=(8, 16, 8)).astype(np.float32)
# A spike.
TARGETS[6] *= 1000


def loss(params, inputs, targets):
    outputs = inputs @ params["kernel"] + params["bias"][None]
    return jnp.mean(jnp.square(outputs - targets))


def train(mesh=None):
    """The parameters and the metrics of each step, for each clipper.

    Args:
        mesh: With an axis "x", along which parameters and batch are split; None for one device.
    """

    def place(value, spec):
        if mesh is None:
            return jnp.asarray(value)
        # Each process creates the shards of its devices.
        return jax.make_array_from_callback(
            value.shape, NamedSharding(mesh, spec), lambda index: value[index]
        )

    def gather(tree):
        if mesh is None:
            return tree
        return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(tree)

    txs = {
        name: optax.chain(clipper(), optax.sgd(0.05, momentum=0.9))
        for name, clipper in CLIPPERS.items()
    }

    @jax.jit
    def step(models, inputs, targets):
        trained = {}
        for name, (params, state) in models.items():
            grads = jax.grad(loss)(params, inputs, targets)
            updates, state = txs[name].update(grads, state, params)
            trained[name] = optax.apply_updates(params, updates), state
        return trained

    params = {"bias": place(PARAMS["bias"], P("x")), "kernel": place(PARAMS["kernel"], P("x"))}
    models = {name: (params, jax.jit(tx.init)(params)) for name, tx in txs.items()}
    records = {name: [] for name in txs}
    for inputs, targets in zip(INPUTS, TARGETS, strict=True):
        models = step(models, place(inputs, P("x")), place(targets, P("x")))
        for name, (_, state) in models.items():
            records[name].append(
                {key: np.asarray(value).tolist() for key, value in smartclip.metrics(state).items()}
            )
    return {
        name: {
            "params": jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), gather(params)),
            "metrics": records[name],
        }
        for name, (params, _) in models.items()
    }


def main(address, process_id, out):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(process_id))
    assert (len(jax.local_devices()), len(jax.devices())) == (4, 8)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    # In a file, because the collectives print messages.
    Path(out).write_text(json.dumps(train(mesh)))


if __name__ == "__main__":
    main(*sys.argv[1:])
