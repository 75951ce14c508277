"""`keep_last_good` returns to the copy that a count by hand selects, bit for bit."""

import functools
import inspect
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from compat import lenient
from compilation import JUDGED
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import assert_close, assert_same_bits, random_tree

import optax_smartclip as smartclip
from optax_smartclip import keep_last_good, restore_last_good

NAN = float("nan")
HAS_HOST = any(
    memory.kind == "pinned_host" for memory in jax.devices()[0].addressable_memories()
) and hasattr(jax, "memory")
needs_host = pytest.mark.skipif(not HAS_HOST, reason="no pinned_host memory")


# Which copy.

EVENTS = st.lists(st.sampled_from([1.0, 1.1, 0.9, 1.0, 1e3, NAN]), min_size=40, max_size=40)


@jax.jit
def follow(sizes, every):
    """The parameters before each step, restored after it, and after it, and the metrics."""
    inner = smartclip.skip_spikes(optax.sgd(1.0), warmup_steps=3, window=8, max_consecutive=2)
    tx = keep_last_good(inner, every=every)

    def step(carry, size):
        before, state = carry
        updates, state = tx.update(size, state, before)
        params = optax.apply_updates(before, updates)
        restored, _ = restore_last_good(params, state, True)
        return (params, state), (before, restored, params, smartclip.metrics(state))

    start = jnp.float32(0)
    return jax.lax.scan(step, (start, tx.init(start)), sizes)[1]


@given(EVENTS, st.integers(1, 9))
def test_a_restore_returns_to_the_older_of_two_copies(sizes, every):
    sizes = np.float32(sizes)
    before, restored, after, record = jax.device_get(follow(sizes, every))
    dropped = record["skipped"]
    bad = dropped | (record["skip_norm"] > record["skip_norm_threshold"])
    taken = []
    for step, size in enumerate(sizes):
        since = np.sum(~dropped[taken[-1] : step]) if taken else every
        if np.isfinite(size) and since >= every and not (step and bad[step - 1]):
            taken.append(step)
        older = taken[-2:][:1]
        # Before the first copy, a restore changes nothing.
        assert restored[step] == (before[older[0]] if older else after[step])
        age = np.sum(~dropped[older[0] : step + 1]) if older else -1
        assert record["copy_age"][step] == age
    if len(taken) > 1:
        assert record["copy_age"][-1] >= every


# Training.

SHAPES = {"bias": (8,), "kernel": (16, 8)}
PARAMS = random_tree(0, 0.1, SHAPES)
EVERY, LIMIT, BAD = 4, 3, range(14, 17)
# The last two copies before the bad steps are those of the steps 8 and 12.
COPY = 8


def gradient(step, size=1.0):
    return random_tree(100 + step, size, SHAPES)


GRADS = [gradient(step, NAN if step in BAD else 1.0) for step in range(24)]


def optimizer(memory_kind=None):
    sgd = optax.sgd(optax.linear_schedule(0.1, 0, 40), momentum=0.9)
    skipping = smartclip.skip_spikes(lenient(sgd), window=8, warmup_steps=4, give_up_after=LIMIT)
    return keep_last_good(skipping, every=EVERY, memory_kind=memory_kind)


def make_step(tx, rate_factor=1.0):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        exhausted = smartclip.metrics(state)["exhausted"]
        return restore_last_good(params, state, exhausted, rate_factor=rate_factor)

    return step


def train(step, carry, stream):
    """The parameters and the state before the first step and after each."""
    history = [carry]
    for grads in stream:
        # There are more devices than cores, so steps in flight together can starve each other of
        # threads.
        history.append(jax.block_until_ready(step(*history[-1], grads)))
    return history


@functools.cache
def uninterrupted():
    """The compiled step, and a run with it that returns to a copy once."""
    tx = optimizer()
    step = jax.jit(make_step(tx, 0.5))
    history = train(step, (jax.tree.map(jnp.asarray, PARAMS), tx.init(PARAMS)), GRADS)
    restores = [int(smartclip.metrics(state)["num_restores"]) for _, state in history]
    assert restores == [0] * (BAD[-1] + 1) + [1] * (len(history) - BAD[-1] - 1)
    return step, history


def learned(carry):
    return carry[0], carry[1].inner_state


