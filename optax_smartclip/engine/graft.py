"""Adopting a clipper in a run that is under way, without losing what its optimizer has learnt."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_smartclip.engine.states import ClipState
from optax_smartclip.engine.trees import KeyPath, PyTree, path_name


def graft(saved: PyTree, opt_state: PyTree) -> PyTree:
    """Puts everything but the clippers of a saved optimizer state into a new one.

    For a run that goes on with another clipper in its chain than it was saved with, with one more
    or with none. Leaves are recognised by the names on their paths (`mu`, `kernel`), in order where
    these are equal, not by their place in the chain, so that `saved` may be a state of its own type
    or the lists and dictionaries of a checkpoint that was restored without a target. A clipper that
    `saved` has, too, with the same fields and shapes, goes on where it was; any other starts anew.

    Args:
        saved: The optimizer state of the run so far.
        opt_state: What `init` of the new transformation returns for the same parameters.

    Returns:
        The new state, with the structure of `opt_state`.

    Raises:
        ValueError: If, clippers apart, a leaf of either has no counterpart of the same name, shape
            and dtype in the other.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_smartclip as smartclip
        >>> params = {"w": jnp.zeros(2)}
        >>> old = optax.sgd(0.1, momentum=0.9)
        >>> _, saved = old.update({"w": jnp.array([3.0, 4.0])}, old.init(params))
        >>> new = optax.chain(smartclip.autoclip(), optax.sgd(0.1, momentum=0.9))
        >>> opt_state = smartclip.graft(saved, new.init(params))
        >>> print(optax.tree.get(opt_state, "trace"))
        {'w': Array([3., 4.], dtype=float32)}
    """
    clippers, leaves = [], defaultdict(list)
    for path, node in jax.tree_util.tree_leaves_with_path(saved, is_leaf=_is_clip_state):
        if _is_clip_state(node):
            clippers.append(node)
        else:
            leaves[_names(path)].append((path, node))

    def counterpart(path: KeyPath, node: Any) -> Any:
        if _is_clip_state(node):
            same = [clipper for clipper in clippers if _fields(clipper) == _fields(node)]
            if not same:
                return node
            clippers[:] = [clipper for clipper in clippers if clipper is not same[0]]
            return jax.tree.unflatten(jax.tree.structure(node), _in_order(same[0], node))
        if not leaves[_names(path)]:
            raise ValueError(f"`saved` has nothing for {path_name(path)!r} of `opt_state`.")
        saved_path, leaf = leaves[_names(path)].pop(0)
        if _kind(leaf) != _kind(node):
            raise ValueError(
                f"`saved` must have {path_name(saved_path)!r} with shape and dtype {_kind(node)}, "
                f"as `opt_state` has, got {_kind(leaf)}."
            )
        return leaf

    grafted = jax.tree_util.tree_map_with_path(counterpart, opt_state, is_leaf=_is_clip_state)
    unused = [path_name(path) for same_name in leaves.values() for path, _ in same_name]
    if unused:
        raise ValueError(f"`opt_state` has no place for {unused} of `saved`.")
    return grafted


def _is_clip_state(node: Any) -> bool:
    """Whether a node is a clipper's state, or the dictionary that became of one."""
    untyped = isinstance(node, Mapping) and {"num_observed", "last"} <= set(node)
    return untyped or isinstance(node, ClipState)


def _names(path: KeyPath) -> tuple[str, ...]:
    """A path without places in a sequence, which a link more or less in a chain would move."""
    return tuple(name for name in path_name(path).split("/") if not name.isdigit())


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    return jnp.shape(leaf), str(jnp.asarray(leaf).dtype)


def _by_name(clipper: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(clipper)}


def _fields(clipper: Any) -> dict[str, Any]:
    return {name: _kind(leaf) for name, leaf in _by_name(clipper).items()}


def _in_order(clipper: Any, like: Any) -> list[Any]:
    leaves = _by_name(clipper)
    return [leaves[name] for name in _by_name(like)]
