"""The contract that every clipper keeps for wrappers and training loops.

It is the contract that Optax tests its own optimizers with, and more: scopes, metrics, NaN, and
extreme numbers, where Optax's own clipping goes wrong.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from breadth import long_but, one_of_each_kind
from clipper_table import CLIPPERS, KINDS, WEIGHT_BASED, scope_of
from compat import enable_x64
from lowered import conditionals, lowered_for, operations
from trees import assert_same_bits

import optax_smartclip as smartclip

every_clipper = pytest.mark.parametrize("name", CLIPPERS)

TINY = np.finfo(np.float32).tiny

HISTORY_BASED = [name for name in CLIPPERS if name not in WEIGHT_BASED]


def mixed_tree(seed, size=1.0):
    """Leaves of every kind, random, with `size` as the root mean square of an element."""
    rng = np.random.default_rng(seed)

    def leaf(shape, dtype):
        return jnp.asarray(np.asarray(size * rng.normal(size=shape)).astype(dtype))

    return {
        "body": {"bias": leaf(4, jnp.float16), "kernel": leaf((3, 4), jnp.float32)},
        "empty": leaf((0, 3), jnp.float32),
        "frozen": optax.MaskedNode(),
        "head": (leaf((4, 2), jnp.bfloat16), None),
        "temperature": leaf((), jnp.float32),
    }


PARAMS = mixed_tree(0)
# All gradients here are small in comparison with these.
LARGE_PARAMS = mixed_tree(0, size=1e4)


def stream(num_steps, seed=1):
    """Gradients with norms like those in training, and a spike every ten steps."""
    sizes = 0.1 * np.exp(0.2 * np.random.default_rng(seed).normal(size=num_steps))
    sizes[11::10] *= 1000
    return [mixed_tree(100 * seed + step, size) for step, size in enumerate(sizes)]


@functools.cache
def build(name):
    """A clipper and its jitted update, compiled once for all tests."""
    tx = CLIPPERS[name]()
    return tx, jax.jit(tx.update)


def run(name, grads, state=None, params=PARAMS):
    """The updates and states of a loop of jitted steps."""
    tx, update = build(name)
    state = tx.init(params) if state is None else state
    updates, states = [], []
    for grad in grads:
        update_now, state = update(grad, state, params)
        updates.append(update_now)
        states.append(state)
    return updates, states


def assert_close(actual, expected, ulps=4):
    """Equal up to some units in the last place of each leaf's dtype."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        inexact = jnp.issubdtype(a.dtype, jnp.inexact)
        rtol = ulps * float(jnp.finfo(a.dtype).eps) if inexact else 0
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol)


