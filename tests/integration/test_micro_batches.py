"""Parts of a batch on several devices are clipped like the same parts on one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from breadth import long_but
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from trees import assert_close, random_tree

import optax_smartclip as smartclip

P = PartitionSpec
DEVICES, PER_DEVICE, STEPS = 8, 2, 3
SHAPES = {"kernel": (4, 2), "bias": (2,)}
PARAMS = random_tree(0, 1.0, SHAPES)
CLIPPER = smartclip.autoclip(scope="per_param")
# [steps, parts, ...]; in each step, one part is damaged.
GRADS = random_tree(1, 0.1, {name: (STEPS, 16, *shape) for name, shape in SHAPES.items()})
for step, part in enumerate((15, 6, 9)):
    GRADS["kernel"][step, part] *= 1000
GRADS["bias"][1, 3] = np.nan


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def expected():
    """The mean of each step, and the last state, on one device."""
    tx = smartclip.clip_micro_batches(CLIPPER)
    means, state = jax.jit(lambda grads: scan(tx, grads))(GRADS)
    record = smartclip.metrics(state)
    assert record["num_nonfinite"].tolist() == [1, 0]
    assert record["num_clipped"][1] >= 3
    return jax.device_get((means, state))


def scan(tx, grads):
    def step(state, batch):
        mean, state = tx.update(batch, state, PARAMS)
        return state, mean

    state, means = jax.lax.scan(step, tx.init(PARAMS), grads)
    return means, state


def test_parts_on_all_devices_are_clipped_before_the_sum_and_share_one_state(mesh, expected):
    tx = smartclip.clip_micro_batches(CLIPPER, axis_name="data")

    # P() for the state: JAX knows that it is the same on all devices.
    @partial(jax.shard_map, mesh=mesh, in_specs=P(None, "data"), out_specs=P())
    def train(grads):
        return scan(tx, grads)

    assert_close(jax.device_get(jax.jit(train)(GRADS)), expected, rtol=1e-5, atol=1e-7)


def test_a_loop_on_each_device_needs_only_one_sum_at_the_end(mesh):
    """In each iteration, parts are judged in the order of the devices."""
    tx = smartclip.clip_micro_batches(CLIPPER, axis=None, axis_name="data", reduce=None)

    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def mean(grads):
        def add(carry, part):
            total, state = carry
            clipped, state = tx.update(part, state, PARAMS)
            return (jax.tree.map(jnp.add, total, clipped), state), None

        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), grads)
        (total, state), _ = jax.lax.scan(add, (zeros, tx.init(PARAMS)), grads)
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf / PER_DEVICE, "data"), total), state

    batch = jax.tree.map(lambda leaf: leaf[0], GRADS)
    actual, state = jax.jit(mean)(batch)
    in_turn = np.arange(16).reshape(DEVICES, PER_DEVICE).T.ravel()
    alone = smartclip.clip_micro_batches(CLIPPER)
    ordered = jax.tree.map(lambda leaf: leaf[in_turn], batch)
    expected, state_alone = jax.jit(alone.update)(ordered, alone.init(PARAMS), PARAMS)
    assert_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-5, atol=1e-7)
    assert_close(
        jax.device_get(state.clipper), jax.device_get(state_alone.clipper), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("kind", long_but([AxisType.Explicit], [AxisType.Auto, AxisType.Explicit]))
def test_under_jit_the_parts_may_be_distributed(kind, expected):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
    tx = smartclip.clip_micro_batches(CLIPPER)
    means, state = expected
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P(None, "data"))
        grads = jax.tree.map(lambda leaf: jax.device_put(leaf, place), GRADS)
        update = jax.jit(tx.update)
        of_run = tx.init(PARAMS)
        for step in range(STEPS):
            batch = jax.tree.map(lambda leaf, step=step: leaf[step], grads)
            mean, of_run = jax.block_until_ready(update(batch, of_run, PARAMS))
            wanted = jax.tree.map(lambda leaf, step=step: leaf[step], means)
            assert_close(jax.device_get(mean), wanted, rtol=1e-5, atol=1e-7)
    assert_close(jax.device_get(of_run), state, rtol=1e-5, atol=1e-7)


def loss(params, rows):
    return jnp.mean((rows @ params["kernel"] + params["bias"][None] - 1) ** 2)


def vary(params):
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(params, "data", to="varying")
    return jax.lax.pvary(params, "data")


def test_each_device_has_its_own_gradient_if_the_parameters_vary(mesh):
    rows = np.float32(np.random.default_rng(0).normal(size=(DEVICES, 3, 4)))
    rows[5] *= 1000
    tx = smartclip.clip_micro_batches(smartclip.autoclip(), axis=None, axis_name="data")

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def update(params, rows):
        grads = jax.grad(loss)(vary(params), rows[0])
        return tx.update(grads, tx.init(params), params)[0]

    stacked = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(PARAMS, rows)
    alone = smartclip.clip_micro_batches(smartclip.autoclip())
    expected, state = jax.jit(alone.update)(stacked, alone.init(PARAMS), PARAMS)
    assert smartclip.metrics(state)["micro_batches_clipped"] > 0
    actual = jax.jit(update)(PARAMS, rows)
    assert_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-5, atol=1e-7)


def test_gradients_that_jax_has_summed_are_refused(mesh):
    tx = smartclip.clip_micro_batches(smartclip.autoclip(), axis=None, axis_name="data")

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def update(params, rows):
        return tx.update(jax.grad(loss)(params, rows[0]), tx.init(params), params)[0]

    with pytest.raises(ValueError, match="`updates` must be each device's own along `axis_name`"):
        jax.eval_shape(update, PARAMS, np.zeros((DEVICES, 3, 4), np.float32))


def test_a_leaf_may_have_the_same_gradient_on_all_devices(mesh):
    tx = smartclip.clip_micro_batches(smartclip.autoclip(), axis=None, axis_name="data")

    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def update(rows):
        grads = {"own": rows[0], "same": jnp.ones(2)}
        return tx.update(grads, tx.init(grads), grads)[0]

    mean = jax.jit(update)(np.ones((DEVICES, 3), np.float32))
    assert_close(
        jax.device_get(mean),
        {"own": np.ones(3, np.float32), "same": np.ones(2, np.float32)},
        rtol=1e-6,
    )


def test_leaves_may_be_split_over_another_axis():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    clipper = smartclip.autoclip(axis_name="model")
    tx = smartclip.clip_micro_batches(clipper, axis_name="data")
    specs = {"kernel": P("data", "model"), "bias": P("data")}
    means = {"kernel": P("model"), "bias": P()}

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=(means, P()))
    def update(grads):
        params = jax.tree.map(lambda leaf: leaf[0], grads)
        mean, state = tx.update(grads, tx.init(PARAMS), params)
        return mean, state.clipper.last.grad_norm

    batch = jax.tree.map(lambda leaf: leaf[0], GRADS)
    alone = smartclip.clip_micro_batches(smartclip.autoclip())
    expected, state = jax.jit(alone.update)(batch, alone.init(PARAMS), PARAMS)
    actual, norm = jax.jit(update)(batch)
    assert_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(norm, state.clipper.last.grad_norm, rtol=1e-5)
