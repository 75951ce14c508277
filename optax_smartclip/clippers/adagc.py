"""AdaGC: each tensor's norm is held to just above a moving average of its own clipped norms.

    threshold = relative_clip * average       of the norms before the current one
    average  <- decay * average + (1 - decay) * min(norm, threshold)

In warm-up the whole gradient is cut to one fixed norm, and `average` becomes the smallest norm
that each tensor then had.

Wang et al., `AdaGC: Improving Training Stability for Large Language Model Pretraining
<https://arxiv.org/abs/2502.11034>`_, 2025.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import as_float32
from optax_smartclip.engine.groups import LeafMask, Scope
from optax_smartclip.engine.learning import ThresholdRule
from optax_smartclip.engine.meshes import AxisName
from optax_smartclip.engine.norm_of import NormOf
from optax_smartclip.engine.norms import LARGEST, Norms, safe_divisor, safe_sqrt
from optax_smartclip.engine.rule import clip_by_rule
from optax_smartclip.engine.stacks import Stacked
from optax_smartclip.engine.states import state_dataclass
from optax_smartclip.histories.moments import count_known, is_warm, new_weight


@state_dataclass
class AdaGCState:
    """The moving average of each group's norms.

    Attributes:
        average: In the unit of the norms; in warm-up, the smallest of them.
        num_recorded: How many norms are in it. Stops at 2 ** 31 - 1.
    """

    average: Float32[Array, " groups"]
    num_recorded: Int32[Array, " groups"]


def adagc(
    relative_clip: Any = 1.04,
    *,
    decay: Any = 0.99,
    absolute_clip: Any = 1.0,
    record_limit: Any = None,
    scope: Scope = "per_param",
    stacked: Stacked = None,
    mask: LeafMask = None,
    norm_of: NormOf = None,
    warmup_steps: Any = 100,
    max_norm: Any = None,
    nonfinite: str = "zero",
    min_scale: Any = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaGC: keeps each tensor near the average of its norms, with the published defaults.

    *The current norm is left out* of the average that judges it, and *the clipped norm is
    recorded*. Each tensor is scaled on its own, so the direction of the whole gradient changes.

    Note that this is not an outlier clipper: on norms that vary by 20 % it cuts two steps of three,
    by 18 % on average. And as published, **a threshold can rise by at most 0.04 % a step** (the
    average takes 1 % of a norm that is at most 1.04 times as large): it takes more than 5,000
    steps to follow a tenfold rise of constant norms, and more than 9,000 to get from
    `absolute_clip` to norms 50 times as large. `record_limit=3.0` fixes this: norms are then
    recorded as at most three times the average, which follows a tenfold rise in some 250 steps.

    Differences from the publication: zeros are not recorded (one in warm-up would set the threshold
    of its tensor to zero for good), NaN and Inf neither (there, they switch clipping off).

    Args:
        relative_clip: What each average is multiplied by to give the threshold, > 0.
        decay: The decay of the moving average per step, in [0, 1).
        absolute_clip: In warm-up, what the norm of the whole gradient (of all groups together) is
            cut to, > 0; None to cut nothing, so that a spike passes as it is.
        record_limit: None, or as how many times the average a norm is recorded at most, > 0: what
            is clipped then has no influence on the average.
        scope: Which leaves share one norm; see `clip_by_rule`.
        stacked: Axes that count layers, each with a norm of its own; see `clip_by_rule`.
        mask: Which leaves take part; see `clip_by_rule`.
        norm_of: What the norms are of, if not of the gradient; see `clip_by_rule`.
        warmup_steps: How many norms of a group are recorded before its threshold counts.
        max_norm: A ceiling on each group that always holds; see `clip_by_rule`.
        nonfinite: `"zero"` or `"propagate"`, for NaN and Inf norms; see `clip_by_rule`.
        min_scale: The smallest scale, in [0, 1], or None; see `clip_by_rule`.
        axis_name: Mapped axes over which leaves are split; see `clip_by_rule`.

    Returns:
        A gradient transformation. Its state has the averages and the last step's metrics.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> tx = smartclip.adagc(warmup_steps=2)
        >>> state = tx.init({"w": jnp.zeros(()), "b": jnp.zeros(())})
        >>> for w, b in [(3.0, 4.0), (6.0, 8.0), (6.0, 0.5)]:
        ...     updates, state = tx.update({"w": jnp.array(w), "b": jnp.array(b)}, state)
        >>> print(f"{updates['w']:.3f} {updates['b']:.3f}")  # 1.04 * 0.6, and 0.5 as it was
        0.624 0.500
    """
    checks.check_positive("relative_clip", relative_clip)
    checks.check_decay(decay)
    checks.check_positive("absolute_clip", absolute_clip, none="to cut nothing in warm-up")
    checks.check_positive("record_limit", record_limit, none="to record clipped norms")
    checks.check_clip_options(warmup_steps, max_norm, nonfinite, min_scale)
    # The rule has a threshold of its own in warm-up.
    return clip_by_rule(
        adagc_rule(relative_clip, decay, absolute_clip, record_limit, warmup_steps),
        scope=scope,
        stacked=stacked,
        mask=mask,
        norm_of=norm_of,
        max_norm=max_norm,
        nonfinite=nonfinite,
        min_scale=min_scale,
        axis_name=axis_name,
    )


def adagc_rule(
    relative_clip: Any, decay: Any, absolute_clip: Any, record_limit: Any, warmup_steps: Any
) -> ThresholdRule:
    """Threshold: `relative_clip` times the average; in warm-up, a share of `absolute_clip`."""

    def init(num_groups: int) -> AdaGCState:
        return AdaGCState(
            average=jnp.zeros(num_groups, jnp.float32),
            num_recorded=jnp.zeros(num_groups, jnp.int32),
        )

    def threshold(state: AdaGCState, norms: Norms) -> Norms:
        in_warmup = share_of_total(norms, absolute_clip)
        warm = is_warm(state.average, state.num_recorded, warmup_steps)
        return jnp.where(warm, as_float32(relative_clip) * state.average, in_warmup)

    def record(state: AdaGCState, norms: Norms, thresholds: Norms) -> AdaGCState:
        clipped = jnp.minimum(norms, thresholds)
        num_known = count_known(state.average, state.num_recorded)
        smallest = jnp.where(num_known > 0, jnp.minimum(state.average, clipped), clipped)
        limit = thresholds if record_limit is None else as_float32(record_limit) * state.average
        change = jnp.minimum(norms, limit) - state.average
        warm = is_warm(state.average, state.num_recorded, warmup_steps)
        return AdaGCState(
            average=jnp.where(warm, state.average + new_weight(decay) * change, smallest),
            num_recorded=optax.safe_increment(num_known),
        )

    return ThresholdRule(init, threshold, record)


def share_of_total(norms: Norms, max_total: Any) -> Norms:
    """The norms after all groups together are cut to `max_total`."""
    if max_total is None:
        return jnp.full_like(norms, LARGEST)
    # In units of the largest, so that no square overflows or is lost.
    unit = jax.lax.stop_gradient(safe_divisor(jnp.max(norms, initial=0.0)))
    total = safe_sqrt(jnp.sum(jnp.square(norms / unit)))
    over = total * unit > as_float32(max_total)
    # In this order nothing is so small that it would be flushed to zero.
    shares = norms / unit / jnp.maximum(total, 1.0)
    return jnp.where(over, as_float32(max_total) * shares, LARGEST)
