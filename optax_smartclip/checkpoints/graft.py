"""Adopting a clipper, or another model, in a run under way without losing what it has learned."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax

from optax_smartclip.checkpoints.regroup import (
    Clipper,
    Rows,
    as_array,
    is_clipper,
    is_float,
    kind,
    rebuild,
)
from optax_smartclip.engine import checks
from optax_smartclip.engine.trees import KeyPath, PyTree, path_name, prefixes

Nodes = list[tuple[KeyPath, Any]]

# The names that lead to a field of a state, and the path of the parameter below it; None where
# the numbers in that path are not names.
Identity = tuple[tuple[str, ...], tuple[str, ...] | None]


def graft(
    saved: PyTree,
    opt_state: PyTree,
    *,
    on_mismatch: Any = None,
    saved_labels: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    cast: Any = False,
) -> PyTree:
    """Puts everything but the clippers of a saved optimizer state into a new one.

    Use it when a run adds, removes or exchanges a clipper, or starts to use `skip_spikes`. Leaves
    are matched by the names on their paths (`mu`, `kernel`), and leaves with equal names by their
    order. Indices are ignored, since adding a link to a chain shifts them, and so is the
    `inner_state` of a wrapper. So `saved` may be a state of its own type, or the lists and
    dictionaries of a checkpoint that was restored without a target. A clipper that `saved` has
    under the same names, with the same fields and shapes, continues; any other starts from `init`.

    With `on_mismatch`, the model may have changed as well. Leaves that both states have continue.
    A leaf that is new, or has another shape, starts as `init` starts it, and a leaf that only
    `saved` has is left out. Indices in the path of a parameter then count as names. A clipper with
    several groups has no names in its state: it continues only if both lists of labels are given,
    each group from the group with its label.

    Args:
        saved: The optimizer state of the run so far.
        opt_state: What `init` of the new transformation returns for the parameters.
        on_mismatch: None, where all but clippers must fit, or a function such as `print` or
            `logging.warning`. It is called with one line of text for each leaf, clipper or group
            that starts or is left out.
        saved_labels: What `group_labels` returns for the scope of the clipper and the parameters of
            `saved`. For all clippers with as many groups, before and after.
        labels: The same for the parameters of `opt_state`.
        cast: Whether a leaf may have another float dtype than in `opt_state`, such as bfloat16, and
            is then cast. Integers are not.

    Returns:
        The new state, with the structure of `opt_state`.

    Raises:
        ValueError: If, clippers apart, a leaf of either has no counterpart of the same name, shape
            and dtype in the other, unless `on_mismatch` or `cast` allows it; if a group has none
            of the same label, unless `on_mismatch` allows it; or if the labels fit no clipper.

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

        With a parameter more:

        >>> grown = params | {"v": jnp.zeros(1)}
        >>> opt_state = smartclip.graft(saved, old.init(grown), on_mismatch=print)
        started '0/trace/v'
        >>> print(optax.tree.get(opt_state, "trace"))
        {'v': Array([0.], dtype=float32), 'w': Array([3., 4.], dtype=float32)}
    """
    checks.check_flag("cast", cast)
    if on_mismatch is not None and not callable(on_mismatch):
        raise ValueError(
            f"`on_mismatch` must be None or a function of one line of text, got {on_mismatch!r}."
        )
    old, new = _in_order(saved), _in_order(opt_state)
    _check_labels(saved_labels, labels, old, new)
    match = _Match(on_mismatch, saved_labels, labels, cast)
    fields = set() if on_mismatch is None else set(_fields_of_tuples(opt_state))
    by_path = match.leaves(_leaves(old), _leaves(new), fields)
    by_path |= match.clippers(_clippers(old), _clippers(new))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: by_path[path], opt_state, is_leaf=is_clipper
    )


@dataclasses.dataclass(frozen=True)
class _Match:
    """Finds what each part of a new state goes on from.

    Attributes:
        on_mismatch, saved_labels, labels, cast: As given to `graft`.
        reshaped: The paths of parameters that were found to have another shape.
    """

    on_mismatch: Callable[[str], Any] | None
    saved_labels: Sequence[str] | None
    labels: Sequence[str] | None
    cast: bool
    reshaped: set[str] = dataclasses.field(default_factory=set)

    def leaves(self, old: Nodes, new: Nodes, fields: Collection[KeyPath]) -> dict[KeyPath, Any]:
        """Leaves that belong to no clipper; below `fields`, numbers are names."""
        identities = {path: _identity(path, fields) for path, _ in new}
        counts: Counter[Identity | None] = Counter(identities.values())
        candidates: dict[Identity | None, Nodes] = defaultdict(list)
        for path, leaf in old:
            known = next((each for each in _possible_identities(path) if each in counts), None)
            candidates[known].append((path, leaf))
        unused: Nodes = []
        for identity, same in candidates.items():
            # Which is which is known by their order only if all of them are there.
            if self.on_mismatch and len(same) != counts[identity]:
                unused += same
                same.clear()

        by_path = {}
        for path, like in new:
            by_path[path], name, same = like, path_name(path), candidates[identities[path]]
            if not same:
                self.tell(f"`saved` has nothing for {name!r} of `opt_state`.", f"started {name!r}")
                continue
            saved_path, leaf = same.pop(0)
            problem = (
                f"`saved` must have {path_name(saved_path)!r} with shape and dtype {kind(like)}, "
                f"as `opt_state` has, got {kind(leaf)}."
            )
            shape, expected = kind(leaf)[0], kind(like)[0]
            if shape == expected:
                by_path[path] = self.cast_leaf(leaf, like, problem)
            else:
                self.tell(problem, f"started {name!r}: its shape is {expected} and was {shape}")
                self.reshaped.add("/".join(identities[path][1] or ()))
        names = [path_name(path) for path, _ in sum(candidates.values(), unused)]
        if names:
            problem = f"`opt_state` has no place for {names} of `saved`."
            self.tell(problem, *(f"left out {name!r}" for name in names))
        return by_path

    def cast_leaf(self, leaf: Any, like: Any, problem: str) -> Any:
        """A leaf in the dtype of another, where that is allowed."""
        if kind(leaf) == kind(like):
            return leaf
        if not (is_float(leaf) and is_float(like)):
            raise ValueError(problem)
        if not self.cast:
            raise ValueError(f"{problem} With `cast=True`, it is cast.")
        return as_array(leaf).astype(as_array(like).dtype)

    def clippers(self, old: Nodes, new: Nodes) -> dict[KeyPath, Any]:
        """Clippers. One without a counterpart starts from `init`, without an error."""
        remaining = [(path, Clipper.of(node)) for path, node in old]
        by_path, lines = {}, []
        for path, node in new:
            by_path[path], name, clipper = node, path_name(path), Clipper.of(node)
            alike = [
                candidate
                for saved_path, candidate in remaining
                if _names(saved_path) == _names(path)
                and candidate.kind(cast=self.cast) == clipper.kind(cast=self.cast)
            ]
            for candidate in alike:
                rows = self.rows(candidate, clipper, name)
                if rows is not None:
                    by_path[path] = rebuild(candidate.go_on(clipper, rows), node)
                    remaining = [item for item in remaining if item[1] is not candidate]
                    break
            else:
                unknown = ": `saved_labels` and `labels` do not tell its groups" if alike else ""
                lines.append(f"started {name!r}{unknown}")
        lines += [f"left out {path_name(path)!r}" for path, _ in remaining]
        if self.on_mismatch is not None:
            self.tell("", *lines)
        return by_path

    def rows(self, old: Clipper, new: Clipper, name: str) -> Rows | None:
        """Where each group of a clipper is in a saved one; None if that cannot be known."""
        before, after = self.saved_labels, self.labels
        if before and after and (old.num_groups, new.num_groups) == (len(before), len(after)):
            row_of = {label: row for row, label in enumerate(before) if not self.is_reshaped(label)}
            for label in after:
                if label not in row_of:
                    problem = f"`saved_labels` has nothing for {label!r} of `labels`."
                    self.tell(problem, f"started {name!r}, group {label!r}")
            for label in before:
                if label not in after:
                    problem = f"`labels` has no place for {label!r} of `saved_labels`."
                    self.tell(problem, f"left out {name!r}, group {label!r}")
            return [row_of.get(label) for label in after]
        by_position = self.on_mismatch is None or new.num_groups in (None, 0, 1)
        if old.num_groups == new.num_groups and by_position:
            return range(new.num_groups or 0)
        return None

    def is_reshaped(self, label: str) -> bool:
        """Whether a label names a parameter, or a layer with one, that has another shape now."""
        return any(f"{name}/".startswith(f"{label}/") for name in self.reshaped)

    def tell(self, problem: str, *lines: str) -> None:
        """Raises an error with the problem, or reports what happens instead."""
        if self.on_mismatch is None:
            raise ValueError(
                f"{problem} With `on_mismatch=print`, new leaves start, leaves without a place are "
                "left out, and both are printed."
            )
        for line in lines:
            self.on_mismatch(line)


def _check_labels(
    saved_labels: Sequence[str] | None, labels: Sequence[str] | None, old: Nodes, new: Nodes
) -> None:
    """Raises ValueError unless both or neither are given, and each fits a clipper."""
    if (saved_labels is None) != (labels is None):
        raise ValueError(
            "`saved_labels` and `labels` must be given together, "
            f"got {saved_labels=} and {labels=}."
        )
    for argument, given, state, nodes in (
        ("saved_labels", saved_labels, "saved", old),
        ("labels", labels, "opt_state", new),
    ):
        if given is None:
            continue
        clippers = (Clipper.of(node) for _, node in _clippers(nodes))
        sizes = sorted({each.num_groups for each in clippers if each.num_groups is not None})
        if isinstance(given, str) or len(set(given)) < len(given) or len(given) not in sizes:
            raise ValueError(
                f"`{argument}` must be different labels, one for each group of a clipper of "
                f"`{state}` (there are clippers of {sizes} groups), got {given!r}."
            )


def _in_order(tree: PyTree) -> Nodes:
    """Leaves and clippers with their paths, in natural order: layer 10 after layer 9."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_clipper)
    return sorted(nodes, key=lambda item: [_natural(name) for name in _parts(item[0])])


