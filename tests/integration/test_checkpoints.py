"""A resumed run equals the uninterrupted one bit for bit, for each format of checkpoints.

This includes the record of the clipper. The state of another clipper is refused.
"""

import functools
import pickle
import subprocess
import sys
from typing import Any, NamedTuple

import flax.serialization
import flax.training.checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from breadth import long_but, one_of_each_kind
from clipper_table import CLIPPERS, WEIGHT_BASED
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import assert_same_bits

import optax_smartclip as smartclip

SOME_CLIPPERS = ["autoclip", "autoclip_p90_per_layer", "zscore_clip", "agc"]
some_clippers = pytest.mark.parametrize("name", long_but({"autoclip", "agc"}, SOME_CLIPPERS))
# Several groups.
ON_A_MESH = "autoclip_p95_per_param"

rng = np.random.default_rng(0)
PARAMS = {
    "body": {
        "bias": np.float32(rng.normal(size=8)),
        "kernel": np.float32(0.3 * rng.normal(size=(16, 8))),
    },
    "head": {"kernel": np.float32(0.3 * rng.normal(size=(8, 8)))},
}
# The steps before the first save fill the histories. The steps after it have two spikes.
BEFORE, AFTER = 40, 6
INPUTS = rng.normal(size=(BEFORE + AFTER, 4, 16)).astype(np.float32)
TARGETS = rng.normal(size=(BEFORE + AFTER, 4, 8)).astype(np.float32)
TARGETS[[BEFORE + 1, BEFORE + 4]] *= 100


