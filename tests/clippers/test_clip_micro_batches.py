"""Clipping before the mean, against float64 NumPy and against a loop over the clipper."""

import functools
from functools import partial

import flax.serialization
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from trees import assert_close, assert_same_bits, random_tree

import optax_smartclip as smartclip

PARTS, STEPS = 8, 5
SHAPES = {"body": {"kernel": (4, 3), "bias": (3,)}, "scale": ()}
PARAMS = random_tree(0, 1.0, SHAPES)
DAMAGED, NAN = (13, 30), 27


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def gradients():
    """The parts of all batches: noise, two that are damaged, and one with a NaN."""
    parts = [random_tree(1 + number, 0.1, SHAPES) for number in range(STEPS * PARTS)]
    for number in DAMAGED:
        parts[number] = jax.tree.map(lambda leaf: 1000 * leaf, parts[number])
    parts[NAN]["scale"] = np.float32(np.nan)
    return parts


GRADIENTS = gradients()
NORMS = np.array([reference.norm(part) for part in GRADIENTS])
BATCHES = [stack(GRADIENTS[first : first + PARTS]) for first in range(0, len(GRADIENTS), PARTS)]
MEAN_OF_CLIPPED = smartclip.clip_micro_batches(smartclip.autoclip())
UPDATE = jax.jit(MEAN_OF_CLIPPED.update)


def run(tx, batches=BATCHES, update=None):
    """The updates of all batches, and the state after each."""
    update, state, updates, states = update or jax.jit(tx.update), tx.init(PARAMS), [], []
    for batch in batches:
        update_of_batch, state = update(batch, state, PARAMS)
        updates.append(jax.device_get(update_of_batch))
        states.append(state)
    return updates, states


@functools.cache
def run_of_autoclip():
    return run(MEAN_OF_CLIPPED, update=UPDATE)


def looped(clipper):
    """The parts that `clipper` clips one by one, and its state after each."""
    update, state, parts, states = jax.jit(clipper.update), clipper.init(PARAMS), [], []
    for gradient in GRADIENTS:
        clipped, state = update(gradient, state, PARAMS)
        parts.append(clipped)
        states.append(state)
    return parts, states


def clipped_in_float64():
    """Every part, scaled to the fence of the norms before it. A part with a NaN is zero."""
    thresholds = reference.lower_fence_thresholds(np.where(np.isfinite(NORMS), NORMS, np.nan))
    scales = np.minimum(1.0, thresholds / NORMS)
    scales[NAN] = 0.0
    pairs = zip(scales, GRADIENTS, strict=True)
    return [jax.tree.map(lambda x, s=scale: np.nan_to_num(x) * s, part) for scale, part in pairs]


def test_the_update_is_the_mean_of_parts_clipped_by_the_norms_before_them():
    updates, _ = run_of_autoclip()
    clipped = clipped_in_float64()
    for number, update in enumerate(updates):
        of_batch = clipped[number * PARTS : (number + 1) * PARTS]
        mean = jax.tree.map(lambda *leaves: np.mean(leaves, 0, np.float64), *of_batch)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), update, mean)


def test_the_record_counts_the_parts_of_the_last_batch():
    _, states = run_of_autoclip()
    records = [smartclip.metrics(state) for state in states]
    thresholds = reference.lower_fence_thresholds(np.where(np.isfinite(NORMS), NORMS, np.nan))
    over = (np.isfinite(NORMS) & (thresholds < NORMS)).reshape(STEPS, PARTS)
    assert [int(r["micro_batches_clipped"]) for r in records] == over.sum(1).tolist()
    assert [int(r["micro_batches_nonfinite"]) for r in records] == [0, 0, 0, 1, 0]
    assert records[-1]["num_steps"] == STEPS * PARTS
    assert records[-1]["num_clipped"] == over.sum()
    reported = reference.reported(NORMS).reshape(STEPS, PARTS)
    expected = {"micro_batch_norm": np.median(reported, 1)}
    expected["largest_micro_batch_norm"] = reported.max(1)
    for name, values in expected.items():
        np.testing.assert_allclose([r[name] for r in records], values, rtol=1e-6)


