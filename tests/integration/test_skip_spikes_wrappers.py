"""`skip_spikes` inside and around Optax's wrappers, saved and resumed, exported and sharded.

With the wrappers, training equals a loop in float64 NumPy that drops steps by hand.
"""

import contextlib
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
import reference
import regression
from breadth import KINDS, one_of_each_kind
from clipper_table import CLIPPERS
from compat import lenient
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from regression import PARAMS, RATE, Autoclip, assert_same_params, descend
from trees import assert_close, assert_same_bits, random_tree

import optax_smartclip as smartclip

# Thirty-six batches with three spikes and a NaN.
rng = np.random.default_rng(1)
INPUTS = rng.normal(size=(36, 8, 3)).astype(np.float32)
FINITE_TARGETS = rng.normal(size=(36, 8, 2)).astype(np.float32)
FINITE_TARGETS[[14, 15, 25]] *= 100
TARGETS = FINITE_TARGETS.copy()
TARGETS[20] = np.nan
OPTIONS = {"window": 16, "warmup_steps": 6}
skip_spikes = functools.partial(smartclip.skip_spikes, **OPTIONS)


def train_by_hand(update, targets=TARGETS):
    """`update` maps the gradient, the parameters and the loss to a step."""
    params, history = jax.tree.map(np.float64, PARAMS), []
    for batch in zip(INPUTS, targets, strict=True):
        grads, loss = regression.gradient(params, *batch), regression.value(params, *batch)
        params = jax.tree.map(np.add, params, update(grads, params, loss))
        history.append(params)
    return history


class Judge:
    """Tells which steps to drop, and records the answers."""

    def __init__(self, **options):
        self.options = {"size": 16, "warmup_steps": 6} | options
        self.norms, self.losses, self.told = [], [], []

    def __call__(self, grads, loss):
        self.norms.append(reference.norm(grads))
        self.losses.append(loss)
        skipped, _ = reference.skipped_steps(self.norms, self.losses, **self.options)
        self.told.append(skipped[-1])
        return skipped[-1]


def nothing(grads):
    return jax.tree.map(np.zeros_like, grads)


def compare(tx, update, *judges, targets=TARGETS):
    """Trains both ways, compares parameters and counts, and returns the last state."""
    # MultiSteps and the plateau mix dtypes.
    with jax.numpy_dtype_promotion("standard"):
        history = regression.train(tx, INPUTS, targets)
    assert_same_params(history, train_by_hand(update, targets))
    state = history[-1][1]
    counts = [int(count) for _, count in optax.tree.get_all_with_path(state, "num_skipped")]
    assert counts == [sum(judge.told) for judge in judges]
    assert min(counts) > 0
    return state


def test_in_a_chain_with_a_clipper_in_a_partition_inside():
    parts = {"w": Autoclip.factory(), "b": optax.identity()}
    inner = optax.chain(optax.partition(parts, {"w": "w", "b": "b"}), optax.sgd(RATE, momentum=0.9))
    clip, judge, trace = Autoclip(), Judge(), nothing(PARAMS)

    def update(grads, params, loss):
        nonlocal trace
        if judge(grads, loss):
            return nothing(grads)
        clipped = grads | clip({"w": grads["w"]}, params)
        trace = jax.tree.map(lambda old, new: 0.9 * old + new, trace, clipped)
        return jax.tree.map(lambda leaf: 0.5 * leaf, descend(trace))

    compare(optax.chain(skip_spikes(inner), optax.scale(0.5)), update, judge)
    assert set(np.flatnonzero(judge.told)) == {14, 15, 20, 25}


def test_after_a_clipper_a_loss_can_be_a_spike_but_a_norm_cannot():
    tx = optax.chain(Autoclip.factory(), skip_spikes(optax.sgd(RATE)))
    clip, judge = Autoclip(), Judge()

    def update(grads, params, loss):
        clipped = clip(grads, params) if np.isfinite(loss) else nothing(grads)
        return nothing(grads) if judge(clipped, loss) else descend(clipped)

    compare(tx, update, judge)
    by_norm, _ = reference.skipped_steps(judge.norms, size=16, warmup_steps=6)
    assert not np.any(by_norm)


