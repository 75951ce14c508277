"""Training in float16 with a scaled loss: gradients are unscaled, then checked, then clipped.

Flax, jmp or a few lines by hand, as in the guide on loss scaling, compute the scale. The last tests
show the errors of other orders.
"""

import functools

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import program_text
import pytest
from breadth import long_but
from compat import lenient
from compilation import JUDGED
from flax.training.dynamic_scale import DynamicScale
from regression import INPUTS, PARAMS, RATE, TARGETS, Autoclip

import optax_smartclip as smartclip

SPIKE = 5  # The batch whose gradient overflows with a large scale.
BATCHES = list(zip(INPUTS, TARGETS, strict=True))
LARGE, SMALL = 2.0**10, 2.0
PERIOD = 3  # The number of finite steps that doubles the scale.


def loss_fn(params, inputs, targets):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    predictions = inputs.astype(jnp.float16) @ half["w"] + half["b"][None]
    errors = predictions.astype(jnp.float32) - targets
    return jnp.mean(jnp.sum(jnp.square(errors), axis=1))


def unscaled_grads(scale, *args):
    grads = jax.grad(lambda *args: scale * loss_fn(*args))(*args)
    return jax.tree.map(lambda grad: grad / scale, grads)


def all_finite(tree):
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def adjust(scale, num_finite, finite):
    num_finite = jnp.where(finite, num_finite + 1, 0)
    grow = num_finite == PERIOD
    factor = jnp.where(grow, 2.0, jnp.where(finite, 1.0, 0.5))
    return scale * factor, jnp.where(grow, 0, num_finite)


# Each returns its next state, the next scale, whether the gradients are finite, and the gradients.


def by_hand(state, *args):
    grads = unscaled_grads(state[0], *args)
    finite = all_finite(grads)
    state = adjust(*state, finite)
    return state, state[0], finite, grads


def with_flax(state, *args):
    state, finite, _, grads = state.value_and_grad(loss_fn)(*args)
    return state, state.scale, finite, grads


def with_jmp(state, *args):
    grads = state.unscale(jax.grad(lambda *args: state.scale(loss_fn(*args)))(*args))
    finite = jmp.all_finite(grads)
    with jax.numpy_dtype_promotion("standard"):  # jmp multiplies an int32 by a bool.
        state = state.adjust(finite)
    return state, state.loss_scale, finite, grads


def without(state, *args):
    return state, 1.0, True, jax.grad(loss_fn)(*args)


INITIAL = {
    by_hand: lambda scale: (scale, jnp.int32(0)),
    with_flax: lambda scale: DynamicScale(
        growth_interval=PERIOD, fin_steps=jnp.int32(0), scale=scale
    ),
    with_jmp: lambda scale: jmp.DynamicLossScale(scale, jnp.int32(0), period=PERIOD),
    without: lambda scale: None,
}


def keep_where(finite, new, old):
    return jax.tree.map(functools.partial(jnp.where, finite), new, old)


def always_new(finite, new, old):
    del finite, old
    return new


def clipped_sgd():
    return optax.chain(Autoclip.factory(), optax.sgd(RATE, momentum=0.9))


def train(compute, scale=1.0, tx=None, keep=keep_where, batches=BATCHES):
    """The scale, the parameters and the optimizer's state after each step."""
    tx = tx or clipped_sgd()

    @jax.jit
    def step(scaling, params, opt_state, *batch):
        scaling, scale, finite, grads = compute(scaling, params, *batch)
        updates, new_state = tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), new_state
        return scaling, scale, *keep(finite, new, (params, opt_state))

    scaling, params = INITIAL[compute](jnp.float32(scale)), jax.tree.map(jnp.asarray, PARAMS)
    opt_state, history = tx.init(params), []
    for batch in batches:
        scaling, scale, params, opt_state = step(scaling, params, opt_state, *batch)
        history.append((float(scale), params, opt_state))
    return history


@functools.cache
def without_the_spike():
    return train(without, batches=BATCHES[:SPIKE] + BATCHES[SPIKE + 1 :])


def assert_same(actual, expected):
    """Scales are powers of two, but a compiler may delay the rounding to float16."""
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-3)
    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("compute", long_but([with_jmp], [by_hand, with_flax, with_jmp]))
def test_with_unscaled_gradients_training_equals_that_without_a_scale(compute):
    history, expected = train(compute, SMALL), train(without)
    for (_, *actual), (_, *same) in zip(history, expected, strict=True):
        assert_same(actual, same)
    scales = [scale for scale, _, _ in history]
    assert scales == sorted(scales)
    assert scales[-1] >= 4 * SMALL
    assert smartclip.metrics(history[-1][2])["num_clipped"] > 0


