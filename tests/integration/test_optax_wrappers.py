"""Training under Optax's wrappers equals a loop in float64 NumPy that clips by hand.

Where in each wrapper that is, and what the clipper there sees, is what these tests document.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import optax_smartclip as smartclip

RATE = 0.1
WINDOW = 5

rng = np.random.default_rng(0)
PARAMS = {"b": np.float32(rng.normal(size=2)), "w": np.float32(rng.normal(size=(3, 2)))}
# Twelve batches; the targets of the sixth are large and give a spike.
INPUTS = rng.normal(size=(12, 8, 3)).astype(np.float32)
TARGETS = rng.normal(size=(12, 8, 2)).astype(np.float32)
TARGETS[5] *= 100


def loss(params, inputs, targets):
    predictions = inputs @ params["w"] + params["b"][None]
    return jnp.mean(jnp.sum(jnp.square(predictions - targets), axis=1))


def gradient(params, inputs, targets):
    """Of the loss, in NumPy."""
    residuals = inputs @ params["w"] + params["b"] - targets
    return {"b": 2 * residuals.mean(axis=0), "w": 2 * inputs.T @ residuals / len(inputs)}


def train(tx, inputs=INPUTS, targets=TARGETS, params=PARAMS, fast=lambda params: params):
    """A training loop. Returns the parameters and the optimizer's state after each step."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, inputs, targets):
        value, grads = jax.value_and_grad(loss)(fast(params), inputs, targets)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    history = []
    for batch in zip(inputs, targets, strict=True):
        params, state = step(params, state, *batch)
        history.append((params, state))
    return history


class Autoclip:
    """By hand: the median of the last five norms, the current one included."""

    factory = staticmethod(
        lambda **kwargs: smartclip.autoclip(50.0, history=smartclip.ring_buffer(WINDOW), **kwargs)
    )

    def __init__(self):
        self.norms = []

    def __call__(self, grads, params):
        self.norms.append(reference.norm(grads))
        self.limit = reference.percentile_thresholds(self.norms, 50.0, WINDOW)[-1]
        return jax.tree.map(lambda grad: grad * min(1, self.limit / self.norms[-1]), grads)


class Agc:
    """By hand: each column of a matrix, and each vector, to a tenth of the weights' norm."""

    factory = staticmethod(lambda **kwargs: smartclip.agc(0.1, **kwargs))

    def __call__(self, grads, params):
        def clip(grad, weight):
            norm, weight_norm = (np.linalg.norm(x, axis=0) for x in (grad, weight))
            return grad * np.minimum(1, 0.1 * np.maximum(weight_norm, 1e-3) / norm)

        return jax.tree.map(clip, grads, params)


BY_HAND = {"autoclip": Autoclip, "agc": Agc}
both = pytest.mark.parametrize("clipper", BY_HAND.values(), ids=BY_HAND)


def train_by_hand(update, inputs=INPUTS, targets=TARGETS):
    """The parameters after each step; `update` maps the gradient and the parameters to a step."""
    params = jax.tree.map(np.float64, PARAMS)
    history = []
    for batch in zip(inputs, targets, strict=True):
        updates = update(gradient(params, *batch), params)
        params = jax.tree.map(np.add, params, updates)
        history.append(params)
    return history


def descend(grads):
    return jax.tree.map(lambda grad: -RATE * grad, grads)


def assert_same_params(history, expected):
    for (params, _), expected_params in zip(history, expected, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5),
            params,
            expected_params,
        )


@both
@pytest.mark.parametrize("chain", ["chain", "named_chain"])
def test_in_a_chain_the_optimizer_sees_the_clipped_gradient(clipper, chain):
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


def test_weight_decay_behind_the_clipper_is_not_clipped_and_before_it_is():
    decay = optax.add_decayed_weights(0.5)
    clip = Autoclip()

    def decayed(grads, params):
        return jax.tree.map(lambda grad, param: grad + 0.5 * param, grads, params)

    behind = train(optax.chain(Autoclip.factory(), decay, optax.sgd(RATE)))
    expected = train_by_hand(lambda grads, params: descend(decayed(clip(grads, params), params)))
    assert_same_params(behind, expected)
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


@both
def test_under_masked_the_norm_is_that_of_the_leaves_in_the_mask(clipper):
    tx = optax.chain(optax.masked(clipper.factory(), {"w": True, "b": False}), optax.sgd(RATE))
    clip = clipper()

    def update(grads, params):
        clipped = clip({"w": grads["w"]}, {"w": params["w"]})
        return descend({"w": clipped["w"], "b": grads["b"]})

    assert_same_params(train(tx), train_by_hand(update))


@both
def test_under_partition_each_part_has_a_clipper_of_its_own(clipper):
    # Two rates, to see that each part also has its own optimizer.
    tx = optax.partition(
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


def test_a_global_ceiling_in_each_of_two_parts_is_no_ceiling_for_both_together():
    grads = {"w": jnp.full((3, 2), 10.0), "b": jnp.full(2, 10.0)}

    def norm_after(tx):
        updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS))
        return reference.norm(updates)

    parts = {label: smartclip.autoclip(max_norm=1.0) for label in ("w", "b")}
    inside = optax.partition(parts, {"w": "w", "b": "b"})
    np.testing.assert_allclose(norm_after(inside), np.sqrt(2), rtol=1e-6)
    identities = {label: optax.identity() for label in ("w", "b")}
    outside = optax.chain(
        smartclip.autoclip(max_norm=1.0), optax.partition(identities, {"w": "w", "b": "b"})
    )
    np.testing.assert_allclose(norm_after(outside), 1.0, rtol=1e-6)


@both
def test_inside_multisteps_the_clipper_sees_the_mean_gradient_once(clipper):
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


def test_inject_hyperparams_schedules_the_ceiling_together_with_the_rate():
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


def test_apply_if_finite_keeps_a_bad_step_from_the_clipper():
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


def test_a_bad_step_alone_is_a_zero_gradient_for_the_optimizer():
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
        smartclip.agc(0.1, scope="global"), smartclip.autoclip(max_norm=0.01), optax.sgd(RATE)
    )
    _, state = train(tx, INPUTS[:1], TARGETS[:1])[0]
    record = smartclip.metrics(state)
    np.testing.assert_allclose(record["0/clip_threshold"], 0.1 * reference.norm(PARAMS), rtol=1e-6)
    np.testing.assert_allclose(record["1/grad_norm"], record["0/clip_threshold"], rtol=1e-6)
    np.testing.assert_allclose(record["1/clip_threshold"], 0.01, rtol=1e-6)