def kinds(tree):
    """The properties for which `jit` compiles again when they change."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


# Structure: traced, not compiled.


@every_clipper
def test_unknown_extra_arguments_are_ignored(name):
    tx = CLIPPERS[name]()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    update = functools.partial(tx.update, value=jnp.ones(()), unknown="something")
    updates, _ = jax.eval_shape(
        lambda grads, state, params: update(grads, state, params), PARAMS, tx.init(PARAMS), PARAMS
    )
    assert kinds(updates) == kinds(PARAMS)


@every_clipper
def test_state_is_strongly_typed_and_keeps_its_kind(name):
    tx = CLIPPERS[name]()
    state = tx.init(PARAMS)
    _, after = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    assert kinds(after) == kinds(state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


@every_clipper
def test_updates_keep_their_dtype_and_the_state_its_types(name):
    def check(*dtypes):
        tx = CLIPPERS[name]()
        params = {**PARAMS, "weak": jnp.asarray(1.0), "more": [jnp.ones(3, d) for d in dtypes]}
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert kinds(after) == kinds(state)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float32", "int32", "bool"}
        for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert (update.shape, update.dtype) == (param.shape, param.dtype)

    check("complex64", "float8_e4m3fn")
    with enable_x64(True):
        check("complex64", "float8_e4m3fn", "float64", "complex128")


@every_clipper
def test_state_can_be_carried_through_scan_and_cond(name):
    tx = CLIPPERS[name]()
    state = tx.init(PARAMS)

    def step(carry, keep):
        updates, state = carry
        carry = jax.lax.cond(
            keep, lambda: tx.update(updates, state, PARAMS), lambda: (updates, state)
        )
        return carry, None

    carry, _ = jax.eval_shape(lambda: jax.lax.scan(step, (PARAMS, state), jnp.array([True, False])))
    assert kinds(carry) == kinds((PARAMS, state))


@every_clipper
def test_init_needs_only_shapes_and_dtypes(name):
    tx = CLIPPERS[name]()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    state = tx.init(PARAMS)
    assert_same_bits(tx.init(shapes), state)
    assert kinds(jax.eval_shape(tx.init, shapes)) == kinds(state)


@every_clipper
@pytest.mark.parametrize("grad_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
def test_update_has_the_dtypes_of_the_gradient(name, grad_dtype, param_dtype):
    tx = CLIPPERS[name]()
    grads, params = (
        {"w": jax.ShapeDtypeStruct((2, 3), dtype), "b": jax.ShapeDtypeStruct((), dtype)}
        for dtype in (grad_dtype, param_dtype)
    )
    updates, _ = jax.eval_shape(tx.update, grads, tx.init(params), params)
    assert kinds(updates) == kinds(grads)


@every_clipper
def test_a_tree_without_leaves_passes(name):
    tx = CLIPPERS[name]()
    empty = {"frozen": optax.MaskedNode(), "nothing": None}
    updates, state = jax.eval_shape(tx.update, empty, tx.init(empty), empty)
    assert updates == empty
    assert kinds(state) == kinds(tx.init(empty))


@every_clipper
def test_gradients_may_be_none_where_parameters_are_not(name):
    tx = CLIPPERS[name]()
    state = tx.init(PARAMS)
    grads = {**PARAMS, "body": {"bias": None, "kernel": PARAMS["body"]["kernel"]}}
    updates, after = jax.eval_shape(tx.update, grads, state, PARAMS)
    assert kinds(updates) == kinds(grads)
    assert kinds(after) == kinds(state)


@every_clipper
def test_leaves_that_are_not_gradients_pass_untouched(name):
    tx = CLIPPERS[name]()
    others = {"steps": jnp.arange(2), "key": jax.random.key(0), "none": None}
    params = {**others, "w": jnp.ones(2), "masked": optax.MaskedNode(), "seed": jnp.arange(3)}
    others["seed"] = np.zeros(3, jax.dtypes.float0)

    def update(grad):
        updates, _ = tx.update({**params, **others, "w": grad}, tx.init(params), params)
        assert updates.keys() == params.keys()
        assert all(updates[name] is leaf for name, leaf in others.items())
        return updates["w"]

    assert kinds(jax.eval_shape(update, params["w"])) == kinds(params["w"])


@pytest.mark.parametrize("name", HISTORY_BASED)
def test_history_based_clippers_need_no_params(name):
    tx = CLIPPERS[name]()
    state = tx.init(PARAMS)
    updates, after = jax.eval_shape(tx.update, PARAMS, state)
    assert kinds((updates, after)) == kinds((PARAMS, state))


@pytest.mark.parametrize("name", sorted(WEIGHT_BASED))
def test_weight_based_clippers_say_that_they_need_params(name):
    tx = CLIPPERS[name]()
    with pytest.raises(ValueError, match="`params` must be passed"):
        tx.update(PARAMS, tx.init(PARAMS))


@every_clipper
def test_map_params_finds_parameters_in_other_states_only(name):
    tx = optax.chain(CLIPPERS[name](), optax.adam(0.1))
    state = tx.init(PARAMS)
    marked = optax.tree.map_params(
        tx, lambda _: "parameter", state, transform_non_params=lambda _: "other"
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    assert set(jax.tree.leaves(marked[0])) == {"other"}
    assert set(jax.tree.leaves(marked[1][0].mu)) == {"parameter"}


@every_clipper
@pytest.mark.parametrize("place", ["alone", "chain", "named_chain", "inject_hyperparams"])
def test_tree_get_finds_every_metric_and_still_the_count_of_others(name, place):
    if place == "chain":
        tx = optax.chain(CLIPPERS[name](), optax.scale_by_adam())
    elif place == "named_chain":
        tx = optax.named_chain(("clip", CLIPPERS[name]()), ("adam", optax.scale_by_adam()))
    elif place == "inject_hyperparams":
        tx = optax.inject_hyperparams(CLIPPERS[name], hyperparam_dtype=jnp.float32)()
    else:
        tx = CLIPPERS[name]()
    state = tx.init(PARAMS)
    found = {field: optax.tree.get(state, field) for field in smartclip.ClipMetrics._fields}
    assert None not in found.values()
    assert_same_bits(found, smartclip.metrics(state))
    assert (optax.tree.get(state, "count") is None) == (place == "alone")


# Values, from loops of the one jitted update.


@one_of_each_kind
def test_eager_steps_equal_jitted_ones_and_no_nan_arises_on_the_way(name):
    # One small leaf, as each operation is compiled again for another shape.
    params = np.float32([[3.0, -4.0], [0.5, 0.1]])
    direction = np.float32([[0.1, 2.0], [-3.0, 4.0]])
    tx = CLIPPERS[name](max_norm=2.0)
    update = jax.jit(tx.update)
    eager_state = jitted_state = tx.init(params)
    stream = [np.float32(size) * direction for size in (0.0, 0.1, 0.1, 50.0, 1e30, np.inf)]
    for grads in map(jnp.asarray, [*stream, np.float32([[np.inf, 1.0], [0.0, 1.0]])]):
        jitted_updates, jitted_state = update(grads, jitted_state, params)
        with jax.debug_nans(True):
            eager_updates, eager_state = tx.update(grads, eager_state, params)
        assert_close((eager_updates, eager_state), (jitted_updates, jitted_state))


@one_of_each_kind
def test_donated_steps_equal_others_and_compile_once(name):
    tx, _ = build(name)
    grads = stream(4)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    expected, expected_state = PARAMS, tx.init(PARAMS)
    params, state = jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS)
    for grad in grads:
        updates, (expected_state,) = run(name, [grad], expected_state, expected)
        expected = optax.apply_updates(expected, updates[0])
        # The last record is never read, so that `jit` drops those buffers before they are given.
        given = [leaf for leaf in jax.tree.leaves((params, state.rule)) if leaf.size]
        params, state = train_step(params, state, grad)
        assert all(leaf.is_deleted() for leaf in given)
    assert train_step._cache_size() == 1
    assert_close((params, state), (expected, expected_state))


@one_of_each_kind
def test_scan_equals_a_loop_of_jitted_steps(name):
    tx, _ = build(name)
    grads = stream(200)
    # The loop passes `params`, the scan only where it must.
    params = PARAMS if name in WEIGHT_BASED else None

    def step(state, grad):
        updates, state = tx.update(grad, state, params)
        return state, updates

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *grads)
    state, updates = jax.jit(lambda grads: jax.lax.scan(step, tx.init(PARAMS), grads))(stacked)
    expected_updates, expected_states = run(name, grads)
    expected_updates = jax.tree.map(lambda *leaves: np.stack(leaves), *expected_updates)
    # Not to the bit: XLA may sum up a leaf in another order in another program.
    assert_close((updates, state), (expected_updates, expected_states[-1]))


@every_clipper
def test_resuming_from_a_copy_of_the_state_repeats_every_bit(name):
    grads = stream(30)
    expected_updates, expected_states = run(name, grads)
    saved = jax.tree.map(np.array, expected_states[14])
    updates, states = run(name, grads[15:], saved)
    assert_same_bits(updates, expected_updates[15:])
    assert_same_bits(states[-1], expected_states[-1])


@every_clipper
def test_every_clipper_clips_the_spike(name):
    grads = stream(12)
    updates, states = run(name, grads)
    np.testing.assert_array_equal(
        np.asarray(states[-1].last.clipped) > 0, states[-1].last.grad_norm > 0
    )
    assert reference.norm(updates[-1]) < reference.norm(grads[-1]) / 2


@every_clipper
def test_constant_gradients_are_returned_bit_for_bit(name):
    grads = [mixed_tree(3)] * 30 + [mixed_tree(3, size=0.1)] * 5
    updates, states = run(name, grads, params=LARGE_PARAMS)
    assert_same_bits(updates, grads)
    assert not np.any(states[-1].last.num_clipped)
    np.testing.assert_array_equal(states[-1].last.clip_scale, 1.0)


@pytest.mark.parametrize("name", long_but({*KINDS, "zscore_clip"}, CLIPPERS))
def test_constants_of_any_size_are_never_clipped(name):
    sizes = np.float32([0.1, 1 / 3, 7.3e-5, 1.0, 1e4, 1e-20, 1e20])[:, None]
    if scope_of(name) == "unit":
        # A unit whose square overflows counts as not finite.
        sizes = sizes[:-1]
    tx = CLIPPERS[name]()

    def follow(size):
        def step(state, _):
            updates, state = tx.update(size, state, 1000 * size)
            return state, (updates, state.last.clip_scale)

        return jax.lax.scan(step, tx.init(size), length=120)[1]

    updates, scales = jax.jit(jax.vmap(follow))(sizes)
    np.testing.assert_array_equal(scales, np.ones((len(sizes), 120)))
    np.testing.assert_array_equal(updates, np.broadcast_to(sizes[:, None], updates.shape))


@every_clipper
def test_zero_gradients_give_zero_updates(name):
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    grads = [zeros, *stream(12), zeros, zeros]
    updates, states = run(name, grads)
    for step in (0, -2, -1):
        assert_same_bits(updates[step], zeros)
        np.testing.assert_array_equal(states[step].last.grad_norm, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1].rule))


@every_clipper
def test_steps_with_nan_or_inf_leave_no_trace_except_their_count(name):
    grads = stream(24)
    bad = [
        jax.tree.map(lambda leaf, value=value: jnp.full_like(leaf, value), PARAMS)
        for value in (np.nan, -np.inf)
    ]
    expected_updates, expected_states = run(name, grads)
    # Before the first gradient, and in the middle.
    updates, states = run(name, [bad[0], *grads[:13], *bad, *grads[13:]])
    assert_same_bits(updates[1:14] + updates[16:], expected_updates)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    assert_same_bits([updates[0], *updates[14:16]], [zeros] * 3)
    for state, expected in ((states[15], expected_states[12]), (states[-1], expected_states[-1])):
        np.testing.assert_array_equal(state.last.num_steps, expected.last.num_steps + 3)
        np.testing.assert_array_equal(state.last.num_clipped, expected.last.num_clipped)
        # The empty leaf has the norm 0, also where it is a group of its own.
        poisoned = np.array([True, True, False, True, True])
        poisoned = poisoned if state.num_observed.size == poisoned.size else np.array(True)
        np.testing.assert_array_equal(state.last.num_nonfinite, 3 * poisoned)
        learned, expected_learned = (
            jax.tree.map(lambda leaf, mask=poisoned: leaf[mask], (x.rule, x.num_observed))
            for x in (state, expected)
        )
        assert_same_bits(learned, expected_learned)


@every_clipper
def test_one_nan_costs_its_own_group_and_nothing_else(name):
    (grads,) = stream(1)
    kernel = grads["body"]["kernel"]
    poisoned = {**grads, "body": {**grads["body"], "kernel": kernel.at[1, 2].set(np.nan)}}
    (clean,), _ = run(name, [grads])
    (updates,), (state,) = run(name, [poisoned])
    zeros = jax.tree.map(jnp.zeros_like, grads)
    expected = {
        "global": zeros,
        "per_layer": {**clean, "body": zeros["body"]},
        "per_param": {**clean, "body": {**clean["body"], "kernel": zeros["body"]["kernel"]}},
        "unit": {
            **clean,
            "body": {**clean["body"], "kernel": clean["body"]["kernel"].at[:, 2].set(0)},
        },
    }
    assert_same_bits(updates, expected[scope_of(name)])
    assert np.sum(state.last.num_nonfinite) == 1


@pytest.mark.parametrize("name", HISTORY_BASED)
def test_the_first_step_is_recorded_in_the_metrics(name):
    (grads,) = stream(1)
    _, (state,) = run(name, [grads])
    record = smartclip.metrics(state)
    np.testing.assert_allclose(
        np.linalg.norm(record["grad_norm"]), reference.norm(grads), rtol=1e-6
    )
    np.testing.assert_array_equal(record["num_steps"], 1)


# Derivatives, ceilings, extreme sizes and nonfinite="propagate", from one program of each clipper.

FACTORS = (1.0, 2.0, 0.5)


def small_tree(seed):
    """Float32 leaves in two layers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(rng.normal(size=shape)),
        {"a": {"w": (2, 3)}, "c": (2,)},
        is_leaf=lambda node: isinstance(node, tuple),
    )