@pytest.mark.parametrize(
    ("compute", "wrap", "keep"),
    [
        (by_hand, lambda tx: tx, keep_where),
        pytest.param(with_flax, lambda tx: tx, keep_where, marks=pytest.mark.long),
        pytest.param(with_jmp, lambda tx: tx, keep_where, marks=pytest.mark.long),
        (with_flax, lambda tx: optax.apply_if_finite(tx, 100), always_new),
        (with_flax, smartclip.skip_spikes, always_new),
    ],
    ids=["by hand", "flax", "jmp", "apply_if_finite", "skip_spikes"],
)
def test_a_step_that_overflows_only_halves_the_scale(compute, wrap, keep):
    history = train(compute, LARGE, wrap(clipped_sgd()), keep)
    scales = [scale for scale, _, _ in history]
    assert scales[SPIKE] == scales[SPIKE - 1] / 2
    assert scales[-1] > scales[SPIKE]
    del history[SPIKE]
    for (_, params, state), (_, *same) in zip(history, without_the_spike(), strict=True):
        assert_same([params, getattr(state, "inner_state", state)], same)


def test_float16_gradients_are_cast_before_they_are_unscaled():
    scale, size = 2.0**16, 2.0**-26
    grads = {"w": jnp.full(4, scale * size, jnp.float16)}
    assert not np.any(grads["w"] / jnp.float16(scale / 2))  # Too small for float16.
    unscaled = jax.tree.map(lambda grad: grad.astype(jnp.float32) / scale, grads)
    tx = smartclip.autoclip(max_norm=size)
    updates, state = jax.jit(tx.update)(unscaled, tx.init(unscaled))
    np.testing.assert_allclose(smartclip.metrics(state)["grad_norm"], 2 * size, rtol=1e-6)
    np.testing.assert_allclose(updates["w"], size / 2, rtol=1e-6)


def test_unscaling_moves_no_more_memory_than_the_cast_to_float32():
    tx = optax.chain(Autoclip.factory(), lenient(optax.adamw(1e-3)))

    def moved(width, unscale):
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, half, scale):
            grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), half)
            if unscale:
                grads = jax.tree.map(lambda grad: grad / scale, grads)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, half = (
            {"w": jax.ShapeDtypeStruct((width, 64), dtype)} for dtype in (jnp.float32, jnp.float16)
        )
        args = params, jax.eval_shape(tx.init, params), half, jnp.float32(1)
        return program_text.usual_bytes(step.lower(*args).compile(JUDGED))

    def slope(unscale):
        """Bytes per byte of the parameters; the history has a constant size."""
        return (moved(256, unscale) - moved(128, unscale)) / (4 * 128 * 64)

    assert slope(True) == pytest.approx(slope(False), rel=1e-3)


# Other orders.


def test_with_a_check_of_the_updates_the_scale_rises_forever():
    tx = clipped_sgd()

    @jax.jit
    def step(scaling, params, state, *batch):
        grads = unscaled_grads(scaling[0], params, *batch)
        updates, state = tx.update(grads, state, params)
        scaling = adjust(*scaling, all_finite(updates))
        return scaling, optax.apply_updates(params, updates), state, all_finite(grads)

    scaling, params = INITIAL[by_hand](jnp.float32(LARGE)), PARAMS
    state, finite = tx.init(params), []
    for batch in BATCHES * 4:
        scaling, params, state, is_finite = step(scaling, params, state, *batch)
        finite.append(bool(is_finite))
    assert scaling[0] == LARGE * 2 ** (len(finite) / PERIOD)
    assert not any(finite[-len(BATCHES) :])  # Training has stopped.
    assert smartclip.metrics(state)["num_nonfinite"] == finite.count(False)


@pytest.mark.parametrize("unscale_first", [True, False])
def test_a_clipper_of_scaled_gradients_clips_after_the_scale_doubles(unscale_first):
    tx = smartclip.autoclip()
    grads = {"w": np.float32([0.6, 0.8])}
    state, update, sizes = tx.init(grads), jax.jit(tx.update), []
    for scale in [2.0**8] * 20 + [2.0**9]:
        shown = 1.0 if unscale_first else scale
        updates, state = update({"w": np.float32(shown) * grads["w"]}, state)
        sizes.append(float(optax.tree.norm(updates)) / shown)
    np.testing.assert_allclose(sizes[:-1], 1.0, rtol=1e-6)
    np.testing.assert_allclose(sizes[-1], 1.0 if unscale_first else 0.5, rtol=1e-6)
    assert bool(smartclip.metrics(state)["clipped"]) != unscale_first