def test_under_masked_only_the_leaves_in_the_mask_are_judged_and_dropped():
    masked = optax.masked(skip_spikes(optax.scale(0.5)), {"w": True, "b": False})
    judge = Judge()

    def update(grads, params, loss):
        dropped = judge({"w": grads["w"]}, loss)
        return descend(grads | {"w": (0.0 if dropped else 0.5) * grads["w"]})

    compare(optax.chain(masked, optax.sgd(RATE)), update, judge, targets=FINITE_TARGETS)


def test_inside_partition_each_part_is_judged_alone():
    rates = {"b": RATE / 2, "w": RATE}
    tx = optax.partition(
        {key: skip_spikes(optax.sgd(rate)) for key, rate in rates.items()}, {"b": "b", "w": "w"}
    )
    judges = {"b": Judge(), "w": Judge()}

    def update(grads, params, loss):
        return {
            key: -rates[key] * (0 if judge({key: grads[key]}, loss) else 1) * grads[key]
            for key, judge in judges.items()
        }

    compare(tx, update, *judges.values(), targets=FINITE_TARGETS)


def test_inside_multisteps_the_mean_gradient_is_judged():
    # Without that function, a NaN stays in the accumulated gradient: see the next test.
    tx = optax.MultiSteps(
        skip_spikes(optax.sgd(RATE)), 2, should_skip_update_fn=optax.skip_not_finite
    )
    judge, seen = Judge(), []

    def update(grads, params, loss):
        if np.isfinite(loss):
            seen.append(grads)
            if len(seen) % 2 == 0:
                mean = jax.tree.map(lambda a, b: (a + b) / 2, *seen[-2:])
                # The loss is that of the last small batch.
                return nothing(grads) if judge(mean, loss) else descend(mean)
        return nothing(grads)

    compare(tx.gradient_transformation(), update, judge)
    assert sum(judge.told) == 2


def test_multisteps_alone_never_forgets_a_nan():
    # If this fails, Optax has fixed it, and the test above does not need `skip_not_finite`.
    tx = optax.MultiSteps(skip_spikes(optax.sgd(RATE)), 2).gradient_transformation()
    with jax.numpy_dtype_promotion("standard"):
        history = regression.train(tx, INPUTS, TARGETS)
    skipped = [int(smartclip.metrics(state)["num_skipped"]) for _, state in history]
    assert skipped[-1] - skipped[19] == (36 - 20) / 2
    params, state = history[-1]
    assert np.isnan(state.acc_grads["w"]).all()
    assert_same_bits(params, history[19][0])


def test_around_multisteps_each_small_batch_is_judged_and_a_dropped_one_is_replaced():
    inner = optax.MultiSteps(optax.sgd(RATE), 2).gradient_transformation()
    judge, kept = Judge(), []

    def update(grads, params, loss):
        if judge(grads, loss):
            return nothing(grads)
        kept.append(grads)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *kept[-2:]) if len(kept) % 2 == 0 else None
        return nothing(grads) if mean is None else descend(mean)

    state = compare(skip_spikes(inner), update, judge)
    assert optax.tree.get(state, "gradient_step") == len(kept) // 2 == 16


@pytest.mark.parametrize("around", [False, True])
def test_with_apply_if_finite_in_both_orders(around):
    judge = Judge()

    def update(grads, params, loss):
        if not around and not np.isfinite(loss):
            return nothing(grads)
        return nothing(grads) if judge(grads, loss) else descend(grads)

    if around:
        tx = skip_spikes(optax.apply_if_finite(optax.sgd(RATE), 3))
    else:
        tx = optax.apply_if_finite(skip_spikes(optax.sgd(RATE)), 3)
    state = compare(tx, update, judge)
    # Inside `skip_spikes`, `apply_if_finite` sees no NaN; around it, it removes the NaN.
    assert optax.tree.get(state, "total_notfinite") == (0 if around else 1)
    assert sum(judge.told) == (4 if around else 3)


