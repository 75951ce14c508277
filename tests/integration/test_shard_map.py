"""Inside `shard_map`: trees with split and replicated leaves, and one learner per device."""

import itertools
from functools import partial

import jax
import numpy as np
import optax
import pytest
from breadth import KINDS, long_but
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


@pytest.mark.parametrize("scope", ["global", "per_param"])
def test_split_and_replicated_leaves_are_counted_once(scope):
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(AxisType.Auto,) * 2)
    tx = smartclip.autoclip(scope=scope, axis_name=("d", "e"))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(SPECS,), out_specs=P())
    def norms(grads):
        _, state = tx.update(grads, tx.init(grads))
        return smartclip.metrics(state)["grad_norm"]

    for size in (1.0, 1e25, 1e-25):
        grads = jax.tree.map(lambda x, size=size: x * np.float32(size), PARAMS)
        squares = [np.sum(np.float64(grads[name]) ** 2) for name in sorted(PARAMS)]
        expected = np.sqrt(np.sum(squares) if scope == "global" else squares)
        np.testing.assert_allclose(norms(grads), expected, rtol=1e-5)


def agc_by_hand(scope, grads, params):
    """The gradients after `agc(0.1)`; the last axis counts the units."""

    def norms(tree):
        axes = {"unit": lambda leaf: tuple(range(leaf.ndim - 1))}.get(scope, lambda leaf: None)
        squares = {
            name: np.sum(np.float64(leaf) ** 2, axis=axes(leaf), keepdims=True)
            for name, leaf in tree.items()
        }
        if scope == "global":
            squares = dict.fromkeys(squares, sum(np.sum(square) for square in squares.values()))
        return jax.tree.map(np.sqrt, squares)

    return jax.tree.map(
        lambda grad, norm, limit: np.float32(grad * np.minimum(1, limit / norm)),
        grads,
        norms(grads),
        jax.tree.map(lambda norm: 0.1 * np.maximum(norm, 1e-3), norms(params)),
    )


@pytest.mark.parametrize("scope", ["unit", "per_param", "global"])
def test_agc_counts_split_and_replicated_weights_once(mesh, scope):
    # "experts" is split across its units, "both" within them.
    unit_axes = (lambda path, shape: len(shape) - 1) if scope == "unit" else None
    tx = smartclip.agc(0.1, scope=scope, unit_axes=unit_axes, axis_name=("d", "e"))
    # Different ratios of gradient and weights, and one leaf at the floor of weight norms: if not,
    # an error in both norms would cancel.
    factors = {"experts": 3, "router": 2, "both": 5}
    grads = {name: np.float32(factor) * PARAMS[name] for name, factor in factors.items()}
    params = PARAMS | {"router": np.float32(1e-4) * PARAMS["router"]}
    specs = {**SPECS, "both": P("d")}

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, specs), out_specs=specs)
    def update(grads, params):
        return tx.update(grads, tx.init(params), params)[0]

    assert_close(jax.jit(update)(grads, params), agc_by_hand(scope, grads, params), rtol=1e-5)


def test_a_replicated_gradient_is_not_summed(mesh):
    tx = smartclip.autoclip(axis_name="d")

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(),), out_specs=P())
    def norm(grads):
        return smartclip.metrics(tx.update(grads, tx.init(grads))[1])["grad_norm"]

    np.testing.assert_allclose(jax.jit(norm)(np.float32([3.0, 4.0])), 5.0, rtol=1e-6)


def test_without_check_vma_all_leaves_count_as_split(mesh):
    tx = smartclip.autoclip(axis_name="d")

    @partial(jax.shard_map, mesh=mesh, in_specs=(P("d"), P()), out_specs=P(), check_vma=False)
    def norm(part, whole):
        grads = (part, whole)
        return smartclip.metrics(tx.update(grads, tx.init(grads))[1])["grad_norm"]

    grads = np.float32([3.0, 4.0]), np.float32([6.0])
    np.testing.assert_allclose(jax.jit(norm)(*grads), np.sqrt(25 + 2 * 36), rtol=1e-6)


def test_a_nan_on_one_device_zeroes_the_update_on_all_devices(mesh):
    tx = smartclip.autoclip(axis_name=("d", "e"))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(SPECS,), out_specs=SPECS)
    def update(grads):
        return tx.update(grads, tx.init(grads))[0]

    for name in PARAMS:
        grads = {**PARAMS, name: PARAMS[name].copy()}
        grads[name].flat[-1] = np.nan
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(update(grads)))


def learner(tx, params, stream):
    """Trains on gradients that are the parameters times the numbers of a stream."""

    def step(carry, number):
        params, state = carry
        grads = jax.tree.map(lambda p: p * number, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), smartclip.metrics(state)

    (params, _), records = jax.lax.scan(step, (params, tx.init(params)), stream)
    return params, records


STREAMS = np.float32(np.random.default_rng(1).lognormal(size=(DEVICES, 12)) * 0.1)
LEARNERS = np.float32(np.random.default_rng(2).normal(size=(DEVICES, 3, 2)))
# With and without `skip_spikes` around the clipper.
SHORT = set(zip(sorted(KINDS), itertools.cycle([False, True]), strict=False))
CASES = long_but(SHORT, itertools.product(CLIPPERS, [False, True]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_each_device_can_train_its_own_learner(mesh, case):
    name, wrapped = case
    tx = optax.chain(CLIPPERS[name](), lenient(optax.adam(0.01)))
    tx = smartclip.skip_spikes(tx, warmup_steps=3) if wrapped else tx
    alone = jax.jit(partial(learner, tx))

    @partial(jax.shard_map, mesh=mesh, in_specs=P(("d", "e")), out_specs=P(("d", "e")))
    def train(params, streams):
        result = learner(tx, {"w": params[0]}, streams[0])
        return jax.tree.map(lambda leaf: leaf[None], result)

    actual = jax.tree.map(np.asarray, jax.jit(train)(LEARNERS, STREAMS))
    for device in range(DEVICES):
        of_device = jax.tree.map(lambda leaf, i=device: leaf[i], actual)
        expected = alone({"w": LEARNERS[device]}, STREAMS[device])
        assert_close(of_device, expected, rtol=1e-5, atol=1e-6)


# The units of agc lie within a device.
@pytest.mark.parametrize("name", long_but(KINDS, sorted(set(CLIPPERS) - {"agc"})))
def test_a_learner_can_be_split_over_an_axis_that_norms_are_summed_over(mesh, name):
    tx = optax.chain(CLIPPERS[name](axis_name="d"), lenient(optax.adam(0.01)))
    alone = optax.chain(CLIPPERS[name](), lenient(optax.adam(0.01)))
    expected, _ = jax.jit(partial(learner, alone))(PARAMS, STREAMS[0])
    specs = {"experts": P("d"), "router": P(), "both": P("d")}

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, P()), out_specs=specs)
    def train(params, streams):
        return learner(tx, params, streams)[0]

    assert_close(jax.jit(train)(PARAMS, STREAMS[0]), expected, rtol=1e-4)
