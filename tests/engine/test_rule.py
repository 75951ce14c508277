"""`clip_by_rule` around short rules: the arguments of a rule, and the steps around it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_smartclip as smartclip

NAN, INF = np.nan, np.inf
PARAMS = {"a": jnp.zeros(2), "b": jnp.zeros(2)}


def grads(a, b=0.0):
    """A gradient in which the leaf "a" has the norm `a`, and "b" the norm `b`."""
    return {"a": jnp.float32([0.6 * a, 0.8 * a]), "b": jnp.float32([0.0, b])}


class Notes(NamedTuple):
    """The arguments that the noting rule has received."""

    norms: jax.Array
    thresholds: jax.Array
    recorded: jax.Array


# Its threshold shows the state and the norms that it was given, and its state the arguments of
# `record`: the third norm 4 after 2 and 8 gives the threshold 100 * 2 + 8 + 4 / 16.
NOTING = smartclip.ThresholdRule(
    init=lambda groups: Notes(
        jnp.zeros(groups, jnp.float32),
        jnp.zeros(groups, jnp.float32),
        jnp.zeros(groups, jnp.int32),
    ),
    threshold=lambda notes, norms: (
        100 * notes.recorded.astype(jnp.float32) + notes.norms + norms / 16
    ),
    record=lambda notes, norms, thresholds: Notes(norms, thresholds, notes.recorded + 1),
)


def fixed(threshold):
    """A rule with a constant threshold that counts its records."""
    return smartclip.ThresholdRule(
        init=lambda groups: jnp.zeros(groups, jnp.int32),
        threshold=lambda count, norms: jnp.full_like(norms, threshold),
        record=lambda count, norms, thresholds: count + 1,
    )


def run(tx, steps, params=PARAMS, **extra_args):
    """Updates, states and metrics after each of the gradients, the update compiled once."""
    update = jax.jit(tx.update)
    state = tx.init(params)
    for step in steps:
        updates, state = update(step, state, params, **extra_args)
        yield updates, state, smartclip.metrics(state)


def column(results, name):
    return [np.asarray(record[name]).tolist() for *_, record in results]


def test_the_rule_receives_its_state_and_the_norms_of_the_step():
    results = list(run(smartclip.clip_by_rule(NOTING), [grads(x) for x in (2.0, 8.0, 4.0)]))
    thresholds = [2 / 16, 100 + 2 + 8 / 16, 200 + 8 + 4 / 16]
    np.testing.assert_allclose(column(results, "clip_threshold"), thresholds, rtol=1e-6)
    notes = results[-1][1].rule
    np.testing.assert_allclose(notes.norms, [4.0], rtol=1e-6)
    np.testing.assert_allclose(notes.thresholds, thresholds[-1:], rtol=1e-6)
    np.testing.assert_array_equal(notes.recorded, [3])


def test_the_rule_records_raw_norms_and_its_own_thresholds():
    # The thresholds are without warm-up and ceiling, and the norms are those before clipping.
    tx = smartclip.clip_by_rule(NOTING, warmup_steps=10, max_norm=0.5)
    for updates, state, record in run(tx, [grads(32.0)]):
        np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-6)
        np.testing.assert_allclose(record["clip_threshold"], 0.5)
        np.testing.assert_allclose(state.rule.norms, [32.0], rtol=1e-6)
        np.testing.assert_allclose(state.rule.thresholds, [2.0], rtol=1e-6)


@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
def test_the_rule_sees_a_zero_for_a_non_finite_norm_and_keeps_its_state(nonfinite):
    tx = smartclip.clip_by_rule(NOTING, nonfinite=nonfinite)
    (_, before, _), *dropped = run(tx, [grads(2.0), grads(NAN), grads(INF)])
    for count, (_, after, record) in enumerate(dropped, start=1):
        np.testing.assert_allclose(record["clip_threshold"], 100 + 2 + 0)
        for old, new in zip(before.rule, after.rule, strict=True):
            np.testing.assert_array_equal(old, new)
        np.testing.assert_array_equal(after.num_observed, [1])
        np.testing.assert_array_equal(record["num_nonfinite"], count)
        np.testing.assert_array_equal(record["num_steps"], 1 + count)


def test_warm_up_counts_the_finite_norms_of_each_group():
    tx = smartclip.clip_by_rule(fixed(1.0), scope="per_param", warmup_steps=3)
    others = [NAN, INF, 5.0, NAN, 5.0, 5.0, 5.0]
    results = list(run(tx, [grads(5.0, b) for b in others]))
    clipped = np.array(column(results, "clipped"))
    np.testing.assert_array_equal(clipped[:, 0], [False] * 3 + [True] * 4)
    np.testing.assert_array_equal(clipped[:, 1], [False] * 6 + [True])
    np.testing.assert_array_equal(results[-1][1].num_observed, [7, 4])
    np.testing.assert_array_equal(results[-1][1].rule, [7, 4])
    np.testing.assert_array_equal(results[-1][2]["num_clipped"], [4, 1])


@pytest.mark.parametrize(
    ("threshold", "expected"), [(1.0, [3.0, 3.0, 1.0]), (4.0, [3.0, 3.0, 3.0])]
)
def test_the_ceiling_holds_in_warm_up_and_after_it(threshold, expected):
    tx = smartclip.clip_by_rule(fixed(threshold), warmup_steps=2, max_norm=3.0)
    norms = [float(optax.tree.norm(updates)) for updates, *_ in run(tx, [grads(5.0)] * 3)]
    np.testing.assert_allclose(norms, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("scope", "norms", "expected"),
    [
        ("global", 13.0, {"a": 5 / 13, "b": 12 / 13}),
        ("per_param", [5.0, 12.0], {"a": 1.0, "b": 1.0}),
        ("per_layer", 13.0, {"a": 5 / 13, "b": 12 / 13}),
        (lambda path: path[-1].key == "a", [5.0, 12.0], {"a": 1.0, "b": 1.0}),
        ({"a": 1, "b": 1}, 13.0, {"a": 5 / 13, "b": 12 / 13}),
    ],
)
def test_each_group_comes_out_with_its_norm_at_the_threshold(scope, norms, expected):
    tx = smartclip.clip_by_rule(fixed(1.0), scope=scope)
    ((updates, _, record),) = run(tx, [grads(5.0, 12.0)])
    np.testing.assert_allclose(record["grad_norm"], norms, rtol=1e-6)
    for name, norm in expected.items():
        np.testing.assert_allclose(optax.tree.norm(updates[name]), norm, rtol=1e-6)
    np.testing.assert_allclose(updates["a"][0] / updates["a"][1], 0.75, rtol=1e-6)


def test_a_gradient_within_the_threshold_is_returned_bit_for_bit():
    gradient = {
        "a": np.random.default_rng(0).normal(size=1000).astype(np.float32),
        "b": np.float32([-0.0, 1e-37, 1.0000001]),
    }
    ((updates, _, record),) = run(smartclip.clip_by_rule(fixed(1e3)), [gradient], gradient)
    for name, leaf in gradient.items():
        np.testing.assert_array_equal(
            np.asarray(updates[name]).view(np.uint32), leaf.view(np.uint32)
        )
    assert float(record["clip_scale"]) == 1.0


@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
def test_one_bad_element_zeroes_its_group_or_passes_and_leaves_other_groups_alone(nonfinite):
    tx = smartclip.clip_by_rule(fixed(1.0), scope="per_layer", nonfinite=nonfinite)
    bad_values = (NAN, INF, -INF)
    gradients = [
        {"x": {"a": jnp.float32([3.0, bad]), "b": jnp.float32([4.0])}, "y": jnp.float32([2.0])}
        for bad in bad_values
    ]
    for step, (bad, (updates, state, record)) in enumerate(
        zip(bad_values, run(tx, gradients, gradients[0]), strict=True), start=1
    ):
        zero = nonfinite == "zero"
        np.testing.assert_array_equal(updates["x"]["a"], [0.0, 0.0] if zero else [3.0, bad])
        np.testing.assert_array_equal(updates["x"]["b"], [0.0] if zero else [4.0])
        np.testing.assert_array_equal(updates["y"], [1.0])
        np.testing.assert_array_equal(record["num_nonfinite"], [step, 0])
        np.testing.assert_array_equal(state.num_observed, [0, step])


def test_a_nan_in_one_group_does_not_change_the_others():
    tx = smartclip.clip_by_rule(NOTING, scope="per_param", max_norm=3.0)
    sizes = (2.0, 8.0, 1.0, 4.0)
    clean = list(run(tx, [grads(size, size) for size in sizes]))
    bad = list(run(tx, [grads(size, NAN) for size in sizes]))
    for (updates, state, record), (bad_updates, bad_state, bad_record) in zip(
        clean, bad, strict=True
    ):
        np.testing.assert_array_equal(updates["a"], bad_updates["a"])
        np.testing.assert_array_equal(bad_updates["b"], [0.0, 0.0])
        for name in record:
            np.testing.assert_array_equal(record[name][0], bad_record[name][0])
        for leaf, bad_leaf in zip(state.rule, bad_state.rule, strict=True):
            np.testing.assert_array_equal(leaf[0], bad_leaf[0])
            np.testing.assert_array_equal(bad_leaf[1], 0)


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_norm_that_is_handed_over_is_used_and_not_computed_again(chained, dtype):
    tx = smartclip.clip_by_rule(fixed(1.0))
    if chained:
        tx = optax.chain(tx, optax.identity())
    # Differs from the norm of this gradient, to show that it is used.
    ((updates, _, record),) = run(tx, [grads(3.0, 4.0)], grad_norm=jnp.asarray(50.0, dtype))
    np.testing.assert_allclose(record["grad_norm"], 50.0)
    np.testing.assert_allclose(optax.tree.norm(updates), 5 / 50, rtol=1e-6)
    program = str(
        jax.make_jaxpr(lambda grads, norm: tx.update(grads, tx.init(PARAMS), grad_norm=norm))(
            PARAMS, jnp.zeros((), dtype)
        )
    )
    assert "sqrt" not in program
    assert "reduce_sum" not in program


@pytest.mark.parametrize("grad_norm", [5.0, 5, np.float64(5.0), np.float32(5.0)])
def test_a_norm_may_be_handed_over_as_a_number(grad_norm):
    tx = smartclip.clip_by_rule(fixed(1.0))
    _, state = jax.eval_shape(
        lambda grads: tx.update(grads, tx.init(PARAMS), grad_norm=grad_norm), PARAMS
    )
    assert (state.last.grad_norm.dtype, state.last.grad_norm.weak_type) == (jnp.float32, False)


def test_a_non_finite_norm_that_is_handed_over_drops_the_step():
    tx = smartclip.clip_by_rule(fixed(1.0))
    ((updates, state, record),) = run(tx, [grads(3.0, 4.0)], grad_norm=jnp.float32(NAN))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    np.testing.assert_array_equal(state.num_observed, [0])
    np.testing.assert_array_equal(record["num_nonfinite"], 1)


@pytest.mark.parametrize("scope", ["per_param", "per_layer", {"a": 1, "b": 1}])
def test_a_norm_of_the_whole_gradient_is_refused_for_other_scopes(scope):
    tx = smartclip.clip_by_rule(fixed(1.0), scope=scope)
    with pytest.raises(
        ValueError, match=r"`grad_norm` is .* needs scope='global', got scope="
    ) as error:
        tx.update(PARAMS, tx.init(PARAMS), grad_norm=1.0)
    assert repr(scope) in str(error.value)


@pytest.mark.parametrize("shape", [(1,), (2,), (0,), (1, 1)])
def test_a_norm_that_is_not_a_scalar_is_refused(shape):
    tx = smartclip.clip_by_rule(fixed(1.0))
    with pytest.raises(ValueError, match="`grad_norm` must be a scalar, got the shape") as error:
        tx.update(PARAMS, tx.init(PARAMS), grad_norm=np.ones(shape))
    assert str(shape) in str(error.value)


def test_extra_arguments_for_other_transformations_are_ignored():
    tx = smartclip.clip_by_rule(fixed(1.0))
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    ((updates, *_),) = run(tx, [grads(5.0)], value=jnp.float32(1.0), unknown={"x": jnp.zeros(1)})
    np.testing.assert_allclose(updates["a"], [0.6, 0.8], rtol=1e-6)


def test_init_needs_shapes_only():
    tx = smartclip.clip_by_rule(NOTING, scope="per_param")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    state = tx.init(PARAMS)
    for other in (tx.init(shapes), jax.jit(tx.init)(PARAMS)):
        assert jax.tree.structure(other) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, other, state)
    abstract = jax.eval_shape(tx.init, shapes)
    assert jax.tree.map(np.shape, abstract) == jax.tree.map(np.shape, state)


@pytest.mark.parametrize(
    ("init", "shape"),
    [
        (lambda groups: jnp.zeros(()), "()"),
        (lambda groups: jnp.zeros(groups + 1), "(3,)"),
        (lambda groups: {"fine": jnp.zeros(groups), "bad": jnp.zeros((1, groups))}, "(1, 2)"),
        (lambda groups: 0.0, "()"),
    ],
)
def test_a_rule_whose_state_lacks_the_groups_is_refused(init, shape):
    rule = smartclip.ThresholdRule(init, lambda state, norms: norms, lambda state, *_: state)
    with pytest.raises(
        ValueError, match=r"`rule.init` must return .* one entry per group"
    ) as error:
        smartclip.clip_by_rule(rule, scope="per_param").init(PARAMS)
    assert "(2)" in str(error.value)
    assert f"got the shape {shape}" in str(error.value)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_a_rule_with_another_number_of_thresholds_is_refused(shape):
    rule = fixed(1.0)._replace(threshold=lambda state, norms: jnp.ones(shape))
    tx = smartclip.clip_by_rule(rule, scope="per_param")
    with pytest.raises(ValueError, match=r"`rule.threshold` must return one .* 2 groups") as error:
        tx.update(PARAMS, tx.init(PARAMS))
    assert f"got the shape {shape}" in str(error.value)


def test_holes_in_the_gradient_alone_need_the_parameters():
    tx = smartclip.clip_by_rule(fixed(1.0), scope="per_param")
    state = tx.init(PARAMS)
    partial = {"a": None, "b": jnp.float32([0.0, 2.0])}
    with pytest.raises(ValueError, match=r"\(1,\), .*, got \(2,\).* pass `params` to `update`"):
        tx.update(partial, state)
    updates, state = jax.jit(tx.update)(partial, state, PARAMS)
    assert updates["a"] is None
    np.testing.assert_array_equal(updates["b"], [0.0, 1.0])
    np.testing.assert_array_equal(state.last.grad_norm, [0.0, 2.0])
    np.testing.assert_array_equal(state.last.num_clipped, [0, 1])


def test_other_parameters_than_those_of_init_are_refused():
    tx = smartclip.clip_by_rule(fixed(1.0), scope="per_param")
    with pytest.raises(ValueError, match=r"'num_observed' of shape \(3,\), .*, got \(2,\)"):
        tx.update(PARAMS | {"c": jnp.zeros(1)}, tx.init(PARAMS))


def test_a_gradient_without_a_parameter_is_named():
    tx = smartclip.clip_by_rule(fixed(1.0))
    with pytest.raises(ValueError, match="leaf 'c/0' that `params` does not have"):
        tx.update(PARAMS | {"c": [jnp.zeros(1)]}, tx.init(PARAMS), PARAMS)


def test_leaves_without_a_norm_pass_unchanged():
    others = {
        "int": jnp.array([300, 400]),
        "python int": 7,
        "bool": jnp.array([True]),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "key": jax.random.key(0),
        "none": None,
    }
    tx = smartclip.clip_by_rule(fixed(1.0))
    tree = others | {"masked": optax.MaskedNode(), "float": jnp.float32([3.0, 4.0])}
    updates, state = tx.update(tree, tx.init(tree))
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert all(updates[name] is leaf for name, leaf in others.items())
    np.testing.assert_allclose(updates["float"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(state.last.grad_norm, 5.0)


def test_python_numbers_scalars_and_empty_arrays_are_leaves():
    tree = {"float": 3.0, "scalar": jnp.float32(4.0), "empty": jnp.zeros((0, 2)), "complex": 12j}
    tx = smartclip.clip_by_rule(fixed(1.0))
    updates, state = tx.update(tree, tx.init(tree))
    np.testing.assert_allclose(state.last.grad_norm, 13.0, rtol=1e-6)
    np.testing.assert_allclose(updates["float"], 3 / 13, rtol=1e-6)
    np.testing.assert_allclose(updates["complex"], 12j / 13, rtol=1e-6)
    assert updates["empty"].shape == (0, 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
        np.dtype(name) for name in ("float32", "int32", "bool")
    }


@pytest.mark.parametrize("tree", [{}, {"a": optax.MaskedNode(), "b": None}])
@pytest.mark.parametrize(("scope", "groups"), [("global", 1), ("per_param", 0), ("per_layer", 0)])
def test_an_empty_tree_passes(tree, scope, groups):
    tx = smartclip.clip_by_rule(NOTING, scope=scope)
    updates, state = jax.jit(tx.update)(tree, tx.init(tree))
    assert updates == tree
    np.testing.assert_array_equal(state.num_observed, np.zeros(groups))


@pytest.mark.parametrize("scope", ["global", "per_param"])
@pytest.mark.parametrize(
    "rule",
    [NOTING, fixed(1.0)],
    ids=["noting", "fixed"],
)
def test_the_state_keeps_its_structure_and_types(rule, scope):
    tx = smartclip.clip_by_rule(rule, scope=scope, warmup_steps=jnp.int32(1), max_norm=2.0)
    state = jax.eval_shape(tx.init, PARAMS)
    for gradient in (PARAMS, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)):
        _, after = jax.eval_shape(tx.update, gradient, state)
        assert after == state
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


def traced(update):
    """The compiled function, and a list that grows each time that it is traced."""
    traces = []

    def noted(*arguments):
        traces.append(1)
        return update(*arguments)

    return jax.jit(noted), traces


# The rule of the example in `clip_by_rule`, but with a moving average; `full` gives a weak type.
WEAK = smartclip.ThresholdRule(
    init=lambda groups: jnp.full(groups, 8.0),
    threshold=lambda mean, norms: 2 * mean,
    record=lambda mean, norms, thresholds: 0.5 * mean + 0.5 * norms,
)


def test_a_rule_that_starts_with_a_weak_type_is_compiled_once():
    tx = smartclip.clip_by_rule(WEAK)
    update, traces = traced(tx.update)
    state = tx.init(PARAMS)
    for _ in range(2):
        _, state = update(grads(1.0), state)
    np.testing.assert_allclose(state.rule, [2.75], rtol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("scope", ["global", "per_param"])
def test_steps_are_the_same_in_a_loop_in_a_scan_and_compiled_once(scope):
    tx = smartclip.clip_by_rule(NOTING, scope=scope, warmup_steps=1, max_norm=3.0)
    sizes = (2.0, 8.0, NAN, 1e30, 0.0, 4.0)
    steps = [grads(size, 2 * size) for size in sizes]
    update, traces = traced(tx.update)
    state = tx.init(PARAMS)
    looped = []
    for step in steps:
        updates, state = update(step, state)
        looped.append(updates)
    assert len(traces) == 1

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    scanned_state, scanned = jax.lax.scan(
        lambda state, step: tx.update(step, state)[::-1], tx.init(PARAMS), stacked
    )
    jax.tree.map(np.testing.assert_array_equal, scanned_state, state)
    for name in PARAMS:
        np.testing.assert_array_equal(scanned[name], [updates[name] for updates in looped])


def test_eager_and_compiled_steps_agree():
    tx = smartclip.clip_by_rule(NOTING, warmup_steps=1, max_norm=3.0)
    state = tx.init(PARAMS)
    for step in (grads(2.0), grads(8.0, 1.0), grads(NAN)):
        compiled = jax.jit(tx.update)(step, state)
        _, state = eager = tx.update(step, state)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), compiled, eager)


def test_an_ensemble_is_clipped_member_by_member():
    tx = smartclip.clip_by_rule(NOTING, scope="per_param", max_norm=3.0)
    members = [[grads(8.0, 1.0)] * 2, [grads(NAN, 2.0), grads(1e30, 1e-30)], [grads(0.0)] * 2]

    def stack(*trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    state = jax.vmap(tx.init)(stack(*[PARAMS] * 3))
    update = jax.jit(jax.vmap(tx.update))
    for step in range(2):
        updates, state = update(stack(*[member[step] for member in members]), state)
    alone = [list(run(tx, member))[-1] for member in members]
    for index, (expected_updates, expected_state, _) in enumerate(alone):
        for expected, actual in (
            (expected_updates, updates),
            (expected_state, state),
        ):
            jax.tree.map(
                lambda x, y, index=index: np.testing.assert_allclose(x, y[index], rtol=1e-6),
                expected,
                actual,
            )


def test_numbers_may_be_traced():
    def clip(warmup_steps, max_norm):
        tx = smartclip.clip_by_rule(fixed(1.0), warmup_steps=warmup_steps, max_norm=max_norm)
        updates, _ = tx.update(grads(5.0), tx.init(PARAMS))
        return optax.tree.norm(updates)

    clip = jax.jit(clip)
    for dtype in (jnp.float32, jnp.bfloat16):
        assert float(clip(jnp.int32(0), jnp.asarray(2.0, dtype))) == pytest.approx(1.0)
        assert float(clip(jnp.int32(1), jnp.asarray(2.0, dtype))) == pytest.approx(2.0)


def test_numbers_may_be_injected_and_changed_between_steps():
    tx = optax.inject_hyperparams(
        lambda max_norm: smartclip.clip_by_rule(fixed(4.0), max_norm=max_norm)
    )(max_norm=2.0)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    updates, state = update(grads(5.0), state)
    np.testing.assert_allclose(optax.tree.norm(updates), 2.0, rtol=1e-6)
    state = state._replace(hyperparams={"max_norm": jnp.float32(3.0)})
    updates, state = update(grads(5.0), state)
    np.testing.assert_allclose(optax.tree.norm(updates), 3.0, rtol=1e-6)


def test_senseless_values_of_a_rule_do_no_harm():
    @jax.jit
    def clipped_norm(threshold):
        tx = smartclip.clip_by_rule(fixed(threshold))
        return optax.tree.norm(tx.update(grads(5.0), tx.init(PARAMS))[0])

    for threshold, norm in ((NAN, 5.0), (-1.0, 0.0), (-INF, 0.0), (INF, 5.0), (0.0, 0.0)):
        np.testing.assert_allclose(clipped_norm(jnp.float32(threshold)), norm, rtol=1e-6)