LOOPS = {
    "autoclip of slices": smartclip.autoclip(
        90.0, scope="per_param", stacked={"kernel": (1, 0)}, max_norm=0.3
    ),
    "adagc per layer": smartclip.adagc(
        scope="per_layer", warmup_steps=5, absolute_clip=None, nonfinite="propagate"
    ),
    "norms times parameters": smartclip.autoclip(
        norm_of=lambda updates, params: jax.tree.map(jnp.multiply, updates, params), min_scale=0.01
    ),
}


@pytest.mark.parametrize("clipper", LOOPS.values(), ids=LOOPS)
def test_parts_and_state_equal_a_loop_that_calls_the_clipper_for_each_part(clipper):
    updates, states = run(smartclip.clip_micro_batches(clipper, reduce=None))
    parts, loop_states = looped(clipper)
    for number, (update, state) in enumerate(zip(updates, states, strict=True)):
        last = (number + 1) * PARTS
        assert_close(update, stack(jax.device_get(parts[last - PARTS : last])), rtol=1e-6)
        assert_close(state.clipper, loop_states[last - 1], rtol=1e-6)
    assert smartclip.metrics(states[-1])["num_clipped"].max() > 1


@pytest.mark.parametrize(("axis", "reduce"), [(1, "sum"), (-1, None)])
def test_parts_may_be_stacked_along_any_axis_and_summed(axis, reduce):
    batch = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    params = np.zeros((3, 2), np.float32)
    tx = smartclip.clip_micro_batches(smartclip.autoclip(max_norm=20.0), axis=axis, reduce=reduce)
    update, _ = jax.jit(tx.update)(np.moveaxis(batch, 0, axis), tx.init(params))
    norms = np.linalg.norm(batch.reshape(4, -1), axis=1)
    limits = np.minimum(reference.lower_fence_thresholds(norms), 20.0)
    clipped = batch * np.minimum(1, limits / norms)[:, None, None]
    expected = clipped.sum(0) if reduce else np.moveaxis(clipped, 0, axis)
    np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_without_parameters_the_leaves_of_a_part_have_their_shapes():
    tx = smartclip.clip_micro_batches(LOOPS["autoclip of slices"])
    state = tx.init(PARAMS)
    expected = tx.update(BATCHES[0], state, PARAMS)
    assert_same_bits(tx.update(BATCHES[0], state), expected)


@pytest.mark.parametrize("axis", [0, -1])
def test_parts_of_a_scalar_are_along_its_only_axis(axis):
    tx = smartclip.clip_micro_batches(smartclip.autoclip(), axis=axis)
    update, _ = tx.update(np.float32([1, 1, 100, 1]), tx.init(np.float32(0)), np.float32(0))
    assert update == pytest.approx((1 + 1 + 1.5 + 1) / 4)


def test_the_record_of_no_step_is_zero():
    state = smartclip.clip_micro_batches(smartclip.autoclip(scope="per_param")).init(PARAMS)
    groups = len(jax.tree.leaves(PARAMS))
    assert_same_bits(
        state.last,
        smartclip.MicroBatchMetrics(
            *(np.zeros(groups, dtype) for dtype in ("int32", "int32", "float32", "float32"))
        ),
    )


def test_means_in_low_precision_are_rounded_once_and_integers_come_from_the_first_part():
    params = {"low": np.zeros(2, jnp.bfloat16), "count": np.int32(0)}
    batch = {
        "low": np.asarray([[256.0, 5.0], [1.0, 0.0]] + 3 * [[0.0, 0.0]], jnp.bfloat16),
        "count": np.int32([7, 8, 9, 10, 11]),
    }
    clipper = smartclip.autoclip(warmup_steps=100)
    tx = smartclip.clip_micro_batches(clipper)
    update, _ = jax.jit(tx.update)(batch, tx.init(params), params)
    # A sum in bfloat16 would round 257 to 256, and the mean would be 51.25.
    assert update["low"].dtype == jnp.bfloat16
    assert np.asarray(update["low"], np.float32).tolist() == [51.5, 1.0]
    assert update["count"] == 7


