"""Units: the parts of a leaf that compute one output feature each. This is scope "unit".

Some axes of a leaf count its units; the norm of a unit is taken over the others. This module says
which axes these are, makes the partition, and reports what was clipped:

    units = assign_units(params, unit_axes, stacked, mask, split=False)
    partition = units.partition(paths)
    record = report_units(last, norms, limits, scales, nonfinite)
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import as_float32, is_inexact
from optax_smartclip.engine.groups import LeafMask, Scope, check_known, covered_paths
from optax_smartclip.engine.metrics import ClipMetrics, next_metrics
from optax_smartclip.engine.partitions import WHOLE, Stack, Units
from optax_smartclip.engine.scaling import NO_GRADIENT
from optax_smartclip.engine.stacks import Stacked, find_stacks, is_axes
from optax_smartclip.engine.trees import KeyPath, PyTree, flatten, path_name
from optax_smartclip.masks import is_vector

UnitAxes = int | tuple[int, ...] | str | Callable[[KeyPath, tuple[int, ...]], Any] | None

# Where the output features are.
LAYOUTS = {"flax": -1, "equinox": 0}

# A scale of 0 is reported as this.
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class UnitGroups:
    """The units of one tree, which share one record in a state.

    Attributes:
        axes: The axes of each leaf that takes part over which a unit's norm is taken; None if it
            is one unit.
        known: Every leaf of the tree.
    """

    axes: dict[KeyPath, tuple[int, ...] | None]
    known: frozenset[KeyPath]
    num_groups = 1

    def takes_part(self, path: KeyPath) -> bool:
        """Whether a leaf has units; see `Groups.takes_part`."""
        check_known(path, self.known)
        return path in self.axes

    def partition(self, paths: Iterable[KeyPath]) -> Units:
        """The partition of a list of leaves that take part, given by their key paths."""
        return Units(tuple(self.axes[path] for path in paths))


def assign_units(
    params: PyTree, unit_axes: UnitAxes, stacked: Stacked, mask: LeafMask, *, split: bool
) -> UnitGroups:
    """Divides every leaf that a mask does not leave out into units."""
    stacks = find_stacks(stacked, params)
    covered = covered_paths(mask, params, stacks)
    axes = {
        path: reduced_axes(path, np.shape(leaf), unit_axes, split, stacks[path])
        for path, leaf in flatten(params).items()
        if path in covered and is_inexact(leaf)
    }
    return UnitGroups(axes, frozenset(stacks))


def check_unit_axes(unit_axes: UnitAxes, scope: Scope) -> None:
    """Raises ValueError if `unit_axes` has none of its forms, or nothing to say in `scope`."""
    if unit_axes is None or callable(unit_axes):
        valid = True
    elif isinstance(unit_axes, str):
        valid = unit_axes in LAYOUTS
    else:
        valid = is_axes(unit_axes)
    if not valid:
        raise ValueError(
            f"`unit_axes` must be None, a Python int, a tuple of ints, one of {tuple(LAYOUTS)}, or "
            f"a function of key path and shape, got {unit_axes!r}.{checks.static_hint(unit_axes)}"
        )
    if unit_axes is not None and not (isinstance(scope, str) and scope == "unit"):
        raise ValueError(f"`unit_axes` must be None unless scope='unit', got {unit_axes!r}.")


def reduced_axes(
    path: KeyPath, shape: tuple[int, ...], unit_axes: UnitAxes, split: bool, stack: Stack = WHOLE
) -> tuple[int, ...] | None:
    """The axes of a leaf over which a unit's norm is taken; None if it is one unit.

    If the leaf is `split` over devices, an axis of size 1 here may be longer in the whole, and only
    a leaf of rank 1 counts as a vector. Each slice of a stacked leaf has its own.
    """
    axes = stack.within if stack.axes else tuple(range(len(shape)))
    shape = tuple(shape[axis] for axis in axes)
    rank = len(shape)
    if callable(unit_axes):
        kept = unit_axes(path, shape)
    elif rank <= 1 or (is_vector(shape) and not split):
        kept = ()
    elif unit_axes is None:
        # Rank 3 is taken for attention heads, [inputs, heads, features], as Optax does.
        kept = (1, 2) if rank == 3 else -1
    elif isinstance(unit_axes, str):
        kept = LAYOUTS[unit_axes]
    else:
        kept = unit_axes
    kept = (kept,) if isinstance(kept, int) else tuple(kept)
    if not all(-rank <= axis < rank for axis in kept):
        raise ValueError(
            f"`unit_axes` must name axes of {path_name(path)!r}, which has the shape {shape}, "
            f"got {kept}."
        )
    units = {axes[axis] for axis in kept}
    if not units and not stack.axes:
        return None
    return tuple(axis for axis in axes if axis not in units)


def report_units(
    previous: ClipMetrics,
    norms: list[Array],
    limits: list[Array],
    scales: list[Array],
    nonfinite: str,
) -> ClipMetrics:
    """The metrics of a step with these units: the smallest scale, and the share below 1.

    A unit with a norm that is NaN or Inf has a negative scale, and does not count as clipped. One
    without a gradient has a scale above 1 (`mark_zeros` of `signed_scale`).
    """
    del norms, limits
    if not scales:
        scales = [jnp.empty(0)]
    # Two reductions of each leaf's units, which may be sharded along several axes, and one of the
    # scalars that come out. A single one over all units would have to gather them.
    smallest = jnp.min(jnp.stack([jnp.min(scale, initial=NO_GRADIENT) for scale in scales]))[None]
    clipped = jnp.stack([jnp.sum(as_float32((scale >= 0) & (scale < 1))) for scale in scales])
    # In units of the threshold.
    largest = jnp.where(smallest < NO_GRADIENT, 1 / jnp.maximum(smallest, _SMALLEST), 0.0)
    norm = jnp.where(smallest < 0, jnp.inf, largest)
    smallest = jnp.minimum(smallest, 1.0)
    record = next_metrics(previous, norm, jnp.ones_like(norm), smallest, nonfinite)
    num_units = sum(scale.size for scale in scales)
    return record._replace(clipped=jnp.sum(clipped) / max(num_units, 1))
