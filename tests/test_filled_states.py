"""Training continues from a state that a lenient restore has put together from two clippers.

Some restores fill in what a checkpoint lacks from the initial state without a message: Flax's
`restore_checkpoint` does, by way of Orbax. A run that was saved with one clipper and is resumed
with another then has the counts of the first and the empty history of the second.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clipper_table import CLIPPERS
from jax.tree_util import tree_leaves_with_path
from trees import assert_same_bits

import optax_smartclip as smartclip

STEPS = 120
# With weights of this size, agc clips nothing.
PARAMS = {"w": np.full(4, 1000.0, np.float32), "b": np.full(2, 1000.0, np.float32)}
SIZES = np.float32(np.exp(0.1 * np.random.default_rng(0).normal(size=STEPS)))


@functools.cache
def clipper(name):
    """The initial state, and a compiled function from a state to the last one and all scales.

    All clippers have one scope, so that their counts have the same shape.
    """
    tx = CLIPPERS[name](scope="per_param")

    def step(state, size):
        grads = jax.tree.map(lambda leaf: size * jnp.ones_like(leaf), PARAMS)
        updates, state = tx.update(grads, state, PARAMS)
        return state, jnp.stack([updates[name][0] / size for name in PARAMS])

    return tx.init(PARAMS), jax.jit(lambda state: jax.lax.scan(step, state, SIZES))


def fill(initial, saved):
    """The initial state, with those leaves of the saved one that have its path, shape and dtype."""
    saved = {jax.tree_util.keystr(path): leaf for path, leaf in tree_leaves_with_path(saved)}

    def leaf(path, like):
        found = saved.get(jax.tree_util.keystr(path), like)
        return found if (found.shape, found.dtype) == (like.shape, like.dtype) else like

    return jax.tree_util.tree_map_with_path(leaf, initial)


@functools.cache
def new_run(name):
    """The last state and all scales of a run from the initial state."""
    initial, run = clipper(name)
    return run(initial)


@pytest.mark.parametrize("name", CLIPPERS)
def test_every_clipper_continues_from_the_state_of_any_other(name):
    initial, run = clipper(name)
    _, alone = new_run(name)
    for other in CLIPPERS:
        state = fill(initial, new_run(other)[0])
        assert int(np.max(smartclip.metrics(state)["num_steps"])) in (0, STEPS)
        end, scales = run(state)
        # No step is lost, and at the end it clips as a new run does.
        assert np.min(scales) > 0.5, other
        np.testing.assert_allclose(scales[-20:], alone[-20:], rtol=0.05, err_msg=other)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(end.rule)), other


@pytest.mark.parametrize("name", ["autoclip", "autoclip_outliers_only", "zscore_clip", "adagc"])
def test_a_count_has_no_effect_while_the_history_is_empty(name):
    initial, run = clipper(name)
    counted = dataclasses.replace(initial.rule, num_recorded=jnp.full(2, STEPS))
    end, scales = run(dataclasses.replace(initial, rule=counted))
    expected, alone = new_run(name)
    np.testing.assert_array_equal(scales, alone)
    assert_same_bits(end.rule, expected.rule)


@pytest.mark.parametrize("name", CLIPPERS)
def test_a_new_run_has_counted_nothing(name):
    state = smartclip.skip_spikes(optax.chain(CLIPPERS[name]())).init(PARAMS)
    counts = {
        jax.tree_util.keystr(path[-1:], simple=True): leaf
        for path, leaf in tree_leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.integer)
    }
    assert {"num_observed", "num_in_a_row"} <= counts.keys()
    assert not any(np.any(count) for count in counts.values()), counts
