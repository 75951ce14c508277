"""Training with the transformations of `optax.contrib`, and with those that need extra arguments.

Some of them are written again in NumPy. For the others, a loop in NumPy clips the gradients by hand
and passes them to the same optimizer without a clipper. The last tests differentiate whole training
loops.
"""

import itertools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from breadth import each_value, long_but
from compat import enable_x64
from regression import (
    BY_HAND,
    INPUTS,
    PARAMS,
    RATE,
    TARGETS,
    Autoclip,
    assert_same_params,
    descend,
    gradient,
    loss,
    train,
    train_by_hand,
    value,
)

import optax_smartclip as smartclip

# The wrappers do not know their clipper: one is enough by default.
with_autoclip, with_agc = (
    pytest.mark.parametrize("name", long_but({name}, BY_HAND)) for name in ("autoclip", "agc")
)

ASCENT = 0.5


class Driven:
    """An Optax optimizer in a loop in NumPy."""

    def __init__(self, tx):
        self.state = tx.init(PARAMS)
        self.update = jax.jit(optax.with_extra_args_support(tx).update)

    def __call__(self, *args, **extra_args):
        (grads, params), extra_args = jax.tree.map(np.float32, (args, extra_args))
        updates, self.state = self.update(grads, self.state, params, **extra_args)
        return jax.tree.map(np.float64, updates)


def num_clipped(history):
    return int(smartclip.metrics(history[-1][1])["num_clipped"])


def plus(a, b):
    return jax.tree.map(np.add, a, b)


def minus(a, b):
    return jax.tree.map(np.subtract, a, b)


def times(factor, a):
    return jax.tree.map(lambda leaf: factor * leaf, a)


def dot(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: np.sum(x * y), a, b)))


def no_extra_args(value, grads, batch):
    del value, grads, batch
    return {}


def ascend(grads, params):
    del params
    return times(ASCENT / reference.norm(grads), grads)


def sam_by_hand(ascend, step):
    """Every other step starts where the one before it did, with the gradient found there."""
    start, counter = None, itertools.count()

    def update(grads, params):
        nonlocal start
        if next(counter) % 2 == 0:
            start = params
            return ascend(grads, params)
        return minus(plus(start, step(grads, start)), params)

    return update


@with_autoclip
def test_in_the_outer_optimizer_of_sam_the_clipper_sees_every_other_gradient(name):
    clipper = BY_HAND[name]
    tx = optax.contrib.sam(
        optax.chain(clipper.factory(), optax.sgd(RATE)),
        optax.chain(optax.contrib.normalize(), optax.sgd(ASCENT)),
    )
    with jax.numpy_dtype_promotion("standard"):  # sam multiplies states by a bool.
        history = train(tx, extra_args=no_extra_args)
    clip = clipper()
    update = sam_by_hand(ascend, lambda grads, params: descend(clip(grads, params)))
    assert_same_params(history, train_by_hand(update))
    num_steps = [int(smartclip.metrics(state)["num_steps"]) for _, state in history]
    assert num_steps == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert num_clipped(history) > 0


def test_in_the_ascent_of_sam_the_clipper_must_not_be_reset_to_learn():
    def run(reset_state):
        tx = optax.contrib.sam(
            optax.sgd(RATE),
            optax.chain(Autoclip.factory(), optax.sgd(ASCENT)),
            reset_state=reset_state,
        )
        with jax.numpy_dtype_promotion("standard"):  # sam multiplies states by a bool.
            return train(tx, INPUTS[1:], TARGETS[1:], extra_args=no_extra_args)

    def by_hand(clip):
        update = sam_by_hand(
            lambda grads, params: times(ASCENT, clip(grads, params)),
            lambda grads, params: descend(grads),
        )
        return train_by_hand(update, INPUTS[1:], TARGETS[1:])

    kept = run(reset_state=False)
    assert_same_params(kept, by_hand(Autoclip()))
    assert num_clipped(kept) > 0
    # The first norm of a history is its median, so no gradient is clipped.
    assert_same_params(run(reset_state=True), by_hand(lambda grads, params: grads))


@with_agc
def test_opaque_sam_clips_only_the_gradient_that_it_descends(name):
    clipper = BY_HAND[name]
    tx = optax.contrib.sam(
        optax.chain(clipper.factory(), optax.sgd(RATE)),
        optax.chain(optax.contrib.normalize(), optax.sgd(ASCENT)),
        opaque_mode=True,
    )

    def give_gradient(value, grads, batch):
        del value, grads
        return {"grad_fn": lambda params, _: jax.grad(loss)(params, *batch)}

    history = train(tx, extra_args=give_gradient)
    clip, batches = clipper(), zip(INPUTS, TARGETS, strict=True)

    def update(grads, params):
        there = gradient(plus(params, ascend(grads, params)), *next(batches))
        return descend(clip(there, params))

    assert_same_params(history, train_by_hand(update))
    assert int(smartclip.metrics(history[-1][1])["num_steps"]) == 12
    assert num_clipped(history) > 0


