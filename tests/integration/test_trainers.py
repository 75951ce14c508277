"""Operations of public training programs on the state of an optimizer that has a clipper.

Each test does in a few lines what some of these programs do: `docs/integrations.md` names them.
Scanned, donated and vmapped loops are in `test_strict_modes.py` and `test_ensembles.py`.
"""

import functools
import io

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from breadth import long_but
from compilation import JUDGED
from flax.jax_utils import replicate
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from regression import (
    INPUTS,
    PARAMS,
    RATE,
    TARGETS,
    Autoclip,
    assert_same_params,
    descend,
    loss,
    train_by_hand,
)
from trees import assert_close, assert_same_bits, random_tree

import optax_smartclip as smartclip
from optax_smartclip import masks

# It has a clipper inside.
KINDS = {"skip_spikes"}
CLIPPERS = {
    "autoclip": smartclip.autoclip,
    "autoclip per layer": functools.partial(smartclip.autoclip, 90.0, scope="per_layer"),
    "agc": smartclip.agc,
    "skip_spikes": lambda: smartclip.skip_spikes(smartclip.autoclip()),
}
every_clipper = pytest.mark.parametrize("name", long_but(KINDS, CLIPPERS))


def optimizer(make):
    return optax.chain(make(), optax.sgd(RATE, momentum=0.9))


def mesh_of(*sizes):
    return jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def gradients(params, steps=8):
    """The gradients of all steps; the sixth is a spike."""
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    sizes = [0.1 + 0.01 * step for step in range(steps)]
    sizes[5] = 100.0
    return [random_tree(1 + step, size, shapes) for step, size in enumerate(sizes)]


def run(step, params, state, grads):
    for each in grads:
        # On simulated devices, steps in flight together can starve each other of threads.
        params, state = jax.block_until_ready(step(params, state, each))
    return params, state


def make_step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


class Model(nn.Module):
    """Two layers with names of their axes."""

    @nn.compact
    def __call__(self, x):
        for name, axes in [("up", ("embed", "mlp")), ("down", ("mlp", "embed"))]:
            kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
            x = nn.Dense(8, kernel_init=kernel_init, name=name)(x)
        return x


@every_clipper
def test_names_of_axes_reach_the_moments_and_every_other_leaf_is_replicated(name):
    tx, apply_fn = optimizer(CLIPPERS[name]), Model().apply

    def init():
        params = Model().init(jax.random.key(0), jnp.ones((2, 8)))["params"]
        return TrainState.create(apply_fn=apply_fn, params=params, tx=tx)

    specs = nn.get_partition_spec(jax.eval_shape(init))
    assert specs.opt_state[1][0].trace == specs.params
    assert specs.params["up"]["kernel"] == P("embed", "mlp")
    assert set(jax.tree.leaves(specs.opt_state[0])) == {P()}

    mesh = mesh_of(4, 2)
    rules = [("embed", "data"), ("mlp", "model")]
    shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
    placed = jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)()
    grads = gradients(placed.params)
    step = jax.jit(make_step(tx), donate_argnums=(0, 1))
    got = run(step, placed.params, placed.opt_state, grads)
    alone = nn.unbox(init())
    expected = run(jax.jit(make_step(tx)), alone.params, alone.opt_state, grads)
    assert_close(got, expected, rtol=2e-6, atol=1e-7)
    # The spike was clipped or dropped.
    assert any(
        np.any(leaf > 0)
        for name, leaf in smartclip.metrics(got[1]).items()
        if name.endswith(("num_clipped", "num_skipped"))
    )


def shard_by_shape(tx, params, shardings, mesh):
    """Gives each leaf of the state the sharding of a parameter of its shape."""
    by_shape = {
        leaf.shape: sharding
        for leaf, sharding in zip(*map(jax.tree.leaves, (params, shardings)), strict=True)
    }
    return jax.tree.map(
        lambda leaf: by_shape.get(leaf.shape, NamedSharding(mesh, P())),
        jax.eval_shape(tx.init, params),
    )