def test_inject_hyperparams_schedules_what_is_dropped():
    tx = optax.inject_hyperparams(smartclip.skip_spikes, static_args="window")(
        optax.sgd(RATE),
        # The values change before the first spike.
        sigma=lambda count: jnp.where(count < 12, 1e6, 5.0),
        max_consecutive=lambda count: jnp.where(count < 12, 32, 1),
        **OPTIONS,
    )
    judge = Judge(sigma=5.0, max_consecutive=1)
    compare(tx, lambda grads, _, loss: (nothing if judge(grads, loss) else descend)(grads), judge)
    assert judge.told.index(True) == 14
    assert not judge.told[15]
    # `inject_hyperparams` makes an array of every number that is not a static argument.
    factory = inspect.unwrap(smartclip.skip_spikes)
    with pytest.raises(ValueError, match="`window` must be a Python int"):
        optax.inject_hyperparams(factory)(optax.sgd(RATE)).init(PARAMS)


def test_the_plateau_inside_gets_the_losses_of_steps_that_are_not_dropped():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    tx = skip_spikes(optax.chain(optax.sgd(RATE), plateau))
    judge, update_plateau = Judge(), jax.jit(plateau.update)
    state = plateau.init(PARAMS)

    def update(grads, params, loss):
        nonlocal state
        if judge(grads, loss):
            return nothing(grads)
        with jax.numpy_dtype_promotion("standard"):
            _, state = update_plateau(PARAMS, state, value=np.float32(loss))
        # It scales by its new state.
        return jax.tree.map(lambda leaf: float(state.scale) * leaf, descend(grads))

    inner = compare(tx, update, judge).inner_state[1]
    assert_close(inner, state, rtol=1e-4)
    assert inner.count == state.count
    assert inner.scale < 1


def test_extra_arguments_are_passed_on_and_a_given_norm_is_used():
    def update(updates, state, params=None, *, value, grad_norm, batch):
        assert batch == "first"
        return jnp.full_like(updates, value + grad_norm), state

    tx = skip_spikes(optax.GradientTransformationExtraArgs(lambda params: (), update))
    step = jax.jit(tx.update, static_argnames="batch")
    grads, state = jnp.ones(2), tx.init(jnp.ones(2))
    norms = [1.0] * 7 + [100.0, 1.0]
    for norm in norms:
        updates, state = step(grads, state, value=3.0, grad_norm=norm, batch="first")
        np.testing.assert_array_equal(updates, 0.0 if norm == 100 else 4.0)
        assert smartclip.metrics(state)["skip_norm"] == norm


def test_only_given_arguments_are_passed_on_and_only_to_a_transformation_that_takes_them():
    given = []

    def update(updates, state, params=None, **extra_args):
        given.append(set(extra_args))
        return updates, state

    takes_all = optax.GradientTransformationExtraArgs(lambda params: (), update)
    takes_none = optax.GradientTransformation(takes_all.init, lambda u, s, p=None: update(u, s))
    for extra_args in ({}, {"value": 1.0}, {"grad_norm": 1.0}, {"batch": None}):
        for inner in (takes_all, takes_none):
            update_fn = functools.partial(skip_spikes(inner).update, **extra_args)
            jax.eval_shape(update_fn, jnp.ones(1), skip_spikes(inner).init(jnp.ones(1)))
        assert given[-2:] == [set(extra_args), set()]


# Its record.