def test_transparent_sam_changes_a_type_of_the_state_which_a_scan_refuses():
    def trained(opaque_mode):
        tx = optax.contrib.sam(
            optax.chain(smartclip.autoclip(), optax.sgd(RATE)),
            optax.chain(optax.contrib.normalize(), optax.sgd(ASCENT)),
            opaque_mode=opaque_mode,
        )

        def step(carry, batch):
            params, state = carry
            extra_args = {"grad_fn": lambda params, _: jax.grad(loss)(params, *batch)}
            grads = jax.grad(loss)(params, *batch)
            updates, state = tx.update(grads, state, params, **extra_args if opaque_mode else {})
            return (optax.apply_updates(params, updates), state), None

        with jax.numpy_dtype_promotion("standard"):  # sam multiplies states by a bool.
            return jax.eval_shape(
                lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), (INPUTS, TARGETS))
            )

    trained(opaque_mode=True)
    with pytest.raises(TypeError, match="carry"):
        trained(opaque_mode=False)


@pytest.mark.parametrize(("name", "outside"), each_value(BY_HAND, [True, False]))
def test_schedule_free_averages_steps_along_clipped_gradients(name, outside):
    clipper = BY_HAND[name]

    def schedule_free(base):
        return optax.contrib.schedule_free(base, RATE, b1=0.9)

    if outside:
        tx = optax.chain(clipper.factory(), schedule_free(optax.sgd(RATE)))
    else:
        tx = schedule_free(optax.chain(clipper.factory(), optax.sgd(RATE)))
    clip, averages = clipper(), []
    fast = slow = jax.tree.map(np.float64, PARAMS)

    def update(grads, params):
        nonlocal fast, slow
        fast = plus(fast, descend(clip(grads, params)))
        weight = 1 / (len(averages) + 1)
        slow = plus(times(1 - weight, slow), times(weight, fast))
        averages.append(slow)
        return minus(plus(times(0.9, slow), times(0.1, fast)), params)

    history = train(tx)
    assert_same_params(history, train_by_hand(update))
    for_eval = [
        (optax.contrib.schedule_free_eval_params(state[-1] if outside else state, params), state)
        for params, state in history
    ]
    assert_same_params(for_eval, averages)
    assert num_clipped(history) > 0


@with_autoclip
def test_before_mechanize_the_clipper_bounds_the_gradient_that_sets_the_rate(name):
    clipper = BY_HAND[name]

    def mechanize():
        return optax.contrib.mechanize(optax.sgd(1.0), s_init=0.1)

    history = train(optax.chain(clipper.factory(), mechanize()))
    clip, tune = clipper(), Driven(mechanize())
    expected = train_by_hand(lambda grads, params: tune(clip(grads, params), params))
    assert_same_params(history, expected)
    assert num_clipped(history) > 0


@with_agc
def test_inside_mechanize_the_clipper_bounds_the_step_but_not_the_gradient_that_sets_the_rate(name):
    clipper = BY_HAND[name]
    inner = optax.chain(clipper.factory(), optax.sgd(1.0))
    history = train(optax.contrib.mechanize(inner, s_init=0.1))
    # Mechanize gets the raw gradient, and the clipped step as that of its base optimizer.
    given = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda grads, state, params, step: (step, state)
    )
    clip, tune = clipper(), Driven(optax.contrib.mechanize(given, s_init=0.1))
    expected = train_by_hand(
        lambda grads, params: tune(grads, params, step=times(-1.0, clip(grads, params)))
    )
    assert_same_params(history, expected)
    assert num_clipped(history) > 0


@with_agc
def test_before_muon_the_clipper_bounds_the_share_of_a_gradient_in_the_momentum(name):
    clipper = BY_HAND[name]
    with jax.numpy_dtype_promotion("standard"):  # muon raises a float to the power of an int32.
        history = train(optax.chain(clipper.factory(), optax.contrib.muon(RATE)))
        unclipped = train(optax.contrib.muon(RATE))
        clip, muon = clipper(), Driven(optax.contrib.muon(RATE))
        expected = train_by_hand(lambda grads, params: muon(clip(grads, params), params))
    assert_same_params(history, expected)
    # Muon makes all steps equally long, so the clipper changes only later directions.
    assert reference.norm(minus(history[-1][0], unclipped[-1][0])) > 0.1
    assert num_clipped(history) > 0


