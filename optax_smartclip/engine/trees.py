"""Leaves and key paths of any parameter tree, with one spelling of a path for all of them.

Everything that needs to know where a leaf sits (groups, masks, metrics) flattens through here, so
that a parameter has the same key path when `init` sees it and when `update` does.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from optax_smartclip.engine.dtypes import is_inexact

KeyPath = tuple[Any, ...]
PyTree = Any

# Nodes that hold one array, and metadata: a level of the tree to JAX, but not to people.
_BOXES = (
    ("flax.nnx", "Variable"),
    ("flax.core.meta", "AxisMetadata"),
    ("haliax.core", "NamedArray"),
    ("penzai.core.named_axes", "NamedArrayBase"),
    ("penzai.core.variables", "AbstractVariableValue"),
)


def _is_box(node: Any) -> bool:
    # Looked up, not imported: a program that has such a node has loaded its library.
    return any(
        isinstance(node, getattr(sys.modules[module], name, ()))
        for module, name in _BOXES
        if module in sys.modules
    )


def _content(box: Any) -> Any:
    children = jax.tree.leaves(box, is_leaf=lambda node: node is not box)
    return unbox(children[0]) if len(children) == 1 else box


def unbox(tree: PyTree) -> PyTree:
    """The tree with every box replaced by its content, such as an array.

    `nnx.Optimizer` gives `init` a state of variables and `update` one of bare arrays; without
    this, a path would end in `kernel/value` in the first and in `kernel` in the second. Boxes of
    Flax (NNX and Linen), Haliax and Penzai are known.
    """
    return jax.tree.map(
        lambda node: _content(node) if _is_box(node) else node, tree, is_leaf=_is_box
    )


def flatten(tree: PyTree) -> dict[KeyPath, Any]:
    """The leaves of `tree` by key path, in the order in which JAX flattens them."""
    return dict(jax.tree_util.tree_flatten_with_path(unbox(tree))[0])


def is_path(value: Any) -> bool:
    """Whether a value is a key path, or a part of one, and not some other tuple."""
    entries = (
        jax.tree_util.DictKey,
        jax.tree_util.SequenceKey,
        jax.tree_util.GetAttrKey,
        jax.tree_util.FlattenedIndexKey,
    )
    return isinstance(value, tuple) and all(isinstance(entry, entries) for entry in value)


def path_name(path: KeyPath) -> str:
    """A key path as people write it: `layers/0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def prefixes(path: KeyPath) -> list[KeyPath]:
    """The paths of the nodes on the way to a leaf: the root first, and the leaf last."""
    return [path[:depth] for depth in range(len(path) + 1)]


def leaves_by_name(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree` by the name of their path."""
    return {path_name(path): leaf for path, leaf in flatten(tree).items()}


def clippable_leaves(
    updates: PyTree, takes_part: Callable[[KeyPath], bool]
) -> dict[KeyPath, Array]:
    """The leaves that take part and have a norm, as arrays by key path."""
    return {
        path: jnp.asarray(leaf)
        for path, leaf in flatten(updates).items()
        if is_inexact(leaf) and takes_part(path)
    }


def replace_leaves(tree: PyTree, leaves: dict[KeyPath, Any]) -> PyTree:
    """The tree with some of its leaves replaced, by key path as `flatten` gives them."""
    old, treedef = jax.tree.flatten(tree)
    new = [leaves.get(path, leaf) for path, leaf in zip(flatten(tree), old, strict=True)]
    return jax.tree.unflatten(treedef, new)