SKIP, CLIP = smartclip.SkipMetrics._fields, smartclip.ClipMetrics._fields
NESTED = {
    "alone": (skip_spikes(optax.adam(0.1)), SKIP),
    "around a clipper": (
        skip_spikes(optax.chain(smartclip.autoclip(), optax.adam(0.1))),
        (*CLIP, *SKIP),
    ),
    "two clippers": (
        skip_spikes(optax.chain(smartclip.autoclip(), smartclip.agc())),
        (*(f"inner_state/{i}/{name}" for i in (0, 1) for name in CLIP), *SKIP),
    ),
    "two in a chain": (
        optax.chain(skip_spikes(optax.identity()), skip_spikes(smartclip.autoclip())),
        (*(f"{i}/detector/{name}" for i in (0, 1) for name in SKIP), *CLIP),
    ),
    "one in another": (
        skip_spikes(skip_spikes(optax.identity())),
        (*(f"{place}detector/{name}" for place in ("", "inner_state/") for name in SKIP),),
    ),
}


@pytest.mark.parametrize(("tx", "names"), NESTED.values(), ids=NESTED)
def test_metrics_qualify_only_names_that_occur_twice(tx, names):
    assert sorted(smartclip.metrics(tx.init(PARAMS))) == sorted(names)


def test_tree_get_finds_the_record_of_each():
    tx = skip_spikes(optax.chain(smartclip.autoclip(), lenient(optax.adam(0.1))), warmup_steps=1)
    update, state = jax.jit(tx.update), tx.init(jnp.ones(1))
    for size in (2.0, 2.0, 100.0):
        _, state = update(jnp.full(1, size), state, jnp.ones(1))
    expected = {"num_skipped": 1, "skip_norm": 100, "grad_norm": 2, "num_steps": 2, "count": 2}
    assert {name: optax.tree.get(state, name) for name in expected} == expected
    record = smartclip.metrics(state)
    assert {name: optax.tree.get(state, name) for name in record} == record


# One stream of gradients for all tests below.

SHAPES = {"b": (8,), "w": (8, 2)}
SIZES = [1.0, 1.1, 0.9] * 4 + [100.0, np.nan, 100.0, 100.0, 1.0, np.inf, 50.0, 1.1]
STREAM = [random_tree(1 + step, size, SHAPES) for step, size in enumerate(SIZES)]
NORMS = [reference.norm(grads) for grads in STREAM]
START = random_tree(0, 1.0, SHAPES)


def make_step(tx):
    def step(params, state, grads, value):
        updates, state = tx.update(grads, state, params, value=value)
        return jax.tree.map(lambda param, update: param - 0.1 * update, params, updates), state

    return step


def run(step, carry, first=0, stream=STREAM):
    """Parameters and state after each step of the stream, from the `first` on."""
    history = []
    for grads in stream[first:]:
        # Steps in flight together can starve each other of threads: devices outnumber the cores.
        carry = jax.block_until_ready(step(*carry, grads, np.float32(1)))
        history.append(carry)
    return history


def skipped_in(history):
    return np.diff([0] + [int(smartclip.metrics(state)["num_skipped"]) for _, state in history])


@functools.cache
def run_all(names):
    """The dropped steps, and updates and states of the stream with and without these steps.

    One program for all clippers takes a fraction of the time of one for each.
    """
    clippers = {name: CLIPPERS[name]() for name in names}

    def init(params):
        return {name: clipper.init(params) for name, clipper in clippers.items()}

    def update(updates, state, params=None):
        both = {name: tx.update(updates, state[name], params) for name, tx in clippers.items()}
        return {name: new for name, (new, _) in both.items()}, {
            name: new for name, (_, new) in both.items()
        }

    tx = skip_spikes(optax.GradientTransformation(init, update))
    step = jax.jit(lambda grads, state: tx.update(grads, state, START))

    def loop(stream):
        history = [(None, tx.init(START))]
        for grads in stream:
            history.append(step(grads, history[-1][1]))
        return history[1:]

    dropped, _ = reference.skipped_steps(NORMS, warmup_steps=6, size=16)
    assert list(np.flatnonzero(dropped)) == [12, 13, 14, 15, 17, 18]
    kept = [grads for grads, is_dropped in zip(STREAM, dropped, strict=True) if not is_dropped]
    return dropped, loop(STREAM), loop(kept)