@with_autoclip
def test_reduce_on_plateau_scales_the_clipped_step_by_the_value(name):
    clipper = BY_HAND[name]
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    tx = optax.chain(clipper.factory(), optax.sgd(RATE), plateau)
    with jax.numpy_dtype_promotion("standard"):  # reduce_on_plateau multiplies int32 and float32.
        history = train(tx)
    clip, batches = clipper(), zip(INPUTS, TARGETS, strict=True)
    scale, best, waited = 1.0, np.inf, 0

    def update(grads, params):
        nonlocal scale, best, waited
        now = value(params, *next(batches))
        waited = 0 if now < (1 - 1e-4) * best else waited + 1
        best = min(now, best)
        if waited == 2:
            scale, waited = scale / 2, 0
        return times(scale, descend(clip(grads, params)))

    assert_same_params(history, train_by_hand(update))
    assert scale < 1
    assert num_clipped(history) > 0


@pytest.mark.parametrize("place", ["before", "after"])
def test_after_differentially_private_aggregate_no_example_moves_more_than_its_share(place):
    # Two batches of four gradients of norm 1, which differ in one.
    examples = [np.array([1.0, 1.0, 1.0, last], np.float32)[:, None] for last in (1.0, -1e6)]
    private = optax.contrib.differentially_private_aggregate(1.0, 0.0, key=jax.random.key(0))
    links = [smartclip.autoclip(max_norm=2.0), private]
    tx = optax.chain(*links) if place == "before" else optax.chain(*links[::-1])
    means = [jax.jit(tx.update)(grads, tx.init(np.float32([0.0])))[0] for grads in examples]
    moved = float(jnp.linalg.norm(means[1] - means[0]))
    share = 2 * 1.0 / 4  # From one example's limit in one direction to its limit in the other.
    if place == "after":
        assert moved <= share * (1 + 1e-6)
    else:
        assert moved > 2 * share  # It scales all other examples, too.


def test_inside_split_real_and_imaginary_a_complex_leaf_is_two_leaves():
    grads = {"w": np.complex64([3 + 4j])}
    split = optax.contrib.split_real_and_imaginary

    def clipped(wrap, scope):
        tx = wrap(smartclip.autoclip(max_norm=1.0, scope=scope))
        return jax.jit(tx.update)(grads, tx.init(grads), grads)[0]["w"]

    with jax.numpy_dtype_promotion("standard"):  # It multiplies by a Python complex number.
        np.testing.assert_allclose(clipped(split, "global"), [0.6 + 0.8j], rtol=1e-6)
        np.testing.assert_allclose(clipped(lambda tx: tx, "per_param"), [0.6 + 0.8j], rtol=1e-6)
        np.testing.assert_allclose(clipped(split, "per_param"), [1 + 1j], rtol=1e-6)


@pytest.mark.parametrize("place", ["before", "after"])
def test_polyak_sgd_takes_its_rate_from_the_norm_that_it_is_given(place):
    links = [Autoclip.factory(), optax.polyak_sgd(max_learning_rate=1.0)]
    history = train(optax.chain(*links) if place == "before" else optax.chain(*links[::-1]))
    clip, batches = Autoclip(), zip(INPUTS, TARGETS, strict=True)

    def polyak(grads, params):
        rate = value(params, *next(batches)) / dot(grads, grads)
        return times(-min(rate, 1.0), grads)

    def update(grads, params):
        if place == "before":
            return polyak(clip(grads, params), params)
        return clip(polyak(grads, params), params)

    assert_same_params(history, train_by_hand(update))
    assert num_clipped(history) > 0


def test_a_line_search_after_the_clipper_is_given_its_arguments():
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=30)
    tx = optax.chain(Autoclip.factory(), optax.sgd(1.0), search)

    def give_function(value, grads, batch):
        inputs, targets = batch
        function = {"value": value, "grad": grads, "value_fn": loss}
        return {**function, "inputs": inputs, "targets": targets}

    history = train(tx, extra_args=give_function)
    clip, batches, rates = Autoclip(), zip(INPUTS, TARGETS, strict=True), [1.0]

    def update(grads, params):
        batch = next(batches)
        direction = times(-1.0, clip(grads, params))
        rate = min(1.5 * rates[-1], 1.0)

        def is_too_long(rate):
            enough = value(params, *batch) + 1e-4 * rate * dot(direction, grads)
            return value(plus(params, times(rate, direction)), *batch) > enough

        while is_too_long(rate):
            rate *= 0.8
        rates.append(rate)
        return times(rate, direction)

    assert_same_params(history, train_by_hand(update))
    assert min(rates) < 1
    assert num_clipped(history) > 0