GRAD, DIRECTION, WEIGHTS, PROJECTION = (small_tree(seed) for seed in range(4))
STEP = 1e-3


class Case(NamedTuple):
    """The gradient of three steps, which is multiplied by a factor in each, and the ceiling."""

    grad: Any
    max_norm: float = 1.0
    factors: tuple[float, ...] = FACTORS


CASES = {
    "zero": Case(jax.tree.map(np.zeros_like, GRAD)),
    "grad": Case(GRAD),
    "ahead": Case(jax.tree.map(lambda g, d: g + np.float32(STEP) * d, GRAD, DIRECTION)),
    "before": Case(jax.tree.map(lambda g, d: g - np.float32(STEP) * d, GRAD, DIRECTION)),
    "one zero leaf": Case({**GRAD, "a": jax.tree.map(np.zeros_like, GRAD["a"])}),
    "nan": Case(jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), GRAD)),
    "inf": Case(jax.tree.map(lambda leaf: np.full_like(leaf, -np.inf), GRAD)),
}


def first_step(size, direction, max_norm=1.0):
    """One step in which one leaf has a gradient, which is then the same group in every scope."""
    grad = np.float32(size) * np.float32(direction)
    zeros = jax.tree.map(np.zeros_like, GRAD["a"])
    return Case({"a": zeros, "c": grad}, max_norm, (1.0, 0.0, 0.0))


