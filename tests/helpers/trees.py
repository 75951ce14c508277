"""Random trees, and what it is for two trees to be the same."""

import jax
import numpy as np


def random_tree(seed, size, shapes):
    """A tree of float32 arrays of standard deviation `size`, in place of the shapes."""
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
    """The leaves of two trees of one structure, which have the same shapes and dtypes, too."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    for a, b in leaves:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return leaves
