"""AGC: clip a gradient that is large relative to the weights that it updates.

    norm(g) <= clipping * max(norm(w), eps)        for each unit, an output row of a weight

Brock, De, Smith, Simonyan, `High-Performance Large-Scale Image Recognition Without Normalization
<https://arxiv.org/abs/2102.06171>`_, 2021, equation 3.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from optax_smartclip.engine import checks
from optax_smartclip.engine.groups import (
    SCOPES,
    Groups,
    LeafMask,
    Scope,
    assign_groups,
    check_known,
    check_scope,
    covered_paths,
)
from optax_smartclip.engine.meshes import AxisName, vary_as, vary_as_before
from optax_smartclip.engine.metrics import ClipMetrics, increment_where, next_metrics
from optax_smartclip.engine.norms import as_float32, group_norms, is_inexact, norms_in_range
from optax_smartclip.engine.partitions import WHOLE, Stack, Units
from optax_smartclip.engine.rule import check_num_groups, clippable_leaves, has_gradient
from optax_smartclip.engine.scaling import limit_threshold, scale_arrays, signed_scale
from optax_smartclip.engine.stacks import Stacked, check_stacked, find_stacks
from optax_smartclip.engine.states import ClipState, init_state, register_with_flax
from optax_smartclip.engine.trees import KeyPath, PyTree, flatten, path_name, replace_leaves
from optax_smartclip.masks import is_vector

UnitAxes = int | tuple[int, ...] | str | Callable[[KeyPath, tuple[int, ...]], Any] | None

# Where the output features are.
LAYOUTS = {"flax": -1, "equinox": 0}

# A scale of 0 is reported as this.
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)

# In place of the scale of a unit without a gradient: larger than any.
_NO_GRADIENT = 2.0


def agc(
    clipping: Any = 0.01,
    *,
    eps: Any = 1e-3,
    scope: Scope = "unit",
    unit_axes: UnitAxes = None,
    stacked: Stacked = None,
    mask: LeafMask = None,
    warmup_steps: Any = 0,
    max_norm: Any = None,
    nonfinite: str = "zero",
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each unit's gradient to a fraction of the norm of the unit's weights.

    With its defaults, the numbers are those of `optax.adaptive_grad_clip`. It keeps no history,
    needs `params` in `update`, and belongs before the optimizer. Published for SGD; with AdamW, the
    default has been reported to harm: 38.5 instead of 79.3 % top-1 for a ViT-B on ImageNet
    (`arXiv 2502.17055 <https://arxiv.org/abs/2502.17055>`_, version 3).

    A unit is what computes one output feature: a column of a Flax kernel, a filter of a
    convolution. Vectors, and what is a vector but for axes of size 1, are one unit. Brock et al.
    leave the last linear layer alone: `mask=masks.except_paths("head")`.

    Args:
        clipping: The largest ratio of gradient norm to weight norm, > 0.
        eps: The least weight norm that is assumed, > 0, in the unit of the weights, so that
            weights that start at zero can grow.
        scope: `"unit"`, or groups of whole leaves as in `clip_by_rule` (`"per_param"`,
            `"per_layer"`, `"global"`, a tree of labels, a function of the key path).
        unit_axes: For scope "unit", the axes that count units; norms are taken over all others.
            An int or a tuple of ints, the name of a layout (`"flax"`: the last axis, `"equinox"`:
            the first), or a function of a leaf's key path and shape that returns an int or a
            tuple (`()` makes the leaf one unit). None is the rule of `optax.adaptive_grad_clip`,
            which goes by rank: the last axis of matrices and convolutions, the last two of
            rank 3. Of a stacked leaf, these are axes of one slice, and the shape is that of one.
        stacked: Axes that count layers, each of which has its own units (or groups); see
            `clip_by_rule`.
        mask: Which leaves are clipped; see `clip_by_rule`.
        warmup_steps: How many positive, finite norms are observed before clipping starts; for
            scope "unit", how many gradients that are not zero.
        max_norm: A ceiling on the norm of every unit (or group) that always holds (norms of units
            under about 5e-10 count as within it).
        nonfinite: `"zero"` or `"propagate"`, for units (or groups) with a NaN or Inf norm; see
            `clip_by_rule`. The norm of a unit over 1e19, whose square overflows, counts as Inf.
        axis_name: Mapped axes over which the leaves are split; see `clip_by_rule`. With scope
            "unit", only for leaves that are split within their units; where the units themselves
            are distributed, each device has what it needs.

    Returns:
        A gradient transformation. With scope "unit", its metrics say how hard and how widely it
        clipped: `clip_scale` is the smallest scale of any unit, `clipped` is the share of units
        that were clipped (float32), and norms are in units of their thresholds: `grad_norm` is
        the largest, 1 if none is over and 0 if all are zero, and `clip_threshold` is 1.

    Raises:
        ValueError: If an argument is out of range; from `update`, if `params` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> tx = smartclip.agc(0.1)
        >>> params = jnp.array([[3.0, 0.0], [4.0, 1.0]])  # columns of norm 5 and 1
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jnp.ones((2, 2)) * 0.3, state, params)
        >>> print(updates)  # thresholds 0.5 and 0.1, norms 0.42
        [[0.3        0.07071068]
         [0.3        0.07071068]]
        >>> record = smartclip.metrics(state)
        >>> print(f"{record['grad_norm']:.3f} {record['clipped']}")  # 0.42 / 0.1, one unit of two
        4.243 0.5
    """
    checks.check_positive("clipping", clipping)
    checks.check_positive("eps", eps)
    checks.check_shared(warmup_steps, max_norm, nonfinite)
    check_scope(scope, ("unit", *SCOPES))
    check_stacked(stacked, scope)
    check_unit_axes(unit_axes, scope)

    by_units = isinstance(scope, str) and scope == "unit"
    report: Callable[..., ClipMetrics] = report_units if by_units else next_metrics

    def groups_of(params: PyTree) -> UnitGroups | Groups:
        if by_units:
            return assign_units(params, unit_axes, stacked, mask, split=axis_name is not None)
        return assign_groups(scope, params, stacked=stacked, mask=mask)

    def init_fn(params: PyTree) -> ClipState:
        register_with_flax()
        state = init_state(optax.EmptyState(), groups_of(params).num_groups)
        if by_units:
            share = jnp.zeros((), jnp.float32)
            state = dataclasses.replace(state, last=state.last._replace(clipped=share))
        return vary_as(state, params, axis_name)

    def update_fn(
        updates: PyTree, state: ClipState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ClipState]:
        del extra_args
        if params is None:
            raise ValueError("`params` must be passed to `update`: agc compares with the weights.")
        groups = groups_of(params)
        check_num_groups(state, groups.num_groups)
        weights = {path: leaf for path, leaf in flatten(params).items() if is_inexact(leaf)}
        leaves = clippable_leaves(updates, lambda path: groups.takes_part(path) and path in weights)
        arrays = list(leaves.values())
        partition = groups.partition(leaves)
        weight_norms = norms_in_range(
            [jnp.asarray(weights[path]) for path in leaves], partition, axis_name=axis_name
        )
        norms = group_norms(arrays, partition, axis_name=axis_name)

        def limit(weight_norm: Array) -> Array:
            threshold = as_float32(clipping) * jnp.maximum(weight_norm, as_float32(eps))
            return limit_threshold(threshold, state.num_observed, warmup_steps, max_norm)

        limits = jax.tree.map(limit, weight_norms)
        scales = jax.tree.map(signed_scale, norms, limits)
        clipped = scale_arrays(arrays, partition, scales, nonfinite)
        last = report(state.last, norms, limits, scales, nonfinite)
        live = has_gradient(last.grad_norm).reshape(groups.num_groups)
        next_state = ClipState(
            rule=state.rule,
            num_observed=increment_where(live, state.num_observed),
            last=last,
        )
        clipped_updates = replace_leaves(updates, dict(zip(leaves, clipped, strict=True)))
        return clipped_updates, vary_as_before(next_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class UnitGroups:
    """The units of one tree, of which a state has one record.

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
        axes = unit_axes if isinstance(unit_axes, tuple) else (unit_axes,)
        valid = all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes)
    if not valid:
        raise ValueError(
            f"`unit_axes` must be None, a Python int, a tuple of ints, one of {tuple(LAYOUTS)}, or "
            f"a function of key path and shape, got {unit_axes!r}. (Under "
            "optax.inject_hyperparams, name it in `static_args`.)"
        )
    if unit_axes is not None and not (isinstance(scope, str) and scope == "unit"):
        raise ValueError(f"`unit_axes` must be None unless scope='unit', got {unit_axes!r}.")


def reduced_axes(
    path: KeyPath, shape: tuple[int, ...], unit_axes: UnitAxes, split: bool, stack: Stack = WHOLE
) -> tuple[int, ...] | None:
    """The axes of a leaf over which a unit's norm is taken; None if it is one unit.

    If the leaf is `split` over devices, what is an axis of size 1 here may be longer in the
    whole, and only a leaf of rank 1 counts as a vector. Each slice of a stacked leaf has its own.

    Raises:
        ValueError: If `unit_axes` names an axis that the leaf does not have.
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

    A unit with a norm that is NaN or Inf has a negative scale, and does not count as clipped.
    """
    del limits
    if not scales:
        norms, scales = [jnp.zeros(0)], [jnp.ones(0)]
    # Two reductions of each leaf's units, which may be sharded along several axes, and one of the
    # scalars that come out. A single one over all units would have to gather them.
    smallest = jnp.min(
        jnp.stack(
            [
                jnp.min(jnp.where(norm == 0, _NO_GRADIENT, scale), initial=_NO_GRADIENT)
                for norm, scale in zip(norms, scales, strict=True)
            ]
        )
    )[None]
    clipped = jnp.stack([jnp.sum(as_float32((scale >= 0) & (scale < 1))) for scale in scales])
    # In units of the threshold.
    largest = jnp.where(smallest < _NO_GRADIENT, 1 / jnp.maximum(smallest, _SMALLEST), 0.0)
    norm = jnp.where(smallest < 0, jnp.inf, largest)
    smallest = jnp.minimum(smallest, 1.0)
    record = next_metrics(previous, norm, jnp.ones_like(norm), smallest, nonfinite)
    num_units = sum(scale.size for scale in scales)
    return record._replace(clipped=jnp.sum(clipped) / max(num_units, 1))
