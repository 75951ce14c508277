"""On eight devices every clipper does what it does on one, however the gradient is sharded.

Under `jit` by itself, on meshes with explicit and with automatic axes; under `shard_map` and `pmap`
with `axis_name`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from clipper_table import CLIPPERS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_smartclip as smartclip

every_clipper = pytest.mark.parametrize("name", CLIPPERS)
modes = pytest.mark.parametrize("mode", [AxisType.Explicit, AxisType.Auto])

SHAPES = {"bias": (8,), "body": {"kernel": (16, 8)}}
# As under FSDP: each leaf along one of its axes.
FSDP = {"bias": P("x"), "body": {"kernel": P(None, "x")}}
# Along the inputs, which is within the units of AGC.
SPLIT = {"bias": P("x"), "body": {"kernel": P("x", None)}}


def is_shape(node):
    return isinstance(node, tuple)


def random_tree(seed, size, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(size * rng.normal(size=shape)), shapes, is_leaf=is_shape
    )


PARAMS = random_tree(0, 1.0)
# Ordinary norms, a spike, norms whose squares overflow and underflow, and a NaN.
SIZES = [0.1, 0.2, 0.15] * 4 + [100.0, 1e30, 1e-30, 0.1, np.nan, 0.2]
GRADS = [random_tree(1 + step, size) for step, size in enumerate(SIZES)]


def loop(update, state, place=lambda tree: tree):
    """The updates of all steps, and the last state."""
    params = place(PARAMS)
    updates = []
    for grads in GRADS:
        update_now, state = update(place(grads), state, params)
        updates.append(update_now)
    return updates, state


@functools.cache
def alone(name):
    """The same on one device."""
    tx = CLIPPERS[name]()
    return loop(jax.jit(tx.update), tx.init(PARAMS))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=1e-37)


def make_mesh(mode, *sizes):
    return jax.make_mesh(sizes, ("x", "y")[: len(sizes)], axis_types=(mode,) * len(sizes))


def place_on(mesh, specs):
    return lambda tree: jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


def check_jit(name, mode):
    tx = CLIPPERS[name]()
    mesh = make_mesh(mode, 8)
    place = place_on(mesh, FSDP)
    with jax.set_mesh(mesh):
        update = jax.jit(tx.update)
        updates, state = loop(update, tx.init(place(PARAMS)), place)
        assert update._cache_size() == 1
    assert_same((updates, state), alone(name))
    for leaf, spec in zip(jax.tree.leaves(updates[-1]), jax.tree.leaves(FSDP), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    # The stream is one that clips, and that has something to rescue.
    counts = jax.tree.map(np.max, (state.last.num_clipped, state.last.num_nonfinite))
    assert counts[0] >= 2
    assert counts[1] == 1


@every_clipper
def test_fsdp_on_explicit_axes_equals_one_device(name):
    check_jit(name, AxisType.Explicit)


@pytest.mark.parametrize("name", ["autoclip", "agc"])
def test_fsdp_on_automatic_axes_equals_one_device(name):
    check_jit(name, AxisType.Auto)


def test_eager_steps_run_on_explicit_axes():
    # The simplest rule: each operation is compiled on its own.
    rule = smartclip.ThresholdRule(
        init=lambda groups: jnp.ones(groups),
        threshold=lambda limits, norms: limits,
        record=lambda limits, norms, thresholds: limits,
    )
    tx = smartclip.clip_by_rule(rule)
    params = np.float32(np.arange(2))
    mesh = make_mesh(AxisType.Explicit, 2)
    with jax.set_mesh(mesh):
        grads = jax.device_put(np.float32(1e30) * params, NamedSharding(mesh, P("x")))
        updates, _ = tx.update(grads, tx.init(params))
    assert updates.sharding == grads.sharding
    np.testing.assert_array_equal(updates, params)


RANKS = {
    "rank 1": ((8,), P("x")),
    "rank 2, inputs": ((8, 4), P("x", None)),
    "rank 2, both": ((8, 4), P("x", "y")),
    "rank 3, inputs": ((4, 2, 3), P("x", None, None)),
    "rank 3, heads and features": ((3, 4, 2), P(None, "x", "y")),
    "rank 4, filters": ((2, 2, 1, 8), P(None, None, None, ("x", "y"))),
    "rank 5": ((2, 1, 2, 4, 3), P(None, None, "y", "x", None)),
}


def clip_units(grad, param):
    """Each unit to a hundredth of the norm of its weights, by hand."""
    axes = {1: (0,), 3: (0,)}.get(grad.ndim, tuple(range(grad.ndim - 1)))
    norm, weight_norm = (
        np.sqrt(np.sum(np.float64(x) ** 2, axis=axes, keepdims=True)) for x in (grad, param)
    )
    return grad * np.minimum(1, 0.01 * weight_norm / norm)


@modes
def test_units_are_right_however_the_weights_are_sharded(mode):
    shapes = {name: shape for name, (shape, _) in RANKS.items()}
    specs = {name: spec for name, (_, spec) in RANKS.items()}
    params, grads = random_tree(0, 1.0, shapes), random_tree(1, 0.015, shapes)
    expected = jax.tree.map(clip_units, grads, params)
    assert all(np.any(expected[name] != grads[name]) for name in RANKS)
    tx = smartclip.agc(0.01)
    mesh = make_mesh(mode, 4, 2)
    place = place_on(mesh, specs)
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(tx.update)(place(grads), tx.init(params), place(params))
    assert_same(updates, expected)
    for name, update in updates.items():
        assert update.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), update.ndim)


def test_optax_refuses_explicit_axes_where_agc_does_not():
    # When this fails, Optax has mended it, and the documentation needs an update.
    tx = optax.adaptive_grad_clip(0.01)
    mesh = make_mesh(AxisType.Explicit, 8)
    place = place_on(mesh, FSDP)
    with jax.set_mesh(mesh), pytest.raises(Exception, match="sharding"):
        jax.eval_shape(tx.update, place(PARAMS), tx.init(PARAMS), place(PARAMS))


def shard_map(update, mesh, spec):
    return jax.shard_map(
        update, mesh=mesh, in_specs=(spec, P(), spec), out_specs=(spec, P()), check_vma=True
    )


@every_clipper
def test_shard_map_with_axis_name_equals_one_device(name):
    tx = CLIPPERS[name](axis_name="x")
    update = jax.jit(shard_map(tx.update, make_mesh(AxisType.Auto, 8), SPLIT))
    assert_same(loop(update, tx.init(PARAMS)), alone(name))


def test_a_unit_of_agc_is_that_of_the_whole_leaf_where_a_shard_is_but_one_row_of_it():
    params, grads = (random_tree(seed, 1.0, {"kernel": (8, 4)}) for seed in range(2))
    tx = smartclip.agc(0.1, axis_name="x")
    update = jax.jit(shard_map(tx.update, make_mesh(AxisType.Auto, 8), P("x", None)))
    updates, _ = update(grads, tx.init(params), params)
    norms, weight_norms = (np.linalg.norm(tree["kernel"], axis=0) for tree in (grads, params))
    scale = np.minimum(1, 0.1 * weight_norms / norms)
    np.testing.assert_allclose(updates["kernel"], scale[None] * grads["kernel"], rtol=1e-6)


def test_shard_map_needs_no_axis_name_where_each_device_has_the_whole_gradient():
    name = "autoclip_p10"
    tx = CLIPPERS[name]()
    update = jax.jit(shard_map(tx.update, make_mesh(AxisType.Auto, 8), P()))
    assert_same(loop(update, tx.init(PARAMS)), alone(name))


def test_shard_map_refuses_a_split_gradient_without_axis_name():
    tx = smartclip.autoclip()
    update = shard_map(tx.update, make_mesh(AxisType.Auto, 8), SPLIT)
    with pytest.raises(ValueError, match="replicated"):
        jax.eval_shape(update, PARAMS, tx.init(PARAMS), PARAMS)


def test_shard_map_over_explicit_axes_and_several_names():
    tx = smartclip.autoclip(max_norm=1.0, axis_name=("x", "y"))
    grads = {"w": np.float32(1e30 * np.random.default_rng(0).normal(size=(8, 4)))}
    mesh = make_mesh(AxisType.Explicit, 4, 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(grads, NamedSharding(mesh, P("x", "y")))
        update = shard_map(tx.update, mesh, P("x", "y"))
        updates, state = jax.jit(update)(sharded, tx.init(grads), sharded)
    np.testing.assert_allclose(state.last.grad_norm, reference.norm(grads), rtol=1e-6)
    np.testing.assert_allclose(updates["w"], grads["w"] / reference.norm(grads), rtol=1e-6)


def test_pmap_with_axis_name_equals_one_device():
    tx = CLIPPERS["zscore_clip"](axis_name="devices")

    def split(tree):
        return jax.tree.map(lambda leaf: leaf.reshape(8, leaf.shape[0] // 8, *leaf.shape[1:]), tree)

    state = jax.tree.map(lambda leaf: np.stack([leaf] * 8), tx.init(PARAMS))
    updates, state = loop(jax.pmap(tx.update, axis_name="devices"), state, split)
    expected_updates, expected_state = alone("zscore_clip")
    assert_same(updates, [split(tree) for tree in expected_updates])
    assert_same(state, jax.tree.map(lambda leaf: np.stack([leaf] * 8), expected_state))


@pytest.mark.parametrize("num_leaves", [1, 20])
def test_a_step_has_no_more_all_reduces_than_one_of_optax(num_leaves):
    shapes = {f"layer{number}": (16, 8) for number in range(num_leaves)}
    mesh = make_mesh(AxisType.Auto, 8)
    grads = place_on(mesh, dict.fromkeys(shapes, P(None, "x")))(random_tree(0, 1.0, shapes))

    def count(tx):
        with jax.set_mesh(mesh):
            program = jax.jit(tx.update).lower(grads, tx.init(grads)).compile().as_text()
        # Not those of the second reading, which is a branch that a step takes when it needs to.
        main = program[program.index("\nENTRY ") :]
        return len(re.findall(r" all-reduce(?:-start)?\(", main))

    ours = count(smartclip.autoclip())
    assert ours == count(optax.clip_by_global_norm(1.0))
    # Older versions of XLA did not combine all-reduces on CPU devices.
    assert ours == 1 or jax.__version_info__ < (0, 10)
