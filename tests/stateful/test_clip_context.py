"""Inside a `clip_context`, the optimizer's own `update` clips; after it, it does not.

A plain loop gives the expected updates: NumPy clips the gradient before the optimizer's step.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import types
import unittest.mock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from flax.training import train_state
from trees import assert_close

import optax_smartclip as smartclip

PARAMS = {"bias": np.full(4, 0.5, np.float32), "kernel": np.ones((3, 4), np.float32)}
SIZES = [0.1, 0.2, 0.15, 50.0, 0.1, 0.3]
PERCENTILE, WINDOW, LEARNING_RATE = 50.0, 5, 0.5
CLIPPING, LOOSE_CLIPPING = 0.1, 0.5


def gradient(seed, size):
    rng = np.random.default_rng(seed)
    return {name: np.float32(size * rng.normal(size=x.shape)) for name, x in PARAMS.items()}


GRADS = [gradient(1 + step, size) for step, size in enumerate(SIZES)]


def percentile_clipper():
    return smartclip.AutoClip(
        mode="percentile",
        percentile=PERCENTILE,
        history="window",
        window_size=WINDOW,
        warmup_steps=2,
        min_history=0,
    )


def agc_clipper(clipping):
    return smartclip.AGC(clipping=clipping, scope="global", exclude_bias_bn=False)


# They have no history, so tests can share them and their compiled operations.
AGC, LOOSE_AGC = agc_clipper(CLIPPING), agc_clipper(LOOSE_CLIPPING)


def scaled(grads, scale):
    return jax.tree.map(lambda x: np.float32(scale) * x, grads)


def clip_by_percentile(grads):
    norms = [reference.norm(tree) for tree in grads]
    limits = reference.percentile_thresholds(norms, PERCENTILE, WINDOW)
    scales = [min(1, limit / norm) for norm, limit in zip(norms, limits, strict=True)]
    # In warm-up, the only norm is the median.
    assert min(scales) < 0.5
    return [scaled(tree, scale) for tree, scale in zip(grads, scales, strict=True)]


def clip_by_weights(grads, clipping=CLIPPING):
    limit = clipping * reference.norm(PARAMS)
    scales = [min(1, limit / reference.norm(tree)) for tree in grads]
    assert min(scales) < 0.1
    return [scaled(tree, scale) for tree, scale in zip(grads, scales, strict=True)]


BY_PERCENTILE, BY_WEIGHTS = clip_by_percentile(GRADS), clip_by_weights(GRADS)
LOOSELY = clip_by_weights(GRADS, LOOSE_CLIPPING)


def sgd_updates(grads):
    return [scaled(tree, -LEARNING_RATE) for tree in grads]


def loop(tx, grads=GRADS, update=None, **extra_args):
    """The updates of all steps."""
    state, updates = tx.init(PARAMS), []
    for tree in grads:
        update_now, state = (update or tx.update)(tree, state, PARAMS, **extra_args)
        updates.append(update_now)
    return updates


class Plain:
    """An optimizer of the user."""

    def init(self, params):
        return ()

    def update(self, updates, state, params=None):
        return scaled(updates, -LEARNING_RATE), state


class WithFields:
    """The functions are attributes of the object."""

    def __init__(self):
        self.init, self.update = optax.sgd(LEARNING_RATE)


class WithSlots:
    """The object has the functions and no `__dict__`."""

    __slots__ = ("init", "update")

    def __init__(self):
        self.init, self.update = optax.sgd(LEARNING_RATE)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """No attribute can be set."""

    learning_rate: float = LEARNING_RATE

    def init(self, params):
        return ()

    def update(self, updates, state, params=None):
        return scaled(updates, -self.learning_rate), state


class Transformation(NamedTuple):
    """Looks like a transformation of Optax."""

    init: Any
    update: Any


OPTAX = {
    "sgd": lambda: optax.sgd(LEARNING_RATE),
    "chain": lambda: optax.chain(optax.identity(), optax.sgd(LEARNING_RATE)),
}
OBJECTS = {
    **OPTAX,
    "GradientTransformation": lambda: optax.GradientTransformation(*optax.sgd(LEARNING_RATE)),
    "named tuple": lambda: Transformation(*optax.sgd(LEARNING_RATE)),
    "class": Plain,
    "fields": WithFields,
    "slots": WithSlots,
    "frozen dataclass": Frozen,
}
every_object = pytest.mark.parametrize("name", OBJECTS)


@every_object
def test_the_update_of_the_object_itself_clips_inside_the_block_and_not_after_it(name):
    tx = OBJECTS[name]()
    with smartclip.clip_context(None, optimizer=tx, clipper=AGC):
        within = loop(tx)
    assert_close(within, sgd_updates(BY_WEIGHTS), rtol=1e-5)
    assert_close(loop(tx), sgd_updates(GRADS), rtol=1e-5)


@every_object
def test_after_the_block_the_object_is_unchanged(name):
    tx = OBJECTS[name]()
    kind, update = type(tx), tx.update
    with smartclip.clip_context(None, optimizer=tx, clipper=AGC):
        assert isinstance(tx, kind)
        assert type(tx).__name__ == kind.__name__
        assert tx.update != update
        loop(tx, GRADS[:1])
    assert type(tx) is kind
    assert tx.update == update


@every_object
def test_the_yielded_transformation_clips_inside_and_after_the_block(name):
    tx, clipper = OBJECTS[name](), percentile_clipper()
    with smartclip.clip_context(None, optimizer=tx, clipper=clipper) as wrapped:
        assert isinstance(wrapped, optax.GradientTransformationExtraArgs)
        within = loop(wrapped, GRADS[:3])
    after = loop(wrapped, GRADS[3:])
    assert_close(within + after, sgd_updates(BY_PERCENTILE), rtol=1e-5)
    assert clipper.num_steps == len(GRADS)


def test_a_transformation_remains_a_tuple_in_the_block_and_after_it():
    tx = optax.sgd(LEARNING_RATE)
    init, update = tx
    assert tx.update is update
    with smartclip.clip_context(None, optimizer=tx, clipper=AGC):
        first, second = tx
        assert (first, second) == (init, update)
        assert tuple(tx) == (init, update)
        assert isinstance(tx, optax.GradientTransformation)
        assert tx.init is init
        updates = loop(tx)
    assert_close(updates, sgd_updates(BY_WEIGHTS), rtol=1e-5)
    assert tuple(tx) == (init, update)
    assert tx.update is update
    assert type(tx) is optax.GradientTransformationExtraArgs


def test_the_clipper_is_an_autoclip_of_the_block_by_default():
    norms = np.float32(np.random.default_rng(0).lognormal(0, 0.1, size=104))
    norms[[50, 102]] = 100
    limits = reference.lower_fence_thresholds(norms, warmup_steps=99)
    expected = -LEARNING_RATE * reference.clip(norms, limits)
    assert expected[50] == -LEARNING_RATE * 100
    assert expected[102] > -LEARNING_RATE * 10
    tx = optax.sgd(LEARNING_RATE)
    for _ in range(2):
        with smartclip.clip_context(None, tx):
            step = jax.jit(lambda x: tx.update(x, tx.init(x))[0])
            updates = [step(norm[None]) for norm in norms]
        np.testing.assert_allclose(np.concatenate(updates), expected, rtol=1e-5)


def test_agc_is_given_the_parameters_and_on_metrics_the_records():
    tx, records = optax.sgd(LEARNING_RATE), []
    with smartclip.clip_context(None, tx, AGC, on_metrics=records.append):
        updates = loop(tx)
    assert_close(updates, sgd_updates(BY_WEIGHTS), rtol=1e-5)
    norms = [reference.norm(tree) for tree in GRADS]
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-6)
    weight_norm = reference.norm(PARAMS)
    assert [record["weight_norm"] for record in records] == pytest.approx([weight_norm] * 6)


def test_agc_without_the_parameters_is_an_error():
    tx = optax.sgd(LEARNING_RATE)
    with (
        pytest.raises(ValueError, match="param"),
        smartclip.clip_context(None, tx, AGC),
    ):
        tx.update(GRADS[0], tx.init(PARAMS))


@pytest.mark.parametrize("own", [False, True], ids=["yielded", "itself"])
def test_extra_arguments_reach_the_optimizer(own):
    def update(updates, state, params=None, *, value, **extra_args):
        del params, extra_args
        return scaled(updates, value), state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = optax.chain(optax.identity(), tx)
    with smartclip.clip_context(None, tx, AGC) as wrapped:
        updates = loop(tx if own else wrapped, value=-3.0, unknown="something")
    assert_close(updates, [scaled(tree, -3.0) for tree in BY_WEIGHTS], rtol=1e-5)


def test_each_gradient_that_multi_steps_accumulates_is_clipped():
    tx = optax.MultiSteps(optax.sgd(LEARNING_RATE), every_k_schedule=2)
    with (
        jax.numpy_dtype_promotion("standard"),  # MultiSteps divides by an int.
        smartclip.clip_context(None, tx, percentile_clipper()),
    ):
        updates = loop(tx, update=jax.jit(lambda *arguments: tx.update(*arguments)))
    for first in (0, 2, 4):
        assert not any(np.any(x) for x in updates[first].values())
        mean = jax.tree.map(lambda a, b: (a + b) / np.float32(2), *BY_PERCENTILE[first : first + 2])
        assert_close(updates[first + 1], scaled(mean, -LEARNING_RATE), rtol=1e-5)
    assert type(tx) is optax.MultiSteps
    assert "update" not in vars(tx)


# Objects after errors, and nested blocks.


def test_an_exception_leaves_the_block_unchanged_and_restores_the_object():
    tx = optax.sgd(LEARNING_RATE)
    update, complaint = tx.update, KeyError("mine")
    with (
        pytest.raises(KeyError) as caught,
        smartclip.clip_context(None, tx, AGC),
    ):
        raise complaint
    assert caught.value is complaint
    assert complaint.__context__ is None
    assert complaint.__cause__ is None
    assert type(tx) is optax.GradientTransformationExtraArgs
    assert tx.update is update


def test_an_exception_of_the_optimizer_is_not_changed():
    def update(updates, state, params=None):
        raise FloatingPointError("of the optimizer")

    tx = optax.GradientTransformation(lambda params: (), update)
    with (
        pytest.raises(FloatingPointError, match="of the optimizer"),
        smartclip.clip_context(None, tx, percentile_clipper()),
    ):
        loop(tx)
    assert tx.update is update


def test_of_two_blocks_with_one_object_the_inner_one_clips_first():
    tx = optax.sgd(LEARNING_RATE)
    outer, inner = [], []
    with (
        smartclip.clip_context(None, tx, percentile_clipper(), on_metrics=outer.append),
        smartclip.clip_context(None, tx, LOOSE_AGC, on_metrics=inner.append),
    ):
        updates = loop(tx, update=jax.jit(lambda *arguments: tx.update(*arguments)))
        jax.effects_barrier()
    assert_close(updates, sgd_updates(clip_by_percentile(LOOSELY)), rtol=1e-5)
    for records, given in ((inner, GRADS), (outer, LOOSELY)):
        norms = [reference.norm(tree) for tree in given]
        assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-5)
        assert records[3]["clipped"]
    assert_close(loop(tx), sgd_updates(GRADS), rtol=1e-5)


def test_after_the_inner_block_the_outer_one_clips_again():
    tx = optax.sgd(LEARNING_RATE)
    with smartclip.clip_context(None, tx, LOOSE_AGC):
        with smartclip.clip_context(None, tx, AGC):
            within = loop(tx)
        after = loop(tx)
    assert_close(within, sgd_updates(BY_WEIGHTS), rtol=1e-5)
    assert_close(after, sgd_updates(LOOSELY), rtol=1e-5)


@pytest.mark.parametrize("first_left", ["inner", "outer"])
def test_blocks_may_be_left_in_any_order(first_left):
    tx = optax.sgd(LEARNING_RATE)
    update = tx.update
    clippers = {"outer": LOOSE_AGC, "inner": AGC}
    clipped = {"outer": LOOSELY, "inner": BY_WEIGHTS}
    steps_before = {name: clipper.num_steps or 0 for name, clipper in clippers.items()}
    stacks = {name: contextlib.ExitStack() for name in clippers}
    for name, clipper in clippers.items():
        stacks[name].enter_context(smartclip.clip_context(None, tx, clipper))
    assert_close(loop(tx), sgd_updates(BY_WEIGHTS), rtol=1e-5)
    remaining = {"inner": "outer", "outer": "inner"}[first_left]
    stacks[first_left].close()
    assert_close(loop(tx), sgd_updates(clipped[remaining]), rtol=1e-5)
    assert clippers[first_left].num_steps - steps_before[first_left] == len(GRADS)
    assert clippers[remaining].num_steps - steps_before[remaining] == 2 * len(GRADS)
    stacks[remaining].close()
    assert type(tx) is optax.GradientTransformationExtraArgs
    assert tx.update is update


def test_blocks_of_different_objects_are_independent():
    first, second, third = (optax.sgd(LEARNING_RATE) for _ in range(3))
    with (
        smartclip.clip_context(None, first, LOOSE_AGC),
        smartclip.clip_context(None, second, AGC),
    ):
        updates = [loop(tx) for tx in (first, second, third)]
    expected = LOOSELY, BY_WEIGHTS, GRADS
    assert_close(updates, [sgd_updates(grads) for grads in expected], rtol=1e-5)


def test_many_blocks_leave_no_classes_behind():
    tx = optax.sgd(LEARNING_RATE)
    update, kind = tx.update, type(tx)

    def num_subclasses():
        # Classes refer to themselves.
        gc.collect()
        return len(kind.__subclasses__())

    before, steps_before, unused_clipper = num_subclasses(), AGC.num_steps or 0, smartclip.AGC()
    for number in range(100):
        fails = number % 10 > 0
        with (
            contextlib.suppress(KeyError),
            smartclip.clip_context(None, tx, unused_clipper if fails else AGC),
        ):
            if fails:
                raise KeyError
            loop(tx, GRADS[:1])
    assert type(tx) is kind
    assert tx.update is update
    assert num_subclasses() == before
    assert AGC.num_steps - steps_before == 10


# Compiled steps.

unused = pytest.raises(RuntimeError, match="Nothing was clipped within this clip_context")


def compile_step(tx):
    return jax.jit(lambda grads: tx.update(grads, tx.init(PARAMS), PARAMS)[0])


def test_a_block_that_never_clips_is_an_error():
    tx = optax.sgd(LEARNING_RATE)
    with unused, smartclip.clip_context(None, tx, percentile_clipper()):
        tx.init(PARAMS)
    assert type(tx) is optax.GradientTransformationExtraArgs


def test_a_step_compiled_before_the_block_does_not_clip_and_is_an_error():
    tx = optax.sgd(LEARNING_RATE)
    step = compile_step(tx)
    step(GRADS[0])
    clipper = percentile_clipper()
    with unused, smartclip.clip_context(None, tx, clipper):
        updates = [step(grads) for grads in GRADS]
    assert_close(updates, sgd_updates(GRADS), rtol=1e-5)
    assert clipper.num_steps == 0


def test_a_step_compiled_in_the_block_clips_each_time_that_it_runs():
    tx, clipper = optax.sgd(LEARNING_RATE), percentile_clipper()
    with smartclip.clip_context(None, tx, clipper):
        step = compile_step(tx)
        updates = [step(grads) for grads in GRADS]
    assert step._cache_size() == 1
    assert_close(updates, sgd_updates(BY_PERCENTILE), rtol=1e-5)
    assert clipper.num_steps == len(GRADS)


def test_a_step_compiled_in_an_earlier_block_clips_in_a_later_one_with_the_same_clipper():
    tx, clipper = optax.sgd(LEARNING_RATE), percentile_clipper()
    step = compile_step(tx)
    updates = []
    for grads in (GRADS[:2], GRADS[2:]):
        with smartclip.clip_context(None, tx, clipper):
            updates += [step(tree) for tree in grads]
    assert step._cache_size() == 1
    assert_close(updates, sgd_updates(BY_PERCENTILE), rtol=1e-5)


def test_a_step_compiled_with_the_yielded_transformation_clips_after_the_block_too():
    tx, clipper = optax.sgd(LEARNING_RATE), percentile_clipper()
    with smartclip.clip_context(None, tx, clipper) as wrapped:
        step = compile_step(wrapped)
        updates = [step(tree) for tree in GRADS[:2]]
    updates += [step(tree) for tree in GRADS[2:]]
    assert_close(updates, sgd_updates(BY_PERCENTILE), rtol=1e-5)


def test_the_block_can_be_inside_the_compiled_step():
    tx, clipper = optax.sgd(LEARNING_RATE), percentile_clipper()

    @jax.jit
    def step(grads):
        with smartclip.clip_context(None, tx, clipper):
            return tx.update(grads, tx.init(PARAMS), PARAMS)[0]

    assert_close([step(grads) for grads in GRADS], sgd_updates(BY_PERCENTILE), rtol=1e-5)
    assert type(tx) is optax.GradientTransformationExtraArgs


def test_a_scan_in_the_block_clips():
    tx = optax.sgd(LEARNING_RATE)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *GRADS)

    def step(state, grads):
        updates, state = tx.update(grads, state, PARAMS)
        return state, updates

    with smartclip.clip_context(None, tx, percentile_clipper()):
        _, updates = jax.lax.scan(step, tx.init(PARAMS), stacked)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *sgd_updates(BY_PERCENTILE))
    assert_close(updates, expected, rtol=1e-5)


# Flax.

rng = np.random.default_rng(7)
INPUTS = np.float32(rng.normal(size=(6, 5, 3)))
TARGETS = np.float32(rng.normal(size=(6, 5, 4)))
TARGETS[3] *= 100


def loss(params, inputs, targets):
    return jnp.mean(jnp.square(inputs @ params["kernel"] + params["bias"][None] - targets))


@functools.cache
def train_by_hand():
    """The parameters after each step, with gradients clipped by hand."""
    derive = jax.jit(jax.grad(loss))
    params, stream, history = PARAMS, [], []
    for batch in zip(INPUTS, TARGETS, strict=True):
        stream.append(jax.tree.map(np.asarray, derive(params, *batch)))
        norms = [reference.norm(grads) for grads in stream]
        limit = reference.percentile_thresholds(norms, PERCENTILE, WINDOW)[-1]
        scale = min(1, limit / norms[-1])
        update = scaled(stream[-1], -0.1 * scale)
        params = jax.tree.map(np.add, params, update)
        history.append((params, scale))
    assert min(scale for _, scale in history) < 0.1
    return [params for params, _ in history]


def test_a_flax_train_state_applies_clipped_gradients():
    state = train_state.TrainState.create(
        apply_fn=None, params=jax.tree.map(jnp.array, PARAMS), tx=optax.sgd(0.1)
    )

    @jax.jit
    def train_step(state, *batch):
        return state.apply_gradients(grads=jax.grad(loss)(state.params, *batch))

    history = []
    with smartclip.clip_context(None, optimizer=state.tx, clipper=percentile_clipper()):
        for batch in zip(INPUTS, TARGETS, strict=True):
            state = train_step(state, *batch)
            history.append(state.params)
    assert_close(history, train_by_hand(), rtol=1e-5)
    assert type(state.tx) is optax.GradientTransformationExtraArgs


def test_an_nnx_optimizer_updates_with_clipped_gradients():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    model.bias[...], model.kernel[...] = PARAMS["bias"], PARAMS["kernel"]
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    update = optimizer.tx.update

    @nnx.jit
    def train_step(model, optimizer, inputs, targets):
        grads = nnx.grad(lambda model: jnp.mean(jnp.square(model(inputs) - targets)))(model)
        optimizer.update(model, grads)

    history = []
    with smartclip.clip_context(model, optimizer=optimizer.tx, clipper=percentile_clipper()):
        for batch in zip(INPUTS, TARGETS, strict=True):
            train_step(model, optimizer, *batch)
            history.append({"bias": np.array(model.bias), "kernel": np.array(model.kernel)})
    assert_close(history, train_by_hand(), rtol=1e-5)
    # Some versions of Flax put a copy into the optimizer, so its class may differ.
    assert optimizer.tx.update is update


# Objects that are not optimizers.


def without_update():
    return types.SimpleNamespace(init=lambda params: ())


def nnx_optimizer():
    return nnx.Optimizer(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1), wrt=nnx.Param)


@pytest.mark.parametrize(
    "make",
    [without_update, nnx_optimizer, lambda: None, lambda: (1, 2), lambda: collections.Counter()],
    ids=["without update", "nnx.Optimizer", "None", "tuple", "Counter"],
)
def test_an_object_without_init_and_update_is_refused(make):
    with (
        pytest.raises(
            TypeError, match=r"(?s)`optimizer` must be .* with `init` and `update`.*`tx`"
        ),
        smartclip.clip_context(None, optimizer=make()),
    ):
        pytest.fail("the block was entered")


def namespace():
    init, update = optax.sgd(0.1)
    return types.SimpleNamespace(init=init, update=update)


def class_itself():
    return type("Optimizer", (), dict(zip(("init", "update"), optax.sgd(0.1), strict=True)))


def final():
    class Final(Plain):
        def __init_subclass__(cls):
            raise TypeError("this class is final")

    return Final()


@pytest.mark.parametrize("make", [namespace, class_itself, final, unittest.mock.MagicMock])
def test_an_object_whose_class_cannot_be_exchanged_is_refused_and_unchanged(make):
    optimizer = make()
    kind, update = type(optimizer), optimizer.update
    with (
        pytest.raises(TypeError, match=r"`optimizer` must be .* class can be exchanged.*autoclip"),
        smartclip.clip_context(None, optimizer=optimizer),
    ):
        pytest.fail("the block was entered")
    assert type(optimizer) is kind
    assert optimizer.update == update
