"""Adopting a clipper in a run that is under way, without losing what its optimizer has learnt."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optax_smartclip.engine.trees import KeyPath, PyTree, leaves_by_name, path_name


def graft(saved: PyTree, opt_state: PyTree) -> PyTree:
    """Puts everything but the clippers of a saved optimizer state into a new one.

    For a run that goes on with another clipper in its chain than it was saved with, with one more
    or with none, or within `skip_spikes`. Leaves are recognised by the names on their paths (`mu`,
    `kernel`), and those of equal names by their order: a number is no name, because a link more or
    less in a chain moves the others, nor is the `inner_state` of a wrapper. So `saved` may be a
    state of its own type, or the lists and dictionaries of a checkpoint that was restored without
    a target. A clipper that `saved` has under the same names, with the same fields and shapes,
    goes on where it was; any other starts anew.

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
    candidates = defaultdict(list)
    for path, node in _in_order(saved):
        candidates[_names(path), _clipper_fields(node)].append((path, node))

    counterparts = []
    template = _in_order(opt_state)
    for path, node in template:
        fields = _clipper_fields(node)
        same_names = candidates[_names(path), fields]
        if fields is not None:
            clipper = same_names.pop(0)[1] if same_names else node
            counterparts.append(_rebuild(clipper, node))
            continue
        if not same_names:
            raise ValueError(f"`saved` has nothing for {path_name(path)!r} of `opt_state`.")
        saved_path, leaf = same_names.pop(0)
        if _kind(leaf) != _kind(node):
            raise ValueError(
                f"`saved` must have {path_name(saved_path)!r} with shape and dtype {_kind(node)}, "
                f"as `opt_state` has, got {_kind(leaf)}."
            )
        counterparts.append(leaf)

    unused = [
        path_name(path)
        for (_, fields), nodes in candidates.items()
        for path, _ in nodes
        if fields is None
    ]
    if unused:
        raise ValueError(f"`opt_state` has no place for {unused} of `saved`.")
    by_path = {path: node for (path, _), node in zip(template, counterparts, strict=True)}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: by_path[path], opt_state, is_leaf=_is_clipper
    )


def _in_order(tree: PyTree) -> list[tuple[KeyPath, Any]]:
    """Leaves and clippers with their paths; the tenth layer behind the ninth, also by its name."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_clipper)
    return sorted(nodes, key=lambda item: [_natural(name) for name in _parts(item[0])])


def _natural(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() else (-1, name)


def _parts(path: KeyPath) -> list[str]:
    return path_name(path).split("/")


def _names(path: KeyPath) -> tuple[str, ...]:
    """A path without what one more link in a chain, or a wrapper around it, would change."""
    return tuple(name for name in _parts(path) if not name.isdecimal() and name != "inner_state")


def _is_clipper(node: Any) -> bool:
    """Whether a node is a clipper's state, or the dictionary that became of one.

    Or either within another state, as of `inject_hyperparams`. What `skip_spikes` knows of past
    steps is one as well; the optimizer inside it is not.
    """
    fields = _fields(node)
    if "detector" in fields:
        return False
    wrapped = "inner_state" in fields and _is_clipper(fields["inner_state"])
    return wrapped or {"num_observed", "last"} <= fields.keys()


def _fields(node: Any) -> Mapping[Any, Any]:
    if dataclasses.is_dataclass(node):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    fields = node._asdict() if hasattr(node, "_asdict") else node
    return fields if isinstance(fields, Mapping) else {}


def _clipper_fields(node: Any) -> frozenset[Any] | None:
    """Names, shapes and dtypes of what a clipper consists of; None for anything else."""
    if not _is_clipper(node):
        return None
    return frozenset((name, *_kind(leaf)) for name, leaf in leaves_by_name(node).items())


def _rebuild(clipper: Any, like: Any) -> Any:
    leaves = leaves_by_name(clipper)
    in_order = [leaves[name] for name in leaves_by_name(like)]
    return jax.tree.unflatten(jax.tree.structure(like), in_order)


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return tuple(array.shape), str(array.dtype)