def test_a_part_with_nan_costs_its_own_share_and_leaves_no_trace_in_the_history():
    start = run_of_autoclip()[1][1]
    bad, zero = (jax.tree.map(np.copy, BATCHES[0]) for _ in range(2))
    bad["body"]["bias"][3, 1] = np.nan
    for leaf in jax.tree.leaves(zero):
        leaf[3] = 0
    updates, state = UPDATE(bad, start, PARAMS)
    expected, state_of_zero = UPDATE(zero, start, PARAMS)
    assert_same_bits(updates, expected)
    assert_same_bits(state.clipper.rule, state_of_zero.clipper.rule)
    assert state.last.micro_batches_nonfinite == 1
    assert state.last.largest_micro_batch_norm == np.finfo(np.float32).max
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_batch_of_nothing_but_nan_is_zero():
    batch = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), BATCHES[0])
    updates, state = UPDATE(batch, MEAN_OF_CLIPPED.init(PARAMS), PARAMS)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert state.last.micro_batches_nonfinite == PARTS


# The fence after the first batch.
FENCE = reference.lower_fence_thresholds(np.append(NORMS[:PARTS], 1.0))[-1]


@hypothesis.given(
    place=st.integers(0, PARTS - 1),
    damage=st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([np.nan, np.inf]),
)
@hypothesis.settings(max_examples=25)
def test_any_damage_to_one_part_moves_the_update_by_no_more_than_its_share(place, damage):
    good = BATCHES[0]
    bad = jax.tree.map(np.copy, good)
    bad["scale"][place] = damage
    state = run_of_autoclip()[1][0]
    (before, _), (after, _) = (UPDATE(batch, state, PARAMS) for batch in (good, bad))
    moved = reference.norm(jax.tree.map(lambda a, b: np.float64(a) - b, after, before))
    # The good part and the damaged one are both clipped to the threshold at their place. One norm
    # can move the fences of the parts after them, but not far.
    assert moved <= 2 * 1.5 * FENCE / PARTS


def test_clipping_the_mean_loses_the_good_parts_of_a_damaged_batch():
    good, damaged = np.float32([1.0, 0.0]), np.float32([0.0, 1000.0])
    parts = np.stack([good] * 7 + [damaged])
    _, state = UPDATE(np.stack([good] * 8), MEAN_OF_CLIPPED.init(good), good)
    update, _ = UPDATE(parts, state, good)
    np.testing.assert_allclose(update, [7 / 8, 1 / 8], rtol=1e-5)
    as_a_whole = parts.mean(0) / np.linalg.norm(parts.mean(0))
    assert as_a_whole[0] < 0.01


def test_a_second_clipper_clips_the_mean():
    tx = optax.chain(MEAN_OF_CLIPPED, smartclip.autoclip(max_norm=0.05))
    updates, states = run(tx, BATCHES[:2])
    norms = [reference.norm(update) for update in run_of_autoclip()[0][:2]]
    np.testing.assert_allclose([reference.norm(update) for update in updates], 0.05, rtol=1e-5)
    record = smartclip.metrics(states[-1])
    np.testing.assert_allclose(record["1/grad_norm"], norms[-1], rtol=1e-5)
    assert (record["0/clipper/num_steps"], record["1/num_steps"]) == (2 * PARTS, 2)


