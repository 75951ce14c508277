"""On eight devices every clipper gives the results of one device, however the gradient is sharded.

First `jit` on meshes with explicit and with automatic axes, then `shard_map` and `pmap` with
`axis_name`. Then whole training steps in the usual layouts, and the messages between the devices in
the compiled programs.
"""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from breadth import KINDS, each_value, long_but, one_of_each_kind
from clipper_table import CLIPPERS, scope_of
from compat import lenient
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import assert_close, random_tree

import optax_smartclip as smartclip

MODES = [AxisType.Explicit, AxisType.Auto]
modes = pytest.mark.parametrize("mode", MODES)
# In one scope, norms are summed alike.
ONE_OF_EACH_SCOPE = {scope_of(name): name for name in sorted(KINDS, reverse=True)}.values()
each_scope = pytest.mark.parametrize("name", long_but(set(ONE_OF_EACH_SCOPE), CLIPPERS))

SHAPES = {"bias": (8,), "body": {"kernel": (16, 8)}}
# As under FSDP: each leaf is split along one of its axes.
FSDP = {"bias": P("x"), "body": {"kernel": P(None, "x")}}
# Split along the inputs, which is within the units of AGC.
SPLIT = {"bias": P("x"), "body": {"kernel": P("x", None)}}
ROUNDING = {"rtol": 1e-6, "atol": 1e-37}


PARAMS = random_tree(0, 1.0, SHAPES)
# Ordinary norms, a spike, norms whose squares overflow and underflow, and a NaN.
SIZES = [0.1, 0.2, 0.15] * 4 + [100.0, 1e30, 1e-30, 0.1, np.nan, 0.2]
GRADS = [random_tree(1 + step, size, SHAPES) for step, size in enumerate(SIZES)]


def loop(update, state, place=lambda tree: tree):
    """The updates of all steps, and the last state."""
    params = place(PARAMS)
    updates = []
    for grads in GRADS:
        # Steps in flight together can starve each other of threads: devices outnumber the cores.
        update_now, state = jax.block_until_ready(update(place(grads), state, params))
        updates.append(update_now)
    return updates, state


@functools.cache
def alone(name):
    """The updates and the last state on one device."""
    tx = CLIPPERS[name]()
    return loop(jax.jit(tx.update), tx.init(PARAMS))


def make_mesh(mode, *sizes):
    return jax.make_mesh(sizes, ("x", "y")[: len(sizes)], axis_types=(mode,) * len(sizes))


def place_on(mesh, specs):
    return lambda tree: jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


# A step reads only the counts of the last record. `jit` drops the other fields, so they are not
# donated.
UNREAD = {"grad_norm", "clip_threshold", "clip_scale", "clipped"}


def names_of_kept(tree):
    """The names of the arrays that were not donated."""
    return {
        jax.tree_util.keystr(path[-1:], simple=True)
        for path, leaf in jax.tree.leaves_with_path(tree)
        if not leaf.is_deleted()
    }


def check_jit(name, mode):
    tx = CLIPPERS[name]()
    mesh = make_mesh(mode, 8)
    place = place_on(mesh, FSDP)
    with jax.set_mesh(mesh):
        # Gradient and state are donated; a buffer that could not be reused would be a warning.
        update = jax.jit(tx.update, donate_argnums=(0, 1))
        given = place(GRADS[0]), tx.init(place(PARAMS))
        update(*given, place(PARAMS))
        assert names_of_kept(given) <= UNREAD
        updates, state = loop(update, tx.init(place(PARAMS)), place)
        assert update._cache_size() == 1
    assert_close((updates, state), alone(name), **ROUNDING)
    for leaf, spec in zip(jax.tree.leaves(updates[-1]), jax.tree.leaves(FSDP), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    # The stream has steps that clip and a step that is not finite.
    counts = jax.tree.map(np.max, (state.last.num_clipped, state.last.num_nonfinite))
    assert counts[0] >= 2
    # Units of AGC also count the step of 1e30 as not finite.
    assert counts[1] == (2 if name == "agc" else 1)


@each_scope
def test_fsdp_on_explicit_axes_equals_one_device(name):
    check_jit(name, AxisType.Explicit)


@pytest.mark.parametrize("name", long_but({"autoclip"}, ["autoclip", "agc"]))
def test_fsdp_on_automatic_axes_equals_one_device(name):
    check_jit(name, AxisType.Auto)


def test_eager_steps_run_on_explicit_axes():
    # The simplest rule, because eager JAX compiles each operation on its own.
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


def clip_units(grad, param, clipping=0.01):
    """Clips each unit to a fraction of the norm of its weights, by hand."""
    axes = {1: (0,), 3: (0,)}.get(grad.ndim, tuple(range(grad.ndim - 1)))
    norm, weight_norm = (
        np.sqrt(np.sum(np.float64(x) ** 2, axis=axes, keepdims=True)) for x in (grad, param)
    )
    return grad * np.minimum(1, clipping * weight_norm / norm)


@modes
def test_units_are_right_under_any_sharding_of_the_weights(mode):
    shapes = {name: shape for name, (shape, _) in RANKS.items()}
    specs = {name: spec for name, (_, spec) in RANKS.items()}
    params, grads = random_tree(0, 1.0, shapes), random_tree(1, 0.015, shapes)
    expected = jax.tree.map(lambda *leaf: np.float32(clip_units(*leaf)), grads, params)
    assert all(np.any(expected[name] != grads[name]) for name in RANKS)
    tx = smartclip.agc(0.01)
    mesh = make_mesh(mode, 4, 2)
    place = place_on(mesh, specs)
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(tx.update)(place(grads), tx.init(params), place(params))
    assert_close(updates, expected, **ROUNDING)
    for name, update in updates.items():
        assert update.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), update.ndim)


