"""Matrices: the leaves with two axes, or with two beside those along which they are stacked."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from optax_smartclip.engine.partitions import Stack


def is_matrix(leaf: Any, stack: Stack) -> bool:
    """Whether a leaf is a matrix of real numbers, or several, and has elements."""
    shape = np.shape(leaf)
    is_real = jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating)
    return bool(is_real and len(shape) == len(stack.axes) + 2 and all(shape))


def matrix_shape(leaf: Any, stack: Stack) -> tuple[int, int]:
    """The shape of one matrix of a leaf."""
    rows, columns = np.delete(np.shape(leaf), stack.axes).tolist()
    return rows, columns


def as_matrices(leaf: Float[Array, "..."], stack: Stack) -> Float[Array, "slices rows columns"]:
    """All matrices of a leaf, turned so that none is higher than wide."""
    rows, columns = matrix_shape(leaf, stack)
    in_front = jnp.moveaxis(leaf, stack.axes, range(len(stack.axes)))
    matrices = in_front.reshape(-1, rows, columns)
    return matrices if rows <= columns else matrices.mT


def from_matrices(
    matrices: Float[Array, "slices rows columns"], like: Float[Array, "..."], stack: Stack
) -> Float[Array, "..."]:
    """The leaf whose matrices these are, with the shape of another one."""
    shape = matrix_shape(like, stack)
    turned = matrices if shape[0] <= shape[1] else matrices.mT
    return jnp.moveaxis(turned.reshape(stack.sizes + shape), range(len(stack.axes)), stack.axes)
