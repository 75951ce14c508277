"""Every clipper's training step under the strict modes of JAX equals the ordinary one.

These modes help to find a bug: they forbid implicit transfers, intermediate NaNs and leaked
tracers, enable double precision, or disable `jit`. Strict promotion of dtypes and of ranks is on in
all tests.
"""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from breadth import one_of_each_kind
from clipper_table import CLIPPERS
from compat import enable_x64, lenient
from trees import assert_close, assert_same_bits

import optax_smartclip as smartclip

WARMUP = 2
SPIKE, ZERO, INF = 2, 3, 4

# A step reads only the counts of the last record. `jit` drops the other fields, so they are not
# donated.
UNREAD = ("grad_norm", "clip_threshold", "clip_scale", "clipped")

rng = np.random.default_rng(0)
PARAMS = {
    "b": rng.normal(size=2).astype(np.float32),
    "w": rng.normal(size=(3, 2)).astype(np.float32),
}
# In float64, so that a test can detect rounding to float32.
GRADS = [
    jax.tree.map(lambda leaf: size * rng.normal(size=leaf.shape), PARAMS)  # noqa: B023
    for size in (0.1, 0.1, 100.0, 0.0, 0.1, 0.1)
]
GRADS[INF]["b"][0] = np.inf
GRADS[INF]["w"][1, 1] = -np.inf


ADAM = lenient(optax.adamw(0.01))
UPDATE_ADAM = jax.jit(ADAM.update)


@functools.cache
def build(name):
    """The optimizer and its training step, not compiled."""
    tx = optax.chain(CLIPPERS[name](warmup_steps=WARMUP), ADAM)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


@functools.cache
def compiled_step(name):
    return jax.jit(build(name)[1], donate_argnums=(0, 1))


def start(name, dtype=jnp.float32):
    params = jax.tree.map(lambda leaf: jnp.array(leaf, dtype), PARAMS)
    return params, build(name)[0].init(params)


def gradients(dtype=jnp.float32):
    return [jax.tree.map(lambda leaf: jnp.array(leaf, dtype), grads) for grads in GRADS]


def run(step, carry, grads):
    """The parameters and the state after each step."""
    history = []
    for grad in grads:
        carry = step(*carry, grad)
        # Copied, because the next step may reuse the buffers.
        history.append(jax.tree.map(np.array, carry))
    return history


# The rounding of one operation. Adam's mean may be a difference, which needs `atol`.
ROUNDING = {"rtol": 2e-6, "atol": 2e-9}


@functools.cache
def ordinary(name):
    return run(compiled_step(name), start(name), gradients())


@one_of_each_kind
def test_a_donated_step_clips_the_spike_and_reuses_all_buffers(name):
    step, grads = compiled_step(name), gradients()
    carry = start(name)
    for grad in grads:
        given = [
            leaf
            for path, leaf in jax.tree.leaves_with_path(carry)
            if path[-1] not in map(jax.tree_util.GetAttrKey, UNREAD)
        ]
        carry = step(*carry, grad)
        assert all(leaf.is_deleted() for leaf in given)
    assert step._cache_size() == 1
    assert_same_bits(jax.tree.map(np.array, carry), ordinary(name)[-1])
    records = [state[0].last for _, state in ordinary(name)]
    assert np.all(records[SPIKE].clipped)
    assert np.all(records[INF].num_nonfinite == 1)
    # In a step with a unit that is not finite, other units may be clipped.
    quiet = (ZERO, 0) if name == "agc" else (ZERO, INF, 0)
    assert not any(np.any(records[step].clipped) for step in quiet)


@pytest.mark.parametrize(
    ("name", "thresholds"),
    [
        ("autoclip", functools.partial(reference.lower_fence_thresholds, warmup_steps=WARMUP)),
        ("zscore_clip", functools.partial(reference.zscore_thresholds, warmup_steps=WARMUP)),
    ],
)
def test_the_ordinary_run_is_that_by_hand(name, thresholds):
    norms = [reference.norm(grads) for grads in GRADS]
    limits = thresholds(norms)
    params, state = PARAMS, ADAM.init(PARAMS)
    for grads, norm, limit, (actual, _) in zip(GRADS, norms, limits, ordinary(name), strict=True):
        finite = grads if norm < np.inf else jax.tree.map(np.zeros_like, grads)
        scale = min(1, limit / norm) if norm else 1
        clipped = jax.tree.map(lambda leaf, scale=scale: np.float32(scale * leaf), finite)
        updates, state = UPDATE_ADAM(clipped, state, params)
        params = jax.tree.map(np.add, params, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, params)


