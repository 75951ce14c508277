"""A clipper's state as leaves with names, so that it can go on with other groups or dtypes.

The groups of a state are rows of its arrays. Where each new group has its row in the saved state
is for `graft` to say; here the rows are moved.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from optax_smartclip.engine.metrics import RECORDS
from optax_smartclip.engine.states import select_groups
from optax_smartclip.engine.trees import leaves_by_name

# The row of each new group in the saved state; None for a group that starts.
Rows = Sequence[int | None]


def is_clipper(node: Any) -> bool:
    """Whether a node is a clipper's state, or the dictionary that a checkpoint made of one.

    It may be inside another state, such as that of `inject_hyperparams`. The history of
    `skip_spikes`, the copies of `keep_last_good` and a record that stands alone count as well; the
    optimizer inside either of the two does not.
    """
    fields = _fields(node)
    if any(fields.keys() == set(record._fields) for record in RECORDS):
        return True
    if "detector" in fields or "kept" in fields:
        return False
    wrapped = "inner_state" in fields and is_clipper(fields["inner_state"])
    return wrapped or any({own, "last"} <= fields.keys() for own in ("num_observed", "copies"))


def _fields(node: Any) -> Mapping[Any, Any]:
    if dataclasses.is_dataclass(node):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    fields = node._asdict() if hasattr(node, "_asdict") else node
    return fields if isinstance(fields, Mapping) else {}


def kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype."""
    array = as_array(leaf)
    return tuple(array.shape), str(array.dtype)


def as_array(leaf: Any) -> Any:
    """A leaf with a dtype; one that has it is left where it is."""
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def is_float(leaf: Any) -> bool:
    """Whether a leaf has a real floating-point dtype, of any width."""
    return bool(jnp.issubdtype(as_array(leaf).dtype, jnp.floating))


@dataclasses.dataclass(frozen=True)
class Clipper:
    """A clipper's state by the names of its leaves.

    Attributes:
        leaves: All leaves, those of a wrapper around it among them.
        within: What the names of the leaves with a row for each group begin with.
        num_groups: The number of these rows; None if there are none, as in `skip_spikes`.
    """

    leaves: dict[str, Any]
    within: str
    num_groups: int | None

    @classmethod
    def of(cls, node: Any) -> "Clipper":
        """Reads a node for which `is_clipper` holds."""
        inner, within = _fields(node), ""
        while "inner_state" in inner:
            inner, within = _fields(inner["inner_state"]), f"{within}inner_state/"
        num_groups = np.shape(inner["num_observed"])[0] if "rule" in inner else None
        return cls(leaves_by_name(node), within, num_groups)

    def kind(self, *, cast: bool) -> frozenset[Any]:
        """Equal for two states if one can go on from the other, whatever their groups."""
        return frozenset(
            (name, self._shape_of_row(leaf), "float" if cast and is_float(leaf) else kind(leaf)[1])
            for name, leaf in self.leaves.items()
        )

    def go_on(self, new: "Clipper", rows: Rows) -> dict[str, Any]:
        """The leaves of a new state of this kind, filled from this one where possible."""
        return {
            name: self._go_on(leaf, fresh, rows, new)
            if name.startswith(self.within)
            else _cast(leaf, fresh)
            for name, fresh in new.leaves.items()
            for leaf in [self.leaves[name]]
        }

    def _go_on(self, leaf: Any, fresh: Any, rows: Rows, new: "Clipper") -> Any:
        if self.num_groups is None or list(rows) == list(range(self.num_groups)):
            return _cast(leaf, fresh)
        _check_has_values(fresh)
        kept = [row is not None for row in rows]
        picked = self._by_group(leaf)[np.array([row or 0 for row in rows])]
        fresh_rows = new._by_group(fresh)
        regrouped: Array = select_groups(jnp.asarray(kept), _cast(picked, fresh_rows), fresh_rows)
        return regrouped.reshape(fresh.shape)

    def _shape_of_row(self, leaf: Any) -> tuple[int, ...]:
        shape = tuple(np.shape(leaf))
        # The record of a single group is a scalar.
        return shape[1:] if shape[:1] == (self.num_groups,) else shape

    def _by_group(self, leaf: Any) -> Array:
        return jnp.asarray(leaf).reshape(self.num_groups, *self._shape_of_row(leaf))


def _cast(leaf: Any, fresh: Any) -> Any:
    """A leaf in the dtype of another. Values that are still initial keep their full precision.

    Empty places of a history hold the largest float32, which bfloat16 rounds to infinity.
    """
    if kind(leaf)[1] == kind(fresh)[1]:
        return leaf
    _check_has_values(fresh)
    narrow, start = jnp.asarray(leaf), jnp.asarray(fresh)
    return jnp.where(narrow == start.astype(narrow.dtype), start, narrow.astype(start.dtype))


def rebuild(leaves: dict[str, Any], like: Any) -> Any:
    """A node with the structure of `like`, from leaves by name."""
    in_order = [leaves[name] for name in leaves_by_name(like)]
    return jax.tree.unflatten(jax.tree.structure(like), in_order)


def _check_has_values(leaf: Any) -> None:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(
            "`opt_state` must have arrays, and not only their shapes, where a clipper gets other "
            "groups or is cast: pass what `init` returns."
        )