@pytest.mark.parametrize(
    ("scope", "groups"), [pytest.param("global", 1, marks=pytest.mark.long), ("per_layer", 2)]
)
def test_a_history_may_be_sharded_like_a_parameter_of_its_shape(scope, groups):
    tx = optimizer(functools.partial(smartclip.autoclip, scope=scope))
    params = random_tree(
        0, 1.0, {"body": {"bias": (groups,), "kernel": (8, 4)}, "head": {"kernel": (groups, 48)}}
    )
    mesh = mesh_of(4, 1 if groups == 1 else 2)
    specs = {
        "body": {"bias": P("model"), "kernel": P("data")},
        "head": {"kernel": P("model", "data")},
    }
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    of_state = shard_by_shape(tx, params, placed, mesh)
    state = jax.jit(tx.init, out_shardings=of_state)(params)
    ring = state[0].rule.history.ring
    assert ring.sharding.shard_shape(ring.shape) == (1, 12)

    # The tolerance is that of machine code that LLVM has optimized, as it does by default.
    usual = JUDGED | {"xla_backend_optimization_level": 3}
    jit = functools.partial(jax.jit, make_step(tx), compiler_options=usual)
    step = jit(out_shardings=(placed, of_state), donate_argnums=(0, 1))
    grads = gradients(params, steps=14)
    got = run(step, jax.device_put(params, placed), state, grads)
    expected = run(jit(), params, tx.init(params), grads)
    assert_close(got, expected, rtol=2e-6, atol=1e-7)
    assert np.any(smartclip.metrics(got[1])["num_clipped"] > 0)


@every_clipper
def test_partition_specs_for_a_state_need_shapes_alone(name):
    # An `init` in three parts, as where every transformation comes with specs of its state.
    tx = optimizer(CLIPPERS[name])
    params = random_tree(0, 1.0, {"layer": {"bias": (8,), "kernel": (16, 8)}})
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    specs = jax.tree.map(
        lambda leaf: P(*(None for _ in leaf.shape)), jax.eval_shape(tx.init, shapes)
    )
    mesh = mesh_of(4, 2)
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    state = jax.jit(tx.init, out_shardings=placed)(params)
    assert_same_bits(state, tx.init(params))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", long_but(KINDS, ["autoclip per layer", "skip_spikes"]))
def test_a_state_in_host_memory_gives_the_same_numbers(name):
    tx = optimizer(CLIPPERS[name])
    params = random_tree(0, 1.0, {"layer": {"bias": (8,), "kernel": (16, 8)}})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kinds = [memory.kind for memory in jax.devices()[0].addressable_memories()]
    if "pinned_host" not in kinds:
        pytest.skip("JAX has no pinned_host memory on this platform")
    host = device.with_memory_kind("pinned_host")

    @functools.partial(jax.jit, out_shardings=(device, host))
    def step(params, state, grads):
        return make_step(tx)(params, jax.device_put(state, device), grads)

    grads = gradients(params)
    params, state = run(step, params, jax.device_put(tx.init(params), host), grads)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == {"pinned_host"}
    initial = random_tree(0, 1.0, {"layer": {"bias": (8,), "kernel": (16, 8)}})
    expected = run(jax.jit(make_step(tx)), initial, tx.init(initial), grads)
    assert_same_bits((params, state), expected)


@every_clipper
def test_a_state_dict_by_paths_without_its_empty_nodes_is_restored(name):
    # Layers in a list have numbers as names in a state dict.
    tx = optimizer(CLIPPERS[name])
    params = random_tree(0, 1.0, [{"kernel": (4, 2)}, {"kernel": (2, 4)}])
    grads = gradients(params)
    step = jax.jit(make_step(tx))
    params, state = run(step, params, tx.init(params), grads)
    by_path = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(state), sep="/")
    saved = flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(by_path))
    assert smartclip.metrics(saved).keys() <= smartclip.metrics(state).keys()

    target = tx.init(params)
    paths = flax.traverse_util.flatten_dict(
        flax.serialization.to_state_dict(target), sep="/", keep_empty_nodes=True
    )
    restored = flax.serialization.from_state_dict(
        target, flax.traverse_util.unflatten_dict(paths | saved, sep="/")
    )
    assert_same_bits(jax.tree.map(jnp.asarray, restored), state)
    assert_same_bits(run(step, params, restored, grads), run(step, params, state, grads))


@every_clipper
def test_a_chain_saved_as_an_array_of_objects_is_restored(name):
    tx = optimizer(CLIPPERS[name])
    params = random_tree(0, 1.0, {"layer": {"bias": (8,), "kernel": (16, 8)}})
    _, state = run(jax.jit(make_step(tx)), params, tx.init(params), gradients(params))
    file = io.BytesIO()
    np.savez(file, opt_state=np.asarray(state, dtype=object))
    file.seek(0)
    restored = tuple(np.load(file, allow_pickle=True)["opt_state"].tolist())
    # NumPy converts a link that is a tuple to a list, but not the state of a clipper.
    assert_same_bits(restored[0], state[0])


STATISTICS = "_overwrite_with_gradient"


