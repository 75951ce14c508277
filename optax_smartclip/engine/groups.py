"""Groups: which leaves of a tree share one norm. This is the meaning of `scope`.

A scope is one of

- `"global"`: all leaves are one group, as in `optax.clip_by_global_norm`;
- `"per_layer"`: leaves with the same parent (a layer's kernel and bias) are a group;
- `"per_param"`: every leaf is a group;
- a function of a leaf's key path that returns a label: equal labels are a group;
- a tree of labels with the structure of the parameters, or a prefix of it.

Groups are numbered in the order in which they first occur when the tree is flattened; that
number is the index into every `[groups]` array of a state.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

from optax_smartclip.engine import checks
from optax_smartclip.engine.partitions import Leaves
from optax_smartclip.engine.trees import KeyPath, PyTree, flatten, is_path, path_name

Scope = str | Callable[[KeyPath], Hashable] | PyTree

SCOPES = ("global", "per_layer", "per_param")


class Groups(NamedTuple):
    """The groups of one tree.

    Attributes:
        labels: One label per group.
        number: The number of the group of each leaf, by key path.
    """

    labels: tuple[str, ...]
    number: dict[KeyPath, int]

    def partition(self, paths: Iterable[KeyPath]) -> Leaves:
        """The partition of a list of leaves, given by their key paths."""
        return Leaves(tuple(self.number[path] for path in paths), len(self.labels))


def check_scope(scope: Scope, choices: tuple[str, ...] = SCOPES) -> None:
    """Raises ValueError if `scope` is a string but not one of `choices`."""
    if isinstance(scope, str):
        checks.check_choice("scope", scope, choices)
    elif scope is None:
        raise ValueError(f"`scope` must be one of {choices}, a function or a tree, got None.")


def assign_groups(scope: Scope, tree: PyTree) -> Groups:
    """Assigns every leaf of `tree` to a group.

    Raises:
        ValueError: If a tree of labels has no label for a leaf, or a function returns None.
    """
    paths = flatten(tree)
    # A group is known by its key: a label, or a path (whose name alone could be ambiguous).
    if isinstance(scope, str) and scope == "global":
        keys: dict[KeyPath, Any] = dict.fromkeys(paths, "global")
        every_key: list[Any] = ["global"]  # also when the tree is empty
    elif isinstance(scope, str) and scope == "per_layer":
        keys = {path: path[:-1] for path in paths}
        every_key = list(keys.values())
    elif isinstance(scope, str):
        keys = {path: path for path in paths}
        every_key = list(keys.values())
    elif callable(scope):
        keys = {path: scope(path) for path in paths}
        for path, label in keys.items():
            if label is None or not isinstance(label, Hashable):
                raise ValueError(
                    "`scope` must return a label (any hashable value but None) for every leaf, "
                    f"got {label!r} for {path_name(path)!r}."
                )
        every_key = list(keys.values())
    else:
        label_of = flatten(scope)
        keys = broadcast_prefix("scope", label_of, paths)
        every_key = list(label_of.values())
    numbers = {key: number for number, key in enumerate(dict.fromkeys(every_key))}
    labels = tuple(path_name(key) if is_path(key) else str(key) for key in numbers)
    return Groups(labels, {path: numbers[key] for path, key in keys.items()})


def broadcast_prefix(
    name: str, prefix: dict[KeyPath, Any], paths: Iterable[KeyPath]
) -> dict[KeyPath, Any]:
    """Gives each path the value that a prefix tree (flattened) holds for it or for a parent.

    Raises:
        ValueError: If a path is not covered; `name` is the argument that the prefix came from.
    """
    covered = {}
    for path in paths:
        for depth in range(len(path) + 1):
            if path[:depth] in prefix:
                covered[path] = prefix[path[:depth]]
                break
        else:
            raise ValueError(
                f"`{name}` must be a tree with the structure of the parameters, or a prefix of "
                f"it, but it has nothing for {path_name(path)!r}."
            )
    return covered


def group_labels(scope: Scope, params: PyTree) -> tuple[str, ...]:
    """The label of each group, in the order of the `[groups]` arrays of the metrics.

    Args:
        scope: As given to the clipper.
        params: The parameters that the clipper was initialised with (arrays or
            `jax.ShapeDtypeStruct`s; only the structure matters).

    Returns:
        One label per group: a path such as `"layers/0/kernel"` for the scopes `"per_param"` and
        `"per_layer"`, else the user's labels as strings.

    Raises:
        ValueError: If `scope` is none of the five forms, or a tree of labels misses a leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> params = {"dense": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
        >>> smartclip.group_labels("per_param", params)
        ('dense/bias', 'dense/kernel')
    """
    check_scope(scope)
    return assign_groups(scope, params).labels
