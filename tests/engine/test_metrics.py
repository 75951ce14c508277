"""The record of the last step: its shapes and counters, and reading it from any optimizer state."""

import functools

import flax.nnx as nnx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference

import optax_smartclip as smartclip
from optax_smartclip.engine.metrics import init_metrics, next_metrics

FIELDS = {
    "grad_norm": jnp.float32,
    "clip_threshold": jnp.float32,
    "clip_scale": jnp.float32,
    "clipped": jnp.bool_,
    "num_steps": jnp.int32,
    "num_clipped": jnp.int32,
    "num_nonfinite": jnp.int32,
}
LARGEST = 2**31 - 1
PARAMS = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
GRADS = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}

# The norm is 5 and is clipped to 1. Every clipper below must report this.
RECORD = {
    "grad_norm": 5.0,
    "clip_threshold": 1.0,
    "clip_scale": 0.2,
    "clipped": True,
    "num_steps": 1,
    "num_clipped": 1,
    "num_nonfinite": 0,
}


def fixed_clip(max_norm=1.0):
    """A rule without a history or a threshold, so that only the ceiling clips."""
    rule = smartclip.ThresholdRule(
        init=lambda groups: jnp.zeros(groups, jnp.float32),
        threshold=lambda state, norms: jnp.full_like(norms, jnp.inf),
        record=lambda state, norms, thresholds: state,
    )
    return smartclip.clip_by_rule(rule, max_norm=max_norm)


def advance(tx, grads=GRADS, params=PARAMS, steps=1):
    """The state after some updates, compiled as one program.

    In the standard promotion mode: in the strict one, Optax's own Adam and MultiSteps raise.
    """

    @jax.jit
    def run(grads, params):
        state = tx.init(params)
        for _ in range(steps):
            _, state = tx.update(grads, state, params)
        return state

    with jax.numpy_dtype_promotion("standard"):
        return run(grads, params)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def touch_all(params, state):
    """Reads every leaf, because an unused argument is not donated."""
    return jax.tree.map(jnp.copy, (params, state))


