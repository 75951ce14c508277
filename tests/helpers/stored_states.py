"""Stores the state of every clipper after some steps, and its updates in the steps that follow.

    python tests/helpers/stored_states.py            the folder of the current version
    python tests/helpers/stored_states.py --again    overwrites a folder that exists

`test_stored_states.py` restores the states of all versions and expects the same steps. The folder
of a released version is never written again, because people have such checkpoints.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from clipper_table import CLIPPERS, FUNCTIONS, TABLE

import optax_smartclip as smartclip

FOLDER = Path(__file__).parents[1] / "stored"

SKIP_SPIKES = {
    "skip_spikes": lambda: smartclip.skip_spikes(
        smartclip.autoclip(outliers_only=True, history=smartclip.ring_buffer(16)), window=16
    )
}

# The arguments that states of a version were stored with, which may never change. Where an argument
# is left out, its default may not change either: a run that was saved with it could not go on.
FROZEN = {
    "v0.1.0": {
        "autoclip": partial(smartclip.autoclip, outliers_only=True),
        "autoclip_percentile": partial(
            smartclip.autoclip, 90.0, history=smartclip.ring_buffer(16), scope="per_layer"
        ),
        "autoclip_geometric": partial(
            smartclip.autoclip, 90.0, history=smartclip.geometric_quantile(), scope="per_param"
        ),
        "autoclip_histogram": partial(
            smartclip.autoclip, 50.0, history=smartclip.log_histogram(0.5)
        ),
        "autoclip_fading_histogram": partial(
            smartclip.autoclip, 50.0, history=smartclip.log_histogram(0.5, decay=0.9)
        ),
        "zscore_clip": smartclip.zscore_clip,
        "zclip": partial(smartclip.zclip, warmup_steps=5, max_norm=None),
        "adagc": partial(smartclip.adagc, warmup_steps=5, absolute_clip=None),
        "agc": partial(smartclip.agc, 0.1),
        **SKIP_SPIKES,
    }
}


def clippers(version):
    """The clippers of a version by the names of their files.

    Versions after 0.1.0 store the rows of the batteries. If such a row changes, its arguments at
    the time of the version go to `FROZEN`.
    """
    short_memory = smartclip.log_histogram(0.5, decay=0.9)
    fading = {"autoclip_fading": partial(TABLE["autoclip_fading"].factory, history=short_memory)}
    return FROZEN.get(version, {**CLIPPERS, **fading, **SKIP_SPIKES})


# Called with nothing that sets a shape; only the shapes of their states are stored.
DEFAULTS = {
    **{f"{name}()": function for name, function in FUNCTIONS.items()},
    "autoclip(outliers_only=True)": partial(smartclip.autoclip, outliers_only=True),
    "autoclip(10.0)": partial(smartclip.autoclip, 10.0),
    "autoclip(95.0, history=geometric_quantile())": partial(
        smartclip.autoclip, 95.0, history=smartclip.geometric_quantile()
    ),
    "autoclip(10.0, history=log_histogram())": partial(
        smartclip.autoclip, 10.0, history=smartclip.log_histogram()
    ),
    "skip_spikes(autoclip())": lambda: smartclip.skip_spikes(smartclip.autoclip()),
    "skip_spikes(autoclip(outliers_only=True))": lambda: smartclip.skip_spikes(
        smartclip.autoclip(outliers_only=True)
    ),
}

# The call that continues a run of a version whose defaults have changed.
CALLED_TODAY = {
    "v0.1.0": {
        "autoclip()": "autoclip(outliers_only=True)",
        "skip_spikes(autoclip())": "skip_spikes(autoclip(outliers_only=True))",
    }
}

SEED = 0
BEFORE, NEXT = 30, 8
# One step of each kind before the state is stored, and one after.
NANS, ZEROS, SPIKES, LARGE = (12, 33), (15, 35), (20, 32), (26, 37)


def make_stream(seed):
    """Parameters, the gradients of all steps, and their losses."""
    rng = np.random.default_rng(seed)
    steps = BEFORE + NEXT
    sizes = rng.lognormal(sigma=0.2, size=steps)
    for places, size in ((NANS, np.nan), (ZEROS, 0.0), (SPIKES, 50.0), (LARGE, 2.5)):
        sizes[list(places)] *= size
    shapes = {"bias": (2,), "kernel": (3, 2)}
    params = {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    grads = {
        name: np.float32(
            0.3 * sizes.reshape(-1, *[1] * len(shape)) * rng.normal(size=(steps, *shape))
        )
        for name, shape in shapes.items()
    }
    losses = np.float32(2.0 + 0.1 * rng.normal(size=steps))
    return {"dense": params}, {"dense": grads}, losses


def follow(tx, state, params, grads, losses):
    """The state after these steps; updates and metrics of each."""

    def step(state, batch):
        grads, loss = batch
        updates, state = tx.update(grads, state, params, value=loss)
        return state, {"updates": updates, "metrics": smartclip.metrics(state)}

    return jax.device_get(jax.jit(partial(jax.lax.scan, step))(state, (grads, losses)))


def layout(state):
    """The dtype and the shape of every leaf, by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (f"{leaf.dtype}{list(leaf.shape)}")
        for path, leaf in leaves
    }


def default_layouts(params):
    return {name: layout(jax.eval_shape(make().init, params)) for name, make in DEFAULTS.items()}


def to_json(tree):
    """Text with as many digits as each number needs to be read back exactly."""

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(child) for name, child in value.items()}
        if isinstance(value, np.ndarray) and value.ndim:
            return [plain(child) for child in value]
        if isinstance(value, np.ndarray | np.generic):
            return float(str(value)) if value.dtype == np.float32 else value.item()
        return value

    def lines(tree, indent=""):
        if not isinstance(tree, dict):
            return json.dumps(tree)
        inner = indent + "  "
        items = [f"{inner}{json.dumps(key)}: {lines(value, inner)}" for key, value in tree.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"

    return lines(plain(tree)) + "\n"


def write(folder):
    params, grads, losses = make_stream(SEED)
    before = jax.tree.map(lambda leaf: leaf[:BEFORE], (grads, losses))
    following = jax.tree.map(lambda leaf: leaf[BEFORE:], (grads, losses))
    folder.mkdir(exist_ok=True)
    stream = {"seed": SEED, "params": params, "grads": following[0], "losses": following[1]}
    (folder / "stream.json").write_text(to_json(stream))
    (folder / "defaults.json").write_text(to_json(default_layouts(params)))
    for name, make in clippers(folder.name).items():
        tx = make()
        state, _ = follow(tx, tx.init(jax.tree.map(jnp.asarray, params)), params, *before)
        _, steps = follow(tx, state, params, *following)
        (folder / f"{name}.msgpack").write_bytes(flax.serialization.to_bytes(state))
        (folder / f"{name}.json").write_text(to_json({"layout": layout(state), **steps}))


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="overwrite, if it is not released")
    again = parser.parse_args(arguments).again
    folder = FOLDER / f"v{smartclip.__version__}"
    if folder.exists() and not again:
        parser.exit(
            1,
            f"{folder} is there. If this version has not been released, and what it stores is "
            "meant to change, say --again.\n",
        )
    write(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
