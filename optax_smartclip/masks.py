"""Masks for `agc`: which leaves it clips, as in `optax.masked` (True: clipped, False: left alone).

    smartclip.agc(mask=masks.except_paths("head"))
    smartclip.agc(mask=masks.every(masks.except_vectors, masks.except_paths(r"^head/")))

Each is a function of the parameters that returns a tree of bools with their structure, so they
serve `optax.masked` and `optax.adamw(mask=...)` as well.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from optax_smartclip.engine import checks
from optax_smartclip.engine.trees import KeyPath, PyTree, flatten, path_name, unbox

MaskFn = Callable[[PyTree], PyTree]


def except_paths(*patterns: str) -> MaskFn:
    """A mask that leaves alone what lies at certain paths, such as the final layer.

    Args:
        *patterns: Regular expressions, searched for (`re.search`) in paths such as
            `layers/0/kernel`.

    Returns:
        A function of the parameters (arrays or shapes) that returns a tree of bools. It raises
        ValueError if a pattern matches no path: a mask that masks nothing is a misspelled one.

    Raises:
        ValueError: If no pattern is given, or one is not a regular expression.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_smartclip import masks
        >>> masks.except_paths("^head/")({"head": {"w": jnp.zeros(3)}, "body": jnp.zeros(3)})
        {'body': True, 'head': {'w': False}}
    """
    if not patterns:
        raise ValueError("`patterns` must have at least one regular expression, got none.")
    compiled = [
        checks.compile_pattern("`patterns` must be regular expressions", pattern)
        for pattern in patterns
    ]

    def mask(params: PyTree) -> PyTree:
        names = [path_name(path) for path in flatten(params)]
        hint = checks.static_hint(params)
        checks.check_patterns_match("`patterns` must", compiled, names, hint)
        return _map_leaves(
            lambda path, _: not any(pattern.search(path_name(path)) for pattern in compiled), params
        )

    return mask


def except_vectors(params: PyTree) -> PyTree:
    """A mask that leaves alone biases, norm scales and scalars: leaves with one axis at most.

    Axes of size 1 do not count, so that a convolution's bias of shape `[features, 1, 1]` is a
    vector, too.

    Args:
        params: Arrays or shapes (anything with a `shape`).

    Returns:
        A tree of bools with the structure of `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_smartclip import masks
        >>> masks.except_vectors({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros((3, 1, 1))})
        {'bias': False, 'kernel': True}
    """
    return _map_leaves(lambda _, leaf: not is_vector(np.shape(leaf)), params)


def every(*masks: MaskFn) -> MaskFn:
    """A mask that clips what every one of several masks would clip.

    Args:
        *masks: Functions of the parameters that return a tree of bools with their structure.

    Returns:
        Such a function.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_smartclip import masks
        >>> mask = masks.every(masks.except_vectors, masks.except_paths("head"))
        >>> mask({"head": jnp.zeros((2, 3)), "kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
        {'bias': False, 'head': False, 'kernel': True}
    """

    def mask(params: PyTree) -> PyTree:
        bare = unbox(params)
        return jax.tree.map(lambda *values: all(values), *(unbox(mask(bare)) for mask in masks))

    return mask


def is_vector(shape: tuple[int, ...]) -> bool:
    """Whether at most one axis is not of size 1."""
    return sum(size != 1 for size in shape) <= 1


def _map_leaves(function: Callable[[KeyPath, Any], bool], params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(function, unbox(params))