def assert_record(record, expected=None, prefix=""):
    expected = RECORD if expected is None else expected
    for name, value in expected.items():
        np.testing.assert_allclose(record[prefix + name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(("groups", "shape"), [(0, (0,)), (1, ()), (2, (2,)), (5, (5,))])
def test_fields_are_scalars_for_one_group_and_vectors_for_more(groups, shape):
    before = init_metrics(groups)
    norms = jax.ShapeDtypeStruct((groups,), jnp.float32)
    after = jax.eval_shape(lambda norms: next_metrics(before, norms, norms, norms, "zero"), norms)
    for record in (before, after):
        assert record._fields == tuple(FIELDS)
        for name, dtype in FIELDS.items():
            field = getattr(record, name)
            assert (field.shape, field.dtype, field.weak_type) == (shape, dtype, False), name


def test_the_record_is_empty_before_the_first_step():
    threshold = np.finfo(np.float32).max
    expected = dict.fromkeys(FIELDS, 0) | {"clip_threshold": threshold, "clip_scale": 1.0}
    assert_record(init_metrics(3)._asdict(), expected)


def test_a_step_is_recorded_per_group():
    norms = jnp.float32([1.0, 2.0, 4.0, jnp.nan, jnp.inf, 0.0])
    limits = jnp.float32([2.0, jnp.inf, 2.0, 2.0, 2.0, 0.0])
    for nonfinite, dropped in (("zero", 0.0), ("propagate", 1.0)):
        step = jax.jit(functools.partial(next_metrics, nonfinite=nonfinite))
        scales = jnp.float32([1.0, 1.0, 0.5, -1.0, -1.0, 1.0])
        record = init_metrics(6)
        for _ in range(2):
            record = step(record, norms, limits, scales)
        expected = {
            "grad_norm": reference.reported(norms),
            "clip_threshold": reference.reported(limits),
            "clip_scale": [1.0, 1.0, 0.5, dropped, dropped, 1.0],
            "clipped": [False, False, True, False, False, False],
            "num_steps": [2] * 6,
            "num_clipped": [0, 0, 2, 0, 0, 0],
            "num_nonfinite": [0, 0, 0, 2, 2, 0],
        }
        assert_record(record._asdict(), expected)


def test_counters_stop_at_the_largest_integer():
    counts = jnp.array([LARGEST - 1, LARGEST, LARGEST], jnp.int32)
    before = init_metrics(3)._replace(num_steps=counts, num_clipped=counts, num_nonfinite=counts)
    step = jax.jit(functools.partial(next_metrics, nonfinite="zero"))
    norms, scales = jnp.float32([2.0, 2.0, jnp.nan]), jnp.float32([0.5, 0.5, -1.0])
    after = step(before, norms, jnp.ones(3), scales)
    np.testing.assert_array_equal(after.num_steps, [LARGEST] * 3)
    np.testing.assert_array_equal(after.num_clipped, [LARGEST] * 3)
    np.testing.assert_array_equal(after.num_nonfinite, [LARGEST - 1, LARGEST, LARGEST])


@pytest.mark.parametrize(
    "tx",
    [
        fixed_clip(),
        optax.chain(fixed_clip(), optax.adamw(0.1)),
        optax.chain(optax.chain(optax.identity(), fixed_clip()), optax.trace(0.9)),
        optax.named_chain(("clip", fixed_clip()), ("sgd", optax.sgd(0.1))),
        optax.inject_hyperparams(fixed_clip)(max_norm=1.0),
        optax.inject_hyperparams(
            lambda learning_rate: optax.chain(fixed_clip(), optax.sgd(learning_rate))
        )(learning_rate=0.1),
        optax.masked(fixed_clip(), {"a": True, "b": True}),
        optax.partition({"all": fixed_clip()}, {"a": "all", "b": "all"}),
        optax.apply_if_finite(fixed_clip(), 3),
        optax.MultiSteps(fixed_clip(), 1).gradient_transformation(),
    ],
    ids=[
        "plain",
        "chain",
        "nested chain",
        "named_chain",
        "inject_hyperparams",
        "inject_hyperparams around",
        "masked",
        "partition",
        "apply_if_finite",
        "MultiSteps",
    ],
)
def test_one_clipper_is_found_wherever_it_is(tx):
    state = advance(tx)
    record = smartclip.metrics(state)
    assert list(record) == list(FIELDS)
    assert_record(record)
    for name in FIELDS:
        np.testing.assert_array_equal(optax.tree.get(state, name), record[name])


def test_the_names_do_not_collide_with_those_of_optax():
    tx = optax.chain(fixed_clip(), optax.inject_hyperparams(optax.adamw)(learning_rate=0.1))
    state = optax.chain(fixed_clip(), optax.adam(0.1)).init(PARAMS)
    assert optax.tree.get(state, "count") == 0
    np.testing.assert_allclose(optax.tree.get(tx.init(PARAMS), "learning_rate"), 0.1)


def test_the_clip_scale_is_the_factor_of_the_update():
    tx = fixed_clip(max_norm=2.0)
    updates, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS))
    record = smartclip.metrics(state)
    np.testing.assert_allclose(updates["b"], GRADS["b"] * record["clip_scale"], rtol=1e-6)
    np.testing.assert_allclose(reference.norm(updates), 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("tx", "norms"),
    [
        (
            optax.chain(fixed_clip(2.0), optax.identity(), fixed_clip(1.0)),
            {"0/": 5.0, "2/": 2.0},
        ),
        (
            optax.named_chain(("first", fixed_clip(2.0)), ("second", fixed_clip(1.0))),
            {"first/": 5.0, "second/": 2.0},
        ),
        (
            optax.partition({"x": fixed_clip(), "y": fixed_clip()}, {"a": "x", "b": "y"}),
            {"inner_states/x/inner_state/": 3.0, "inner_states/y/inner_state/": 4.0},
        ),
        (
            optax.chain(optax.masked(fixed_clip(), {"a": True, "b": False}), fixed_clip()),
            {"0/inner_state/": 3.0, "1/": np.hypot(1.0, 4.0)},
        ),
    ],
)
def test_several_clippers_are_told_apart_by_their_place(tx, norms):
    record = smartclip.metrics(advance(tx))
    assert list(record) == [prefix + name for prefix in norms for name in FIELDS]
    for prefix, norm in norms.items():
        np.testing.assert_allclose(record[f"{prefix}grad_norm"], norm, rtol=1e-6)


def test_inside_multi_steps_only_the_mean_gradient_is_seen():
    # Outside MultiSteps, a clipper would see every micro-batch.
    tx = optax.MultiSteps(fixed_clip(), 2).gradient_transformation()
    assert_record(smartclip.metrics(advance(tx)), {"num_steps": 0, "grad_norm": 0.0})
    assert_record(smartclip.metrics(advance(tx, steps=2)), RECORD)
    assert_record(
        smartclip.metrics(advance(tx, steps=4)), RECORD | {"num_steps": 2, "num_clipped": 2}
    )


@pytest.mark.parametrize("state", [{}, (), None, optax.EmptyState(), optax.sgd(0.1).init(PARAMS)])
def test_without_a_clipper_there_are_no_metrics(state):
    assert smartclip.metrics(state) == {}