def _natural(name: str) -> tuple[int, str]:
    """A key to sort by: a longer number is a larger one."""
    return name.isdecimal() and len(name), name


def _leaves(nodes: Nodes) -> Nodes:
    return [(path, node) for path, node in nodes if not is_clipper(node)]


def _clippers(nodes: Nodes) -> Nodes:
    return [(path, node) for path, node in nodes if is_clipper(node)]


def _parts(path: KeyPath) -> list[str]:
    return path_name(path).split("/")


def _names(path: KeyPath) -> tuple[str, ...]:
    """A path without what one more link in a chain, or a wrapper around it, would change."""
    return _stable(_parts(path))


def _stable(parts: list[str]) -> tuple[str, ...]:
    # The path of a tree that is a single node is empty.
    passed_over = ("", "inner_state")
    return tuple(name for name in parts if not name.isdecimal() and name not in passed_over)


def _fields_of_tuples(node: PyTree, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths of all fields of named tuples: states of Optax, below which parameters begin."""
    children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda child: child is not node)
    for key, child in children:
        if child is not node:
            if hasattr(node, "_fields"):
                yield path + key
            yield from _fields_of_tuples(child, path + key)


def _identity(path: KeyPath, fields: Collection[KeyPath]) -> Identity:
    """The identity of a leaf of the new state."""
    within = [prefix for prefix in prefixes(path) if prefix in fields]
    if not within:
        return _names(path), None
    return _names(within[-1]), tuple(_parts(path[len(within[-1]) :]))


def _possible_identities(path: KeyPath) -> list[Identity]:
    """The possible identities of a saved leaf: without types, its path may begin anywhere."""
    parts = _parts(path)
    known = [
        (_stable(parts[:begin]), tuple(parts[begin:]) or ("",))
        for begin in range(1, len(parts) + 1)
        if not parts[begin - 1].isdecimal()
    ]
    return [*known, (_stable(parts), None)]