def test_optax_refuses_explicit_axes_where_agc_does_not():
    # If this fails, Optax has fixed it, and the documentation needs an update.
    tx = optax.adaptive_grad_clip(0.01)
    mesh = make_mesh(AxisType.Explicit, 8)
    place = place_on(mesh, FSDP)
    with jax.set_mesh(mesh), pytest.raises(Exception, match="sharding"):
        jax.eval_shape(tx.update, place(PARAMS), tx.init(PARAMS), place(PARAMS))


def shard_map(update, mesh, spec):
    return jax.shard_map(
        update, mesh=mesh, in_specs=(spec, P(), spec), out_specs=(spec, P()), check_vma=True
    )


@each_scope
def test_shard_map_with_axis_name_equals_one_device(name):
    tx = CLIPPERS[name](axis_name="x")
    update = jax.jit(shard_map(tx.update, make_mesh(AxisType.Auto, 8), SPLIT))
    assert_close(loop(update, tx.init(PARAMS)), alone(name), **ROUNDING)


def test_a_unit_of_agc_spans_all_shards_even_if_each_is_a_single_row():
    params, grads = (random_tree(seed, 1.0, {"kernel": (8, 4)}) for seed in range(2))
    tx = smartclip.agc(0.1, axis_name="x")
    update = jax.jit(shard_map(tx.update, make_mesh(AxisType.Auto, 8), P("x", None)))
    updates, _ = update(grads, tx.init(params), params)
    norms, weight_norms = (np.linalg.norm(tree["kernel"], axis=0) for tree in (grads, params))
    scale = np.minimum(1, 0.1 * weight_norms / norms)
    np.testing.assert_allclose(updates["kernel"], scale[None] * grads["kernel"], rtol=1e-6)


def test_shard_map_needs_no_axis_name_where_each_device_has_the_whole_gradient():
    name = "autoclip"
    tx = CLIPPERS[name]()
    update = jax.jit(shard_map(tx.update, make_mesh(AxisType.Auto, 8), P()))
    assert_close(loop(update, tx.init(PARAMS)), alone(name), **ROUNDING)