@pytest.mark.parametrize("kind", ["ClipMetrics", "SkipMetrics"])
def test_an_exported_program_may_take_and_return_them(kind):
    skipping = smartclip.skip_spikes(fixed_clip(), window=4).init(PARAMS)
    record = {"ClipMetrics": skipping.inner_state, "SkipMetrics": skipping.detector}[kind].last
    assert type(record).__name__ == kind
    exported = jax.export.export(jax.jit(lambda record: record))(record)
    assert jax.export.deserialize(exported.serialize()).in_tree == exported.in_tree


def test_inside_jit_they_are_those_outside():
    tx = optax.chain(smartclip.autoclip(scope="per_param", max_norm=3.5), optax.sgd(0.1))

    @jax.jit
    def step(grads, state):
        _, state = tx.update(grads, state)
        return state, smartclip.metrics(state)

    state, inside = step(GRADS, tx.init(PARAMS))
    outside = smartclip.metrics(state)
    assert inside.keys() == outside.keys() == FIELDS.keys()
    for name in FIELDS:
        np.testing.assert_array_equal(inside[name], outside[name])
    assert_record(outside, {"grad_norm": [3.0, 4.0], "clip_scale": [1.0, 0.875]})


def test_they_are_read_from_a_flax_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self):
            self.a, self.b = nnx.Param(jnp.zeros(2)), nnx.Param(jnp.zeros(2))

    model = Model()
    optimizer = nnx.Optimizer(model, optax.chain(fixed_clip(), optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, grads):
        optimizer.update(model, grads)
        return smartclip.metrics(optimizer.opt_state)

    grads = nnx.State({name: nnx.Param(grad) for name, grad in GRADS.items()})
    inside = step(model, optimizer, grads)
    outside = smartclip.metrics(optimizer.opt_state)
    assert_record(inside)
    assert_record(outside)
    assert all(isinstance(value, jax.Array) for value in outside.values())
    np.testing.assert_allclose(model.a[...], [-0.06, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(smartclip.autoclip(), optax.sgd(0.1, momentum=0.9)),
        smartclip.skip_spikes(optax.chain(smartclip.autoclip(), optax.sgd(0.1, momentum=0.9))),
        optax.chain(
            smartclip.autoclip(scope="per_param"), smartclip.agc(), optax.sgd(0.1, momentum=0.9)
        ),
    ],
    ids=["chain", "skip_spikes", "two clippers"],
)
def test_they_are_read_from_a_state_of_mappings(tx, tmp_path):
    state = advance(tx)
    expected = smartclip.metrics(state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        without_target = checkpointer.restore(tmp_path / "state")
    for mapping in (flax.serialization.to_state_dict(state), without_target):
        found = smartclip.metrics(mapping)
        assert list(found) == list(expected)
        for one, other in zip(found.values(), expected.values(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_they_are_read_from_an_nnx_state_and_from_its_pure_dict():
    class Model(nnx.Module):
        def __init__(self):
            self.a, self.b = nnx.Param(jnp.ones(2)), nnx.Param(jnp.ones(2))

    model = Model()
    tx = optax.chain(smartclip.autoclip(), optax.sgd(0.1, momentum=0.9))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    expected = smartclip.metrics(optimizer.opt_state)
    assert expected["num_steps"] == 1
    for state in (nnx.state(optimizer), nnx.to_pure_dict(nnx.state(optimizer))):
        found = smartclip.metrics(state)
        assert list(found) == list(expected)
        np.testing.assert_array_equal(found["grad_norm"], expected["grad_norm"])


@pytest.mark.parametrize(
    "clipper",
    [
        smartclip.autoclip,
        lambda **options: smartclip.autoclip(
            50.0, history=smartclip.geometric_quantile(), **options
        ),
        smartclip.zscore_clip,
        smartclip.agc,
    ],
    ids=["autoclip", "geometric_quantile", "zscore_clip", "agc"],
)
def test_a_state_can_be_donated_again_and_again(clipper):
    # An array in two fields of a state, or in the state and the parameters, cannot be donated.
    for scope in ("global", "per_param"):
        tx = clipper(scope=scope, max_norm=1.0)
        params = jax.tree.map(jnp.copy, GRADS)
        state = tx.init(params)
        touch_all(params, state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))

    donating = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(PARAMS)
    for _ in range(2):
        _, state = donating(GRADS, state, PARAMS)
    np.testing.assert_array_equal(smartclip.metrics(state)["num_steps"], [2, 2])


def test_a_state_of_an_eager_update_can_be_donated():
    tx = smartclip.zscore_clip(scope="per_param", max_norm=1.0)
    updates, state = tx.update(jax.tree.map(jnp.copy, GRADS), tx.init(PARAMS))
    touch_all(updates, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((updates, state)))
