"""A state that a lenient restore has put together from two clippers is one to go on from.

Some restores fill what a checkpoint lacks from the initial state, and say nothing: Flax's
`restore_checkpoint` does, by way of Orbax. A run that was saved with one clipper and is resumed
with another then has the counts of the one and the empty memory of the other.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipper_table import CLIPPERS
from jax.tree_util import tree_leaves_with_path
from trees import assert_same_bits

import optax_smartclip as smartclip

STEPS = 120
# With weights of this size, agc lets everything pass.
PARAMS = {"w": jnp.full(4, 1000.0), "b": jnp.full(2, 1000.0)}
SIZES = np.float32(np.exp(0.1 * np.random.default_rng(0).normal(size=STEPS)))


def make(name):
    # In one scope, so that the counts of all have the same shape.
    return CLIPPERS[name](scope="per_param")


def run(tx, state):
    """The last state, and the scale of each step's gradient."""

    def step(state, size):
        grads = jax.tree.map(lambda leaf: size * jnp.ones_like(leaf), PARAMS)
        updates, state = tx.update(grads, state, PARAMS)
        return state, jnp.stack([updates[name][0] / size for name in PARAMS])

    return jax.jit(lambda state: jax.lax.scan(step, state, SIZES))(state)


def fill(initial, saved):
    """The initial state, with every leaf of the saved one that has its path, shape and dtype."""
    saved = {jax.tree_util.keystr(path): leaf for path, leaf in tree_leaves_with_path(saved)}

    def leaf(path, like):
        found = saved.get(jax.tree_util.keystr(path), like)
        return found if (found.shape, found.dtype) == (like.shape, like.dtype) else like

    return jax.tree_util.tree_map_with_path(leaf, initial)


@pytest.fixture(scope="module")
def saved():
    return {name: run(make(name), make(name).init(PARAMS))[0] for name in CLIPPERS}


@pytest.mark.parametrize("name", CLIPPERS)
def test_every_clipper_goes_on_with_what_any_other_has_left_it(saved, name):
    tx = make(name)
    initial = tx.init(PARAMS)
    _, alone = run(tx, initial)
    for other in CLIPPERS:
        state = fill(initial, saved[other])
        assert int(np.max(smartclip.metrics(state)["num_steps"])) in (0, STEPS)
        end, scales = run(tx, state)
        # No step is lost, and in the end it clips as a new run does.
        assert np.min(scales) > 0.5, other
        np.testing.assert_allclose(scales[-20:], alone[-20:], rtol=0.05, err_msg=other)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(end.rule)), other


@pytest.mark.parametrize("name", ["autoclip", "autoclip_outliers_only", "zscore_clip", "adagc"])
def test_a_count_without_a_memory_counts_nothing(name):
    tx = make(name)
    initial = tx.init(PARAMS)
    counted = dataclasses.replace(initial.rule, num_recorded=jnp.full(2, STEPS))
    end, scales = run(tx, dataclasses.replace(initial, rule=counted))
    expected, alone = run(tx, initial)
    np.testing.assert_array_equal(scales, alone)
    assert_same_bits(end.rule, expected.rule)
