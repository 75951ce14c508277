"""Gradients that are zero teach nothing: experts without tokens, frozen phases, heads in turn.

What a clipper does in the live steps is what it does in a run of the live steps alone.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from breadth import each_value
from clipper_table import CLIPPERS, WEIGHT_BASED
from steps import run, runner
from trees import assert_same_bits

import optax_smartclip as smartclip

STEPS = 40
PARAMS = {"a": {"w": jnp.full((2, 3), 0.5), "b": jnp.full(3, 0.5)}, "z": {"w": jnp.ones(4)}}

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
    """The stream with zeros, of one group or of all, in the steps that are not live."""
    zero = ZERO if group is None else {**dict.fromkeys(PARAMS), group: ZERO[group]}
    return [
        gradient if on else {name: gradient[name] if z is None else z for name, z in zero.items()}
        for gradient, on in zip(GRADIENTS, live, strict=True)
    ]


@pytest.mark.parametrize(("name", "warmup_steps"), each_value(CLIPPERS, [0, 5]))
def test_live_steps_are_those_of_a_run_without_the_zeros(name, warmup_steps):
    run = runner(CLIPPERS[name](warmup_steps=warmup_steps), PARAMS)
    for live in PATTERNS.values():
        expected, wanted = run(those(live, GRADIENTS))
        updates, state = run(silenced(live))
        assert_same_bits(those(live, updates), expected)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(those(~live, updates)))
        # But for the record of the last step.
        assert_same_bits((state.rule, state.num_observed), (wanted.rule, wanted.num_observed))


SCOPES = {"per_param": "per_param", "per_layer": "per_layer", "labels": lambda path: path[0].key}
WITH_HISTORY = sorted(set(CLIPPERS) - WEIGHT_BASED)


@pytest.mark.parametrize(("name", "scope"), each_value(WITH_HISTORY, SCOPES))
def test_so_are_those_of_a_group_whose_gradient_alone_is_zero(name, scope):
    run = runner(CLIPPERS[name](scope=SCOPES[scope]), PARAMS)
    all_live, _ = run(GRADIENTS)
    for live in PATTERNS.values():
        updates, _ = run(silenced(live, "z"))
        only_live, _ = run(those(live, GRADIENTS))
        assert_same_bits([u["a"] for u in updates], [u["a"] for u in all_live])
        assert_same_bits(those(live, [u["z"] for u in updates]), [u["z"] for u in only_live])


def test_skip_spikes_judges_live_steps_by_live_steps():
    inner = optax.chain(smartclip.autoclip(), optax.sgd(1.0))
    run = runner(smartclip.skip_spikes(inner, warmup_steps=4, max_consecutive=2), PARAMS)
    for live in PATTERNS.values():
        expected, wanted = run(those(live, GRADIENTS))
        updates, state = run(silenced(live))
        assert_same_bits(those(live, updates), expected)
        skipped, wanted_skipped = (smartclip.metrics(s)["num_skipped"] for s in (state, wanted))
        assert int(skipped) == int(wanted_skipped)


def test_losses_are_judged_in_steps_without_a_gradient():
    tx = smartclip.skip_spikes(optax.identity(), warmup_steps=4)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for loss in [1.0, 1.1, 0.9, 1.0, 1.1, 50.0]:
        _, state = update(ZERO, state, PARAMS, value=loss)
    assert bool(smartclip.metrics(state)["skipped"])


@pytest.mark.parametrize("every", [8, 2])
def test_a_low_percentile_goes_on_training(every):
    live = np.arange(STEPS) % every != 0
    updates, _ = run(smartclip.autoclip(10.0), PARAMS, silenced(live))
    assert min(float(optax.tree.norm(update)) for update in those(live, updates)) > 0


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
def test_stateful_clippers_do_the_same(make):
    live = PATTERNS["three of four"]
    first, second = make(), make()
    expected = [smartclip.apply_grads(g, PARAMS, first) for g in those(live, GRADIENTS)]
    updates = [smartclip.apply_grads(g, PARAMS, second) for g in silenced(live)]
    assert_same_bits(those(live, updates), expected)
