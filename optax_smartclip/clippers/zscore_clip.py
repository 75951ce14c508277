"""Z-score clipping: clip what is many standard deviations above the mean of recent norms.

    threshold = mean + zmax * std        of the norms before the current one

with exponentially weighted moments, updated by (delta = norm - mean, w = 1 - decay)

    mean <- mean + w * delta
    std  <- sqrt((1 - w) * (std ** 2 + w * delta ** 2))

West, `Updating mean and variance estimates <https://doi.org/10.1145/359146.359153>`_, 1979. The
deviation is taken before it is squared, so nothing cancels when the mean is large, and no square
is stored, so nothing overflows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from optax_smartclip.engine import checks
from optax_smartclip.engine.groups import Scope
from optax_smartclip.engine.metrics import increment_where
from optax_smartclip.engine.norms import AxisName, Norms, as_float32, is_inexact, safe_sqrt
from optax_smartclip.engine.rule import ThresholdRule, clip_by_rule
from optax_smartclip.engine.states import select_groups, state

# A norm enters the moments as at most this many standard deviations above the mean. One spike of
# any size then moves the threshold by 2 % (at decay 0.99), yet a lasting rise multiplies the
# standard deviation by 1.04 a step, which reaches a tenfold level in about 60. At 1 or below, the
# standard deviation would shrink at each such norm, and a rise would be clipped for ever.
_RECORD_LIMIT = 3.0

# The smallest standard deviation, in units of the mean: rounding noise on a constant norm is no
# spike.
_MIN_STD = 0.01


@state
class ZScoreState:
    """The moments of each group's norms.

    Attributes:
        mean: In the unit of the norms.
        std: In the unit of the norms.
        num_recorded: How many norms are in them. Stops at 2 ** 31 - 1.
    """

    mean: Float32[Array, " groups"]
    std: Float32[Array, " groups"]
    num_recorded: Int32[Array, " groups"]


def zscore_clip(
    zmax: Any = 3.0,
    *,
    decay: Any = 0.99,
    scope: Scope = "global",
    warmup_steps: Any = 10,
    max_norm: Any = None,
    nonfinite: str = "zero",
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips gradients to the mean plus `zmax` standard deviations of the norms before them.

    *The current norm is left out*: a mean that already includes a spike lets a third of it pass.
    *What is recorded is the norm, but at most mean + 3 std*: a spike cannot inflate the moments,
    and a lasting rise is still followed. Zeros are not recorded, so that a layer that is frozen
    for a while keeps its threshold.

    The moments of the first `1 / (1 - decay)` norms are plain averages. The first norm counts as
    its own standard deviation, which keeps the early thresholds wide.

    Args:
        zmax: Standard deviations above the mean at which to clip, >= 0.
        decay: Of the moving averages per step, in [0, 1). 0.99 remembers about 100 norms. If
            `optax.inject_hyperparams` has rounded it to 1 (bfloat16 does so from 0.998), the
            nearest decay that could have been meant is used: 0.999.
        scope: Which leaves share one norm; see `clip_by_rule`.
        warmup_steps: How many finite norms are observed before clipping starts.
        max_norm: A ceiling that always holds, in warm-up too; see `clip_by_rule`.
        nonfinite: `"zero"` or `"propagate"`, for NaN and Inf norms; see `clip_by_rule`.
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
    checks.check_number("decay", decay, 0.0, 1.0, allowed="in [0, 1)", strict_high=True)
    return clip_by_rule(
        zscore_rule(zmax, decay),
        scope=scope,
        warmup_steps=warmup_steps,
        max_norm=max_norm,
        nonfinite=nonfinite,
        axis_name=axis_name,
    )


def zscore_rule(zmax: Any, decay: Any) -> ThresholdRule:
    """Threshold: mean + `zmax` * std of the norms before the current one."""

    def init(num_groups: int) -> ZScoreState:
        return ZScoreState(
            mean=jnp.zeros(num_groups, jnp.float32),
            std=jnp.zeros(num_groups, jnp.float32),
            num_recorded=jnp.zeros(num_groups, jnp.int32),
        )

    def threshold(state: ZScoreState, norms: Norms) -> Norms:
        del norms
        limit = _above_mean(state, as_float32(zmax))
        return jnp.where(state.num_recorded > 0, limit, jnp.inf)

    def record(state: ZScoreState, norms: Norms, thresholds: Norms) -> ZScoreState:
        del thresholds
        num_recorded = increment_where(norms > 0, state.num_recorded)
        seed = ZScoreState(mean=norms, std=norms, num_recorded=num_recorded)
        weight = jnp.maximum(
            _new_weight(decay), 1.0 / jnp.maximum(num_recorded, 1).astype(jnp.float32)
        )
        bounded = jnp.minimum(norms, _above_mean(state, jnp.float32(_RECORD_LIMIT)))
        mean, std = update_moments(state.mean, state.std, bounded, weight)
        moved = ZScoreState(mean=mean, std=std, num_recorded=num_recorded)
        recorded = select_groups(state.num_recorded > 0, moved, seed)
        return select_groups(norms > 0, recorded, state)

    return ThresholdRule(init, threshold, record)


def update_moments(mean: Norms, std: Norms, value: Norms, weight: Norms) -> tuple[Norms, Norms]:
    """Exponentially weighted mean and standard deviation after one more value."""
    delta = value - mean
    # In units of the larger of the two, so that no square overflows or is lost.
    unit = jax.lax.stop_gradient(jnp.maximum(std, jnp.abs(delta)))
    unit = jnp.where(unit > 0, unit, 1.0)
    variance = (1.0 - weight) * (jnp.square(std / unit) + weight * jnp.square(delta / unit))
    return mean + weight * delta, unit * safe_sqrt(variance)


def _above_mean(state: ZScoreState, z: Float32[Array, ""]) -> Norms:
    return state.mean + z * jnp.maximum(state.std, _MIN_STD * state.mean)


def _new_weight(decay: Any) -> Float32[Array, ""]:
    """The weight of a new value, `1 - decay`, also when rounding has made `decay` 1."""
    # Decays above 1 - eps / 4 round to 1; the middle of those is what may have been meant.
    rounded = isinstance(decay, jax.Array) and is_inexact(decay)
    eps = float(jnp.finfo(decay.dtype if rounded else jnp.float32).eps)
    return jnp.maximum(as_float32(1 - decay), eps / 8)