VECTORS = {
    "2": first_step(2.0, [0.6, -0.8]),
    "1e20": first_step(1e20, [0.6, -0.8]),
    "1e30": first_step(1e30, [0.6, -0.8]),
    "1e37": first_step(1e37, [0.6, -0.8]),
    "squares that underflow": first_step(5e-25, [0.6, 0.8], 1e-26),
    # A schedule can reach a ceiling of zero, where a Python number must be positive.
    "1e30, ceiling of zero": first_step(1e30, [1.0, 0.0], 0.0),
    "zeros": first_step(0.0, [0.6, 0.8]),
    "zeros, ceiling of zero": first_step(0.0, [0.6, 0.8], 0.0),
    "ceiling of zero": first_step(5.0, [0.6, 0.8], 0.0),
    "within the ceiling": first_step(0.5, [0.6, 0.8]),
    "beyond the ceiling": first_step(5.0, [0.6, 0.8]),
    "beyond a large ceiling": first_step(5e25, [0.6, 0.8], 1e20),
}


def applies(name, vector):
    """Whether the clipper promises to hold such a vector to its limit."""
    norm = reference.norm(VECTORS[vector].grad)
    if name in WEIGHT_BASED and norm > 0:
        # AGC leaves gradients alone that are far below `clipping * eps`. Here its limit is far
        # below 1, so that the scale of the largest gradient would be flushed to zero.
        return 1e-18 < norm < (1e18 if scope_of(name) == "unit" else 1e36)
    return True