@one_of_each_kind
def test_no_clipper_inside_sees_a_dropped_step(name):
    names = frozenset(KINDS if name in KINDS else set(CLIPPERS) - KINDS)
    dropped, history, shorter = run_all(names)
    np.testing.assert_array_equal(skipped_in(history), dropped)
    assert not np.any(skipped_in(shorter))
    zeros = jax.tree.map(np.zeros_like, START)
    rest = iter(shorter)
    expected_state = None
    for (updates, state), is_dropped in zip(history, dropped, strict=True):
        expected = zeros
        if not is_dropped:
            now, of_shorter = next(rest)
            expected, expected_state = now[name], of_shorter.inner_state[name]
        assert_same_bits((updates[name], state.inner_state[name]), (expected, expected_state))
    assert np.all(expected_state.last.num_steps == len(shorter))


@functools.cache
def build(**options):
    """Drops two spikes in a row, even with a NaN between them, but not the third."""
    # Not optax.adam: the tests of checkpoints register its other states with `jax.export`.
    clipper = smartclip.autoclip(50.0, history=smartclip.ring_buffer(8), **options)
    inner = optax.chain(clipper, lenient(optax.scale_by_adam()))
    return skip_spikes(inner, max_consecutive=2, **options)


@functools.cache
def uninterrupted():
    """The compiled step, its initial arguments, and a run with it."""
    tx = build()
    step = jax.jit(make_step(tx))
    start = jax.tree.map(jnp.asarray, START), tx.init(START)
    history = run(step, start)
    expected, _ = reference.skipped_steps(NORMS, size=16, warmup_steps=6, max_consecutive=2)
    np.testing.assert_array_equal(skipped_in(history), expected)
    assert list(np.flatnonzero(~expected)) == [*range(12), 15, 16, 19]
    return step, start, history


def assert_resumes(save, restore, places=range(11, 20)):
    step, start, history = uninterrupted()
    for place in places:
        restored = restore(start, save(history[place]))
        assert_same_bits(jax.tree.map(jnp.asarray, restored), history[place])
        if place in (12, 13):
            for actual, expected in zip(
                run(step, restored, place + 1), history[place + 1 :], strict=True
            ):
                assert_same_bits(actual, expected)


def test_a_run_resumed_from_flax_bytes_is_the_run_that_never_stopped():
    assert_resumes(flax.serialization.to_bytes, flax.serialization.from_bytes)
    state = skip_spikes(optax.identity(), window=8).init(START)
    with pytest.raises(ValueError, match=r"must have 'ring' of shape \(2, 8\)"):
        flax.serialization.from_state_dict(
            state, flax.serialization.to_state_dict(skip_spikes(optax.identity()).init(START))
        )


def test_a_run_resumed_from_a_pickle_is_the_run_that_never_stopped():
    assert_resumes(pickle.dumps, lambda start, saved: pickle.loads(saved))