# Five batches for training, with the spike, and a sixth for the outer loss.
SPIKE = tuple(array[1:6].astype(np.float64) for array in (INPUTS, TARGETS))
JUDGES = tuple(array[7].astype(np.float64) for array in (INPUTS, TARGETS))


def adapt(params, rate, batches):
    """Inner training. Returns the parameters and the clipper's record of each step."""
    tx = optax.chain(Autoclip.factory(), optax.sgd(rate))

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), smartclip.metrics(state)

    (params, _), records = jax.lax.scan(step, (params, tx.init(params)), batches)
    return params, records


def adapt_by_hand(params, rate, batches):
    clip = Autoclip()
    for batch in zip(*batches, strict=True):
        params = minus(params, times(rate, clip(gradient(params, *batch), params)))
    return params


def finite_differences(function, tree, size=1e-5):
    def slope(direction):
        ends = [jax.tree.map(np.float64, unravel(flat + by * direction)) for by in (size, -size)]
        return (function(ends[0]) - function(ends[1])) / (2 * size)

    with enable_x64(True):  # Without it, the tree would be rounded to float32.
        flat, unravel = jax.flatten_util.ravel_pytree(tree)
        slopes = unravel(np.array([slope(direction) for direction in np.eye(flat.size)]))
        return jax.tree.map(np.float64, slopes)


@pytest.mark.long
@pytest.mark.parametrize("first", ["spike", "zero"])
def test_the_gradient_through_clipped_training_is_that_of_finite_differences(first):
    inputs, targets = (array.copy() for array in SPIKE)
    start = jax.tree.map(np.float64, PARAMS)
    if first == "zero":
        inputs[0] = targets[0] = start["b"][:] = 0
    learned = {"params": start, "rate": np.float64(RATE)}

    def outer_loss(learned):
        params, records = adapt(**learned, batches=(inputs, targets))
        return loss(params, *JUDGES), records

    def outer_loss_by_hand(learned):
        return value(adapt_by_hand(**learned, batches=(inputs, targets)), *JUDGES)

    with enable_x64(True):
        slopes, records = jax.jit(jax.grad(outer_loss, has_aux=True))(learned)
    expected = finite_differences(outer_loss_by_hand, learned)
    assert records["clipped"][4]
    assert (records["grad_norm"][0] == 0) == (first == "zero")
    assert all(np.all(np.isfinite(slope)) for slope in jax.tree.leaves(slopes))
    if first == "zero":
        # With another bias, the first gradient is not zero and the history differs.
        del slopes["params"]["b"], expected["params"]["b"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), slopes, expected)


def test_outer_training_through_clipped_inner_training_lowers_the_outer_loss():
    # Two tasks, each with five batches and one for the outer loss. The first has the spike.
    batches = tuple(np.stack([array[1:6], array[6:11]]) for array in (INPUTS, TARGETS))
    judges = tuple(array[[0, 11]] for array in (INPUTS, TARGETS))

    def outer_loss(params):
        def task_loss(batches, judge):
            adapted, records = adapt(params, RATE, batches)
            return loss(adapted, *judge), records["num_clipped"]

        losses, nums_clipped = jax.vmap(task_loss)(batches, judges)
        return jnp.mean(losses), nums_clipped

    def outer_loss_by_hand(params):
        tasks = zip(zip(*batches, strict=True), zip(*judges, strict=True), strict=True)
        return np.mean([value(adapt_by_hand(params, RATE, data), *judge) for data, judge in tasks])

    # The norms of the outer gradient fall, so they exceed `max_norm` but not their median.
    tx = optax.chain(Autoclip.factory(max_norm=0.5), optax.sgd(RATE))

    @jax.jit
    def step(params, state):
        (value, nums_clipped), grads = jax.value_and_grad(outer_loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, nums_clipped

    params, state = PARAMS, tx.init(PARAMS)
    by_hand = jax.tree.map(np.float64, PARAMS)
    losses = [outer_loss_by_hand(by_hand)]
    for _ in range(3):
        params, state, before, nums_clipped = step(params, state)
        np.testing.assert_allclose(before, losses[-1], rtol=1e-4)
        grads = finite_differences(outer_loss_by_hand, by_hand)
        by_hand = plus(by_hand, descend(times(min(1, 0.5 / reference.norm(grads)), grads)))
        assert_same_params([(params, state)], [by_hand])
        losses.append(outer_loss_by_hand(by_hand))
        assert np.all(nums_clipped[:, -1] > 0)
    assert smartclip.metrics(state)["num_clipped"] == 3
    assert losses == sorted(losses, reverse=True)
