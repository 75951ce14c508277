"""Inside `shard_map`: split leaves beside whole ones, and a learner on each device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from breadth import KINDS, each_value, long_but
from clipper_table import CLIPPERS
from compat import lenient
from jax.sharding import AxisType, PartitionSpec
from trees import assert_close

import optax_smartclip as smartclip

DEVICES = 4
P = PartitionSpec


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2), ("d", "e"), axis_types=(AxisType.Auto,) * 2)


RANDOM = np.random.default_rng(0)
PARAMS = {
    "experts": RANDOM.normal(size=(4, 3, 2)).astype(np.float32),
    "router": RANDOM.normal(size=(3, 4)).astype(np.float32),
    "both": RANDOM.normal(size=(4, 6)).astype(np.float32),
}
SPECS = {"experts": P("d"), "router": P(), "both": P("d", "e")}


@pytest.mark.parametrize("size", [1.0, 1e25, 1e-25])
@pytest.mark.parametrize("scope", ["global", "per_param"])
def test_split_and_whole_leaves_are_counted_once(mesh, scope, size):
    grads = jax.tree.map(lambda x: x * np.float32(size), PARAMS)
    tx = smartclip.autoclip(scope=scope, axis_name=("d", "e"))

    @partial(jax.shard_map, mesh=mesh, in_specs=(SPECS,), out_specs=P())
    def norms(grads):
        _, state = tx.update(grads, tx.init(grads))
        return smartclip.metrics(state)["grad_norm"]

    squares = [np.sum(np.float64(grads[name]) ** 2) for name in sorted(PARAMS)]
    expected = np.sqrt(np.sum(squares) if scope == "global" else squares)
    np.testing.assert_allclose(jax.jit(norms)(grads), expected, rtol=1e-5)


@pytest.mark.parametrize("scope", ["unit", "per_param", "global"])
def test_so_they_are_for_agc_and_its_weights(mesh, scope):
    # Split within units, where the last axis counts them.
    unit_axes = (lambda path, shape: len(shape) - 1) if scope == "unit" else None
    agc = partial(smartclip.agc, 0.1, scope=scope, unit_axes=unit_axes)
    grads = jax.tree.map(lambda x: x * np.float32(3.0), PARAMS)
    expected, _ = agc().update(grads, agc().init(PARAMS), PARAMS)
    specs = {**SPECS, "both": P("d")}
    tx = agc(axis_name=("d", "e"))

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, specs), out_specs=specs)
    def update(grads, params):
        return tx.update(grads, tx.init(params), params)[0]

    actual = jax.tree.map(np.asarray, jax.jit(update)(grads, PARAMS))
    assert_close(actual, jax.tree.map(np.asarray, expected), rtol=1e-5)


def test_a_gradient_that_is_whole_everywhere_is_not_summed(mesh):
    tx = smartclip.autoclip(axis_name="d")

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(),), out_specs=P())
    def norm(grads):
        return smartclip.metrics(tx.update(grads, tx.init(grads))[1])["grad_norm"]

    np.testing.assert_allclose(jax.jit(norm)(jnp.float32([3.0, 4.0])), 5.0, rtol=1e-6)


def test_where_nothing_is_known_all_leaves_count_as_split(mesh):
    tx = smartclip.autoclip(axis_name="d")

    @partial(jax.shard_map, mesh=mesh, in_specs=(P("d"), P()), out_specs=P(), check_vma=False)
    def norm(part, whole):
        grads = (part, whole)
        return smartclip.metrics(tx.update(grads, tx.init(grads))[1])["grad_norm"]

    grads = jnp.float32([3.0, 4.0]), jnp.float32([6.0])
    np.testing.assert_allclose(jax.jit(norm)(*grads), np.sqrt(25 + 2 * 36), rtol=1e-6)


def test_a_leaf_that_holds_a_nan_on_one_device_is_found_on_all(mesh):
    tx = smartclip.autoclip(axis_name=("d", "e"))

    @partial(jax.shard_map, mesh=mesh, in_specs=(SPECS,), out_specs=SPECS)
    def update(grads):
        return tx.update(grads, tx.init(grads))[0]

    for name in PARAMS:
        grads = {**PARAMS, name: PARAMS[name].copy()}
        grads[name].flat[-1] = np.nan
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(update)(grads)))


def learner(tx, params, streams):
    """A run whose gradients are the parameters times a stream of numbers."""

    def step(carry, number):
        params, state = carry
        grads = jax.tree.map(lambda p: p * number, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), smartclip.metrics(state)

    (params, _), records = jax.lax.scan(step, (params, tx.init(params)), streams)
    return params, records


STREAMS = np.float32(np.random.default_rng(1).lognormal(size=(DEVICES, 12)) * 0.1)
LEARNERS = np.float32(np.random.default_rng(2).normal(size=(DEVICES, 3, 2)))


@pytest.mark.parametrize(("name", "wrapped"), each_value(CLIPPERS, [False, True]))
def test_each_device_can_train_a_learner_of_its_own(mesh, name, wrapped):
    tx = optax.chain(CLIPPERS[name](), lenient(optax.adam(0.01)))
    tx = smartclip.skip_spikes(tx, warmup_steps=3) if wrapped else tx
    expected = [learner(tx, {"w": w}, s) for w, s in zip(LEARNERS, STREAMS, strict=True)]

    @partial(jax.shard_map, mesh=mesh, in_specs=P(("d", "e")), out_specs=P(("d", "e")))
    def train(params, streams):
        result = learner(tx, {"w": params[0]}, streams[0])
        return jax.tree.map(lambda leaf: leaf[None], result)

    actual = jax.jit(train)(LEARNERS, STREAMS)
    for device, wanted in enumerate(expected):
        of_device = jax.tree.map(lambda leaf, i=device: np.asarray(leaf)[i], actual)
        assert_close(of_device, jax.tree.map(np.asarray, wanted), rtol=1e-5, atol=1e-6)


# The units of agc lie within a device.
@pytest.mark.parametrize("name", long_but(KINDS, sorted(set(CLIPPERS) - {"agc"})))
def test_a_learner_can_be_split_over_an_axis_that_norms_are_summed_over(mesh, name):
    tx = optax.chain(CLIPPERS[name](axis_name="d"), lenient(optax.adam(0.01)))
    alone = optax.chain(CLIPPERS[name](), lenient(optax.adam(0.01)))
    params, _ = learner(alone, PARAMS, STREAMS[0])
    specs = {"experts": P("d"), "router": P(), "both": P("d")}

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, P()), out_specs=specs)
    def train(params, streams):
        return learner(tx, params, streams)[0]

    actual = jax.jit(train)(PARAMS, STREAMS[0])
    assert_close(jax.tree.map(np.asarray, actual), jax.tree.map(np.asarray, params), rtol=1e-4)
