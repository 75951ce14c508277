"""StableAdamW: AdamW with a shorter step for a tensor whose gradient exceeds its second moment.

    RMS = sqrt(mean(g ** 2 / max(v, eps ** 2)))        for each tensor, v with g in it
    rate / max(1, RMS)                                 for Adam's step and for the weight decay

with both moments corrected for their start at zero. As v contains g, RMS <= 1 / sqrt(1 - b2).

Wortsman et al., `Stable and low-precision training for large-scale vision-language models
<https://arxiv.org/abs/2304.13013>`_, 2023, after the update clipping of `Adafactor
<https://arxiv.org/abs/1804.04235>`_.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Inexact, Int32

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import is_inexact, working_dtype
from optax_smartclip.engine.groups import Groups, LeafMask, assign_groups, covered_paths
from optax_smartclip.engine.meshes import (
    AxisName,
    SumOverDevices,
    axis_names,
    vary_as,
    vary_as_before,
)
from optax_smartclip.engine.metrics import increment_where, next_metrics
from optax_smartclip.engine.norms import group_norms, has_gradient, safe_sqrt
from optax_smartclip.engine.scaling import scale_arrays, signed_scale
from optax_smartclip.engine.stacks import Stacked, check_stacked
from optax_smartclip.engine.states import ClipState, check_fits, check_is_state, init_state
from optax_smartclip.engine.trees import (
    KeyPath,
    PyTree,
    clippable_leaves,
    flatten,
    replace_leaves,
)
from optax_smartclip.histories.moments import new_weight

# The RMS of constant gradients is 1. Its rounding error is up to this over 1 - b2.
_ROUNDING = 2.0**-23


# A NamedTuple with the names of Optax's ScaleByAdamState, for optax.tree.get and `graft`.
class StableAdamState(NamedTuple):
    """The state of `scale_by_stable_adam`: that of Adam, and a record.

    Attributes:
        count: int32, the steps so far. Stops at 2 ** 31 - 1.
        mu: The first moments, with the structure and shapes of the parameters.
        nu: The second moments, alike.
        clipper: The record of the last step, for `metrics`. It learns nothing.
    """

    count: Int32[Array, ""]  # type: ignore[assignment]
    mu: PyTree
    nu: PyTree
    clipper: ClipState


def stable_adamw(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.99,
    eps: Any = 1e-6,
    *,
    mu_dtype: Any = None,
    weight_decay: Any = 0.01,
    mask: LeafMask = None,
    stacked: Stacked = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with update clipping: an optimizer in place of `optax.adamw`.

    In a step in which gradients are large for their second moments, the step of that tensor is
    divided by the RMS of their ratio, weight decay included; see `scale_by_stable_adam`. Where
    none is, it is `optax.adamw` with these numbers, to rounding.

    Args:
        learning_rate: A number, or a schedule: a function of the count of steps.
        b1: See `scale_by_stable_adam`, also for the other arguments.
        b2: The decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment, > 0.
        mu_dtype: The dtype of the first moments.
        weight_decay: What the parameters are multiplied by before they are added to the step.
        mask: Which leaves decay.
        stacked: Axes that count layers, each with an RMS of its own.
        axis_name: Mapped axes over which leaves are split.

    Returns:
        A gradient transformation, the last link of a chain.

    Raises:
        ValueError: If an argument is out of range; from `update`, if `params` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> tx = smartclip.stable_adamw(0.1, weight_decay=0.0)
        >>> params = {"w": jnp.zeros(2)}
        >>> opt_state = tx.init(params)
        >>> for size in [1.0] * 100 + [1000.0]:
        ...     updates, opt_state = tx.update({"w": jnp.full(2, size)}, opt_state, params)
        ...     if size == 1.0:
        ...         usual = updates
        >>> print(f"{usual['w'][0]:.4f} {updates['w'][0]:.4f}")
        -0.1000 -0.0101
        >>> print(f"{smartclip.metrics(opt_state)['grad_norm']:.2f}")  # never over 10
        7.98
    """
    return optax.chain(
        scale_by_stable_adam(
            b1,
            b2,
            eps,
            mu_dtype=mu_dtype,
            weight_decay=weight_decay,
            mask=mask,
            stacked=stacked,
            axis_name=axis_name,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_stable_adam(
    b1: Any = 0.9,
    b2: Any = 0.99,
    eps: Any = 1e-6,
    *,
    mu_dtype: Any = None,
    weight_decay: Any = 0.0,
    mask: LeafMask = None,
    stacked: Stacked = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam's step and decoupled weight decay, both divided by `max(1, RMS)` of each tensor.

    The weight decay is an argument here, and not the next link of the chain as in `optax.adamw`:
    the rule divides the learning rate, by which both are multiplied, and a later link
    does not know the divisor.

    Only the step is shorter. *The moments take in the gradient as it is*: a spike pulls the steps
    that follow, in which the RMS is small again. A NaN or Inf makes the moments NaN, as Adam's.
    Put a clipper before it, or `skip_spikes` around it, against both.

    Args:
        b1: The decay of the first moment per step, in [0, 1).
        b2: The decay of the second moment per step, in [0, 1).
        eps: Added to the root of the second moment, which also counts as no smaller than this in
            the RMS; > 0, in the unit of the gradient.
        mu_dtype: The dtype of the first moments; None is float32, or that of the parameters if it
            is wider. The second moments always have this dtype.
        weight_decay: What the parameters are multiplied by before they are added to the step, >= 0.
        mask: Which leaves decay: a tree of bools with the structure of the parameters, a prefix of
            it, or a function of the parameters (of one slice of each stacked leaf) that returns
            one. All leaves have a step of Adam and an RMS.
        stacked: Axes that count layers, each of which has an RMS of its own; see `clip_by_rule`.
        axis_name: Mapped axes over which leaves are split; see `clip_by_rule`.

    Returns:
        A gradient transformation with a `StableAdamState`, whose updates have the dtype of the
        parameters. Leaves whose gradient is None keep their moments. In its metrics, `grad_norm`
        is the RMS of each tensor and `clip_threshold` is 1: `clip_scale` is `1 / max(1, RMS)`.
        What rounding adds to an RMS of 1 is left out.

    Raises:
        ValueError: If an argument is out of range; from `update`, if there is weight decay and
            `params` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> tx = smartclip.scale_by_stable_adam(b1=0.0, b2=0.75)
        >>> state = tx.init(jnp.zeros(()))
        >>> for size in [0.0, 1.0]:  # the second moment is 0.25 / (1 - 0.75 ** 2), the RMS 1.32
        ...     updates, state = tx.update(jnp.array(size), state)
        >>> print(f"{updates:.3f}")  # 1.32 / 1.32
        1.000
    """
    checks.check_decay(b1, "b1")
    checks.check_decay(b2, "b2")
    checks.check_positive("eps", eps)
    checks.check_number("weight_decay", weight_decay, 0.0, float("inf"), allowed=">= 0")
    check_stacked(stacked, "per_param")
    # A number that is traced may be zero in one step and not in the next.
    has_decay = isinstance(weight_decay, jax.Array) or weight_decay != 0

    def groups_of(tree: PyTree) -> Groups:
        return assign_groups("per_param", tree, stacked=stacked)

    def init_fn(params: PyTree) -> StableAdamState:
        groups = groups_of(params)
        covered_paths(mask, params, groups.stacks)  # a wrong mask is found before the first step

        def zeros(dtype: Any) -> PyTree:
            return jax.tree.map(
                lambda leaf: jnp.zeros_like(leaf, _moment_dtype(leaf, dtype)), params
            )

        clipper = init_state(optax.EmptyState(), groups.num_groups)
        return StableAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=zeros(mu_dtype),
            nu=zeros(None),
            clipper=vary_as(clipper, params, axis_name),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, StableAdamState]:
        del extra_args
        if params is None and has_decay:
            raise ValueError("`params` must be passed to `update`: they are what decays.")
        tree = updates if params is None else params
        groups = groups_of(tree)
        check_is_state(state, StableAdamState)
        check_fits(state.clipper, groups.num_groups, rule_fields=frozenset)
        decayed = covered_paths(mask, tree, groups.stacks) if has_decay else set()
        weights, old_mu, old_nu = flatten(tree), flatten(state.mu), flatten(state.nu)
        leaves = clippable_leaves(updates, groups.takes_part)
        count = optax.safe_increment(state.count)

        mu, nu, ratios, steps = {}, {}, {}, []
        for path, leaf in leaves.items():
            dtype = working_dtype(old_nu[path].dtype)
            grad = leaf.astype(dtype)
            # The second moment of a complex number is real, in an array of complex dtype.
            mean = _average(old_mu[path].astype(dtype), grad, b1)
            square = _average(
                jnp.real(old_nu[path].astype(dtype)), jnp.real(grad * grad.conj()), b2
            )
            mu[path], nu[path] = (
                moment.astype(old[path].dtype) for moment, old in ((mean, old_mu), (square, old_nu))
            )
            size = safe_sqrt(square / _correction(b2, count, square.dtype))
            least = jnp.asarray(eps).astype(size.dtype)
            ratios[path] = grad / jnp.maximum(size, least).astype(dtype)
            step = mean / _correction(b1, count, dtype) / (size + least).astype(dtype)
            if path in decayed:
                step += jnp.asarray(weight_decay).astype(dtype) * weights[path].astype(dtype)
            steps.append(step)

        rms = _group_rms(ratios, groups, axis_name)
        is_over = rms > 1 + _ROUNDING / new_weight(b2).astype(rms.dtype)
        rms = jnp.where(is_over, rms, jnp.minimum(rms, 1.0))
        limits = jnp.ones_like(rms)
        scales = signed_scale(rms, limits)
        scaled = scale_arrays(steps, groups.partition(leaves), scales, "propagate")

        last = next_metrics(state.clipper.last, rms, limits, scales, "propagate")
        num_observed = increment_where(has_gradient(rms), state.clipper.num_observed)
        clipper = ClipState(rule=state.clipper.rule, num_observed=num_observed, last=last)
        next_state = StableAdamState(
            count=count,
            mu=replace_leaves(state.mu, mu),
            nu=replace_leaves(state.nu, nu),
            clipper=vary_as_before(clipper, state.clipper),
        )
        new = {
            path: step.astype(jnp.result_type(weights[path]))
            for path, step in zip(leaves, scaled, strict=True)
        }
        return replace_leaves(updates, new), next_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _moment_dtype(leaf: Any, dtype: Any) -> Any:
    if not is_inexact(leaf):
        return None
    return working_dtype(jnp.result_type(leaf)) if dtype is None else dtype


def _average(
    old: Inexact[Array, "*shape"], value: Inexact[Array, "*shape"], decay: Any
) -> Inexact[Array, "*shape"]:
    """The moving average with one more value."""
    kept, new = _decay_and_weight(decay, old.dtype)
    return new * value + kept * old


def _correction(decay: Any, count: Int32[Array, ""], dtype: Any) -> Inexact[Array, ""]:
    """The moving average of `count` ones that starts at zero."""
    kept, _ = _decay_and_weight(decay, jnp.finfo(dtype).dtype)
    # With an integer for exponent, as Optax has it, whose rounding differs.
    correction: Array = (1 - jax.lax.pow(kept, count)).astype(dtype)
    return correction


def _decay_and_weight(decay: Any, dtype: Any) -> tuple[Inexact[Array, ""], Inexact[Array, ""]]:
    weight: Any = 1 - decay
    if isinstance(decay, jax.Array):
        # A decay that rounding has made 1 would forget nothing.
        weight = new_weight(decay)
        decay = 1 - weight
    return jnp.asarray(decay).astype(dtype), jnp.asarray(weight).astype(dtype)


def _group_rms(
    leaves: dict[KeyPath, Array], groups: Groups, axis_name: AxisName
) -> Float[Array, " groups"]:
    """The root mean square of each group, over all devices; 0 of what has no elements."""
    sizes = np.ones(groups.num_groups)
    for path, leaf in leaves.items():
        num_slices = math.prod(groups.stacks[path].sizes)
        num_parts = SumOverDevices([leaf], axis_names(axis_name))(1.0)
        first = groups.first[path]
        sizes[first : first + num_slices] = max(leaf.size, 1) // num_slices * num_parts
    norms: Array = group_norms(list(leaves.values()), groups.partition(leaves), axis_name=axis_name)
    return norms / np.sqrt(sizes).astype(norms.dtype)
