"""Z-score clipping: clip norms many standard deviations above the mean of recent norms.

    threshold = mean + zmax * std        of the norms before the current one

with exponentially weighted moments; see `optax_smartclip.histories.moments`.
"""

from typing import Any

import jax.numpy as jnp
import optax

from optax_smartclip.engine import checks
from optax_smartclip.engine.groups import LeafMask, Scope
from optax_smartclip.engine.learning import ThresholdRule
from optax_smartclip.engine.meshes import AxisName
from optax_smartclip.engine.norm_of import NormOf
from optax_smartclip.engine.norms import LARGEST, Norms
from optax_smartclip.engine.rule import clip_by_rule
from optax_smartclip.engine.stacks import Stacked
from optax_smartclip.engine.states import select_groups
from optax_smartclip.histories.moments import (
    MomentsState,
    above_mean,
    averaging_weight,
    count_known,
    init_moments,
    new_weight,
    update_moments,
)

# A norm enters the moments as at most this many standard deviations above the mean. One spike of
# any size then moves the threshold by 2 % (at decay 0.99), yet a lasting rise multiplies the
# standard deviation by 1.04 a step, which reaches a tenfold level in about 60. At 1 or below, the
# standard deviation would shrink at each such norm, and a rise would be clipped forever.
_RECORD_LIMIT = 3.0


def zscore_clip(
    zmax: Any = 3.0,
    *,
    decay: Any = 0.99,
    scope: Scope = "global",
    stacked: Stacked = None,
    mask: LeafMask = None,
    norm_of: NormOf = None,
    warmup_steps: Any = 1,
    max_norm: Any = None,
    nonfinite: str = "zero",
    min_scale: Any = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips gradients to the mean plus `zmax` standard deviations of the norms before them.

    *The current norm is left out*: a mean that already includes a spike lets a third of it pass.
    *The norm is recorded, but at most mean + 3 std*: a spike cannot inflate the moments,
    and a lasting rise is still followed.

    The moments of the first `1 / (1 - decay)` norms are plain averages. The first norm counts as
    its own standard deviation, which keeps the early thresholds wide; only the first step of a run
    has nothing to be compared with.

    Args:
        zmax: Standard deviations above the mean at which to clip, >= 0.
        decay: The decay of the moving averages per step, in [0, 1). 0.99 remembers about 100 norms.
            If `optax.inject_hyperparams` has rounded it to 1 (bfloat16 does so from 0.998), the
            nearest decay that could have been meant is used: 0.999.
        scope: Which leaves share one norm; see `clip_by_rule`.
        stacked: Axes that count layers, each with a norm of its own; see `clip_by_rule`.
        mask: Which leaves take part; see `clip_by_rule`.
        norm_of: What the norms are of, if not of the gradient; see `clip_by_rule`.
        warmup_steps: How many finite norms are observed before clipping starts.
        max_norm: A ceiling that always holds, in warm-up too; see `clip_by_rule`.
        nonfinite: `"zero"` or `"propagate"`, for NaN and Inf norms; see `clip_by_rule`.
        min_scale: The smallest scale, in [0, 1], or None; see `clip_by_rule`.
        axis_name: Mapped axes over which leaves are split; see `clip_by_rule`.

    Returns:
        A gradient transformation. Its state has the moments and the last step's metrics.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> tx = smartclip.zscore_clip(zmax=2.0)
        >>> state, update_fn = tx.init(jnp.zeros(())), jax.jit(tx.update)
        >>> for norm in [1.0, 3.0] * 200 + [1000.0]:  # mean 2, standard deviation 1
        ...     update, state = update_fn(jnp.asarray(norm), state)
        >>> print(f"{update:.1f}")
        4.0
    """
    checks.check_number("zmax", zmax, 0.0, float("inf"), allowed=">= 0")
    checks.check_decay(decay)
    return clip_by_rule(
        zscore_rule(zmax, decay),
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


def zscore_rule(zmax: Any, decay: Any) -> ThresholdRule:
    """Threshold: mean + `zmax` * std of the norms before the current one."""

    def threshold(state: MomentsState, norms: Norms) -> Norms:
        del norms
        limit = above_mean(state, zmax)
        return jnp.where(count_known(state.mean, state.num_recorded) > 0, limit, LARGEST)

    def record(state: MomentsState, norms: Norms, thresholds: Norms) -> MomentsState:
        del thresholds
        num_known = count_known(state.mean, state.num_recorded)
        num_recorded = optax.safe_increment(num_known)
        seed = MomentsState(mean=norms, std=norms, num_recorded=num_recorded)
        weight = jnp.maximum(new_weight(decay), averaging_weight(num_recorded))
        bounded = jnp.minimum(norms, above_mean(state, _RECORD_LIMIT))
        mean, std = update_moments(state.mean, state.std, bounded, weight)
        moved = MomentsState(mean=mean, std=std, num_recorded=num_recorded)
        recorded: MomentsState = select_groups(num_known > 0, moved, seed)
        return recorded

    return ThresholdRule(init_moments, threshold, record)
