"""Leaves and key paths of any parameter tree, with one spelling of a path for all of them.

Everything that needs to know where a leaf sits (groups, masks, metrics) flattens through here, so
that a parameter has the same key path when `init` sees it and when `update` does.
"""

import sys
from typing import Any

import jax

KeyPath = tuple[Any, ...]
PyTree = Any


def _is_nnx_variable(node: Any) -> bool:
    # Looked up, not imported: a program that uses Flax NNX has loaded it before it calls us.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def _value(variable: Any) -> Any:
    # On the class, because a variable of Flax 0.12.0 looks for what it lacks in its array.
    get_value = getattr(type(variable), "get_value", None)
    return variable.raw_value if get_value is None else get_value(variable)


def unwrap_variables(tree: PyTree) -> PyTree:
    """The tree with every Flax NNX variable replaced by the value it holds.

    `nnx.Optimizer` gives `init` a state of variables and `update` one of bare arrays; without
    this, a path would end in `kernel/value` in the first and in `kernel` in the second.
    """
    return jax.tree.map(
        lambda node: _value(node) if _is_nnx_variable(node) else node,
        tree,
        is_leaf=_is_nnx_variable,
    )


def flatten(tree: PyTree) -> dict[KeyPath, Any]:
    """The leaves of `tree` by key path, in the order in which JAX flattens them."""
    return dict(jax.tree_util.tree_flatten_with_path(unwrap_variables(tree))[0])


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


def leaves_by_name(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree` by the name of their path."""
    return {path_name(path): leaf for path, leaf in flatten(tree).items()}


def replace_leaves(tree: PyTree, leaves: dict[KeyPath, Any]) -> PyTree:
    """The tree with some of its leaves replaced, by key path as `flatten` gives them."""
    old, treedef = jax.tree.flatten(tree)
    new = [leaves.get(path, leaf) for path, leaf in zip(flatten(tree), old, strict=True)]
    return jax.tree.unflatten(treedef, new)