def each_of(vectors):
    """Each clipper with each of the vectors."""
    pairs = [(name, vector) for name in CLIPPERS for vector in vectors if applies(name, vector)]
    return pytest.mark.parametrize(("name", "vector"), pairs)


def first_limit(name, case):
    """The limit of the leaf in its first step: no history clips before its first norm."""
    agc_limit = 0.01 * max(reference.norm(WEIGHTS["c"]), 1e-3)
    return min(case.max_norm, agc_limit if name in WEIGHT_BASED else np.inf)


@functools.cache
def differentiate(name):
    """For each case: a function of the updates of three steps, the updates, its derivative."""

    def loss(grad, max_norm, factors):
        tx = CLIPPERS[name](max_norm=max_norm, nonfinite="propagate")

        def step(state, factor):
            scaled = jax.tree.map(lambda leaf: factor * leaf, grad)
            updates, state = tx.update(scaled, state, WEIGHTS)
            return state, updates

        _, updates = jax.lax.scan(step, tx.init(WEIGHTS), factors)
        products = jax.tree.map(lambda u, v: jnp.sum(u * v[None]), updates, PROJECTION)
        return optax.tree.sum(products), updates

    cases = CASES | VECTORS
    stacked = jax.tree.map(lambda *leaves: np.float32(leaves), *cases.values())
    factors = np.stack(stacked.factors, axis=1)
    evaluate = jax.jit(jax.vmap(jax.value_and_grad(loss, has_aux=True)))
    results = evaluate(stacked.grad, stacked.max_norm, factors)
    return {
        case: jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index]), results)
        for index, case in enumerate(cases)
    }


