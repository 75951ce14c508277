"""Random trees, and comparisons of trees."""

import jax
import numpy as np


def random_tree(seed, size, shapes):
    """A tree of float32 arrays with these shapes and the standard deviation `size`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(size * rng.normal(size=shape)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def assert_same_bits(actual, expected):
    for a, b in pairs(actual, expected):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_close(actual, expected, *, rtol, atol=0.0):
    for a, b in pairs(actual, expected):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


def pairs(actual, expected):
    """The leaves of two trees, which must have the same structure, shapes and dtypes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    for a, b in leaves:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return leaves