def test_a_run_that_returns_continues_bit_for_bit_as_a_run_from_the_copy():
    _, history = uninterrupted()
    after = BAD[-1] + 1
    assert_same_bits(learned(history[after]), learned(history[COPY]))
    # A new run starts from the copied inner state and an empty state of `keep_last_good`.
    tx = optimizer()
    params, inner_state = learned(history[COPY])
    fresh = tx.init(params).replace(inner_state=inner_state)
    # It has the reduced rate of that run.
    kept = fresh.kept.replace(last=fresh.kept.last._replace(rate_scale=jnp.float32(0.5)))
    step, _ = uninterrupted()
    other = train(step, (params, fresh.replace(kept=kept)), GRADS[after:])
    for actual, expected in zip(history[after:], other, strict=True):
        assert_same_bits(learned(actual), learned(expected))
    # The count of the schedule is restored as well, and the bad steps are forgotten.
    counts = optax.tree.get_all_with_path(history[-1][1], "count")
    assert {int(count) for _, count in counts} == {COPY + len(GRADS) - after}
    assert int(smartclip.metrics(history[-1][1])["num_skipped"]) == 0


def test_a_run_can_return_to_the_same_copy_again():
    step, history = uninterrupted()
    after = BAD[-1] + 1
    bad = [gradient(step, NAN) for step in range(LIMIT)]
    again = train(step, history[after + EVERY - 1], bad)[-1]
    assert_same_bits(learned(again), learned(history[COPY]))
    record = smartclip.metrics(again[1])
    assert (int(record["num_restores"]), float(record["rate_scale"])) == (2, 0.25)
    assert int(record["copy_age"]) == 0


def make_bare(**options):
    """SGD with momentum, and a step that returns to a copy when it is told to."""
    tx = keep_last_good(optax.sgd(0.1, momentum=0.9), every=2, **options)

    def step(carry, now):
        (params, state), (grads, when) = carry, now
        updates, state = tx.update(grads, state, params)
        carry = restore_last_good(optax.apply_updates(params, updates), state, when)
        return carry, carry

    return tx, step


def test_a_batch_of_runs_returns_one_by_one():
    tx, step = make_bare()
    sizes = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    whens = np.random.default_rng(1).random((3, 20)) < 0.3

    def run(*stream):
        start = jnp.float32(0)
        return jax.lax.scan(step, (start, tx.init(start)), stream)[1]

    of_all, alone = jax.jit(jax.vmap(run))(sizes, whens), jax.jit(run)
    for row in range(3):
        actual = jax.tree.map(lambda leaf, row=row: leaf[row], of_all)
        # Another program may round differently.
        assert_close(actual, alone(sizes[row], whens[row]), rtol=1e-5, atol=1e-6)


# Meshes and memories.

SPECS = {"bias": P("x"), "kernel": P(None, "x")}


@pytest.mark.parametrize(
    ("mode", "memory_kind"),
    [
        (AxisType.Auto, None),
        pytest.param(AxisType.Explicit, "pinned_host", marks=needs_host),
    ],
)
def test_on_a_mesh_copies_have_the_sharding_of_the_parameters(mode, memory_kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(mode,))
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    tx = optimizer(memory_kind)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, placed)
        stream = [jax.device_put(grads, placed) for grads in GRADS]
        step = jax.jit(make_step(tx, 0.5))
        params, state = train(step, (params, tx.init(params)), stream)[-1]
    _, history = uninterrupted()
    assert_close((params, state.inner_state), learned(history[-1]), rtol=1e-5, atol=1e-6)
    assert smartclip.metrics(state)["num_restores"] == 1
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(params)} == {"device"}
    for copy in state.kept.copies:
        for name, leaf in copy[0].items():
            assert leaf.sharding.memory_kind == (memory_kind or leaf.sharding.memory_kind)
            for other in (leaf, params[name]):
                plain = other.sharding.with_memory_kind("device")
                assert plain.is_equivalent_to(placed[name], leaf.ndim)


def test_under_shard_map_all_devices_return_together():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx, step = make_bare(axis_name="x")
    # In step 4 a copy is due, and one device has a NaN. No device may take the copy.
    sizes, whens = np.where(np.arange(12) == 4, NAN, 1.0), np.arange(12) == 6

    def run(params, grads):
        def one(carry, now):
            size, when = now
            size = jnp.where(jax.lax.axis_index("x") == 3, size, 1.0)
            return step(carry, (jax.tree.map(lambda leaf: size * leaf, grads), when))

        stream = np.float32(sizes), whens
        return jax.lax.scan(one, (params, tx.init(params)), stream)[1][0]

    of_steps = jax.tree.map(lambda spec: P(None, *spec), SPECS)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(SPECS, SPECS), out_specs=of_steps)
    history = jax.jit(sharded)(PARAMS, random_tree(1, 1.0, SHAPES))
    # The steps after the restore repeat those from step 0, with the same gradient.
    for step in range(4):
        same = [jax.tree.map(lambda leaf, i=i: leaf[i], history) for i in (step, step + 7)]
        assert_same_bits(*same)