@one_of_each_kind
def test_derivatives_through_three_updates_are_finite_and_right(name):
    results = differentiate(name)
    for case in ("zero", "grad", "one zero leaf"):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results[case]))
    # Gradients of zero are not clipped: the updates are the gradient times each of the factors.
    expected = jax.tree.map(lambda leaf: leaf * sum(FACTORS), PROJECTION)
    jax.tree.map(np.testing.assert_allclose, results["zero"][1], expected)

    (_, updates), derivative = results["grad"]
    slope = sum(
        np.sum(np.float64(a) * b)
        for a, b in zip(jax.tree.leaves(derivative), jax.tree.leaves(DIRECTION), strict=True)
    )
    ((ahead, _), _), ((before, _), _) = results["ahead"], results["before"]
    atol = 2e-3 * reference.norm(updates)
    assert abs(slope) > 10 * atol
    np.testing.assert_allclose(slope, (ahead - before) / (2 * STEP), rtol=1e-2, atol=atol)


@every_clipper
def test_max_norm_holds_from_the_first_step_on(name):
    (_, updates), _ = differentiate(name)["grad"]
    first = jax.tree.map(lambda leaf: leaf[0], updates)
    norms, given_norms = (
        [
            reference.norm(group)
            for group in {
                "global": [tree],
                "per_layer": [tree["a"], tree["c"]],
                "per_param": [tree["a"]["w"], tree["c"]],
                "unit": [*tree["a"]["w"].T, tree["c"]],
            }[scope_of(name)]
        ]
        for tree in (first, GRAD)
    )
    assert max(given_norms) > 1
    if name in HISTORY_BASED:
        np.testing.assert_allclose(norms, np.minimum(given_norms, 1), rtol=1e-6)
    else:
        assert max(norms) <= 1


@every_clipper
@pytest.mark.parametrize("case", ["nan", "inf"])
def test_propagate_lets_nonfinite_gradients_pass_as_they_are(name, case):
    (_, updates), _ = differentiate(name)[case]
    expected = jax.tree.map(lambda leaf: np.stack([leaf] * len(FACTORS)), CASES[case].grad)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


@each_of(VECTORS)
def test_every_finite_gradient_comes_out_at_the_limit(name, vector):
    case = VECTORS[vector]
    (_, updates), _ = differentiate(name)[vector]
    grad = np.float64(case.grad["c"])
    norm, limit = np.linalg.norm(grad), first_limit(name, case)
    expected = grad if norm <= limit else limit / norm * grad
    np.testing.assert_allclose(updates["c"][0], expected, rtol=1e-6)
    assert not np.any(updates["a"]["w"])


@each_of(VECTORS)
def test_the_derivative_of_an_update_is_that_of_the_formula_everywhere(name, vector):
    case = VECTORS[vector]
    _, derivative = differentiate(name)[vector]
    grad, expected = np.float64(case.grad["c"]), np.float64(PROJECTION["c"])
    norm, limit = np.linalg.norm(grad), first_limit(name, case)
    if norm > limit:
        direction = grad / norm
        expected = limit / norm * (expected - direction * np.dot(direction, expected))
    # A derivative below the normal numbers may be flushed to zero.
    np.testing.assert_allclose(derivative["c"], expected, rtol=1e-5, atol=TINY)


# What Optax's own clipping does there. If one of these fails, Optax has been improved.


@jax.jit
def optax_clip(grads, max_norm):
    return optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())[0]


