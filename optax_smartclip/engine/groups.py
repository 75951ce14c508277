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

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import numpy as np

from optax_smartclip.engine import checks
from optax_smartclip.engine.partitions import WHOLE, Leaves, Stack
from optax_smartclip.engine.stacks import Stacked, check_stacked, find_stacks, slice_shapes
from optax_smartclip.engine.trees import KeyPath, PyTree, flatten, is_path, path_name, prefixes

Scope = str | Callable[[KeyPath], Hashable] | PyTree

# Which leaves take part, as in `optax.masked`.
LeafMask = PyTree | Callable[[PyTree], PyTree] | None

SCOPES = ("global", "per_layer", "per_param")


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups of one tree.

    Attributes:
        keys: What each run of groups is called, and by which indices the groups of a run are
            numbered: none for a group of whole leaves.
        first: The number of the group of each leaf that takes part, or of its first slice.
        stacks: How each leaf of the tree is stacked.
    """

    keys: tuple[tuple[str, tuple[int, ...]], ...]
    first: dict[KeyPath, int]
    stacks: dict[KeyPath, Stack]

    @property
    def labels(self) -> tuple[str, ...]:
        """One label for each group."""
        return tuple(
            f"{name}[{','.join(map(str, index))}]" if sizes else name
            for name, sizes in self.keys
            for index in np.ndindex(*sizes)
        )

    @property
    def num_groups(self) -> int:
        """How many groups there are, those without a leaf among them."""
        return sum(math.prod(sizes) for _, sizes in self.keys)

    def takes_part(self, path: KeyPath) -> bool:
        """Whether a leaf is in a group.

        Raises:
            ValueError: If the tree does not have the leaf.
        """
        check_known(path, self.stacks)
        return path in self.first

    def partition(self, paths: Iterable[KeyPath]) -> Leaves:
        """The partition of a list of leaves that take part, given by their key paths."""
        paths = list(paths)
        return Leaves(
            tuple(self.first[path] for path in paths),
            self.num_groups,
            tuple(self.stacks[path] for path in paths),
        )


def check_known(path: KeyPath, known: Iterable[KeyPath]) -> None:
    """Raises ValueError unless a leaf of the gradient is among the known ones."""
    if path not in known:
        raise ValueError(
            f"The gradient has a leaf {path_name(path)!r} that `params` does not have."
        )


def check_scope(scope: Scope, choices: tuple[str, ...] = SCOPES) -> None:
    """Raises ValueError if `scope` has none of its forms."""
    if isinstance(scope, str):
        checks.check_choice("scope", scope, choices)
    elif scope is None or isinstance(scope, jax.Array):
        raise ValueError(
            f"`scope` must be one of {choices}, a function or a tree, got {scope!r}."
            f"{checks.static_hint(scope)}"
        )


def assign_groups(
    scope: Scope, tree: PyTree, *, stacked: Stacked = None, mask: LeafMask = None
) -> Groups:
    """Assigns every leaf of `tree` that a mask does not leave out to a group.

    A leaf that is left out has a group, too, so that a state does not depend on the mask.

    Raises:
        ValueError: If a tree of labels has no label for a leaf, a function returns None, a mask has
            nothing for a leaf, or `stacked` does not fit.
    """
    stacks = find_stacks(stacked, tree)
    paths = list(stacks)
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
    # Leaves of one key that are stacked differently are apart.
    sizes_of: dict[Any, dict[tuple[int, ...], None]] = {key: {} for key in every_key}
    for path, key in keys.items():
        sizes_of[key][stacks[path].sizes] = None
    runs = [(key, sizes) for key, found in sizes_of.items() for sizes in found or [WHOLE.sizes]]
    ends = itertools.accumulate((math.prod(sizes) for _, sizes in runs), initial=0)
    starts = dict(zip(runs, ends, strict=False))
    covered = covered_paths(mask, tree, stacks)
    return Groups(
        tuple((path_name(key) if is_path(key) else str(key), sizes) for key, sizes in runs),
        {path: starts[key, stacks[path].sizes] for path, key in keys.items() if path in covered},
        stacks,
    )


def covered_paths(mask: LeafMask, tree: PyTree, stacks: dict[KeyPath, Stack]) -> set[KeyPath]:
    """The key paths of the leaves that a mask lets take part.

    A mask that is a function is given the shape of one slice of each stacked leaf, and no boxes.

    Raises:
        ValueError: If the mask is a single value, or has nothing for a leaf.
    """
    if mask is None:
        return set(stacks)
    # One bool says as much as None or the lack of a clipper. It is what a function becomes that
    # optax.inject_hyperparams has taken for a schedule.
    if isinstance(mask, bool | np.bool_ | jax.Array):
        raise ValueError(
            "`mask` must be a tree of bools with the structure of the parameters, a prefix of it, "
            f"or a function of them, and not a single value, got {mask!r}.{checks.STATIC_HINT}"
        )
    if callable(mask):
        mask = mask(slice_shapes(tree, stacks))
    covers = broadcast_prefix("mask", flatten(mask), stacks)
    return {path for path, flag in covers.items() if flag}


def broadcast_prefix(
    name: str, prefix: dict[KeyPath, Any], paths: Iterable[KeyPath]
) -> dict[KeyPath, Any]:
    """Gives each path the value that a prefix tree (flattened) holds for it or for a parent.

    Raises:
        ValueError: If a path is not covered; `name` is the argument that the prefix came from.
    """
    covered = {}
    for path in paths:
        known = next((parent for parent in prefixes(path) if parent in prefix), None)
        if known is None:
            raise ValueError(
                f"`{name}` must be a tree with the structure of the parameters, or a prefix of "
                f"it, but it has nothing for {path_name(path)!r}."
            )
        covered[path] = prefix[known]
    return covered


def group_labels(scope: Scope, params: PyTree, *, stacked: Stacked = None) -> tuple[str, ...]:
    """The label of each group, in the order of the `[groups]` arrays of the metrics.

    Args:
        scope: As given to the clipper.
        params: The parameters that the clipper was initialized with (arrays or
            `jax.ShapeDtypeStruct`s; values do not matter).
        stacked: As given to the clipper.

    Returns:
        One label per group: a path such as `"layers/0/kernel"` for the scopes `"per_param"` and
        `"per_layer"`, else the user's labels as strings. The groups of stacked leaves have an
        index: `"layers/kernel[3]"`.

    Raises:
        ValueError: If `scope` is none of the five forms, a tree of labels misses a leaf, or
            `stacked` does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> params = {"dense": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
        >>> smartclip.group_labels("per_param", params)
        ('dense/bias', 'dense/kernel')
        >>> smartclip.group_labels("per_layer", {"layers": {"w": jnp.zeros((2, 3))}},
        ...                        stacked={"layers": 0})
        ('layers[0]', 'layers[1]')
    """
    check_scope(scope)
    check_stacked(stacked, scope)
    return assign_groups(scope, params, stacked=stacked).labels