@one_of_each_kind
def test_a_compiled_step_transfers_nothing(name):
    step, grads = compiled_step(name), gradients()
    carries = [start(name), start(name)]
    with jax.transfer_guard("disallow"):
        # The guard works: each step would transfer NumPy arrays to the device.
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            step(*carries[0], jax.tree.map(np.float32, GRADS[0]))
        history = [carries[1]]
        for grad in grads:
            history.append(step(*jax.tree.map(jnp.copy, history[-1]), grad))
    assert_same_bits(jax.tree.map(np.array, history[1:]), ordinary(name))


@one_of_each_kind
def test_a_compiled_step_makes_no_nan_from_a_gradient_without_nans(name):
    step = compiled_step(name)
    nans = jax.tree.map(lambda leaf: jnp.asarray(np.full_like(leaf, np.nan)), PARAMS)
    with jax.debug_nans(True):
        assert_same_bits(run(step, start(name), gradients()), ordinary(name))
        # A NaN of the gradient does not reach a result either.
        step(*start(name), nans)


@one_of_each_kind
def test_all_numbers_of_a_state_are_finite_for_any_gradient(name):
    tx = smartclip.skip_spikes(CLIPPERS[name](warmup_steps=WARMUP))
    update = jax.jit(tx.update)
    with jax.debug_infs(True):
        state = tx.init(PARAMS)
        for size in (1.0, 1.0, 0.0, 1.0, np.nan, np.inf):
            grads = jax.tree.map(lambda leaf, size=size: np.full_like(leaf, size), PARAMS)
            updates, state = update(grads, state, PARAMS, value=np.float32(-size))
            chex.assert_tree_all_finite((updates, state))
            record = jax.tree.map(np.ndarray.tolist, jax.device_get(smartclip.metrics(state)))
            json.dumps(record, allow_nan=False)


@one_of_each_kind
def test_no_operation_makes_a_nan_in_uncompiled_steps(name):
    """Under `jit`, JAX checks only the results of a branch."""
    clipper = CLIPPERS[name](warmup_steps=WARMUP)

    def step(params, state, grads):
        with jax.disable_jit(), jax.debug_nans(True):
            clipped, clipper_state = clipper.update(grads, state[0], params)
        updates, adam_state = UPDATE_ADAM(clipped, state[1], params)
        return jax.tree.map(jnp.add, params, updates), (clipper_state, adam_state)

    assert_close(run(step, start(name), gradients()), ordinary(name), **ROUNDING)


@one_of_each_kind
def test_tracing_leaks_no_tracer_and_gives_the_same_program(name):
    tx, step = build(name)

    def train(params, grads):
        return step(*step(params, tx.init(params), grads), grads)

    def program():
        return str(jax.make_jaxpr(lambda *args: train(*args))(PARAMS, gradients()[0]))

    with jax.checking_leaks():
        checked = program()
    assert checked == program()


@one_of_each_kind
def test_float32_stays_float32_where_float64_is_enabled(name):
    with enable_x64(True):
        history = run(jax.jit(build(name)[1]), start(name), gradients())
    for (params, state), (expected, expected_state) in zip(history, ordinary(name), strict=True):
        assert_close(state, expected_state, **ROUNDING)
        # Adam's own powers are then float64.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)


@one_of_each_kind
def test_a_float64_step_has_float64_precision(name):
    with enable_x64(True):
        history = run(jax.jit(build(name)[1]), start(name, jnp.float64), gradients(jnp.float64))
        params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float64), PARAMS)
        state = ADAM.init(params)
        for step in range(WARMUP):
            grads = gradients(jnp.float64)[step]
            updates, state = UPDATE_ADAM(grads, state, params)
            params = jax.tree.map(np.add, params, updates)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), history[step][0], params
            )
    for (params, state), (expected, expected_state) in zip(history, ordinary(name), strict=True):
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float64)}
        assert_close(state[0], expected_state[0], **ROUNDING)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)
