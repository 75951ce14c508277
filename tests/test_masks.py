"""The ready-made masks, by themselves and in Optax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from optax_smartclip import masks

PARAMS = {"head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}


def test_except_paths_searches_every_pattern_in_the_whole_path():
    mask = masks.except_paths(r"^head/kernel$", "norm")(PARAMS)
    assert mask == {"head": {"kernel": False, "bias": True}, "norm": {"scale": False}}


def test_except_vectors_ignores_axes_of_size_one():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones((3, 1, 1)), "scalar": jnp.ones(())}
    assert masks.except_vectors(params) == {"kernel": True, "bias": False, "scalar": False}


def test_every_needs_all_masks_to_agree():
    mask = masks.every(masks.except_vectors, masks.except_paths("head"))(PARAMS)
    assert mask == {"head": {"kernel": False, "bias": False}, "norm": {"scale": False}}


@pytest.mark.parametrize("reverse", [False, True])
def test_every_needs_all_masks_to_agree_on_parameters_in_boxes(reverse):
    params = jax.tree.map(lambda leaf: nn.Partitioned(leaf, ("axis",) * leaf.ndim), PARAMS)

    def nothing(params):
        return jax.tree.map(lambda _: False, params)

    both = [masks.except_vectors, nothing]
    mask = masks.every(*(both[::-1] if reverse else both))(params)
    assert mask == nothing(PARAMS)


def test_masks_work_in_optax():
    tx = optax.masked(optax.scale(0.0), masks.except_paths("head"))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    assert updates["head"]["bias"][0] == 1
    assert updates["norm"]["scale"][0] == 0


def test_a_pattern_that_matches_nothing_is_an_error_that_lists_the_paths():
    with pytest.raises(ValueError, match=r"'haed' matches none of head/bias, head/kernel, norm"):
        masks.except_paths("haed")(PARAMS)


def test_an_invalid_regular_expression_is_an_error():
    with pytest.raises(ValueError, match=r"`patterns` must be regular expressions, got '\('"):
        masks.except_paths("(")


def test_a_missing_pattern_is_an_error():
    with pytest.raises(ValueError, match="`patterns` must have at least one"):
        masks.except_paths()


def test_a_tree_without_leaves_has_nothing_to_match():
    assert masks.except_paths("head")({}) == {}
