"""An ensemble under `vmap`, and a training loop under `scan`, equal separate runs step by step.

Each member has its own history: a spike of one member does not affect the others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from breadth import long_but, one_of_each_kind
from clipper_table import CLIPPERS, WEIGHT_BASED
from trees import assert_close

import optax_smartclip as smartclip

MEMBERS, STEPS, SPIKE = 3, 14, 11
SPIKING = 1
RATE = 0.05

rng = np.random.default_rng(0)
PARAMS = {
    "b": rng.normal(size=(MEMBERS, 2)).astype(np.float32),
    "w": rng.normal(size=(MEMBERS, 3, 2)).astype(np.float32),
}
# All members see the same batches, except for the targets of one member in one step.
INPUTS = np.stack([rng.normal(size=(STEPS, 8, 3))] * MEMBERS, axis=1).astype(np.float32)
TARGETS = np.stack([rng.normal(size=(STEPS, 8, 2))] * MEMBERS, axis=1).astype(np.float32)
TARGETS[SPIKE, SPIKING] *= 1000
BATCHES = INPUTS, TARGETS


def take(tree, *index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def loss(params, batch):
    inputs, targets = batch
    outputs = inputs @ params["w"] + params["b"][None]
    return jnp.mean(jnp.sum(jnp.square(outputs - targets), axis=1))


def make_step(tx):
    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), smartclip.metrics(state)

    return step


def optimizer(name):
    # With the default of AGC, the small weights would be clipped in all steps.
    kwargs = {"clipping": 0.3} if name in WEIGHT_BASED else {}
    return optax.chain(CLIPPERS[name](**kwargs), optax.sgd(RATE, momentum=0.9))


def run(step, carry, batches):
    """A Python loop over steps: the last parameters and state, and the stacked metrics."""
    records = []
    for index in range(STEPS):
        carry, record = step(carry, take(batches, index))
        records.append(record)
    return carry, stack(records)


@functools.cache
def run_separately(name):
    """Runs of single members, stacked along the first axis, or for metrics along the second."""
    tx = optimizer(name)
    step = jax.jit(make_step(tx))
    carries, records = [], []
    for member in range(MEMBERS):
        params = take(PARAMS, member)
        batches = jax.tree.map(lambda leaf, member=member: leaf[:, member], BATCHES)
        carry, record = run(step, (params, tx.init(params)), batches)
        carries.append(carry)
        records.append(record)
    return stack(carries), jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *records)


# Rounding errors add up over the steps.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def assert_only_one_member_spiked(name, record):
    norms = record["grad_norm"].reshape(STEPS, MEMBERS, -1)
    clipped = record["clipped"].reshape(STEPS, MEMBERS, -1)
    ratios = norms[SPIKE].max(axis=-1) / norms[:SPIKE].max(axis=(0, 2))
    assert np.all((ratios > 10) == (np.arange(MEMBERS) == SPIKING))
    assert np.all(clipped[SPIKE, SPIKING])
    if name == "autoclip_outliers_only":
        assert not np.any(clipped[:, np.arange(MEMBERS) != SPIKING])


@one_of_each_kind
def test_members_under_vmap_equal_separate_runs(name):
    tx = optimizer(name)
    step = jax.jit(jax.vmap(make_step(tx)))
    params = jax.tree.map(jnp.array, PARAMS)
    carry, record = run(step, (params, jax.vmap(tx.init)(params)), BATCHES)
    assert step._cache_size() == 1
    assert_close((carry, record), run_separately(name), **ROUNDING)
    assert_only_one_member_spiked(name, record)


SCANNED = ["autoclip_outliers_only", "autoclip_p95_per_param", "agc"]


@pytest.mark.parametrize("name", long_but({"autoclip_p95_per_param"}, SCANNED))
def test_a_loop_of_members_under_scan_equals_separate_runs(name):
    tx = optimizer(name)

    @jax.jit
    def train(params):
        carry = params, jax.vmap(tx.init)(params)
        return jax.lax.scan(jax.vmap(make_step(tx)), carry, BATCHES)

    carry, record = train(PARAMS)
    assert_close((carry, record), run_separately(name), **ROUNDING)
    assert_only_one_member_spiked(name, record)
    # One entry for each step, each member, and each of several groups.
    groups = (2,) if name == "autoclip_p95_per_param" else ()
    assert {leaf.shape for leaf in record.values()} == {(STEPS, MEMBERS, *groups)}


def test_whole_loops_under_vmap_equal_separate_runs():
    tx = optimizer("autoclip")

    def train(params, batches):
        return jax.lax.scan(make_step(tx), (params, tx.init(params)), batches)

    carry, record = jax.jit(jax.vmap(train, in_axes=(0, 1), out_axes=(0, 1)))(PARAMS, BATCHES)
    assert_close((carry, record), run_separately("autoclip"), **ROUNDING)


def test_the_thresholds_of_each_member_are_those_of_its_own_norms():
    _, record = run_separately("autoclip")
    for norms, thresholds in zip(record["grad_norm"].T, record["clip_threshold"].T, strict=True):
        expected = reference.reported(reference.lower_fence_thresholds(norms))
        np.testing.assert_allclose(thresholds, expected, rtol=1e-6)
    derive = jax.jit(jax.grad(loss))
    first = [derive(take(PARAMS, m), take(BATCHES, 0, m)) for m in range(MEMBERS)]
    expected = [reference.norm(grads) for grads in first]
    np.testing.assert_allclose(record["grad_norm"][0], expected, rtol=1e-6)


def test_members_may_differ_in_hyperparameters():
    ceilings = np.float32([0.5, 1.0, 2.0])

    def train(params, ceiling, batches):
        tx = optax.chain(smartclip.zscore_clip(max_norm=ceiling), optax.sgd(RATE))
        return jax.lax.scan(make_step(tx), (params, tx.init(params)), batches)

    _, record = jax.jit(jax.vmap(train, in_axes=(0, 0, 1)))(PARAMS, ceilings, BATCHES)
    assert np.all(np.any(record["clipped"], axis=1))
    for norms, thresholds, ceiling in zip(
        record["grad_norm"], record["clip_threshold"], ceilings, strict=True
    ):
        expected = np.minimum(reference.zscore_thresholds(norms), ceiling)
        np.testing.assert_allclose(thresholds, expected, rtol=1e-5)
