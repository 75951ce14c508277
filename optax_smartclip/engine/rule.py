"""The engine: from a rule that maps norms to thresholds, a gradient transformation.

A history-based clipper is a `ThresholdRule`, three pure functions of arrays; everything else
(groups, norms, warm-up, ceiling, non-finite steps, scaling, metrics) is `clip_by_rule`, once for
all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int32

from optax_smartclip.engine import checks
from optax_smartclip.engine.groups import Groups, LeafMask, Scope, assign_groups, check_scope
from optax_smartclip.engine.learning import ThresholdRule, fields_of, init_rule, learn
from optax_smartclip.engine.meshes import AxisName, vary_as, vary_as_before
from optax_smartclip.engine.metrics import next_metrics
from optax_smartclip.engine.norm_of import NormOf, check_norm_of, measured_arrays
from optax_smartclip.engine.norms import group_norms, has_gradient, learnable
from optax_smartclip.engine.partitions import Leaves, num_parts
from optax_smartclip.engine.scaling import keep_share, limit_threshold, scale_arrays, signed_scale
from optax_smartclip.engine.stacks import Stacked, check_stacked
from optax_smartclip.engine.states import (
    ClipState,
    check_fits,
    init_state,
)
from optax_smartclip.engine.trees import KeyPath, PyTree, clippable_leaves, replace_leaves

# In float64 where a leaf is.
GroupNorms = Float[Array, " groups"]


class ClipSteps(NamedTuple):
    """A clipper's `update` in three steps, for several gradients with one state.

    The gradients are parts of a batch, along an axis of each leaf; where the axis is None, there is
    one part and no axis of it.

    Attributes:
        measure: Parts, parameters or None, axis -> norms, [parts, groups].
        judge: State, norms of one part -> the next state, and the signed scale of each group.
        scale: Parts, parameters or None, axis, signed scales, [parts, groups] -> clipped parts.
    """

    measure: Callable[[PyTree, PyTree | None, int | None], Float[Array, "parts groups"]]
    judge: Callable[[Any, GroupNorms], tuple[ClipState, GroupNorms]]
    scale: Callable[[PyTree, PyTree | None, int | None, Float[Array, "parts groups"]], PyTree]


class ClipperTransformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc]
    """A clipper with a history, the steps of which can be taken one by one.

    Attributes:
        steps: The steps of `update`.
    """

    steps: ClipSteps


def clip_by_rule(
    rule: ThresholdRule,
    *,
    scope: Scope = "global",
    stacked: Stacked = None,
    mask: LeafMask = None,
    norm_of: NormOf = None,
    warmup_steps: Any = 0,
    max_norm: Any = None,
    nonfinite: str = "zero",
    min_scale: Any = None,
    axis_name: AxisName = None,
) -> ClipperTransformation:
    """Clips the norm of each group of leaves to the threshold that a rule has learned.

    Each update computes the norm of each group, asks the rule for thresholds, multiplies each
    group by `min(1, threshold / norm)` and lets the rule record the norms. The gradient is read
    once for the norms and once to scale it; a gradient within the threshold is multiplied by
    exactly 1. A group whose gradient is zero teaches nothing: it counts neither as a step of
    warm-up nor for what the rule learns.

    `update` accepts `grad_norm=`, a scalar, if the norm of all leaves that take part has already
    been computed; it is then not computed again (scope "global" only).

    Args:
        rule: The rule.
        scope: Which leaves share one norm: `"global"` (all), `"per_layer"` (those with the same
            parent path), `"per_param"` (none), a tree of labels with the structure of the
            parameters or a prefix of it, or a function of a leaf's key path (as in
            `jax.tree_util.tree_map_with_path`) that returns a label.
        stacked: Along which axes a leaf is to be taken for several, as in a model that scans over
            its layers: each index is a group of its own, which leaves of the same scope share. A
            mapping from a regular expression, searched for in paths such as `layers/mlp/kernel`,
            to an axis or a tuple of axes, where the first match counts, as in
            `{"layers/.*experts": (0, 1), "layers": 0}`; or a function of a leaf's key path and
            shape that returns an axis, a tuple of axes or None.
        mask: Which leaves take part, as in `optax.masked`: a tree of bools with the structure of
            the parameters, a prefix of it, or a function of the parameters (of one slice of each
            stacked leaf) that returns one. Where it is False, a leaf is passed on as it is, and
            is in no norm; its group stays, and is empty if all of its leaves are left out. See
            `optax_smartclip.masks`.
        norm_of: None, or a function of the gradient and the parameters that returns the tree whose
            norms are taken in place of the gradient's: one with its structure and shapes, such as
            each leaf times the RMS of its parameter. The gradient is scaled; thresholds, `max_norm`
            and the metrics refer to the other norm. `update` then needs `params`. Under
            `shard_map`, the function is given the part of one device.
        warmup_steps: How many positive, finite norms a group has observed before the rule may clip
            it. They are recorded. A number >= 0.
        max_norm: A ceiling on the norm of every group that always holds, in warm-up too, unless
            `min_scale` is set: a positive number, in the unit of the gradient's norm, or None.
        nonfinite: What becomes of a group whose norm is NaN or Inf: `"zero"`, its updates are
            zero, or `"propagate"`, they pass as they are. Either way it is counted and never
            recorded.
        min_scale: The smallest number that a finite gradient is multiplied by, in [0, 1], or None
            for any. It goes before the rule and `max_norm`: where they ask for less, the norm stays
            above both, and the threshold in the record is `min_scale` times the norm. What the rule
            learns does not change.
        axis_name: Under `shard_map` or `pmap`, the mapped axis or axes over which the leaves are
            split, so that norms are summed across them. A leaf that is whole on all devices is
            counted once, unless `shard_map` was told `check_vma=False`: then it counts once for
            each device. Not needed under `jit`, nor where each device holds the whole gradient.

    Returns:
        A transformation with a `ClipState`. Numbers may be traced, as with
        `optax.inject_hyperparams`; functions as `scope`, `stacked`, `mask` or `norm_of` must then
        be named in `static_args`.

    Raises:
        ValueError: If an argument is out of range; from `init`, if `stacked` or `mask` does not
            fit the parameters, or the rule's state lacks the `groups` axis; from `update`, if the
            rule's thresholds lack it, if the gradient has other groups than the parameters had, if
            `grad_norm` is given for more than one group, beside `norm_of` or is not a scalar, or if
            `norm_of` returns something else or lacks `params`.

    Example:
        A clipper that halves the largest norm it lets through whenever it is exceeded:

        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> halving = smartclip.ThresholdRule(
        ...     init=lambda groups: jnp.full(groups, 8.0),
        ...     threshold=lambda limits, norms: limits,
        ...     record=lambda limits, norms, _: jnp.where(norms > limits, limits / 2, limits),
        ... )
        >>> tx = smartclip.clip_by_rule(halving)
        >>> state = tx.init({"w": jnp.zeros(2)})
        >>> for _ in range(2):
        ...     updates, state = tx.update({"w": jnp.array([6.0, 8.0])}, state)
        ...     print(updates["w"])
        [4.8 6.4]
        [2.4 3.2]
    """
    check_scope(scope)
    check_stacked(stacked, scope)
    check_norm_of(norm_of)
    checks.check_clip_options(warmup_steps, max_norm, nonfinite, min_scale)

    def groups_of(tree: PyTree) -> Groups:
        return assign_groups(scope, tree, stacked=stacked, mask=mask)

    rule_fields = fields_of(rule)

    def init_fn(params: PyTree) -> ClipState:
        num_groups = groups_of(params).num_groups
        return vary_as(init_state(init_rule(rule, num_groups), num_groups), params, axis_name)

    def read(updates: PyTree, params: PyTree | None) -> _Gradient:
        groups = groups_of(updates if params is None else params)
        leaves = clippable_leaves(updates, groups.takes_part)
        return _Gradient(leaves, groups.partition(leaves))

    def judge(state: Any, norms: GroupNorms) -> tuple[ClipState, GroupNorms]:
        check_fits(state, len(norms), rule_fields)
        live = has_gradient(norms)
        learned = learn(rule, state.rule, state.num_observed, learnable(norms), live)
        thresholds = limit_threshold(
            learned.thresholds, state.num_observed, warmup_steps, max_norm, norms.dtype
        )
        thresholds = keep_share(thresholds, norms, min_scale)
        scales = signed_scale(norms, thresholds)
        next_state = ClipState(
            rule=learned.rule,
            num_observed=learned.num_observed,
            last=next_metrics(state.last, norms, thresholds, scales, nonfinite),
        )
        return vary_as_before(next_state, state), scales

    def scale(updates: PyTree, gradient: _Gradient, scales: GroupNorms) -> PyTree:
        arrays = list(gradient.leaves.values())
        clipped = scale_arrays(arrays, gradient.partition, scales, nonfinite)
        return replace_leaves(updates, dict(zip(gradient.leaves, clipped, strict=True)))

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        grad_norm: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ClipState]:
        del extra_args
        gradient = read(updates, params)
        if grad_norm is None:
            measured = measured_arrays(norm_of, updates, params, gradient.leaves)
            norms = group_norms(measured, gradient.partition, axis_name=axis_name)
        else:
            norms = _given_norm(grad_norm, scope, norm_of)
        next_state, scales = judge(state, norms)
        return scale(updates, gradient, scales), next_state

    def measure_parts(
        updates: PyTree, params: PyTree | None, axis: int | None
    ) -> Float[Array, "parts groups"]:
        parts, places = read_parts(updates, params, axis)
        of_parts = norm_of
        if norm_of is not None and axis is not None:
            of_parts = jax.vmap(norm_of, (axis, None), axis)
        measured = measured_arrays(of_parts, updates, params, parts.leaves)
        norms: GroupNorms = group_norms(measured, parts.partition, axis_name=axis_name)
        return norms[places]

    def scale_parts(
        updates: PyTree,
        params: PyTree | None,
        axis: int | None,
        scales: Float[Array, "parts groups"],
    ) -> PyTree:
        parts, places = read_parts(updates, params, axis)
        return scale(updates, parts, scales.reshape(-1)[np.argsort(places, axis=None)])

    def read_parts(
        updates: PyTree, params: PyTree | None, axis: int | None
    ) -> tuple[_Gradient, Int32[np.ndarray, "parts groups"]]:
        if axis is None:
            gradient = read(updates, params)
            return gradient, gradient.partition.by_part(1)
        leaves, of_one = read(updates, one_part(updates, axis) if params is None else params)
        shapes = [leaf.shape for leaf in leaves.values()]
        of_parts = of_one.within_parts(shapes, axis)
        return _Gradient(leaves, of_parts), of_one.by_part(num_parts(shapes, axis))

    clipper = ClipperTransformation(init_fn, update_fn)
    clipper.steps = ClipSteps(measure_parts, judge, scale_parts)
    return clipper


def one_part(updates: PyTree, axis: int) -> PyTree:
    """The shapes of one of the parts along an axis."""

    def part(leaf: Any) -> Any:
        shape = tuple(np.delete(np.shape(leaf), axis).tolist())
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree.map(part, updates)


class _Gradient(NamedTuple):
    """The leaves that take part, and how their elements fall into groups."""

    leaves: dict[KeyPath, Array]
    partition: Leaves


def _given_norm(grad_norm: Any, scope: Scope, norm_of: NormOf) -> Float[Array, "1"]:
    if not (isinstance(scope, str) and scope == "global"):
        raise ValueError(
            f"`grad_norm` is the norm of the whole gradient and needs scope='global', got {scope=}."
        )
    if norm_of is not None:
        raise ValueError(
            f"`grad_norm` is the norm of the gradient and needs norm_of=None, got {norm_of=}."
        )
    return checks.check_scalar("grad_norm", grad_norm)[None]