ONE = np.float32(1.0)


@functools.partial(jax.jit, static_argnames="name")
def clip_to(grads, max_norm, name="autoclip"):
    """The update and the norm of a first step."""
    tx = CLIPPERS[name](max_norm=max_norm)
    updates, state = tx.update(grads, tx.init(grads))
    return updates, state.last.grad_norm


@pytest.mark.parametrize("name", long_but(KINDS, HISTORY_BASED))
def test_float16_gradients_of_300_are_clipped_and_not_dropped(name):
    grads = jnp.full(4, 300.0, jnp.float16)
    updates, norm = clip_to(grads, ONE, name=name)
    assert updates.dtype == jnp.float16
    np.testing.assert_array_equal(updates, [0.5] * 4)
    np.testing.assert_array_equal(norm, 600.0)


@pytest.mark.parametrize(
    "grads", [jnp.full(2, 300.0, jnp.float16), *(np.float32([s, s]) for s in (1e20, 1e30, 1e37))]
)
def test_optax_drops_gradients_whose_squares_overflow(grads):
    updates, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    np.testing.assert_array_equal(updates, [0.0, 0.0])


def test_optax_does_not_clip_gradients_whose_squares_underflow():
    grads = np.float32([3e-25, 4e-25])
    np.testing.assert_array_equal(optax_clip(grads, np.float32(1e-26)), grads)


def test_the_norm_of_many_bfloat16_leaves_is_the_true_one():
    # In bfloat16, 256 + 1 is 256: Optax computes 256 for the squared norm 296.
    grads = [jnp.ones(256, jnp.bfloat16), *[jnp.ones(1, jnp.bfloat16)] * 40]
    updates, norm = clip_to(grads, np.float32(16.5))
    np.testing.assert_allclose(norm, np.sqrt(296), rtol=1e-6)
    np.testing.assert_allclose(reference.norm(updates), 16.5, rtol=4e-3)
    tx = optax.clip_by_global_norm(16.5)
    theirs, _ = jax.jit(tx.update)(grads, optax.EmptyState())
    assert reference.norm(theirs) == np.sqrt(296)


def test_one_tree_may_hold_every_dtype():
    grads = [jnp.asarray([12.0], name) for name in ("float32", "float16", "bfloat16", "complex64")]
    updates, _ = clip_to(grads, ONE)
    for update in updates:
        np.testing.assert_array_equal(np.asarray(update, np.complex64), [0.5])
    with pytest.raises(ValueError, match="promotion"):
        optax_clip(grads, ONE)


def test_optax_refuses_integers():
    with pytest.raises((TypeError, ValueError)):
        optax_clip({"int": jnp.arange(3), "float": jnp.ones(3)}, ONE)


@pytest.mark.parametrize(
    ("grad", "max_norm"), [([0.0, 0.0], 0.0), ([np.nan, 1.0], 1.0), ([np.inf, 1.0], 1.0)]
)
def test_optax_makes_nan_of_zeros_at_a_limit_of_zero_and_of_nan_and_inf(grad, max_norm):
    assert np.isnan(optax_clip(np.float32(grad), np.float32(max_norm))[0])


@pytest.mark.parametrize("grads", [[0.0, 0.0], [np.inf, 1.0]])
def test_optax_computes_nan_on_the_way_from_zeros_and_inf(grads):
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        optax.clip_by_global_norm(1.0).update(jnp.float32(grads), optax.EmptyState())


def test_the_derivative_of_the_update_of_zeros_is_nan_in_optax():
    slope = jax.grad(lambda grads: jnp.sum(optax_clip(grads, ONE)))(jnp.zeros(2))
    assert np.all(np.isnan(slope))


# Hyperparameters.


def thresholds_of(tx, norms, dtype=jnp.float32):
    """The thresholds of a transformation for gradients of given norms, one leaf of `dtype`."""
    params = jnp.zeros(1, dtype)

    def step(state, norm):
        _, state = tx.update(norm[None], state, params)
        return state, smartclip.metrics(state)["clip_threshold"]

    norms = jnp.asarray(np.asarray(norms).astype(dtype))
    run = jax.jit(lambda norms: jax.lax.scan(step, tx.init(params), norms)[1])
    return reference.unreported(np.asarray(run(norms)))


