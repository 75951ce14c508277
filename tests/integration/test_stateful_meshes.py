"""`AutoClip` and `AGC` on eight devices give the results of one and report to `on_metrics` once.

Steps run eagerly, compiled on a mesh with explicit or automatic axes, or compiled without a mesh
for sharded arguments. The weights are split as under FSDP, or replicated. NumPy computes the
results of one device.
"""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from breadth import each_value
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import assert_close, random_tree

import optax_smartclip as smartclip

SHAPES = {"body": {"bias": (8,), "kernel": (16, 8)}, "head": {"kernel": (8, 8)}}
LAYOUTS = {
    "FSDP": {
        "body": {"bias": P("x"), "kernel": P(None, "x")},
        "head": {"kernel": P("x", None)},
    },
    # Data parallel training after the sum of the gradients.
    "replicated": {"body": {"bias": P(), "kernel": P()}, "head": {"kernel": P()}},
}


PARAMS = random_tree(0, 1.0, SHAPES)
SIZES = [0.1, 0.2, 0.15, 100.0, 0.2, 1e25, 0.1]
GRADS = [random_tree(1 + step, size, SHAPES) for step, size in enumerate(SIZES)]
PERCENTILE, WINDOW, CLIPPING = 50.0, 5, 0.1

CLIPPERS = {
    "AutoClip": lambda: smartclip.AutoClip(
        mode="percentile",
        percentile=PERCENTILE,
        history="window",
        window_size=WINDOW,
        scope="per_layer",
        warmup_steps=2,
        min_history=0,
    ),
    "AGC": lambda: smartclip.AGC(clipping=CLIPPING),
}


# Older versions of JAX hang when CPU devices wait both for each other and for a callback.
RECENT_JAX = jax.__version_info__ >= (0, 10)
CAN_REPORT = RECENT_JAX


def covered(name, layer):
    """The names of the leaves of a layer that are clipped."""
    return [leaf for leaf, x in PARAMS[layer].items() if name != "AGC" or x.ndim > 1]


def by_hand(name):
    """The clipped gradients, and (layer, norm, limit, clipped) of each record."""
    clipped, records, norms = [], [], {layer: [] for layer in PARAMS}
    for grads in GRADS:
        clipped.append({layer: dict(leaves) for layer, leaves in grads.items()})
        for layer, past in norms.items():
            leaves = covered(name, layer)
            past.append(reference.norm([grads[layer][leaf] for leaf in leaves]))
            if name == "AGC":
                limit = CLIPPING * reference.norm([PARAMS[layer][leaf] for leaf in leaves])
            else:
                limit = reference.percentile_thresholds(past, PERCENTILE, WINDOW)[-1]
            scale = min(1, limit / past[-1])
            for leaf in leaves:
                clipped[-1][layer][leaf] = np.float32(scale * np.float64(grads[layer][leaf]))
            records.append((layer, past[-1], limit, bool(scale < 1)))
    assert any(over for *_, over in records)
    return clipped, records


def make_mesh(mode, num_devices=8):
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((num_devices,), ("x",), axis_types=(mode,), devices=devices)


def place(tree, mesh, layout="FSDP"):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, LAYOUTS[layout]
    )


def assert_right(name, clipped, records):
    expected, expected_records = by_hand(name)
    assert_close(clipped, expected, rtol=1e-5)
    if not CAN_REPORT and not records:
        return
    assert len(records) == len(expected_records)
    limit_name = {"AutoClip": "threshold", "AGC": "target"}[name]
    for record, (layer, norm, limit, over) in zip(records, expected_records, strict=True):
        assert record["key"] == ("layer", layer)
        assert record["clipped"] is over
        np.testing.assert_allclose(record["grad_norm"], norm, rtol=1e-5)
        np.testing.assert_allclose(record[limit_name], limit, rtol=1e-5)


def assert_replicated(clipper, mesh):
    """Each device of the mesh has the whole state."""
    leaves = [ref[...] for ref in jax.tree.leaves(clipper._refs)]
    assert leaves
    for leaf in leaves:
        assert leaf.sharding.device_set == set(mesh.devices.flat)
        assert leaf.sharding.is_fully_replicated


