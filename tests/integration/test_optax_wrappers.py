"""Training under Optax's wrappers equals a loop in float64 NumPy that clips by hand.

The tests show which gradients and parameters a clipper sees at each place in a wrapper.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from breadth import each_value, long_but
from regression import (
    BY_HAND,
    INPUTS,
    PARAMS,
    RATE,
    TARGETS,
    WINDOW,
    Agc,
    Autoclip,
    assert_same_params,
    descend,
    train,
    train_by_hand,
)

import optax_smartclip as smartclip

# The wrappers do not know their clipper: one is enough by default.
with_autoclip, with_agc = (
    pytest.mark.parametrize("name", long_but({name}, BY_HAND)) for name in ("autoclip", "agc")
)


@pytest.mark.parametrize(("name", "chain"), each_value(BY_HAND, ["chain", "named_chain"]))
def test_in_a_chain_the_optimizer_sees_the_clipped_gradient(name, chain):
    clipper = BY_HAND[name]
    links = [("clip", clipper.factory()), ("optimizer", optax.sgd(RATE, momentum=0.9))]
    tx = optax.named_chain(*links) if chain == "named_chain" else optax.chain(*dict(links).values())
    clip, trace = clipper(), jax.tree.map(np.zeros_like, PARAMS)

    def update(grads, params):
        nonlocal trace
        trace = jax.tree.map(lambda old, new: 0.9 * old + new, trace, clip(grads, params))
        return descend(trace)

    history = train(tx)
    assert_same_params(history, train_by_hand(update))
    assert smartclip.metrics(history[-1][1])["num_clipped"] > 0


def test_weight_decay_is_clipped_only_before_the_clipper():
    decay = optax.add_decayed_weights(0.5)
    clip = Autoclip()

    def decayed(grads, params):
        return jax.tree.map(lambda grad, param: grad + 0.5 * param, grads, params)

    after = train(optax.chain(Autoclip.factory(), decay, optax.sgd(RATE)))
    expected = train_by_hand(lambda grads, params: descend(decayed(clip(grads, params), params)))
    assert_same_params(after, expected)
    clip = Autoclip()
    before = train(optax.chain(decay, Autoclip.factory(), optax.sgd(RATE)))
    expected = train_by_hand(lambda grads, params: descend(clip(decayed(grads, params), params)))
    assert_same_params(before, expected)


def test_the_applied_step_has_the_norm_of_the_threshold():
    history = train(optax.chain(Autoclip.factory(), optax.sgd(RATE)))
    (before, _), (after, state) = history[4:6]
    record = smartclip.metrics(state)
    assert record["clipped"]
    norm = reference.norm(jax.tree.map(np.subtract, after, before)) / RATE
    np.testing.assert_allclose(norm, record["clip_threshold"], rtol=1e-5)
    assert norm < record["grad_norm"] / 10


class Adam:
    """By hand. The mean has a short memory, so that a spike shows in the update, too."""

    factory = staticmethod(lambda: optax.adam(RATE, b1=0.5))

    def __init__(self):
        self.mean = self.square = jax.tree.map(np.zeros_like, PARAMS)
        self.count = 0

    def __call__(self, grads):
        self.count += 1
        self.mean = jax.tree.map(lambda m, g: 0.5 * m + 0.5 * g, self.mean, grads)
        self.square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g**2, self.square, grads)
        unbias = [1 - decay**self.count for decay in (0.5, 0.999)]
        return jax.tree.map(
            lambda m, s: -RATE * (m / unbias[0]) / (np.sqrt(s / unbias[1]) + 1e-8),
            self.mean,
            self.square,
        )


def test_after_adam_the_clipper_bounds_the_step_and_before_it_the_moments():
    with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to the power of an int32.
        after = train(optax.chain(Adam.factory(), Autoclip.factory()))
        before = train(optax.chain(Autoclip.factory(), Adam.factory()))
    adam, clip = Adam(), Autoclip()
    assert_same_params(after, train_by_hand(lambda grads, params: clip(adam(grads), params)))
    adam, clip = Adam(), Autoclip()
    assert_same_params(before, train_by_hand(lambda grads, params: adam(clip(grads, params))))

    def at_the_spike(history):
        (old, _), (new, state) = history[4:6]
        record = smartclip.metrics(state)
        assert record["clipped"]
        squares = sum(np.sum(leaf) for leaf in jax.tree.leaves(optax.tree.get(state, "nu")))
        step = reference.norm(jax.tree.map(np.subtract, new, old))
        return step, np.sqrt(squares / 0.001), record

    step, remembered, record = at_the_spike(after)
    np.testing.assert_allclose(step, record["clip_threshold"], rtol=1e-5)
    assert step < record["grad_norm"] / 1.5  # The norm of Adam's update.
    assert remembered > 100
    _, remembered, record = at_the_spike(before)
    limits = [smartclip.metrics(state)["clip_threshold"] for _, state in before[:6]]
    assert remembered <= np.linalg.norm(limits) < record["grad_norm"] / 10


@with_agc
def test_under_masked_the_norm_is_that_of_the_leaves_in_the_mask(name):
    clipper = BY_HAND[name]
    tx = optax.chain(optax.masked(clipper.factory(), {"w": True, "b": False}), optax.sgd(RATE))
    clip = clipper()

    def update(grads, params):
        clipped = clip({"w": grads["w"]}, {"w": params["w"]})
        return descend({"w": clipped["w"], "b": grads["b"]})

    assert_same_params(train(tx), train_by_hand(update))


@pytest.mark.parametrize(
    ("name", "partition"), each_value(BY_HAND, ["partition", "multi_transform"])
)
def test_under_partition_each_part_has_its_own_clipper(name, partition):
    clipper = BY_HAND[name]
    # Two rates show that each part also has its own optimizer.
    tx = getattr(optax, partition)(
        {
            "weights": optax.chain(clipper.factory(), optax.sgd(RATE)),
            "biases": optax.chain(clipper.factory(), optax.sgd(RATE / 2)),
        },
        {"w": "weights", "b": "biases"},
    )
    clips = {"w": clipper(), "b": clipper()}

    def update(grads, params):
        clipped = {key: clips[key]({key: grads[key]}, {key: params[key]})[key] for key in grads}
        return {"w": -RATE * clipped["w"], "b": -RATE / 2 * clipped["b"]}

    history = train(tx)
    assert_same_params(history, train_by_hand(update))
    record = smartclip.metrics(history[-1][1])
    assert len(record) == 2 * len(smartclip.ClipMetrics._fields)
    assert sum(name.endswith("/grad_norm") for name in record) == 2


def test_max_norm_in_each_of_two_parts_does_not_bound_the_whole_gradient():
    grads = {"w": np.full((3, 2), 10.0, np.float32), "b": np.full(2, 10.0, np.float32)}

    def norm_after(tx):
        updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS))
        return reference.norm(updates)

    parts = {label: Autoclip.factory(max_norm=1.0) for label in ("w", "b")}
    inside = optax.partition(parts, {"w": "w", "b": "b"})
    np.testing.assert_allclose(norm_after(inside), np.sqrt(2), rtol=1e-6)
    identities = {label: optax.identity() for label in ("w", "b")}
    outside = optax.chain(
        Autoclip.factory(max_norm=1.0), optax.partition(identities, {"w": "w", "b": "b"})
    )
    np.testing.assert_allclose(norm_after(outside), 1.0, rtol=1e-6)


@with_autoclip
def test_inside_multisteps_the_clipper_sees_the_mean_gradient_once(name):
    clipper = BY_HAND[name]
    tx = optax.MultiSteps(optax.chain(clipper.factory(), optax.sgd(RATE)), every_k_schedule=4)
    clip, seen = clipper(), []

    def update(grads, params):
        seen.append(grads)
        if len(seen) % 4:
            return jax.tree.map(np.zeros_like, grads)
        return descend(clip(jax.tree.map(lambda *g: np.mean(g, axis=0), *seen[-4:]), params))

    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides float32 by int32.
        history = train(tx.gradient_transformation())
    assert_same_params(history, train_by_hand(update))
    num_steps = [int(smartclip.metrics(state)["num_steps"]) for _, state in history]
    assert num_steps == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_outside_multisteps_the_clipper_sees_every_micro_step():
    inner = optax.MultiSteps(optax.sgd(RATE), every_k_schedule=4).gradient_transformation()
    clip, seen = Autoclip(), []

    def update(grads, params):
        seen.append(clip(grads, params))
        if len(seen) % 4:
            return jax.tree.map(np.zeros_like, grads)
        return descend(jax.tree.map(lambda *g: np.mean(g, axis=0), *seen[-4:]))

    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides float32 by int32.
        history = train(optax.chain(Autoclip.factory(), inner))
    assert_same_params(history, train_by_hand(update))
    assert int(smartclip.metrics(history[-1][1])["num_steps"]) == 12


class ApplyEvery:
    """By hand: the sum of two updates in every second step, and zeros in the others."""

    factory = staticmethod(lambda: optax.apply_every(2))

    def __init__(self):
        self.seen = []

    def __call__(self, updates):
        self.seen.append(updates)
        if len(self.seen) % 2:
            return jax.tree.map(np.zeros_like, updates)
        return jax.tree.map(lambda *parts: sum(parts), *self.seen[-2:])


@pytest.mark.parametrize(("name", "place"), each_value(BY_HAND, ["before", "after"]))
def test_before_apply_every_each_micro_gradient_is_clipped_and_after_it_their_sum(name, place):
    clipper = BY_HAND[name]
    links = [clipper.factory(), ApplyEvery.factory()]
    links = links if place == "before" else links[::-1]
    clip, add = clipper(), ApplyEvery()

    def update(grads, params):
        if place == "before":
            return descend(add(clip(grads, params)))
        total = add(grads)
        return descend(clip(total, params) if len(add.seen) % 2 == 0 else total)

    with jax.numpy_dtype_promotion("standard"):  # apply_every multiplies a float by a bool.
        history = train(optax.chain(*links, optax.sgd(RATE)))
    assert_same_params(history, train_by_hand(update))
    record = smartclip.metrics(history[-1][1])
    assert int(record["num_steps"]) == 12
    assert int(record["num_clipped"]) > 0


def test_a_clipper_after_apply_every_does_not_learn_from_the_zeros_between_the_sums():
    grads = {"w": np.float32([0.6, 0.8])}

    def learned(tx):
        update, state = jax.jit(tx.update), tx.init(grads)
        for size in range(12, 0, -1):
            _, state = update({"w": np.float32(size) * grads["w"]}, state)
        return smartclip.metrics(state)["clip_threshold"]

    with jax.numpy_dtype_promotion("standard"):  # apply_every multiplies a float by a bool.
        threshold = learned(optax.chain(optax.apply_every(2), Autoclip.factory()))
    # The median of the last five sums: 10 + 9, 8 + 7, 6 + 5, 4 + 3 and 2 + 1.
    np.testing.assert_allclose(threshold, 11.0, rtol=1e-6)


@pytest.mark.parametrize("place", ["first", "last"])
def test_with_adam_and_apply_every_the_clipper_comes_first_or_last(place):
    links = [Agc.factory(), Adam.factory(), ApplyEvery.factory()]
    links = links if place == "first" else [*links[1:], links[0]]
    clip, adam, add = Agc(), Adam(), ApplyEvery()

    def update(grads, params):
        if place == "first":
            return add(adam(clip(grads, params)))
        total = add(adam(grads))
        return clip(total, params) if len(add.seen) % 2 == 0 else total

    with jax.numpy_dtype_promotion("standard"):  # apply_every multiplies a float by a bool.
        history = train(optax.chain(*links))
    assert_same_params(history, train_by_hand(update))
    assert int(smartclip.metrics(history[-1][1])["num_clipped"]) > 0


@pytest.mark.parametrize("place", ["before", "after"])
def test_apply_every_keeps_a_nan_forever_unless_a_clipper_before_it_removes_it(place):
    targets = TARGETS.copy()
    targets[1] = np.nan
    links = [Autoclip.factory(), ApplyEvery.factory()]
    links = links if place == "before" else links[::-1]
    with jax.numpy_dtype_promotion("standard"):  # apply_every multiplies a float by a bool.
        history = train(optax.chain(*links, optax.sgd(RATE)), targets=targets)
    # Every later sum is NaN, too, and a clipper after `apply_every` makes zeros of it.
    num_nonfinite = int(smartclip.metrics(history[-1][1])["num_nonfinite"])
    assert num_nonfinite == (1 if place == "before" else 11)
    moved = np.any(history[-1][0]["w"] != history[0][0]["w"])
    assert moved == (place == "before")


@pytest.mark.parametrize(
    ("should_skip", "largest"),
    [
        (optax.skip_not_finite, np.inf),
        (functools.partial(optax.skip_large_updates, max_squared_norm=50.0**2), 50.0),
    ],
    ids=["skip_not_finite", "skip_large_updates"],
)
def test_micro_steps_that_multisteps_skips_are_not_seen_by_the_clipper(should_skip, largest):
    targets = TARGETS.copy()
    targets[[3, 7]] = np.nan
    inner = optax.chain(Autoclip.factory(), optax.sgd(RATE))
    tx = optax.MultiSteps(inner, every_k_schedule=2, should_skip_update_fn=should_skip)
    clip, kept, num_steps = Autoclip(), [], []

    def update(grads, params):
        step = jax.tree.map(np.zeros_like, grads)
        if reference.norm(grads) < largest:
            kept.append(grads)
            if len(kept) % 2 == 0:
                step = descend(clip(jax.tree.map(lambda a, b: (a + b) / 2, *kept[-2:]), params))
        num_steps.append(len(kept) // 2)
        return step

    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides float32 by int32.
        history = train(tx.gradient_transformation(), targets=targets)
    assert_same_params(history, train_by_hand(update, targets=targets))
    assert len(kept) == (10 if largest == np.inf else 9)  # The spike is too large for the second.
    for (_, state), expected in zip(history, num_steps, strict=True):
        assert int(smartclip.metrics(state)["num_steps"]) == expected
        assert int(state.gradient_step) == expected
    record = smartclip.metrics(history[-1][1])
    assert int(record["num_nonfinite"]) == 0
    assert int(record["num_clipped"]) > 0


def test_inject_hyperparams_schedules_the_percentile():
    clipper = optax.inject_hyperparams(smartclip.autoclip)(
        percentile=optax.linear_schedule(90.0, 10.0, transition_steps=8),
        history=smartclip.ring_buffer(WINDOW),
    )
    norms, limits = [], []

    def update(grads, params):
        percentile = max(90.0 - 10.0 * len(norms), 10.0)
        norms.append(reference.norm(grads))
        limits.append(np.percentile(norms[-WINDOW:], percentile))
        scale = min(1.0, limits[-1] / norms[-1])
        return descend(jax.tree.map(lambda grad: scale * grad, grads))

    history = train(optax.chain(clipper, optax.sgd(RATE)))
    assert_same_params(history, train_by_hand(update))
    thresholds = [smartclip.metrics(state)["clip_threshold"] for _, state in history]
    np.testing.assert_allclose(thresholds, limits, rtol=1e-5)
    assert smartclip.metrics(history[-1][1])["num_clipped"] > 0


def test_inject_hyperparams_schedules_max_norm_together_with_the_rate():
    @optax.inject_hyperparams
    def optimizer(learning_rate, max_norm):
        return optax.chain(Autoclip.factory(max_norm=max_norm), optax.sgd(learning_rate))

    tx = optimizer(learning_rate=RATE, max_norm=lambda count: jnp.where(count < 4, 2.0, 0.5))
    clip, steps = Autoclip(), iter(range(12))

    def update(grads, params):
        clip(grads, params)
        limit = min(clip.limit, 2.0 if next(steps) < 4 else 0.5)
        scale = min(1, limit / reference.norm(grads))
        return descend(jax.tree.map(lambda grad: scale * grad, grads))

    history = train(tx)
    assert_same_params(history, train_by_hand(update))
    assert float(history[-1][1].hyperparams["max_norm"]) == 0.5


def test_apply_if_finite_hides_a_bad_step_from_the_clipper():
    targets = TARGETS.copy()
    targets[[3, 7]] = np.nan
    tx = optax.apply_if_finite(optax.chain(Autoclip.factory(), optax.sgd(RATE)), 3)
    history = train(tx, targets=targets)
    clip = Autoclip()

    def update(grads, params):
        if not np.isfinite(grads["w"]).all():
            return jax.tree.map(np.zeros_like, grads)
        return descend(clip(grads, params))

    assert_same_params(history, train_by_hand(update, targets=targets))
    record = smartclip.metrics(history[-1][1])
    assert int(record["num_steps"]) == 10
    assert int(record["num_nonfinite"]) == 0


def test_without_a_wrapper_a_bad_step_is_a_zero_gradient_for_the_optimizer():
    targets = TARGETS.copy()
    targets[[3, 7]] = np.nan
    clip, trace = Autoclip(), jax.tree.map(np.zeros_like, PARAMS)

    def update(grads, params):
        nonlocal trace
        finite = np.isfinite(grads["w"]).all()
        clipped = clip(grads, params) if finite else jax.tree.map(np.zeros_like, grads)
        trace = jax.tree.map(lambda old, new: 0.9 * old + new, trace, clipped)
        return descend(trace)

    tx = optax.chain(Autoclip.factory(), optax.sgd(RATE, momentum=0.9))
    history = train(tx, targets=targets)
    assert_same_params(history, train_by_hand(update, targets=targets))
    record = smartclip.metrics(history[-1][1])
    assert int(record["num_steps"]) == 12
    assert int(record["num_nonfinite"]) == 2


def test_flatten_changes_nothing_for_a_global_norm():
    flat = train(optax.chain(optax.flatten(Autoclip.factory()), optax.sgd(RATE)))
    clip = Autoclip()
    assert_same_params(flat, train_by_hand(lambda grads, params: descend(clip(grads, params))))


def test_lookahead_clips_the_gradient_at_the_fast_weights():
    tx = optax.lookahead(
        optax.chain(Autoclip.factory(), optax.sgd(RATE)), sync_period=3, slow_step_size=0.5
    )
    params = optax.LookaheadParams.init_synced(PARAMS)
    with jax.numpy_dtype_promotion("standard"):  # lookahead multiplies a float by a bool.
        history = train(tx, params=params, fast=lambda params: params.fast)
    clip, slow, steps = Autoclip(), jax.tree.map(np.float64, PARAMS), iter(range(1, 13))

    def update(grads, params):
        nonlocal slow
        step = descend(clip(grads, params))
        if next(steps) % 3:
            return step
        fast = jax.tree.map(np.add, params, step)
        slow = jax.tree.map(lambda s, f: s + 0.5 * (f - s), slow, fast)
        return jax.tree.map(np.subtract, slow, params)

    expected = train_by_hand(update)
    assert_same_params([(params.fast, state) for params, state in history], expected)


def test_conditionally_transform_switches_the_clipper_off_and_on():
    tx = optax.chain(
        optax.transforms.conditionally_transform(
            Autoclip.factory(), should_transform_fn=lambda step, **_: step >= 4
        ),
        optax.sgd(RATE),
    )
    clip, steps = Autoclip(), iter(range(12))

    def update(grads, params):
        return descend(grads if next(steps) < 4 else clip(grads, params))

    history = train(tx)
    assert_same_params(history, train_by_hand(update))
    assert int(smartclip.metrics(history[-1][1])["num_steps"]) == 8


def test_two_links_of_one_chain_report_under_their_places():
    tx = optax.chain(
        smartclip.agc(0.1, scope="global"), Autoclip.factory(max_norm=0.01), optax.sgd(RATE)
    )
    _, state = train(tx, INPUTS[:1], TARGETS[:1])[0]
    record = smartclip.metrics(state)
    np.testing.assert_allclose(record["0/clip_threshold"], 0.1 * reference.norm(PARAMS), rtol=1e-6)
    np.testing.assert_allclose(record["1/grad_norm"], record["0/clip_threshold"], rtol=1e-6)
    np.testing.assert_allclose(record["1/clip_threshold"], 0.01, rtol=1e-6)