@needs_host
def test_donated_steps_with_copies_in_host_memory_have_the_same_bits():
    runs = []
    for memory_kind in (None, "pinned_host"):
        tx, step = make_bare(memory_kind=memory_kind)
        step = jax.jit(step, donate_argnums=0)
        start = carry = jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS)
        for number in range(20):
            carry = step(carry, (gradient(number), number % 7 == 6))[0]
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start[1].kept.copies))
        runs.append(carry)
    assert_same_bits(*runs)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(runs[1][1].kept.copies)}
    assert kinds == {"pinned_host"}


# Checkpoints and other tools.


def assert_resumes(restored, place):
    step, history = uninterrupted()
    assert_same_bits(jax.tree.map(jnp.asarray, restored), history[place])
    rest = train(step, restored, GRADS[place:])
    assert_same_bits(rest[-1], history[-1])


def test_a_run_resumed_from_flax_bytes_or_a_pickle_equals_an_uninterrupted_run():
    _, history = uninterrupted()
    for place in (BAD[1], BAD[-1] + 1):
        data = flax.serialization.to_bytes(history[place])
        assert_resumes(flax.serialization.from_bytes(history[0], data), place)
        assert_resumes(pickle.loads(pickle.dumps(history[place])), place)


def test_a_run_resumed_from_orbax_equals_an_uninterrupted_run(tmp_path):
    _, history = uninterrupted()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", history[BAD[1]])
        checkpointer.wait_until_finished()
        assert_resumes(checkpointer.restore(tmp_path / "run", history[0]), BAD[1])


def test_graft_adds_it_to_a_run_and_removes_it():
    _, history = uninterrupted()
    params, saved = history[-1]
    inner = saved.inner_state
    start = optimizer().init(params)
    adopted = smartclip.graft(inner, start)
    assert_same_bits(adopted, start.replace(inner_state=inner))
    assert_same_bits(smartclip.graft(saved, inner), inner)
    assert_same_bits(smartclip.graft(saved, start), saved)
    assert_same_bits(smartclip.graft(flax.serialization.to_state_dict(saved), start), saved)


def test_names_are_found_once_and_parameters_in_the_copies_too():
    tx = keep_last_good(
        smartclip.skip_spikes(optax.inject_hyperparams(optax.sgd)(0.25, momentum=0.9)), every=2
    )
    state = tx.init(PARAMS)
    assert optax.tree.get(state, "learning_rate") == 0.25
    assert smartclip.metrics(state).keys() == set(
        smartclip.SkipMetrics._fields + smartclip.LastGoodMetrics._fields
    )
    mapped = optax.tree.map_params(tx, lambda _, spec: spec, state, SPECS)
    marked = [leaf for leaf in jax.tree.leaves(mapped) if isinstance(leaf, P)]
    # The momentum, and the parameters and the momentum of both copies.
    assert len(marked) == 5 * len(SPECS)


def test_a_random_key_and_other_dtypes_are_kept():
    params = {"half": jnp.ones(2, jnp.bfloat16), "whole": jnp.arange(3), "none": None}
    # Each step replaces the key.
    inner = optax.GradientTransformation(
        lambda params: jax.random.key(0),
        lambda updates, key, params=None: (updates, jax.random.split(key, 1)[0]),
    )
    tx = keep_last_good(inner, every=1, memory_kind="pinned_host" if HAS_HOST else None)

    @jax.jit
    def step(state, when):
        _, state = tx.update(params, state, params)
        return restore_last_good(params, state, when)

    states = [tx.init(params)]
    for when in (False, False, True):
        restored, state = step(states[-1], when)
        states.append(state)
    assert_same_bits(restored, params)
    assert states[3].inner_state == states[1].inner_state != states[2].inner_state


@functools.cache
def descend():
    """Init, update and restore of SGD with a rate of 1 that takes a copy in each step."""
    tx = keep_last_good(optax.sgd(1.0), every=1)
    return tx.init, jax.jit(tx.update), jax.jit(restore_last_good)


def test_the_rate_cut_multiplies_the_updates_of_later_steps():
    init, update, restore = descend()
    grads = random_tree(3, 1.0, SHAPES)
    params, state = PARAMS, init(PARAMS)
    expected = 1.0
    for when, factor in [(True, 0.5), (False, 0.5), (True, 0.25), (True, 1.0), (False, 0.1)]:
        updates, state = update(grads, state, params)
        by_hand = jax.tree.map(lambda leaf, scale=expected: np.float32(-scale) * leaf, grads)
        assert_same_bits(updates, by_hand)
        params, state = restore(params, state, when, rate_factor=factor)
        expected *= factor if when else 1.0
        assert smartclip.metrics(state)["rate_scale"] == expected
    assert smartclip.metrics(state)["num_restores"] == 3


