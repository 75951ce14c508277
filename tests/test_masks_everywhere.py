"""`mask=` of every clipper and of `skip_spikes`: leaves outside the mask have no influence."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
import reference
from breadth import each_value
from clipper_table import CLIPPERS
from steps import run
from trees import assert_same_bits

import optax_smartclip as smartclip
from optax_smartclip import masks

SHAPES = {"frozen": {"w": (3, 2)}, "trained": {"w": (3, 2), "lora": (2,)}}
PARAMS = {
    name: {leaf: np.full(shape, 0.5, np.float32) for leaf, shape in shapes.items()}
    for name, shapes in SHAPES.items()
}
MASKS = {
    "tree": {"frozen": {"w": False}, "trained": {"w": True, "lora": True}},
    "prefix": {"frozen": False, "trained": True},
    "function": masks.except_paths("^frozen"),
}


def gradient(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: np.float32(rng.lognormal(size=p.shape)), PARAMS)


@pytest.mark.parametrize(("name", "mask", "bad"), each_value(CLIPPERS, MASKS, [1e30, np.nan]))
def test_the_other_leaves_are_clipped_as_if_they_were_alone(name, mask, bad):
    grads = [gradient(step) for step in range(12)]
    grads = [{**g, "frozen": {"w": g["frozen"]["w"] * np.float32(bad)}} for g in grads]
    updates, _ = run(CLIPPERS[name](mask=MASKS[mask]), PARAMS, grads)
    alone = [{"trained": g["trained"]} for g in grads]
    expected, _ = run(CLIPPERS[name](), {"trained": PARAMS["trained"]}, alone)
    assert_same_bits([u["trained"] for u in updates], [u["trained"] for u in expected])
    assert_same_bits([u["frozen"] for u in updates], [g["frozen"] for g in grads])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_skip_spikes_ignores_leaves_outside_the_mask(mask):
    tx = smartclip.skip_spikes(optax.identity(), mask=mask, warmup_steps=4)
    grads = [gradient(step) for step in range(12)]
    grads[9]["frozen"]["w"] = grads[9]["frozen"]["w"] * np.float32(np.nan)
    grads[11]["trained"]["w"] = grads[11]["trained"]["w"] * np.float32(1000.0)
    updates, state = run(tx, PARAMS, grads)
    record = smartclip.metrics(state)
    assert (int(record["num_skipped"]), bool(record["skipped"])) == (1, True)
    assert_same_bits(updates[:11], grads[:11])
    assert not np.any(updates[11]["frozen"]["w"])


def test_a_frozen_gradient_does_not_change_the_clipping_of_others():
    labels = {"frozen": "freeze", "trained": "train"}
    split = optax.partition({"train": optax.sgd(1.0), "freeze": optax.set_to_zero()}, labels)
    clipper = smartclip.autoclip(max_norm=1.0, mask=masks.except_paths("^frozen"))
    tx = optax.chain(clipper, split)
    grads = {
        "frozen": {"w": np.full((3, 2), 100 / 6**0.5, np.float32)},
        "trained": {
            "w": np.full((3, 2), 8**-0.5, np.float32),
            "lora": np.full(2, 8**-0.5, np.float32),
        },
    }
    (updates,), state = run(tx, PARAMS, [grads])
    assert reference.norm(updates) == pytest.approx(1.0)
    assert float(smartclip.metrics(state)["grad_norm"]) == pytest.approx(1.0)


def test_the_groups_do_not_depend_on_the_mask():
    for mask in (None, *MASKS.values()):
        state = smartclip.autoclip(scope="per_param", mask=mask).init(PARAMS)
        assert state.num_observed.shape == (3,)


@pytest.mark.parametrize("name", CLIPPERS)
def test_a_mask_without_a_leaf_is_refused_by_init(name):
    tx = CLIPPERS[name](mask={"frozen": True})
    with pytest.raises(ValueError, match=r"`mask` must be a tree .* nothing for 'trained/lora'"):
        tx.init(PARAMS)


def test_skip_spikes_refuses_a_mask_without_a_leaf_in_init():
    tx = smartclip.skip_spikes(optax.identity(), mask={"frozen": True})
    with pytest.raises(ValueError, match=r"`mask` must be a tree .* nothing for 'trained/lora'"):
        tx.init(PARAMS)


@pytest.mark.parametrize("wrap", [optax.masked, optax.transforms.selective_transform])
def test_a_mask_around_a_clipper_means_the_same(wrap):
    grads = [gradient(step) for step in range(12)]
    clipper = partial(smartclip.autoclip, warmup_steps=2)
    expected, _ = run(clipper(mask=MASKS["prefix"]), PARAMS, grads)
    freeze = {"frozen": {"w": True}, "trained": {"w": False, "lora": False}}
    if wrap is optax.masked:
        tx = optax.masked(clipper(), MASKS["tree"])
    else:
        tx = optax.transforms.selective_transform(clipper(), freeze_mask=freeze)
    updates, _ = run(tx, PARAMS, grads)
    assert_same_bits([u["trained"] for u in updates], [u["trained"] for u in expected])