def test_a_run_resumed_from_orbax_is_the_run_that_never_stopped(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:

        def save(what):
            checkpointer.save(tmp_path / "run", what)
            checkpointer.wait_until_finished()

        assert_resumes(save, lambda start, _: checkpointer.restore(tmp_path / "run", start), [12])


def test_an_exported_step_is_the_compiled_one():
    step, start, history = uninterrupted()
    # A class can be registered only once in a process.
    with contextlib.suppress(ValueError):
        jax.export.register_namedtuple_serialization(
            optax.ScaleByAdamState, serialized_name="optax.ScaleByAdamState"
        )
    exported = jax.export.export(step)(*start, STREAM[0], np.float32(1))
    call = jax.export.deserialize(exported.serialize()).call
    for actual, expected in zip(run(jax.jit(call), history[11], 12), history[12:], strict=True):
        assert_same_bits(actual, expected)


def test_a_running_optimizer_can_be_wrapped_and_unwrapped():
    def adamw():
        return lenient(optax.adamw(optax.linear_schedule(0.1, 0, 20)))

    bare, wrapped = adamw(), skip_spikes(adamw())
    steps = {tx: jax.jit(make_step(optax.with_extra_args_support(tx))) for tx in (bare, wrapped)}
    (params, saved) = run(steps[bare], (START, bare.init(START)), stream=STREAM[:6])[-1]
    state = smartclip.graft(saved, wrapped.init(START))
    assert_same_bits(state.inner_state, saved)
    history = run(steps[wrapped], (params, state), stream=STREAM[:14])
    # After six steps of warm-up, it drops the spike and the NaN.
    assert list(np.flatnonzero(skipped_in(history))) == [12, 13]
    expected = run(steps[bare], (params, saved), stream=STREAM[:12])
    assert_close(history[-1][1].inner_state, expected[-1][1], rtol=1e-5, atol=1e-7)
    counts = optax.tree.get_all_with_path(history[-1][1], "count")
    assert {int(count) for _, count in counts} == {6 + 12}
    given_up = smartclip.graft(history[-1][1], bare.init(START))
    assert_same_bits(given_up, history[-1][1].inner_state)
    # The detector keeps its state when a clipper is put before the inner optimizer.
    other = skip_spikes(optax.chain(smartclip.autoclip(), adamw())).init(START)
    assert_same_bits(smartclip.graft(history[-1][1], other).detector, history[-1][1].detector)


# Meshes.

SPECS = {"b": P("x"), "w": P("x", None)}


def mesh_of(mode):
    return jax.make_mesh((8,), ("x",), axis_types=(mode,))


def assert_equal_to_one_device(history):
    *_, expected = uninterrupted()
    np.testing.assert_array_equal(skipped_in(history), skipped_in(expected))
    # Another program on eight devices sums in another order.
    for actual, alone in zip(history, expected, strict=True):
        assert_close(actual, alone, rtol=1e-5, atol=1e-6)


def test_fsdp_on_explicit_axes_equals_one_device_and_keeps_all_shardings():
    tx, mesh = build(), mesh_of(AxisType.Explicit)
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)

    def place(tree):
        return jax.device_put(tree, placed)

    with jax.set_mesh(mesh):
        step = jax.jit(make_step(tx), donate_argnums=(0, 1))
        start = place(START), tx.init(place(START))
        types = jax.tree.map(jax.typeof, start)
        history, carry = [], start
        for grads in STREAM:
            carry = jax.block_until_ready(step(*carry, place(grads), np.float32(1)))
            # Copied, because the next step reuses the buffers.
            history.append(jax.tree.map(jnp.copy, carry))
    assert_equal_to_one_device(history)
    assert jax.tree.map(jax.typeof, carry) == types
    assert step._cache_size() == 1
    params, state = carry
    for tree in (params, optax.tree.get(state, "mu"), optax.tree.get(state, "nu")):
        for leaf, sharding in zip(*map(jax.tree.leaves, (tree, placed)), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.detector))


def test_shard_map_with_axis_name_equals_one_device():
    tx, mesh = build(axis_name="x"), mesh_of(AxisType.Auto)
    of_state = optax.tree.map_params(
        tx, lambda _, spec: spec, tx.init(START), SPECS, transform_non_params=lambda _: P()
    )
    step = jax.shard_map(
        make_step(tx),
        mesh=mesh,
        in_specs=(SPECS, of_state, SPECS, P()),
        out_specs=(SPECS, of_state),
        check_vma=True,
    )
    assert_equal_to_one_device(run(jax.jit(step), (START, tx.init(START))))