def check_training(name, mesh, layout, *, compiled, set_mesh=False, init=False):
    clipper, records = CLIPPERS[name](), []
    on_metrics = records.append if CAN_REPORT or not compiled else None

    def clip(grads, params):
        return smartclip.apply_grads(grads, params, clipper, on_metrics=on_metrics)

    step = jax.jit(clip) if compiled else clip
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        params = place(PARAMS, mesh, layout)
        if init:
            clipper.init(params)
        clipped = [step(place(grads, mesh, layout), params) for grads in GRADS]
        jax.effects_barrier()
    assert_right(name, clipped, records)
    for leaf, like in zip(jax.tree.leaves(clipped[-1]), jax.tree.leaves(params), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    assert_replicated(clipper, mesh)
    assert clipper.num_steps == len(GRADS)
    assert not compiled or step._cache_size() == 1


PLACES = {
    "explicit-FSDP": (AxisType.Explicit, "FSDP"),
    "auto-FSDP": (AxisType.Auto, "FSDP"),
    "auto-replicated": (AxisType.Auto, "replicated"),
}
every_place = pytest.mark.parametrize(("name", "place"), each_value(CLIPPERS, PLACES))


@pytest.mark.parametrize(("name", "mode"), each_value(CLIPPERS, [AxisType.Explicit, AxisType.Auto]))
def test_eager_steps_with_sharded_gradients_equal_one_device(name, mode):
    check_training(name, make_mesh(mode), "FSDP", compiled=False)


@every_place
def test_compiled_steps_under_set_mesh_equal_one_device(name, place):
    mode, layout = PLACES[place]
    check_training(name, make_mesh(mode), layout, compiled=True, set_mesh=True)


@every_place
def test_compiled_steps_without_set_mesh_equal_one_device_after_init(name, place):
    mode, layout = PLACES[place]
    check_training(name, make_mesh(mode), layout, compiled=True, init=True)


def test_a_compiled_step_without_set_mesh_and_without_init_is_refused_by_recent_jax():
    # The trace does not know the mesh, so the state is only on the first device.
    clipper, mesh = CLIPPERS["AGC"](), make_mesh(AxisType.Auto)
    step = jax.jit(lambda grads, params: smartclip.apply_grads(grads, params, clipper))
    refused = pytest.raises(ValueError, match="incompatible devices")
    with refused if RECENT_JAX else contextlib.nullcontext():
        step(place(GRADS[0], mesh), place(PARAMS, mesh))


def test_steps_in_a_scan_on_a_mesh_equal_one_device():
    clipper, mesh, records = CLIPPERS["AutoClip"](), make_mesh(AxisType.Auto), []
    on_metrics = records.append if CAN_REPORT else None
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *GRADS)
    spread = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, P(None, *spec))),
        stacked,
        LAYOUTS["FSDP"],
    )

    @jax.jit
    def train(params, grads):
        def step(carry, grads):
            return carry, smartclip.apply_grads(grads, params, clipper, on_metrics=on_metrics)

        return jax.lax.scan(step, None, grads)[1]

    with jax.set_mesh(mesh):
        clipped = train(place(PARAMS, mesh), spread)
        jax.effects_barrier()
    clipped = [jax.tree.map(lambda x, n=n: x[n], clipped) for n in range(len(GRADS))]
    assert_right("AutoClip", clipped, records)
    assert_replicated(clipper, mesh)


# A saved state.

SAVE_AFTER = 4


def take_steps(clipper, mesh, number_of_steps, records):
    """Compiled, on a mesh or (None) on one device."""
    spread = (lambda tree: tree) if mesh is None else (lambda tree: place(tree, mesh))
    on_metrics = records.append if CAN_REPORT else None
    params = jax.tree.map(jnp.asarray, spread(PARAMS))
    clipper.init(params)
    step = jax.jit(
        lambda grads: smartclip.apply_grads(grads, params, clipper, on_metrics=on_metrics)
    )
    clipped = [step(spread(GRADS[number])) for number in number_of_steps]
    jax.effects_barrier()
    return clipped


TARGETS = {
    "one device": lambda: None,
    "four automatic": lambda: make_mesh(AxisType.Auto, 4),
    "eight explicit": lambda: make_mesh(AxisType.Explicit, 8),
}


@pytest.mark.parametrize(("name", "target"), each_value(CLIPPERS, TARGETS))
def test_a_state_saved_on_a_mesh_goes_on_where_it_is_loaded(name, target):
    saved_on, target = make_mesh(AxisType.Auto), TARGETS[target]()
    clipper, records = CLIPPERS[name](), []
    clipped = take_steps(clipper, saved_on, range(SAVE_AFTER), records)
    saved = json.loads(json.dumps(clipper.state_dict()))
    loaded = CLIPPERS[name]()
    loaded.load_state_dict(saved)
    clipped += take_steps(loaded, target, range(SAVE_AFTER, len(GRADS)), records)
    assert_right(name, clipped, records)
    assert loaded.num_steps == len(GRADS)
    assert clipper.num_steps == SAVE_AFTER
    if target is not None:
        assert_replicated(loaded, target)


def test_a_state_saved_on_one_device_can_be_loaded_into_a_clipper_in_use_on_a_mesh():
    mesh, clipper, records = make_mesh(AxisType.Auto), CLIPPERS["AutoClip"](), []
    clipped = take_steps(clipper, None, range(SAVE_AFTER), records)
    other = CLIPPERS["AutoClip"]()
    # Steps of another stream, which the loaded state replaces.
    take_steps(other, mesh, [5, 5], [])
    other.load_state_dict(json.loads(json.dumps(clipper.state_dict())))
    clipped += take_steps(other, mesh, range(SAVE_AFTER, len(GRADS)), records)
    assert_right("AutoClip", clipped, records)
    assert_replicated(other, mesh)
