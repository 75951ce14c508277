"""ZClip: a norm many standard deviations above the mean is cut, the further the larger it is.

With z = (norm - mean) / std, of the norms before, a norm with z > zmax is cut to

    mean + zmax * std * (zmax / z)      "reciprocal"
    mean                                "mean"
    mean + zmax * std                   "max"

and the norm that was let through, r, is recorded:

    mean <- decay * mean + (1 - decay) * r
    std  <- sqrt(decay * std ** 2 + (1 - decay) * (r - mean) ** 2)      with the new mean

Kumar, Owen, Chowdhury, Güra, `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
<https://arxiv.org/abs/2504.02507>`_, 2025. The authors' code adds 1e-6 to std; ours does not, so
that gradients of any scale are clipped alike.
"""

from typing import Any

import jax.numpy as jnp
import optax

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import as_float32
from optax_smartclip.engine.groups import LeafMask, Scope
from optax_smartclip.engine.learning import ThresholdRule
from optax_smartclip.engine.meshes import AxisName
from optax_smartclip.engine.norm_of import NormOf
from optax_smartclip.engine.norms import LARGEST, Norms, safe_hypot
from optax_smartclip.engine.rule import clip_by_rule
from optax_smartclip.engine.scaling import ratio
from optax_smartclip.engine.stacks import Stacked
from optax_smartclip.histories.moments import (
    MomentsState,
    above_mean,
    averaging_weight,
    count_known,
    init_moments,
    is_warm,
    new_weight,
    update_moments,
)


def zclip(
    zmax: Any = 2.5,
    *,
    decay: Any = 0.97,
    clip_to: str = "reciprocal",
    clip_factor: Any = 1.0,
    record_limit: Any = None,
    scope: Scope = "global",
    stacked: Stacked = None,
    mask: LeafMask = None,
    norm_of: NormOf = None,
    warmup_steps: Any = 25,
    max_norm: Any = 1.0,
    nonfinite: str = "zero",
    min_scale: Any = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """ZClip: clips outliers to near the mean of recent norms, with the published defaults.

    *The current norm is left out* of the statistics that judge it, and *the clipped norm is
    recorded* (before `max_norm`). The mean and standard deviation start as those of the first
    `warmup_steps` norms, which are recorded as they are.

    Note two of the defaults. `max_norm=1.0` makes this `clip_by_global_norm(1.0)` as well; None
    leaves only the learned threshold, and none in warm-up. And as published, the rule **locks up
    after an abrupt rise**: each norm at the new level is cut to nearly the mean and recorded as
    that, so the standard deviation shrinks and no later norm can pass. A norm that doubles at once
    can be clipped forever. `record_limit=3.0` fixes this: it records such norms as 3 standard
    deviations above the mean, whatever they are clipped to.

    One difference from the publication: zeros, NaN and Inf are not recorded (there, the first NaN
    switches clipping off for good).

    Args:
        zmax: Standard deviations above the mean at which to clip, >= 0.
        decay: The decay of the moving averages per step, in [0, 1).
        clip_to: The target for an outlier: `"reciprocal"`, `"mean"` or `"max"`, as above.
        clip_factor: A factor for the target of `"reciprocal"`, in (0, 1].
        record_limit: A cap on recorded norms, in standard deviations above the mean (each at least
            1 % of it), > 0; None records the clipped norm.
        scope: Which leaves share one norm; see `clip_by_rule`.
        stacked: Axes that count layers, each with a norm of its own; see `clip_by_rule`.
        mask: Which leaves take part; see `clip_by_rule`.
        norm_of: What the norms are of, if not of the gradient; see `clip_by_rule`.
        warmup_steps: How many norms are averaged before the rule clips.
        max_norm: A ceiling that always holds, in warm-up too; see `clip_by_rule`.
        nonfinite: `"zero"` or `"propagate"`, for NaN and Inf norms; see `clip_by_rule`.
        min_scale: The smallest scale, in [0, 1], or None; see `clip_by_rule`.
        axis_name: Mapped axes over which leaves are split; see `clip_by_rule`.

    Returns:
        A gradient transformation. Its state has the moments and the last step's metrics; the
        threshold of a step without an outlier is the norm from which on it would be one.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> tx = smartclip.zclip(zmax=2.0, decay=0.99, warmup_steps=100, max_norm=None)
        >>> state, update_fn = tx.init(jnp.zeros(())), jax.jit(tx.update)
        >>> for norm in [1.0, 3.0] * 50 + [10.0]:  # mean 2, standard deviation 1: z is 8
        ...     update, state = update_fn(jnp.asarray(norm), state)
        >>> print(f"{update:.2f}")  # 2 + 2 * 2 / 8
        2.50
    """
    checks.check_number("zmax", zmax, 0.0, float("inf"), allowed=">= 0")
    checks.check_decay(decay)
    checks.check_choice("clip_to", clip_to, ("reciprocal", "mean", "max"))
    checks.check_number("clip_factor", clip_factor, 0.0, 1.0, allowed="in (0, 1]", strict_low=True)
    checks.check_positive("record_limit", record_limit, none="to record clipped norms")
    return clip_by_rule(
        zclip_rule(zmax, decay, clip_to, clip_factor, record_limit, warmup_steps),
        scope=scope,
        stacked=stacked,
        mask=mask,
        norm_of=norm_of,
        warmup_steps=warmup_steps,
        max_norm=max_norm,
        nonfinite=nonfinite,
        min_scale=min_scale,
        axis_name=axis_name,
    )


def zclip_rule(
    zmax: Any, decay: Any, clip_to: str, clip_factor: Any, record_limit: Any, warmup_steps: Any
) -> ThresholdRule:
    """Threshold: for an outlier what it is cut to, else where outliers begin."""

    def threshold(state: MomentsState, norms: Norms) -> Norms:
        excess = as_float32(zmax) * state.std
        outlier = norms > state.mean + excess
        if clip_to == "reciprocal":
            # excess * (zmax / z), without a division by the standard deviation, which may be 0.
            deviation = jnp.where(outlier, norms - state.mean, 1.0)
            target = (state.mean + excess * ratio(excess, deviation)) * as_float32(clip_factor)
        elif clip_to == "mean":
            target = state.mean
        else:
            target = state.mean + excess
        limit = jnp.where(outlier, target, state.mean + excess)
        warm = is_warm(state.mean, state.num_recorded, warmup_steps)
        return jnp.where(warm, limit, LARGEST)

    def record(state: MomentsState, norms: Norms, thresholds: Norms) -> MomentsState:
        num_recorded = optax.safe_increment(count_known(state.mean, state.num_recorded))
        averaged = update_moments(state.mean, state.std, norms, averaging_weight(num_recorded))

        limit = thresholds if record_limit is None else above_mean(state, record_limit)
        weight = new_weight(decay)
        mean = state.mean + weight * (jnp.minimum(norms, limit) - state.mean)
        deviation = jnp.minimum(norms, limit) - mean
        std = safe_hypot(jnp.sqrt(1.0 - weight) * state.std, jnp.sqrt(weight) * deviation)

        warm = is_warm(state.mean, state.num_recorded, warmup_steps)
        return MomentsState(
            mean=jnp.where(warm, mean, averaged[0]),
            std=jnp.where(warm, std, averaged[1]),
            num_recorded=num_recorded,
        )

    return ThresholdRule(init_moments, threshold, record)
