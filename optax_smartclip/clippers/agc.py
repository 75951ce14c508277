"""AGC: clip a gradient that is large relative to the weights that it updates.

    norm(g) <= clipping * max(norm(w), eps)        for each unit, an output row of a weight

Brock, De, Smith, Simonyan, `High-Performance Large-Scale Image Recognition Without Normalization
<https://arxiv.org/abs/2102.06171>`_, 2021, equation 3.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import is_inexact
from optax_smartclip.engine.groups import (
    SCOPES,
    Groups,
    LeafMask,
    Scope,
    assign_groups,
    check_scope,
)
from optax_smartclip.engine.meshes import AxisName, vary_as, vary_as_before
from optax_smartclip.engine.metrics import ClipMetrics, increment_where, next_metrics, observed
from optax_smartclip.engine.norms import accumulator, group_norms, norms_in_range
from optax_smartclip.engine.scaling import keep_share, limit_threshold, scale_arrays, signed_scale
from optax_smartclip.engine.stacks import Stacked, check_stacked
from optax_smartclip.engine.states import (
    ClipState,
    check_fits,
    init_state,
)
from optax_smartclip.engine.trees import PyTree, clippable_leaves, flatten, replace_leaves
from optax_smartclip.engine.units import (
    UnitAxes,
    UnitGroups,
    assign_units,
    check_unit_axes,
    report_units,
)


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
    min_scale: Any = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each unit's gradient to a fraction of the norm of the unit's weights.

    With its defaults, the numbers are those of `optax.adaptive_grad_clip`. It keeps no history,
    needs `params` in `update`, and belongs before the optimizer. Published for SGD; with AdamW, the
    default has been reported to harm: 38.5 instead of 79.3 % top-1 for a ViT-B on ImageNet
    (`arXiv 2502.17055 <https://arxiv.org/abs/2502.17055>`_, version 3).

    A unit computes one output feature: a column of a Flax kernel, a filter of a convolution. A
    vector (ignoring axes of size 1) is a single unit. Brock et al. leave the last linear layer
    alone: `mask=masks.except_paths("head")`.

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
            rank 3. For a stacked leaf, axes and shape are those of one slice.
        stacked: Axes that count layers, each of which has its own units (or groups); see
            `clip_by_rule`.
        mask: Which leaves are clipped; see `clip_by_rule`.
        warmup_steps: How many positive, finite norms are observed before clipping starts; for
            scope "unit", how many gradients that are not zero.
        max_norm: A ceiling on the norm of every unit (or group) that always holds (norms of units
            under about 5e-10 count as within it).
        nonfinite: `"zero"` or `"propagate"`, for units (or groups) with a NaN or Inf norm; see
            `clip_by_rule`. The norm of a unit over 1e19, whose square overflows, counts as Inf
            (not in float64).
        min_scale: The smallest scale of a unit (or group), in [0, 1], or None; see `clip_by_rule`.
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
    checks.check_clip_options(warmup_steps, max_norm, nonfinite, min_scale)
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
        state = init_state(optax.EmptyState(), groups_of(params).num_groups)
        if by_units:
            share = jnp.zeros((), jnp.float32)
            state = dataclasses.replace(state, last=state.last._replace(clipped=share))
        return vary_as(state, params, axis_name)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ClipState]:
        del extra_args
        if params is None:
            raise ValueError("`params` must be passed to `update`: agc compares with the weights.")
        groups = groups_of(params)
        check_fits(state, groups.num_groups, rule_fields=frozenset)
        weights = {path: leaf for path, leaf in flatten(params).items() if is_inexact(leaf)}
        leaves = clippable_leaves(updates, lambda path: groups.takes_part(path) and path in weights)
        arrays = list(leaves.values())
        partition = groups.partition(leaves)
        weight_norms = norms_in_range(
            [jnp.asarray(weights[path]) for path in leaves], partition, axis_name=axis_name
        )
        norms = group_norms(arrays, partition, axis_name=axis_name)

        def threshold_of(weight_norm: Array, norm: Array) -> Array:
            dtype = weight_norm.dtype
            least = jnp.asarray(eps).astype(dtype)
            threshold = jnp.asarray(clipping).astype(dtype) * jnp.maximum(weight_norm, least)
            limited = limit_threshold(
                threshold, state.num_observed, warmup_steps, max_norm, accumulator(arrays)
            )
            return keep_share(limited, norm, min_scale)

        thresholds = jax.tree.map(threshold_of, weight_norms, norms)
        scale = functools.partial(signed_scale, mark_zeros=by_units)
        scales = jax.tree.map(scale, norms, thresholds)
        clipped = scale_arrays(arrays, partition, scales, nonfinite, mark_zeros=by_units)
        last = report(state.last, norms, thresholds, scales, nonfinite)
        live = observed(last).reshape(groups.num_groups)
        next_state = ClipState(
            rule=state.rule,
            num_observed=increment_where(live, state.num_observed),
            last=last,
        )
        clipped_updates = replace_leaves(updates, dict(zip(leaves, clipped, strict=True)))
        return clipped_updates, vary_as_before(next_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