NORMS = np.float32(np.exp(np.random.default_rng(4).normal(size=60)))


@one_of_each_kind
def test_hyperparameters_rounded_to_bfloat16_change_thresholds_little(name):
    tx = optax.inject_hyperparams(CLIPPERS[name])()
    hyperparams = tx.init(jnp.zeros(1, jnp.bfloat16)).hyperparams.values()
    # In the auto mode, the only number is the integer `warmup_steps`.
    assert any(value.dtype == jnp.bfloat16 for value in hyperparams) == (name != "autoclip")
    np.testing.assert_allclose(
        thresholds_of(tx, NORMS, jnp.bfloat16),
        thresholds_of(CLIPPERS[name](), NORMS, jnp.bfloat16),
        rtol=2e-2,
    )


def late_value(early, late):
    """A schedule that changes at step 30."""
    return lambda count: jnp.where(count < 30, early, late)


# The thresholds of units are not reported.
AGC = functools.partial(smartclip.agc, scope="per_param")


@pytest.mark.parametrize(
    ("factory", "hyperparameter", "expected"),
    [
        (
            smartclip.autoclip,
            "percentile",
            lambda value: reference.percentile_thresholds(NORMS, value, 1024),
        ),
        (
            smartclip.zscore_clip,
            "zmax",
            lambda value: reference.zscore_thresholds(NORMS, zmax=value),
        ),
        (
            smartclip.zscore_clip,
            "max_norm",
            lambda value: np.minimum(reference.zscore_thresholds(NORMS), value),
        ),
        (
            smartclip.autoclip,
            "warmup_steps",
            lambda value: reference.lower_fence_thresholds(NORMS, warmup_steps=value),
        ),
        (AGC, "clipping", lambda value: np.full(60, value * 1e-3)),
        (AGC, "eps", lambda value: np.full(60, value * 1e-2)),
    ],
)
def test_a_hyperparameter_may_follow_a_schedule(factory, hyperparameter, expected):
    early, late = (3, 40) if hyperparameter == "warmup_steps" else (1.5, 80.0)
    tx = optax.inject_hyperparams(factory)(**{hyperparameter: late_value(early, late)})
    thresholds = np.r_[expected(early)[:30], expected(late)[30:]]
    np.testing.assert_allclose(thresholds_of(tx, NORMS), thresholds, rtol=1e-5)


def test_a_decay_that_bfloat16_rounds_to_one_still_follows_the_norms():
    tx = optax.inject_hyperparams(smartclip.zscore_clip)(decay=0.999)
    # A stream that bfloat16 holds exactly, with a lower level after 1500 steps.
    norms = np.random.default_rng(5).choice([1.0, 1.5, 2.0], size=4000)
    norms[1500:] /= 4
    assert tx.init(jnp.zeros(1, jnp.bfloat16)).hyperparams["decay"] == 1
    expected = reference.zscore_thresholds(norms, decay=0.999)
    assert expected[-1] < 0.6 * expected[1500]
    thresholds = thresholds_of(tx, norms, jnp.bfloat16)
    np.testing.assert_allclose(thresholds, expected, rtol=0.05)


@pytest.mark.parametrize("factory", [smartclip.autoclip, smartclip.zscore_clip])
def test_a_function_as_scope_is_a_static_argument_of_inject_hyperparams(factory):
    def first_letter(path):
        return path[0].key[0]

    params = {"a1": jnp.ones(2), "a2": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax.inject_hyperparams(factory, static_args="scope")(scope=first_letter, max_norm=1.0)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(optax.tree.get(state, "grad_norm"), [2, 2**0.5], rtol=1e-6)
    np.testing.assert_allclose([reference.norm(updates[key]) for key in ("a1", "b")], [0.5**0.5, 1])


@every_clipper
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_program_of_an_accelerator_has_neither_loops_nor_conditionals(name, platform):
    """A GPU may wait for the host at each."""
    tx = CLIPPERS[name]()
    program = lowered_for(platform, tx.update, PARAMS, tx.init(PARAMS), PARAMS)
    assert not list(conditionals(program))
    assert not list(operations(program, "stablehlo.while"))
