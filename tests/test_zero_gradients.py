"""Zero gradients leave no trace in the history: idle experts, frozen phases, alternating heads.

In the live steps, a clipper does the same as in a run of the live steps alone.
"""

from functools import partial

import jax
import numpy as np
import optax
import pytest
import reference
from breadth import each_value
from clipper_table import CLIPPERS, WEIGHT_BASED
from steps import run, runner
from trees import assert_same_bits

import optax_smartclip as smartclip

STEPS = 40
PARAMS = {
    "a": {"w": np.full((2, 3), 0.5, np.float32), "b": np.full(3, 0.5, np.float32)},
    "z": {"w": np.ones(4, np.float32)},
}

RANDOM = np.random.default_rng(0)
PATTERNS = {
    "every eighth": np.arange(STEPS) % 8 != 0,
    "five of eight": np.arange(STEPS) % 8 > 4,
    "three of four": np.arange(STEPS) % 4 == 1,
    "a frozen start": np.arange(STEPS) >= 20,
    "a frozen phase": (np.arange(STEPS) < 8) | (np.arange(STEPS) >= 30),
    "random": RANDOM.random(STEPS) < 0.5,
}


def gradient(step):
    rng = np.random.default_rng(step)
    size = np.float32(rng.lognormal() * (100.0 if step % 11 == 10 else 1.0))
    return jax.tree.map(lambda p: size * np.float32(rng.normal(size=p.shape)), PARAMS)


GRADIENTS = [gradient(step) for step in range(STEPS)]
ZERO = jax.tree.map(np.zeros_like, GRADIENTS[0])


def those(live, values):
    """The values of the live steps."""
    return [value for value, on in zip(values, live, strict=True) if on]


def silenced(live, group=None):
    """The stream with zeros, in one group or in all, in the steps that are not live."""
    zero = ZERO if group is None else {**dict.fromkeys(PARAMS), group: ZERO[group]}
    return [
        gradient if on else {name: gradient[name] if z is None else z for name, z in zero.items()}
        for gradient, on in zip(GRADIENTS, live, strict=True)
    ]


@pytest.mark.parametrize(("name", "warmup_steps"), each_value(CLIPPERS, [0, 5]))
def test_live_steps_equal_a_run_without_the_zeros(name, warmup_steps):
    run = runner(CLIPPERS[name](warmup_steps=warmup_steps), PARAMS)
    for live in PATTERNS.values():
        expected, wanted = run(those(live, GRADIENTS))
        updates, state = run(silenced(live))
        assert_same_bits(those(live, updates), expected)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(those(~live, updates)))
        # Only the record of the last step differs.
        assert_same_bits((state.rule, state.num_observed), (wanted.rule, wanted.num_observed))


SCOPES = {"per_param": "per_param", "per_layer": "per_layer", "labels": lambda path: path[0].key}
WITH_HISTORY = sorted(set(CLIPPERS) - WEIGHT_BASED)


@pytest.mark.parametrize(("name", "scope"), each_value(WITH_HISTORY, SCOPES))
def test_live_steps_of_a_group_equal_a_run_without_its_zeros(name, scope):
    run = runner(CLIPPERS[name](scope=SCOPES[scope]), PARAMS)
    all_live, _ = run(GRADIENTS)
    for live in PATTERNS.values():
        updates, _ = run(silenced(live, "z"))
        only_live, _ = run(those(live, GRADIENTS))
        assert_same_bits([u["a"] for u in updates], [u["a"] for u in all_live])
        assert_same_bits(those(live, [u["z"] for u in updates]), [u["z"] for u in only_live])


def test_skip_spikes_compares_live_steps_with_live_steps():
    inner = optax.chain(smartclip.autoclip(), optax.sgd(1.0))
    run = runner(smartclip.skip_spikes(inner, warmup_steps=4, max_consecutive=2), PARAMS)
    for live in PATTERNS.values():
        expected, wanted = run(those(live, GRADIENTS))
        updates, state = run(silenced(live))
        assert_same_bits(those(live, updates), expected)
        skipped, wanted_skipped = (smartclip.metrics(s)["num_skipped"] for s in (state, wanted))
        assert int(skipped) == int(wanted_skipped)


def test_a_loss_is_judged_in_a_step_with_a_zero_gradient():
    tx = smartclip.skip_spikes(optax.identity(), warmup_steps=4)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for loss in [1.0, 1.1, 0.9, 1.0, 1.1, 50.0]:
        _, state = update(ZERO, state, PARAMS, value=loss)
    assert bool(smartclip.metrics(state)["skipped"])


@pytest.mark.parametrize("every", [8, 2])
def test_a_low_percentile_continues_to_train(every):
    live = np.arange(STEPS) % every != 0
    updates, _ = run(smartclip.autoclip(10.0), PARAMS, silenced(live))
    norms = [reference.norm(update) for update in those(live, updates)]
    assert min(norms) > 0


@pytest.mark.parametrize(
    "make",
    [
        partial(smartclip.AutoClip, warmup_steps=0, min_history=0),
        partial(
            smartclip.AutoClip,
            mode="percentile",
            percentile=10,
            history="window",
            warmup_steps=3,
            min_history=0,
        ),
        partial(smartclip.ZScoreClip, warmup_steps=0, min_history=0, scope="per_param"),
        smartclip.AGC,
    ],
)
def test_live_steps_of_stateful_clippers_equal_a_run_without_the_zeros(make):
    live = PATTERNS["three of four"]
    first, second = make(), make()
    expected = [smartclip.apply_grads(g, PARAMS, first) for g in those(live, GRADIENTS)]
    updates = [smartclip.apply_grads(g, PARAMS, second) for g in silenced(live)]
    assert_same_bits(those(live, updates), expected)