def test_shard_map_refuses_a_split_gradient_without_axis_name():
    tx = smartclip.autoclip()
    update = shard_map(tx.update, make_mesh(AxisType.Auto, 8), SPLIT)
    with pytest.raises(ValueError, match="replicated"):
        jax.eval_shape(update, PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "name", long_but({"autoclip"}, ["autoclip", "autoclip_p95_per_param", "agc"])
)
def test_each_device_of_a_shard_map_may_clip_its_own_gradient(name):
    tx = CLIPPERS[name](max_norm=1.0)
    params = {"w": np.full(3, 100.0, np.float32), "b": np.full(2, 100.0, np.float32)}
    sizes = np.float32([0.1, 1.0, 2.0, 50.0])
    grads = jax.tree.map(lambda leaf: np.multiply.outer(sizes, leaf / 100), params)
    states = jax.tree.map(lambda leaf: np.stack([leaf] * 4), tx.init(params))

    def of_one(grads, state):
        updates, state = tx.update(*jax.tree.map(lambda leaf: leaf[0], (grads, state)), params)
        return jax.tree.map(lambda leaf: leaf[None], (updates, state))

    alone = jax.jit(tx.update)
    mesh = make_mesh(AxisType.Auto, 4)
    update = jax.jit(jax.shard_map(of_one, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    updates, _ = jax.block_until_ready(update(grads, states))
    for place in range(4):
        expected, _ = alone(
            jax.tree.map(lambda leaf, place=place: leaf[place], grads), tx.init(params), params
        )
        got = jax.tree.map(lambda leaf, place=place: np.asarray(leaf)[place], updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


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
    name = "autoclip"
    tx = CLIPPERS[name](axis_name="devices")

    def split(tree):
        return jax.tree.map(lambda leaf: leaf.reshape(8, leaf.shape[0] // 8, *leaf.shape[1:]), tree)

    state = jax.tree.map(lambda leaf: np.stack([leaf] * 8), tx.init(PARAMS))
    updates, state = loop(jax.pmap(tx.update, axis_name="devices"), state, split)
    expected_updates, expected_state = alone(name)
    assert_close(updates, [split(tree) for tree in expected_updates], **ROUNDING)
    assert_close(state, jax.tree.map(lambda leaf: np.stack([leaf] * 8), expected_state), **ROUNDING)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


@one_of_each_kind
def test_states_keep_their_sharding_type_from_init_to_update(name):
    tx = CLIPPERS[name]()
    mesh = make_mesh(AxisType.Explicit, 8)
    params = place_on(mesh, FSDP)(PARAMS)
    after = []

    def update(state):
        after.append(types(tx.update(params, state, params)[1]))

    with jax.set_mesh(mesh):
        eager, compiled = tx.init(params), jax.jit(tx.init)(params)
        jax.eval_shape(update, eager)
    assert types(eager) == types(compiled) == after[0]
    for leaf in jax.tree.leaves((eager, compiled)):
        assert len(leaf.sharding.device_set) == 8
        assert leaf.sharding.is_fully_replicated


# Training steps.


class Layout(NamedTuple):
    """The mesh and the specs of the stored weights, of the weights in use, and of the batch."""

    mesh: tuple[int, ...]
    kept: Any
    used: Any
    batch: P


def specs(up, bias, down):
    return {"up": {"bias": bias, "kernel": up}, "down": {"kernel": down}}


REPLICATED = specs(P(), P(), P())
COLUMN_THEN_ROW = {axis: specs(P(None, axis), P(axis), P(axis)) for axis in ("x", "y")}
SPLIT_MODEL = specs(P("x"), P("x"), P(None, "x"))
LAYOUTS = {
    "data parallel": Layout((8,), REPLICATED, REPLICATED, P("x")),
    "FSDP": Layout((8,), SPLIT_MODEL, REPLICATED, P("x")),
    "tensor parallel": Layout((8,), COLUMN_THEN_ROW["x"], COLUMN_THEN_ROW["x"], P()),
    "FSDP x tensor parallel": Layout(
        (4, 2), specs(P("x", "y"), P(("x", "y")), P("y", "x")), COLUMN_THEN_ROW["y"], P("x")
    ),
}
MODEL = random_tree(0, 0.3, specs((8, 16), (16,), (16, 8)))
INPUTS, TARGETS = (
    np.float32(np.random.default_rng(seed).normal(size=(14, 16, 8))) for seed in (1, 2)
)
TARGETS[11] *= 100
WINDOW, PERCENTILE, CLIPPING = 5, 70.0, 0.1


def loss(model, inputs, targets, layout=None):
    """The loss of a perceptron with one hidden layer; explicit axes need a layout."""
    where = {}
    if layout is not None:
        model = jax.tree.map(jax.sharding.reshard, model, layout.used)
        where = {"out_sharding": P(*layout.batch, None) if layout.batch else P(None, None)}
    hidden = inputs @ model["up"]["kernel"] + model["up"]["bias"][None]
    outputs = jnp.einsum("bh,ho->bo", jnp.tanh(hidden), model["down"]["kernel"], **where)
    return jnp.mean(jnp.square(outputs - targets))


def make_step(tx, layout=None):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(model, state, inputs, targets):
        grads = jax.grad(loss)(model, inputs, targets, layout)
        updates, state = tx.update(grads, state, model)
        return optax.apply_updates(model, updates), state

    return step


# A chain, so that one program has groups of all kinds: global, per layer and per unit.
THREE_CLIPPERS = optax.chain(
    smartclip.autoclip(),
    smartclip.autoclip(PERCENTILE, history=smartclip.ring_buffer(WINDOW), scope="per_layer"),
    smartclip.agc(CLIPPING),
    lenient(optax.adamw(0.01)),
)


def train(step, model, state, place_batch=lambda batch: batch):
    """The model and the state after each step."""
    history = []
    for batch in zip(INPUTS, TARGETS, strict=True):
        model, state = step(model, state, *place_batch(batch))
        history.append(jax.tree.map(np.array, (model, state)))
    return history, (model, state)


@functools.cache
def train_alone():
    model = jax.tree.map(jnp.array, MODEL)
    history, _ = train(make_step(THREE_CLIPPERS), model, THREE_CLIPPERS.init(model))
    return history


def assert_same_training(actual, expected):
    # Rounding errors add up over the steps.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), actual, expected
    )


def test_training_on_one_device_is_that_by_hand():
    optimizer = lenient(optax.adamw(0.01))
    derive, optimize = jax.jit(jax.grad(loss)), jax.jit(optimizer.update)
    model, state = MODEL, optimizer.init(MODEL)
    norms, layer_norms = [], {"down": [], "up": []}
    for batch, (actual, (globally, by_layer, *_)) in zip(
        zip(INPUTS, TARGETS, strict=True), train_alone(), strict=True
    ):
        grads = derive(model, *batch)
        norms.append(reference.norm(grads))
        limit = reference.lower_fence_thresholds(norms)[-1]
        scale = min(1, limit / norms[-1])
        grads = jax.tree.map(lambda grad, scale=scale: grad * scale, grads)
        limits = []
        for layer, past in layer_norms.items():
            past.append(reference.norm(grads[layer]))
            limits.append(reference.percentile_thresholds(past, PERCENTILE, WINDOW)[-1])
            scale = min(1, limits[-1] / past[-1])
            grads[layer] = jax.tree.map(lambda grad, scale=scale: grad * scale, grads[layer])
        grads = jax.tree.map(lambda g, w: np.float32(clip_units(g, w, CLIPPING)), grads, model)
        updates, state = optimize(grads, state, model)
        model = optax.apply_updates(model, updates)
        assert_same_training(actual, model)
        assert_same_training(globally.last[:2], tuple(reference.reported((norms[-1], limit))))
        assert_same_training(
            by_layer.last[:2],
            (np.array([past[-1] for past in layer_norms.values()]), np.array(limits)),
        )


@pytest.mark.parametrize(("mode", "layout"), each_value(MODES, LAYOUTS))
def test_training_equals_that_on_one_device(mode, layout):
    layout = LAYOUTS[layout]
    mesh = make_mesh(mode, *layout.mesh)
    kept_in = layout.kept
    if mode is AxisType.Explicit:
        # One entry per axis, as in the result of a step: `jit` compiles again for another spelling.
        kept_in = jax.tree.map(
            lambda x, spec: P(*spec, *[None] * (x.ndim - len(spec))), MODEL, kept_in
        )
    spread = place_on(mesh, kept_in)
    split = NamedSharding(mesh, layout.batch)
    step = make_step(THREE_CLIPPERS, layout if mode is AxisType.Explicit else None)
    with jax.set_mesh(mesh):
        given = spread(MODEL), THREE_CLIPPERS.init(spread(MODEL))
        history, after = train(step, *given, lambda batch: jax.device_put(batch, split))
    assert_same_training(history, train_alone())
    assert names_of_kept(given) <= UNREAD
    assert types(given) == types(after)
    for leaf, leaf_after in zip(*map(jax.tree.leaves, (given, after)), strict=True):
        assert leaf.sharding.is_equivalent_to(leaf_after.sharding, leaf.ndim)
    assert step._cache_size() == 1
    *clippers, _ = after[1]
    assert all(np.max(state.last.num_clipped) > 0 for state in clippers)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(clippers))


# The messages between the devices.


def compile_update(tx, tree, spec, mode=AxisType.Auto):
    mesh = make_mesh(mode, 8)
    grads = place_on(mesh, dict.fromkeys(tree, spec))(tree)
    with jax.set_mesh(mesh):
        return jax.jit(tx.update).lower(grads, tx.init(grads), grads).compile().as_text()


def main(program):
    """The program without the second reading of the gradient, which few steps need."""
    return program[program.index("\nENTRY ") :]


def all_reduced(program):
    """For each all-reduce, the shapes of the arrays in it."""
    results = re.findall(r" = (\S+|\(.*?\)) all-reduce(?:-start)?\(", program)
    return [re.findall(r"\w+\[([\d,]*)\]", result) for result in results]


def num_elements(reduced):
    return sum(
        math.prod(map(int, filter(None, shape.split(","))))
        for shapes in reduced
        for shape in shapes
    )


def num_gathers(program):
    return len(re.findall(r" (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program))


def layers(num_leaves):
    return random_tree(0, 1.0, {f"layer{number}": (16, 8) for number in range(num_leaves)})


# Older versions of XLA did not combine all-reduces on CPU devices.
combines = jax.__version_info__ >= (0, 10)


OBSERVED = optax.chain(smartclip.observe_norms("per_param"), smartclip.autoclip())


@pytest.mark.parametrize("num_leaves", [1, 8])
def test_a_step_has_no_more_all_reduces_than_one_of_optax(num_leaves):
    ours, theirs = (
        compile_update(tx, layers(num_leaves), P(None, "x"))
        for tx in (smartclip.autoclip(), optax.clip_by_global_norm(1.0))
    )
    assert len(all_reduced(main(ours))) == len(all_reduced(main(theirs)))
    assert len(all_reduced(main(ours))) == 1 or not combines
    assert num_gathers(ours) == 0


@pytest.mark.parametrize(
    ("tx", "mode", "numbers_per_leaf"),
    [
        (smartclip.autoclip(scope="per_param"), AxisType.Explicit, 1),
        (CLIPPERS["autoclip_p95_per_param"](), AxisType.Auto, 1),
        # With those of the weights.
        (smartclip.agc(scope="per_param"), AxisType.Auto, 2),
        (smartclip.agc(), AxisType.Explicit, 16),
        # One message has the numbers of the observer and of the clipper.
        (OBSERVED, AxisType.Explicit, 2),
        pytest.param(OBSERVED, AxisType.Auto, 2, marks=pytest.mark.long),
    ],
    ids=[
        *("autoclip", "geometric_quantile", "agc per_param", "agc with split units"),
        *("observed on explicit axes", "observed on automatic axes"),
    ],
)
def test_one_all_reduce_for_all_groups_and_nothing_is_gathered(tx, mode, numbers_per_leaf):
    program = compile_update(tx, layers(8), P("x"), mode)
    reduced = all_reduced(main(program))
    assert len(reduced) == 1 or not combines
    assert num_elements(reduced) == 8 * numbers_per_leaf
    assert num_gathers(program) == 0


def test_units_that_are_not_split_need_all_reduces_only_for_the_record():
    # The smallest scale, and the number of clipped units.
    program = compile_update(smartclip.agc(), layers(6), P(None, "x"))
    reduced = all_reduced(program)
    assert {shape for shapes in reduced for shape in shapes} == {""}
    assert num_elements(reduced) == 2 * 6
    assert len(reduced) <= 2 or not combines
    assert num_gathers(program) == 0


@pytest.mark.parametrize("mode", long_but([AxisType.Auto], MODES))
def test_a_training_step_sends_one_more_number_for_each_leaf(mode):
    layout = LAYOUTS["FSDP"]
    mesh = make_mesh(mode, *layout.mesh)
    batch = jax.device_put((INPUTS[0], TARGETS[0]), NamedSharding(mesh, layout.batch))

    def compile_step(clipper):
        tx = optax.chain(clipper, optax.sgd(0.1))
        step = make_step(tx, layout if mode is AxisType.Explicit else None)
        model = place_on(mesh, layout.kept)(MODEL)
        with jax.set_mesh(mesh):
            return step.lower(model, tx.init(model), *batch).compile().as_text()

    ours, theirs, without = map(
        compile_step, (smartclip.autoclip(), optax.clip_by_global_norm(1.0), optax.identity())
    )
    num_ours, num_theirs, num_without = (
        num_elements(all_reduced(main(program))) for program in (ours, theirs, without)
    )
    assert num_ours == num_theirs == num_without + 3
    assert num_gathers(ours) == num_gathers(without)
    assert len(all_reduced(main(ours))) == len(all_reduced(main(theirs)))