class InFloat8(nn.Module):
    """A layer whose backward pass returns statistics in place of a gradient."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, dot_general_cls=nn.fp8_ops.Fp8DirectDotGeneralOp)(x)


def test_statistics_that_are_overwritten_with_gradients_are_not_in_the_norm():
    model = InFloat8()
    inputs = np.float32(1e3 * np.random.default_rng(0).normal(size=(16, 16)))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = model.init(jax.random.key(0), inputs)
        grads = jax.jit(jax.grad(lambda variables: jnp.sum(model.apply(variables, inputs) ** 2)))(
            variables
        )
    ceiling = functools.partial(smartclip.autoclip, max_norm=1.0)
    tx = ceiling(mask=masks.except_paths(STATISTICS))
    updates, state = jax.jit(tx.update)(grads, tx.init(variables), variables)
    assert_same_bits(updates[STATISTICS], grads[STATISTICS])

    # Flax passes only the parameters to the optimizer.
    train_state = TrainState.create(apply_fn=model.apply, params=variables, tx=ceiling())
    after = jax.jit(lambda grads: train_state.apply_gradients(grads=grads))(grads)
    assert_same_bits(after.params[STATISTICS], grads[STATISTICS])
    applied = jax.tree.map(np.subtract, after.params["params"], variables["params"])
    np.testing.assert_allclose(reference.norm(updates["params"]), 1.0, rtol=1e-6)
    np.testing.assert_allclose(reference.norm(applied), 1.0, rtol=1e-5)
    for opt_state in (state, after.opt_state):
        norm = smartclip.metrics(opt_state)["grad_norm"]
        np.testing.assert_allclose(norm, reference.norm(grads["params"]), rtol=1e-5)


def test_replicated_states_under_pmap_train_as_one_device_does():
    tx = optax.chain(Autoclip.factory(), optax.sgd(RATE))

    @functools.partial(jax.pmap, axis_name="batch", donate_argnums=(0, 1))
    def step(params, state, inputs, targets):
        grads = jax.lax.pmean(jax.grad(loss)(params, inputs, targets), "batch")
        return make_step(tx)(params, state, grads)

    replicated, history = replicate((PARAMS, tx.init(PARAMS))), []
    for batch in zip(INPUTS, TARGETS, strict=True):
        replicated = jax.block_until_ready(step(*replicated, *(part[:, None] for part in batch)))
        history.append(jax.tree.map(lambda leaf: np.array(leaf)[0], replicated))
        for leaf in jax.tree.leaves(replicated):
            assert_same_bits(*np.array(leaf)[[0, -1]])
    clip = Autoclip()
    assert_same_params(history, train_by_hand(lambda grads, params: descend(clip(grads, params))))


def test_a_train_state_saved_with_a_fixed_limit_takes_a_clipper_and_keeps_its_momentum():
    half = len(INPUTS) // 3

    def state_of(clipper, params):
        tx = optax.chain(clipper, optax.sgd(RATE, momentum=0.9))
        return TrainState.create(apply_fn=loss, params=params, tx=tx)

    def advance(state, inputs, targets):
        @jax.jit
        def step(state, *batch):
            return state.apply_gradients(grads=jax.grad(loss)(state.params, *batch))

        for batch in zip(inputs, targets, strict=True):
            state = step(state, *batch)
            yield state

    *_, before = first = list(
        advance(state_of(optax.clip_by_global_norm(1.0), PARAMS), INPUTS[:half], TARGETS[:half])
    )
    saved = flax.serialization.msgpack_restore(flax.serialization.to_bytes(before))
    fresh = state_of(Autoclip.factory(), saved["params"])
    state = fresh.replace(
        step=saved["step"], opt_state=smartclip.graft(saved["opt_state"], fresh.opt_state)
    )
    states = [*first, *advance(state, INPUTS[half:], TARGETS[half:])]
    assert states[-1].step == len(INPUTS)

    clip, trace, steps = Autoclip(), jax.tree.map(np.zeros_like, PARAMS), iter(range(len(INPUTS)))

    def update(grads, params):
        nonlocal trace
        if next(steps) < half:
            scale = min(1.0, 1.0 / reference.norm(grads))
            clipped = jax.tree.map(lambda grad: scale * grad, grads)
        else:
            clipped = clip(grads, params)
        trace = jax.tree.map(lambda old, new: 0.9 * old + new, trace, clipped)
        return descend(trace)

    history = [(state.params, state.opt_state) for state in states]
    assert_same_params(history, train_by_hand(update))
    assert smartclip.metrics(states[-1].opt_state)["num_clipped"] > 0