def test_a_run_can_return_several_times_without_a_step():
    init, update, restore = descend()
    _, state = update(PARAMS, init(PARAMS), PARAMS)
    for restores in (1, 2):
        _, state = restore(PARAMS, state, True)
        assert smartclip.metrics(state)["num_restores"] == restores


def test_a_step_whose_norm_is_at_the_threshold_is_a_good_one():
    limit = smartclip.ThresholdRule(
        init=jnp.zeros,
        threshold=lambda state, norms: jnp.ones_like(norms),
        record=lambda state, norms, thresholds: state,
    )
    tx = keep_last_good(smartclip.skip_spikes(optax.sgd(1.0), rule=limit, warmup_steps=0), every=1)
    params, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    ages = []
    for _ in range(3):
        _, state = tx.update(jnp.ones(()), state, params)
        ages.append(int(smartclip.metrics(state)["copy_age"]))
    assert ages == [1, 2, 2]


def test_before_the_first_copy_nothing_changes():
    init, update, restore = descend()
    bad = jax.tree.map(lambda leaf: np.float32(NAN) * leaf, PARAMS)
    state = init(PARAMS)
    for params, grads in ((bad, PARAMS), (PARAMS, bad)):
        _, state = update(grads, state, params)
        assert_same_bits(restore(params, state, True, rate_factor=0.5), (params, state))
        assert smartclip.metrics(state)["copy_age"] == -1


def test_a_step_needs_no_more_than_two_arrays_of_parameters_more():
    params = jnp.ones((100, 100))

    def temporary(tx, restores):
        def step(params, state, inputs):
            grads = jax.grad(lambda params: jnp.sum(jnp.tanh(inputs @ params) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            if restores:
                when = smartclip.metrics(state)["skipped"]
                params, state = restore_last_good(params, state, when)
            return params, state

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(
            params, tx.init(params), jnp.ones((4, 100))
        )
        return compiled.compile(JUDGED).memory_analysis().temp_size_in_bytes

    inner = smartclip.skip_spikes(optax.sgd(0.1, momentum=0.9), window=4)
    more = temporary(keep_last_good(inner, every=5), True) - temporary(inner, False)
    # One with JAX 0.10.2 and two with JAX 0.12. If copies came after updates, it would be four.
    assert more < 2.2 * params.nbytes


# Arguments.

BARE = inspect.unwrap(keep_last_good)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "`every` must be a number of steps from 1 to 2147483647, got 0."),
        (
            {"every": 2**31},
            "`every` must be a number of steps from 1 to 2147483647, got 2147483648.",
        ),
        ({"every": None}, "`every` must be a number of steps from 1 to 2147483647, got None."),
        ({"memory_kind": "host"}, "`memory_kind` must be one of None, 'pinned_host', got 'host'."),
        (
            {"inner": 3},
            "`inner` must be a gradient transformation, as optax.adamw(3e-4) is, got 3.",
        ),
    ],
)
def test_a_bad_argument_is_named_with_its_value(arguments, message):
    with pytest.raises(ValueError, match="must be") as error:
        BARE(**({"inner": optax.identity(), "every": 3} | arguments))
    assert str(error.value) == message


def test_a_run_may_be_too_short_for_a_second_copy():
    tx = keep_last_good(optax.identity(), every=2**31 - 1)
    state = tx.init(PARAMS)
    for age in (1, 2):
        _, state = tx.update(PARAMS, state, PARAMS)
        assert smartclip.metrics(state)["copy_age"] == age


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rate_factor": 0.0}, r"`rate_factor` must be in \(0, 1\], got 0.0"),
        ({"rate_factor": 1.5}, r"`rate_factor` must be in \(0, 1\], got 1.5"),
        ({"when": 1.0}, r"`when` must be a bool, or a scalar array of bools, got 1.0"),
        ({"when": np.array([True])}, r"`when` must be a bool, .* by `jax.vmap`"),
        ({"opt_state": optax.EmptyState()}, "`state` must be the LastGoodState"),
        ({"params": {"bias": jnp.zeros(8)}}, "`params` must have the shapes and dtypes of those"),
    ],
)
def test_a_bad_argument_of_a_restore_is_named(changed, message):
    state = keep_last_good(optax.identity(), every=3).init(PARAMS)
    arguments = {"params": PARAMS, "opt_state": state, "when": True}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(restore_last_good)(**(arguments | changed))


def test_missing_parameters_and_other_states_are_refused():
    tx = keep_last_good(optax.identity(), every=3)
    with pytest.raises(ValueError, match="`params` must be passed to `update`"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="`state` must be the LastGoodState"):
        tx.update(PARAMS, optax.EmptyState(), PARAMS)
    with pytest.raises(ValueError, match="`params` must have the shapes"):
        tx.update(PARAMS, tx.init(PARAMS), {"bias": PARAMS["bias"]})
