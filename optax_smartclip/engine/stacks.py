"""Stacked leaves: axes that count layers, experts or members of an ensemble.

A model that scans over its layers has one leaf for all kernels of a kind. `stacked` says along
which axes such leaves are to be taken for several:

- a mapping from a regular expression, searched for in the path of a leaf (`layers/mlp/kernel`), to
  an axis or a tuple of axes: the first that matches counts, and a leaf that none matches is not
  stacked;
- or a function of a leaf's key path and shape that returns an axis, a tuple of axes or None.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import is_inexact
from optax_smartclip.engine.partitions import WHOLE, Stack
from optax_smartclip.engine.trees import KeyPath, PyTree, flatten, path_name, unbox

Axes = int | tuple[int, ...]
# Any, because a wrong type is refused with a message.
Stacked = Mapping[str, Axes] | Callable[[KeyPath, tuple[int, ...]], Axes | None] | Any


def check_stacked(stacked: Stacked, scope: Any) -> None:
    """Raises ValueError if `stacked` has neither form, or nothing to say in `scope`."""
    if stacked is None:
        return
    if isinstance(scope, str) and scope == "global":
        raise ValueError(
            "`stacked` must be None with scope='global', where all layers share one norm, got "
            f"{stacked!r}. With scope='per_layer' or 'per_param', each layer has its own."
        )
    if callable(stacked):
        return
    if not isinstance(stacked, Mapping) or not stacked:
        raise ValueError(
            "`stacked` must be a mapping from regular expressions to axes, as {'layers': 0} is, or "
            f"a function of key path and shape, got {stacked!r}.{checks.static_hint(stacked)}"
        )
    for pattern, axes in stacked.items():
        checks.compile_pattern("`stacked` must have regular expressions for keys", pattern)
        if not is_axes(axes):
            raise ValueError(
                "`stacked` must map to an axis (a Python int) or a tuple of axes, got "
                f"{axes!r} for {pattern!r}."
            )


def find_stacks(stacked: Stacked, tree: PyTree) -> dict[KeyPath, Stack]:
    """How each leaf is stacked, by key path.

    Raises:
        ValueError: If a pattern matches no leaf, or a leaf lacks an axis.
    """
    leaves = flatten(tree)
    if stacked is None:
        return dict.fromkeys(leaves, WHOLE)
    axes_of = stacked if callable(stacked) else _by_pattern(stacked, leaves)
    return {
        path: _stack(path, np.shape(leaf), axes_of(path, np.shape(leaf)))
        # Counters and random keys, which have no norm, may be scalars.
        if is_inexact(leaf)
        else WHOLE
        for path, leaf in leaves.items()
    }


def slice_shapes(tree: PyTree, stacks: dict[KeyPath, Stack]) -> PyTree:
    """The tree with the shape of one slice, as `jax.ShapeDtypeStruct`, for each stacked leaf."""

    def one_slice(path: KeyPath, leaf: Any) -> Any:
        stack = stacks[path]
        shape = tuple(stack.shape[axis] for axis in stack.within)
        return jax.ShapeDtypeStruct(shape, leaf.dtype) if stack.axes else leaf

    return jax.tree_util.tree_map_with_path(one_slice, unbox(tree))


def _by_pattern(
    stacked: Mapping[str, Axes], leaves: dict[KeyPath, Any]
) -> Callable[[KeyPath, tuple[int, ...]], Any]:
    names = [path_name(path) for path in leaves]
    patterns = [re.compile(pattern) for pattern in stacked]
    checks.check_patterns_match("`stacked` must have patterns that", patterns, names)

    def axes_of(path: KeyPath, shape: tuple[int, ...]) -> Axes | None:
        del shape
        name = path_name(path)
        return next((axes for pattern, axes in stacked.items() if re.search(pattern, name)), None)

    return axes_of


def _stack(path: KeyPath, shape: tuple[int, ...], axes: Any) -> Stack:
    if axes is None:
        return WHOLE
    rank = len(shape)
    listed = axes if isinstance(axes, tuple) else (axes,)
    exist = is_axes(axes) and all(-rank <= axis < rank for axis in listed)
    places = tuple(axis % rank for axis in listed) if exist else ()
    if not exist or len(set(places)) < len(listed):
        raise ValueError(
            f"`stacked` must name axes of {path_name(path)!r}, which has the shape {shape}, each "
            f"once, got {axes!r}."
        )
    # Without elements there are no slices.
    return Stack(places, shape) if places and all(shape) else WHOLE


def is_axes(axes: Any) -> bool:
    """Whether something is an axis, a Python int, or a tuple of axes."""
    listed = axes if isinstance(axes, tuple) else (axes,)
    return all(isinstance(axis, int) and not isinstance(axis, bool) for axis in listed)
