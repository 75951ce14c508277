"""Stacked layers on eight devices, with the stacked axis or the experts split or not.

Every clipper gives the results of one device, and devices exchange only one number per group.
"""

import math
import re
from functools import partial

import jax
import numpy as np
import pytest
from breadth import each_value, long_but
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from steps import run
from trees import assert_close, random_tree

import optax_smartclip as smartclip

SHAPES = {
    "layers": {"kernel": (4, 8, 4), "bias": (4, 8), "experts": (4, 2, 8, 4)},
    "head": (8, 4),
}
STACKED = {"experts": (0, 1), "layers": 0}
NUM_GROUPS = 1 + 4 + 4 + 8

LAYOUTS = {
    "whole": {
        "layers": {"kernel": P(None, "x"), "bias": P(None, "x"), "experts": P(None, None, "x")},
        "head": P("x"),
    },
    "layers split": {
        "layers": {"kernel": P("x"), "bias": P("x"), "experts": P("x")},
        "head": P(),
    },
    "layers and more split": {
        "layers": {"kernel": P("x", "y"), "bias": P("x", "y"), "experts": P("x", None, "y")},
        "head": P("y"),
    },
    "experts split": {
        "layers": {"kernel": P(), "bias": P(), "experts": P(None, "y", "x")},
        "head": P("x"),
    },
}
PARAMS = random_tree(0, 1.0, SHAPES)


def gradients():
    steps = [random_tree(1 + step, 0.1, SHAPES) for step in range(10)]
    steps[6]["layers"]["kernel"][2] *= 1000
    steps[7]["layers"]["experts"][1, 1] *= np.float32(np.nan)
    steps[8]["layers"]["bias"][3] *= np.float32(1e30)
    return steps


GRADS = gradients()
CLIPPERS = {
    "autoclip": partial(smartclip.autoclip, scope="per_param", history=smartclip.ring_buffer(4)),
    "adagc": partial(smartclip.adagc, warmup_steps=3),
    "agc": partial(smartclip.agc, 0.05),
    "agc_per_layer": partial(smartclip.agc, 0.05, scope="per_layer"),
}


def place_on(mesh, specs):
    return lambda tree: jax.tree.map(
        lambda leaf, spec: jax.device_put(
            leaf, NamedSharding(mesh, P(*spec, *[None] * (leaf.ndim - len(spec))))
        ),
        tree,
        specs,
    )


@pytest.mark.parametrize(
    ("name", "layout", "mode"), each_value(CLIPPERS, LAYOUTS, [AxisType.Auto, AxisType.Explicit])
)
def test_a_stack_on_a_mesh_is_clipped_like_on_one_device(name, layout, mode):
    tx = CLIPPERS[name](stacked=STACKED)
    expected = run(tx, PARAMS, GRADS)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(mode,) * 2)
    with jax.set_mesh(mesh):
        updates, state = run(tx, PARAMS, GRADS, place_on(mesh, LAYOUTS[layout]))
    assert_close((updates, state), expected, rtol=1e-5, atol=1e-37)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    assert np.max(state.last.num_clipped) > 0


@pytest.mark.parametrize("layout", long_but({"layers and more split", "experts split"}, LAYOUTS))
def test_devices_exchange_only_one_number_for_each_group(layout):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    place = place_on(mesh, LAYOUTS[layout])
    tx = CLIPPERS["autoclip"](stacked=STACKED)
    with jax.set_mesh(mesh):
        lowered = jax.jit(tx.update).lower(place(GRADS[0]), tx.init(place(PARAMS)), place(PARAMS))
        text = lowered.compile().as_text()
    kinds = r"(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    results = re.findall(rf" = (\S+|\(.*?\)) {kinds}(?:-start)?\(", text)
    shapes = [shape for result in results for shape in re.findall(r"\w+\[([\d,]*)\]", result)]
    assert shapes
    # XLA pads arrays that are not divisible by the number of devices.
    for shape in shapes:
        assert math.prod(map(int, filter(None, shape.split(",")))) < NUM_GROUPS + mesh.size
