"""AGC: clip a gradient that is large relative to the weights that it updates.

    norm(g) <= clipping * max(norm(w), eps)        for each unit, an output row of a weight

Brock, De, Smith, Simonyan, `High-Performance Large-Scale Image Recognition Without Normalization
<https://arxiv.org/abs/2102.06171>`_, 2021, equation 3.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

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
    LARGEST,
    AxisName,
    Norms,
    as_float32,
    by_leaf,
    by_unit,
    group_norms,
    is_inexact,
)
from optax_smartclip.engine.rule import check_num_groups, clippable_leaves
from optax_smartclip.engine.scaling import clip_arrays, limit_threshold
from optax_smartclip.engine.states import ClipState, init_state, register_with_flax
from optax_smartclip.engine.trees import KeyPath, PyTree, flatten, path_name, replace_leaves
from optax_smartclip.masks import MaskFn, is_vector

UnitAxes = int | tuple[int, ...] | str | Callable[[KeyPath, tuple[int, ...]], Any] | None

Mask = PyTree | MaskFn

# Where the output features are.
LAYOUTS = {"flax": -1, "equinox": 0}

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
        max_norm: A ceiling on the norm of every unit (or group) that always holds (norms under
            about 5e-10 count as within it).
        nonfinite: `"zero"` or `"propagate"`, for units (or groups) with a NaN or Inf norm; see
            `clip_by_rule`.
        axis_name: Mapped axes over which the leaves are split; see `clip_by_rule`. With scope
            "unit", only for leaves that are split within their units; where the units themselves
            are distributed, each device has what it needs.

    Returns:
        A gradient transformation. With scope "unit", its metrics are those of the unit that is
        furthest over its threshold (or nearest to it).

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
        >>> print(smartclip.metrics(state)["clip_threshold"])
        0.1
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
        return init_state(optax.EmptyState(), len(groups_of(params).labels))

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
        partition = (
            by_unit(
                [reduced_axes(path, leaf.shape, unit_axes, split) for path, leaf in leaves.items()]
            )
            if by_units
            else by_leaf([groups.number[path] for path in leaves], len(groups.labels))
        )
        # A norm too small for one read is below every threshold, clipping * eps at least, and one
        # too large is no weight's.
        norms = group_norms(arrays, partition, axis_name=axis_name, exact_below=False)
        weight_norms = group_norms(
            [jnp.asarray(weights[path]) for path in leaves],
            partition,
            axis_name=axis_name,
            exact_below=False,
            exact_above=False,
        )
        observed = state.num_observed[0] if by_units else state.num_observed

        def limit(weight_norm: Array) -> Array:
            threshold = as_float32(clipping) * jnp.maximum(weight_norm, as_float32(eps))
            return limit_threshold(threshold, observed, warmup_steps, max_norm)

        limits = jax.tree.map(limit, weight_norms)
        clipped = clip_arrays(arrays, partition, norms, limits, nonfinite)
        if by_units:
            norms, limits = furthest_unit(norms, limits)
        next_state = ClipState(
            rule=state.rule,
            num_observed=increment_where(jnp.isfinite(norms), state.num_observed),
            last=next_metrics(state.last, norms, limits, nonfinite),
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
) -> tuple[int, ...]:
    """The axes of a leaf over which a unit's norm is taken.

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
    return tuple(axis for axis in range(rank) if axis not in units)


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


def furthest_unit(norms: list[Array], limits: list[Array]) -> tuple[Norms, Norms]:
    """Norm and threshold of the unit with the largest ratio of the two, as one group.

    A unit whose norm is NaN or Inf is furthest of all. Within a leaf it is found by comparing, not
    with `argmax`, which would have to flatten arrays that may be sharded along several axes.
    """
    if not norms:
        return jnp.zeros(1, jnp.float32), jnp.full(1, jnp.inf, jnp.float32)

    # Leaf by leaf, and the leaves only at the end: a maximum over all of them that each is then
    # compared with would be computed anew in the program for each.
    def furthest(norm: Array, limit: Array) -> tuple[Array, Array, Array]:
        # The product of clipping and eps may be so small that it is lost.
        ratio = norm / jnp.maximum(limit, _SMALLEST)
        # However far over its threshold a finite norm is, one that is not comes first.
        ratio = jnp.where(jnp.isfinite(norm), jnp.minimum(ratio, LARGEST), jnp.inf)
        largest = jnp.max(ratio, initial=0.0)
        its_norm = jnp.max(jnp.where(ratio == largest, norm, 0.0), initial=0.0)
        its_own = (ratio == largest) & (norm == its_norm)
        return largest, its_norm, jnp.min(jnp.where(its_own, limit, jnp.inf), initial=jnp.inf)

    each = [furthest(norm, limit) for norm, limit in zip(norms, limits, strict=True)]
    ratio, norm, limit = (jnp.stack(values) for values in zip(*each, strict=True))
    leaf = jnp.argmax(ratio, keepdims=True)
    return norm[leaf], limit[leaf]