def test_a_run_continues_from_a_state_saved_by_flax(tmp_path):
    _, states = run_of_autoclip()
    read = flax.serialization.from_bytes(
        MEAN_OF_CLIPPED.init(PARAMS), flax.serialization.to_bytes(states[-2])
    )
    _, state = UPDATE(BATCHES[-1], read, PARAMS)
    assert_same_bits(state, states[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clipper": optax.clip_by_global_norm(1.0)}, "`clipper` must be a clipper with a history"),
        ({"clipper": smartclip.agc()}, "`clipper` must be a clipper with a history"),
        ({"clipper": optax.chain(smartclip.autoclip())}, "not within a chain"),
        ({"clipper": smartclip.autoclip()._replace()}, "`clipper` must be a clipper with a"),
        ({"axis": True}, "`axis` must be a Python int or None, got True"),
        ({"axis": None}, "`axis` must be an int where `axis_name` names no axis"),
        ({"reduce": "median"}, "`reduce` must be one of 'mean', 'sum', None, got 'median'"),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        smartclip.clip_micro_batches(**{"clipper": smartclip.autoclip(), **arguments})


@pytest.mark.parametrize(
    ("w", "b", "message"),
    [
        ((3, 2), (3,), r"along axis 0 .* the shape \(2,\), got the shape \(3,\) for 'b'"),
        ((4, 3, 2), (), r"along axis 0 of every leaf .*got the shape \(\) for 'b'"),
        ((4, 3, 2), (5, 2), r"the same number of parts, at least 1, .*got \[4, 5\]"),
        ((0, 3, 2), (0, 2), r"the same number of parts, at least 1, .*got \[0\]"),
    ],
)
def test_gradients_that_are_not_parts_of_one_batch_are_refused(w, b, message):
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    state = MEAN_OF_CLIPPED.init(params)
    with pytest.raises(ValueError, match=message):
        MEAN_OF_CLIPPED.update({"w": jnp.zeros(w), "b": jnp.zeros(b)}, state, params)


def test_the_state_of_another_transformation_is_refused():
    state = smartclip.autoclip().init(PARAMS)
    with pytest.raises(ValueError, match="`state` must be the MicroBatchState"):
        MEAN_OF_CLIPPED.update(BATCHES[0], state, PARAMS)


# Optax's own parts.

aggregating = getattr(getattr(optax, "experimental", None), "aggregating", None)
microbatching = getattr(optax, "microbatching", None)


@pytest.mark.skipif(aggregating is None, reason="this Optax has no optax.experimental.aggregating")
def test_it_is_an_aggregator_of_optax_or_without_a_mean_a_transformation_before_one():
    assert isinstance(MEAN_OF_CLIPPED, aggregating.Aggregator)
    each = smartclip.clip_micro_batches(smartclip.autoclip(), reduce=None)
    assert not isinstance(each, aggregating.Aggregator)
    mean = aggregating.average_per_element_updates()
    expected, _ = run_of_autoclip()
    for before, aggregator in ((optax.identity(), MEAN_OF_CLIPPED), (each, mean)):
        tx = aggregating.process(before, aggregator, optax.sgd(1.0))
        assert isinstance(tx, aggregating.Aggregator)
        updates, _ = run(tx, BATCHES[:2])
        for update, wanted in zip(updates, expected[:2], strict=True):
            assert_close(update, jax.tree.map(np.negative, wanted), rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(microbatching is None, reason="this Optax has no optax.microbatching")
def test_in_an_accumulator_of_optax_the_clipper_sees_each_micro_batch():
    clipper, params = smartclip.autoclip(), jnp.ones(3)
    rows = np.float32(np.random.default_rng(0).normal(size=(12, 3)))
    rows[5] *= 1000

    def loss(params, rows):
        return jnp.mean((rows @ params - 1) ** 2)

    def clipped_sum(state):
        def add(carry, grads, index):
            total, state = carry
            clipped, state = clipper.update(grads, state, params)
            return total + clipped, state

        return microbatching.Accumulator(
            init=lambda like: (jnp.zeros(like.shape, like.dtype), state),
            update=add,
            finalize=lambda carry: carry,
            aggregate=None,
        )

    @jax.jit
    def total(params, rows, state):
        sum_of = microbatching.microbatch(jax.grad(loss), 1, 3, clipped_sum(state))
        return sum_of(params, rows)

    actual, state = total(params, rows, clipper.init(params))
    # In Optax, a micro-batch consists of every fourth row.
    slope = jax.jit(jax.grad(loss))
    grads = [slope(params, rows[start::4]) for start in range(4)]
    tx = smartclip.clip_micro_batches(clipper, reduce="sum")
    expected, stacked_state = jax.jit(tx.update)(np.stack(grads), tx.init(params), params)
    assert_close((actual, state), (expected, stacked_state.clipper), rtol=1e-5)
    assert smartclip.metrics(state)["num_clipped"] > 0