def loss(params, inputs, targets):
    body = params["body"]
    hidden = jnp.tanh(inputs @ body["kernel"] + body["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["head"]["kernel"] - targets))


class Trainer(NamedTuple):
    """A transformation and its own compiled step, as a new process would build them."""

    tx: Any
    step: Any
    start: Any

    def steps(self, run, first):
        """Yields params and state after each step from the `first` on."""
        for batch in zip(INPUTS[first:], TARGETS[first:], strict=True):
            # On simulated devices, steps in flight together can starve each other of threads.
            run = jax.block_until_ready(self.step(*run, *batch))
            yield run


def build(clipper, **options):
    # The count of a schedule must be resumed, too.
    rate = optax.linear_schedule(0.02, 0.01, BEFORE + AFTER)
    tx = optax.chain(clipper, optax.sgd(rate, momentum=0.9))

    def step(params, state, inputs, targets):
        grads = jax.grad(loss)(params, inputs, targets)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, PARAMS)
    return Trainer(tx, jax.jit(step, **options), (params, tx.init(params)))


@functools.cache
def uninterrupted(name):
    """Parameters and state of an uninterrupted run after each step, from the first save on."""
    trainer = build(CLIPPERS[name]())
    runs = list(trainer.steps(trainer.start, 0))[BEFORE - 1 :]
    clipped = [np.sum(state[0].last.num_clipped) for _, state in runs]
    assert np.any(np.diff(clipped) > 0)
    return runs


@functools.cache
def resumer(name):
    """A trainer that has not run yet."""
    return build(CLIPPERS[name]())


def assert_resumes_after_any_step(name, restore):
    """`restore(trainer, i)` returns the run that was saved after the i-th of the last steps."""
    expected = uninterrupted(name)
    trainer = resumer(name)
    for first in range(AFTER):
        run = restore(trainer, first)
        assert_same_bits(jax.tree.map(jnp.asarray, run), expected[first])
        for step, after in enumerate(trainer.steps(run, BEFORE + first), first + 1):
            assert_same_bits(after, expected[step])
    if name not in WEIGHT_BASED:
        # The comparison detects a clipper without its history.
        params, state = expected[0]
        forgetful = params, (trainer.start[1][0], *state[1:])
        *_, (last_params, _) = trainer.steps(forgetful, BEFORE)
        assert not np.array_equal(last_params["head"]["kernel"], expected[-1][0]["head"]["kernel"])


@pytest.mark.parametrize("name", long_but({"autoclip"}, SOME_CLIPPERS))
def test_a_run_resumed_from_orbax_after_any_step_equals_the_uninterrupted_run(name, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        for i, run in enumerate(uninterrupted(name)):
            checkpointer.save(tmp_path / str(i), run)

    def restore(trainer, i):
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(tmp_path / str(i), trainer.start)

    assert_resumes_after_any_step(name, restore)


def test_a_run_saved_in_the_background_is_resumed_bit_for_bit(tmp_path):
    name = "autoclip"
    # The next step overwrites the buffers that are being saved.
    trainer = build(CLIPPERS[name](), donate_argnums=(0, 1))
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True, max_to_keep=None)
    # Copies, because the cached arrays must not be donated.
    run = jax.tree.map(jnp.array, uninterrupted(name)[0])
    # A program that donates its arguments may round differently.
    expected = [jax.tree.map(np.array, run)]
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        manager.save(0, args=ocp.args.StandardSave(run))
        for step, after in enumerate(trainer.steps(run, BEFORE), 1):
            manager.save(step, args=ocp.args.StandardSave(after))
            expected.append(jax.tree.map(np.array, after))

    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert manager.all_steps() == list(range(AFTER + 1))
        for first in range(AFTER):
            run = manager.restore(first, args=ocp.args.StandardRestore(trainer.start))
            assert_same_bits(run, expected[first])
            for step, after in enumerate(trainer.steps(run, BEFORE + first), first + 1):
                assert_same_bits(after, expected[step])


@one_of_each_kind
def test_a_run_resumed_from_flax_bytes_after_any_step_equals_the_uninterrupted_run(name):
    saved = [flax.serialization.to_bytes(run) for run in uninterrupted(name)]
    assert_resumes_after_any_step(
        name, lambda trainer, i: flax.serialization.from_bytes(trainer.start, saved[i])
    )


@some_clippers
def test_a_run_resumed_from_a_pickle_after_any_step_equals_the_uninterrupted_run(name):
    saved = [pickle.dumps(run) for run in uninterrupted(name)]
    assert_resumes_after_any_step(name, lambda trainer, i: pickle.loads(saved[i]))


SPECS = {"body": {"bias": P("x"), "kernel": P("x", None)}, "head": {"kernel": P(None, "x")}}
MESHES = {"the same mesh": (8, 1), "another mesh": (2, 4), "half the devices": (4, 1)}


def mesh_of(*sizes):
    devices = jax.devices()[: sizes[0] * sizes[1]]
    return jax.make_mesh(sizes, ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def shardings(tx, params, mesh):
    """The shardings of the parameters and of the state."""
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    of_state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        placed,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    return placed, of_state


@pytest.fixture(scope="module")
def saved_on_a_mesh(tmp_path_factory):
    """A folder with the first save of a run on eight devices, and all its steps in memory."""
    folder = tmp_path_factory.mktemp("mesh")
    trainer = build(CLIPPERS[ON_A_MESH]())
    mesh = mesh_of(8, 1)
    with jax.set_mesh(mesh), ocp.StandardCheckpointer() as checkpointer:
        start = jax.device_put(trainer.start, shardings(trainer.tx, PARAMS, mesh))
        runs = list(trainer.steps(start, 0))[BEFORE - 1 :]
        checkpointer.save(folder / "run", runs[0])
    assert np.max(runs[-1][1][0].last.num_clipped - runs[0][1][0].last.num_clipped) > 0
    return folder, runs


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_a_sharded_run_is_resumed_on_the_same_mesh_and_on_others(saved_on_a_mesh, sizes):
    folder, expected = saved_on_a_mesh
    trainer, mesh = resumer(ON_A_MESH), mesh_of(*sizes)
    placed = shardings(trainer.tx, PARAMS, mesh)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (PARAMS, jax.eval_shape(trainer.tx.init, PARAMS)),
        placed,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        run = checkpointer.restore(folder / "run", target)
    assert_same_bits(run, expected[0])
    with jax.set_mesh(mesh):
        runs = [run, *trainer.steps(run, BEFORE)]
    for step, run in enumerate(runs):
        if sizes == (8, 1):
            assert_same_bits(run, expected[step])
        for actual, wanted in zip(*map(jax.tree.leaves, (run, expected[step])), strict=True):
            # Another mesh sums in another order.
            tolerance = 1e-5 * np.max(np.abs(np.asarray(wanted)))
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=tolerance)
        params, state = run
        for leaf, sharding in zip(*map(jax.tree.leaves, (params, placed[0])), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        for leaf in jax.tree.leaves(state[0]):
            assert leaf.sharding.is_fully_replicated
            assert leaf.sharding.device_set == set(mesh.devices.flat)


def test_neither_flax_nor_orbax_is_imported_and_flax_may_come_later():
    code = """
import importlib.util
import sys
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax_smartclip as smartclip

tx = smartclip.skip_spikes(optax.chain(smartclip.autoclip(), optax.sgd(0.1)))
params = {"w": jnp.ones(3)}
target = tx.init(params)
_, state = jax.jit(tx.update)(params, target, params)
# Looks for it without an import, as programs with an optional dependency do.
importlib.util.find_spec("orbax")
print({"flax", "orbax"} & {name.partition(".")[0] for name in sys.modules})
importlib.util.find_spec("flax.serialization")

import flax

restored = flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))
clipper, saved = restored.inner_state[0], state.inner_state[0]
print(clipper.num_observed, np.array_equal(clipper.rule.history.ring, saved.rule.history.ring))
"""
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.splitlines() == ["set()", "[1] True"]


def windowed(size=8, scope="global"):
    return smartclip.autoclip(95.0, history=smartclip.ring_buffer(size), scope=scope)


# The clipper of the resumed run, the shape of its history, and the shape in the checkpoint.
CHANGES = {
    "a longer window": (windowed(16), (1, 16), (1, 8)),
    "a shorter window": (windowed(4), (1, 4), (1, 8)),
    "another number of groups": (windowed(scope="per_param"), (3, 8), (1, 8)),
}
every_change = pytest.mark.parametrize(
    ("clipper", "wanted", "saved"), CHANGES.values(), ids=CHANGES
)


@every_change
def test_flax_bytes_of_another_window_or_number_of_groups_are_refused(clipper, wanted, saved):
    data = flax.serialization.to_bytes(windowed().init(PARAMS))
    target = clipper.init(PARAMS)
    for its in (target, jax.device_get(target)):
        with pytest.raises(ValueError, match="A saved RingBufferState must have 'ring'") as error:
            flax.serialization.from_bytes(its, data)
        assert f"of shape {wanted}" in str(error.value)
        assert f"got {saved}" in str(error.value)


def assert_update_refuses(clipper, state, wanted, saved):
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    if wanted[0] == saved[0]:
        field = "ring"
    else:
        field, wanted, saved = "num_observed", wanted[:1], saved[:1]
    with pytest.raises(ValueError, match=f"The state must have '{field}' of shape") as error:
        clipper.update(grads, state, PARAMS)
    assert f"of shape {wanted}" in str(error.value)
    assert f"got {saved}" in str(error.value)


@every_change
def test_a_pickle_of_another_window_or_number_of_groups_is_refused(clipper, wanted, saved):
    state = pickle.loads(pickle.dumps(windowed().init(PARAMS)))
    assert_update_refuses(clipper, state, wanted, saved)


@every_change
def test_a_state_that_orbax_restores_without_shapes_is_refused_by_the_first_update(
    clipper, wanted, saved, tmp_path
):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", windowed().init(PARAMS))
        target = clipper.init(PARAMS)
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
        state = checkpointer.restore(tmp_path / "run", item=target, restore_args=numpy)
    assert_update_refuses(clipper, state, wanted, saved)


def test_orbax_refuses_another_window_or_number_of_groups_when_it_knows_the_shapes(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", windowed().init(PARAMS))
    # In another process: when one array fails, Orbax abandons the reads of all others.
    code = """
import sys
import jax.numpy as jnp
import orbax.checkpoint as ocp
import optax_smartclip as smartclip

for size, scope in [(16, "global"), (4, "global"), (8, "per_param")]:
    tx = smartclip.autoclip(95.0, history=smartclip.ring_buffer(size), scope=scope)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            checkpointer.restore(sys.argv[1], tx.init({"a": jnp.ones(3), "b": jnp.ones(3)}))
        except ValueError as error:
            print(error)
"""
    output = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    longer, shorter, groups = [line for line in output.splitlines() if "not compatible" in line]
    assert "(1, 16)" in longer
    assert "(1, 4)" in shorter
    assert all("(1, 8)" in line for line in (longer, shorter))
    # Orbax may report either of the arrays.
    assert any(shape in groups for shape in ("(2,)", "(2, 8)"))


# Without a target, Orbax warns that it takes the sharding from the checkpoint.
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_graft_keeps_what_a_lenient_restore_of_flax_resets(tmp_path):
    old, clip = optax.adamw(0.1), smartclip.autoclip()
    with jax.numpy_dtype_promotion("standard"):
        _, saved = old.update(PARAMS, old.init(PARAMS), PARAMS)
    flax.training.checkpoints.save_checkpoint(tmp_path, {"opt_state": saved}, step=1)
    for first in clip, optax.clip_by_global_norm(1.0):
        new = optax.chain(first, old).init(PARAMS)
        lenient = flax.training.checkpoints.restore_checkpoint(tmp_path, {"opt_state": new})
        assert_same_bits(jax.tree.map(jnp.asarray, lenient["opt_state"]), new)
    restored = flax.training.checkpoints.restore_checkpoint(tmp_path, None)["opt_state"]
    state = smartclip.graft(restored, optax.chain(clip, old).init(PARAMS))
    assert_same_bits(jax.tree.map(jnp.asarray, state), (clip.init(PARAMS), saved))


@functools.cache
def register_types_of_optax():
    """Registers states of Optax with `jax.export`, which is possible only once in a process."""
    for cls in (optax.EmptyState, optax.TraceState, optax.ScaleByScheduleState):
        jax.export.register_namedtuple_serialization(cls, serialized_name=f"optax.{cls.__name__}")


@some_clippers
def test_an_exported_step_equals_the_compiled_one_and_does_not_call_python(name):
    trainer, run = resumer(name), uninterrupted(name)[0]
    exported = jax.export.export(trainer.step)(*run, INPUTS[0], TARGETS[0])
    for unportable in ("custom_call", "callback"):
        assert unportable not in exported.mlir_module()
    register_types_of_optax()
    call = jax.export.deserialize(exported.serialize()).call
    for expected, *batch in zip(
        uninterrupted(name)[1:], INPUTS[BEFORE:], TARGETS[BEFORE:], strict=True
    ):
        run = call(*run, *batch)
        assert_same_bits(run, expected)
