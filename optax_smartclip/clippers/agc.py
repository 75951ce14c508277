"""AGC: clip a gradient that is large relative to the weights that it updates.

    norm(g) <= clipping * max(norm(w), eps)        for each unit, an output row of a weight

Brock, De, Smith, Simonyan, `High-Performance Large-Scale Image Recognition Without Normalization
<https://arxiv.org/abs/2102.06171>`_, 2021, equation 3.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from optax_smartclip.engine import checks
from optax_smartclip.engine.groups import (
    SCOPES,
    Groups,
    Scope,
    assign_groups,
    broadcast_prefix,
    check_scope,
)
from optax_smartclip.engine.metrics import increment_where, next_metrics
from optax_smartclip.engine.norms import (
    AxisName,
    Norms,
    as_float32,
    group_norms,
    is_inexact,
    norms_in_range,
)
from optax_smartclip.engine.partitions import Partition, Units
from optax_smartclip.engine.rule import check_num_groups, clippable_leaves
from optax_smartclip.engine.scaling import limit_threshold, scale_arrays, signed_scale
from optax_smartclip.engine.states import ClipState, init_state, register_with_flax
from optax_smartclip.engine.trees import KeyPath, PyTree, flatten, path_name, replace_leaves
from optax_smartclip.masks import MaskFn, is_vector

UnitAxes = int | tuple[int, ...] | str | Callable[[KeyPath, tuple[int, ...]], Any] | None

Mask = PyTree | MaskFn

# Where the output features are.
LAYOUTS = {"flax": -1, "equinox": 0}

# A scale of 0 is reported as this.
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)


def agc(
    clipping: Any = 0.01,
    *,
    eps: Any = 1e-3,
    scope: Scope = "unit",
    unit_axes: UnitAxes = None,
    mask: Mask | None = None,
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
            rank 3.
        mask: Which leaves are clipped, as in `optax.masked`: a tree of bools with the structure
            of the parameters, a prefix of it, or a function of the parameters that returns one.
            Where it is False, a leaf is left alone. See `optax_smartclip.masks`.
        warmup_steps: How many finite norms are observed before clipping starts.
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
        the largest, or 1 if none is over, and `clip_threshold` is 1.

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
    check_unit_axes(unit_axes, scope)
    by_units = isinstance(scope, str) and scope == "unit"
    split = axis_name is not None

    def groups_of(params: PyTree) -> Groups:
        return assign_groups("global" if by_units else scope, params)

    def init_fn(params: PyTree) -> ClipState:
        register_with_flax()
        covered_paths(mask, params)  # a wrong mask is found before the first step
        state = init_state(optax.EmptyState(), len(groups_of(params).labels))
        if not by_units:
            return state
        share = jnp.zeros((), jnp.float32)
        return dataclasses.replace(state, last=state.last._replace(clipped=share))

    def update_fn(
        updates: PyTree, state: ClipState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ClipState]:
        del extra_args
        if params is None:
            raise ValueError("`params` must be passed to `update`: agc compares with the weights.")
        groups = groups_of(params)
        check_num_groups(state, len(groups.labels))
        weights = flatten(params)
        covered = covered_paths(mask, params)
        leaves = {
            path: leaf
            for path, leaf in clippable_leaves(updates, groups).items()
            if path in covered and is_inexact(weights[path])
        }
        arrays = list(leaves.values())
        if by_units:
            axes = (reduced_axes(path, x.shape, unit_axes, split) for path, x in leaves.items())
            partition: Partition = Units(tuple(axes))
        else:
            partition = groups.partition(leaves)
        weight_norms = norms_in_range(
            [jnp.asarray(weights[path]) for path in leaves], partition, axis_name=axis_name
        )
        # Units have no scaled sums, which would cost more than all the rest. A norm too small for a
        # plain sum is below every threshold, and one too large counts as not finite.
        norms = (norms_in_range if by_units else group_norms)(
            arrays, partition, axis_name=axis_name
        )
        observed = state.num_observed[0] if by_units else state.num_observed

        def limit(weight_norm: Array) -> Array:
            threshold = as_float32(clipping) * jnp.maximum(weight_norm, as_float32(eps))
            return limit_threshold(threshold, observed, warmup_steps, max_norm)

        limits = jax.tree.map(limit, weight_norms)
        scales = jax.tree.map(signed_scale, norms, limits)
        clipped = scale_arrays(arrays, partition, scales, nonfinite)
        if by_units:
            smallest, share = summarize_units(scales)
            # In units of the threshold.
            norms = jnp.where(smallest < 0, jnp.inf, 1 / jnp.maximum(smallest, _SMALLEST))
            last = next_metrics(state.last, norms, jnp.ones_like(norms), smallest, nonfinite)
            last = last._replace(clipped=share)
        else:
            last = next_metrics(state.last, norms, limits, scales, nonfinite)
        next_state = ClipState(
            rule=state.rule,
            num_observed=increment_where(jnp.isfinite(norms), state.num_observed),
            last=last,
        )
        return replace_leaves(updates, dict(zip(leaves, clipped, strict=True))), next_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
    path: KeyPath, shape: tuple[int, ...], unit_axes: UnitAxes, split: bool
) -> tuple[int, ...] | None:
    """The axes of a leaf over which a unit's norm is taken; None if it is one unit.

    If the leaf is `split` over devices, what is an axis of size 1 here may be longer in the
    whole, and only a leaf of rank 1 counts as a vector.

    Raises:
        ValueError: If `unit_axes` names an axis that the leaf does not have.
    """
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
    units = {axis % rank for axis in kept}
    return tuple(axis for axis in range(rank) if axis not in units) if units else None


def covered_paths(mask: Mask | None, params: PyTree) -> set[KeyPath]:
    """The key paths of the leaves that a mask leaves to be clipped.

    Raises:
        ValueError: If the mask has nothing for a leaf.
    """
    paths = flatten(params)
    if mask is None:
        return set(paths)
    flags = flatten(mask(params) if callable(mask) else mask)
    return {path for path, flag in broadcast_prefix("mask", flags, paths).items() if flag}


def summarize_units(scales: list[Array]) -> tuple[Norms, Float32[Array, ""]]:
    """The smallest signed scale of all units, and the share of them with a scale below 1.

    It is negative if a norm is NaN or Inf; such a unit does not count as clipped.
    """
    if not scales:
        return jnp.ones(1, jnp.float32), jnp.zeros((), jnp.float32)
    # Two reductions of each leaf's units, which may be sharded along several axes, and one of the
    # scalars that come out. A single one over all units would have to gather them.
    smallest = jnp.stack([jnp.min(scale, initial=1.0) for scale in scales])
    clipped = jnp.stack([jnp.sum(as_float32((scale >= 0) & (scale < 1))) for scale in scales])
    num_units = sum(scale.size for scale in scales)
    return jnp.min(smallest)[None], jnp.sum(clipped) / max(num_units, 1)
