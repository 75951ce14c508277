"""AutoClip: clip at a percentile of the norms so far, or at a fence around the usual ones.

    auto mode              of the norms before the current one, threshold =
      by default           q50 + 2.5 (q50 - q25)
      outliers_only=True   q75 + 1.5 (q75 - q25)
    percentile mode        threshold = P_p(n_1 .. n_t), the current norm included

Seetharaman, Wichern, Pardo, Le Roux, `AutoClip: Adaptive Gradient Clipping for Source Separation
Networks <https://arxiv.org/abs/2007.14469>`_, 2020. Tukey, *Exploratory Data Analysis*, 1977
(the inner fence of the box plot, beyond which a value is called an outlier).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from optax_smartclip.engine import checks
from optax_smartclip.engine.groups import LeafMask, Scope
from optax_smartclip.engine.learning import ThresholdRule
from optax_smartclip.engine.meshes import AxisName
from optax_smartclip.engine.norm_of import NormOf
from optax_smartclip.engine.norms import LARGEST, Norms
from optax_smartclip.engine.rule import clip_by_rule
from optax_smartclip.engine.stacks import Stacked
from optax_smartclip.engine.states import state_dataclass
from optax_smartclip.histories.history import HistoryState, NormHistory, Percentile
from optax_smartclip.histories.ring_buffer import ring_buffer

# At 1.7 standard deviations of normally distributed norms (5 % are above).
# benchmarks/study/rules.py prints how other rules train. No shorter window withstands a burst of
# twenty spikes; with a much longer one, the median follows a rise too late.
_LOWER_FENCE = 2.5
_LOWER_WINDOW = 48

# Tukey's constant. It puts the fence at 2.7 standard deviations of normally distributed norms
# (0.4 % of them are above), and no upper quarter of spikes can move it by more than it would if
# they were ordinary large norms. benchmarks/auto_rules.py prints how other rules fare.
_UPPER_FENCE = 1.5
# Long enough for quartiles that are not mostly noise, short enough for the fence to follow a
# level that rises tenfold within 100 steps (with 128 norms, a sixth of the gradient is cut on the
# way).
_UPPER_WINDOW = 112

# Far percentiles take more norms to know.
_PERCENTILE_WINDOW = 1024

# The fence of fewer norms than this is mostly noise. Until there are as many, a multiple of their
# median takes its place, which catches the batch that would otherwise sit in Adam's moments from
# the start of the run on. The upper fence's is wide enough for noise.
_FENCE_MIN_NORMS = 10
_LOWER_EARLY_FACTOR = 1.5
_UPPER_EARLY_FACTOR = 3.0


@state_dataclass
class FenceState:
    """The state of the auto mode.

    Attributes:
        history: The last norms of each group.
        num_recorded: How many norms there were. Stops at 2 ** 31 - 1.
    """

    history: HistoryState
    num_recorded: Int32[Array, " groups"]


def autoclip(
    percentile: Any = None,
    *,
    outliers_only: Any = False,
    history: Any = None,
    scope: Scope = "global",
    stacked: Stacked = None,
    mask: LeafMask = None,
    norm_of: NormOf = None,
    warmup_steps: Any = None,
    max_norm: Any = None,
    nonfinite: str = "zero",
    min_scale: Any = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips gradients to a threshold learned from the history of their norms.

    Without a percentile (the auto mode), a norm is cut to the fence `q50 + 2.5 * (q50 - q25)`,
    where q50 and q25 are the median and the lower quartile of the last 48 raw norms, *the current
    one left out*. There is no number to set: the fence scales with the gradient and follows a
    change of its level within some 25 steps, and norms above the median, where spikes are, do not
    move it. Where norms are noise, about one step of ten is cut by a little. Where their upper tail
    is heavy, more are, which steadies the step. Until there are 10 norms, the threshold is
    1.5 times their median; only the first step of a run has nothing to be compared with.

    With `outliers_only=True`, ordinary noise is left alone: the threshold is
    `q75 + 1.5 * (q75 - q25)` of the last 112 norms, and three times their median until there are
    10. It trains worse at rates where the step should be steadied (see "Choosing a clipper").

    With a percentile, gradients are cut to that percentile of the last 1,024 raw norms, *the
    current one included*, as in the AutoClip paper (which keeps all norms ever seen; use
    `ring_buffer(steps)` for the same). Note that `autoclip(10.0)`, the paper's
    recommendation, scales down 90 % of all steps.

    All of them record the raw norm, clipped or not, so that they learn a lasting change. They never
    record zero, NaN or Inf. (The paper's code records zeros.)

    Args:
        percentile: In [0, 100], or None for the auto mode.
        outliers_only: For the auto mode only: whether ordinary noise is left alone.
        history: Where norms are kept: `ring_buffer(size)`, `log_histogram()` (the whole run) or,
            with a percentile, `geometric_quantile(rate)`. By default `ring_buffer(48)` in auto
            mode, `ring_buffer(112)` if `outliers_only`, and `ring_buffer(1024)` with a
            percentile.
        scope: Which leaves share one norm; see `clip_by_rule`.
        stacked: Axes that count layers, each with a norm of its own; see `clip_by_rule`.
        mask: Which leaves take part; see `clip_by_rule`.
        norm_of: What the norms are of, if not of the gradient; see `clip_by_rule`.
        warmup_steps: How many finite norms are observed before clipping starts. By default 1 in
            auto mode and 0 with a percentile.
        max_norm: A ceiling that always holds, in warm-up too; see `clip_by_rule`.
        nonfinite: `"zero"` or `"propagate"`, for NaN and Inf norms; see `clip_by_rule`.
        min_scale: The smallest scale, in [0, 1], or None; see `clip_by_rule`.
        axis_name: Mapped axes over which leaves are split; see `clip_by_rule`.

    Returns:
        A gradient transformation. Its state has the history and the last step's metrics.

    Raises:
        ValueError: If an argument is out of range, `outliers_only` is True with a percentile,
            or `history` cannot answer what the mode asks of it (the auto mode needs two
            percentiles, and three if `outliers_only`).

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_smartclip as smartclip
        >>> tx = optax.chain(smartclip.autoclip(), optax.sgd(1.0))
        >>> params = {"w": jnp.zeros(2)}
        >>> opt_state = tx.init(params)
        >>> for size in [1.0, 2.0] * 10 + [1000.0]:  # q25 1, q50 1.5
        ...     updates, opt_state = tx.update({"w": size * jnp.array([0.6, 0.8])}, opt_state)
        >>> float(smartclip.metrics(opt_state)["clip_threshold"])
        2.75
        >>> print(f"{optax.tree.norm(updates):.2f}")
        2.75
    """
    checks.check_flag("outliers_only", outliers_only)
    if not isinstance(history, NormHistory | None):
        raise ValueError(
            "`history` must be a NormHistory, as ring_buffer(128) makes one, or None, "
            f"got {history!r}.{checks.static_hint(history)}"
        )
    if percentile is None:
        rule = upper_fence_rule(history) if outliers_only else lower_fence_rule(history)
        warmup_steps = 1 if warmup_steps is None else warmup_steps
    else:
        checks.check_number("percentile", percentile, 0.0, 100.0, allowed="in [0, 100], or None")
        if outliers_only:
            raise ValueError("`outliers_only` must be False with a percentile, got True.")
        history = ring_buffer(_PERCENTILE_WINDOW) if history is None else history
        rule = percentile_rule(history, percentile)
        warmup_steps = 0 if warmup_steps is None else warmup_steps
    return clip_by_rule(
        rule,
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


def percentile_rule(history: NormHistory, percentile: Percentile) -> ThresholdRule:
    """Threshold: the percentile of the raw norms, the current one included."""

    def record(state: HistoryState, norms: Norms, thresholds: Norms | None = None) -> HistoryState:
        del thresholds
        return history.record(state, norms, (percentile,))

    def threshold(state: HistoryState, norms: Norms) -> Norms:
        return history.percentile(record(state, norms), percentile)

    return ThresholdRule(history.init, threshold, record)


def lower_fence_rule(history: NormHistory | None = None) -> ThresholdRule:
    """Threshold: a fence above the median, by the spread below it, of the norms before this one.

    Raises:
        ValueError: If the history cannot follow two percentiles.
    """

    def fence(q25: Norms, q50: Norms) -> Norms:
        return q50 + _LOWER_FENCE * (q50 - q25)

    history = ring_buffer(_LOWER_WINDOW) if history is None else history
    return _rule_of_quartiles(history, (25.0, 50.0), fence, _LOWER_EARLY_FACTOR)


def upper_fence_rule(history: NormHistory | None = None) -> ThresholdRule:
    """Threshold: Tukey's upper inner fence of the raw norms before the current one.

    Raises:
        ValueError: If the history cannot follow three percentiles.
    """

    def fence(q25: Norms, q50: Norms, q75: Norms) -> Norms:
        del q50
        return q75 + _UPPER_FENCE * (q75 - q25)

    history = ring_buffer(_UPPER_WINDOW) if history is None else history
    return _rule_of_quartiles(history, (25.0, 50.0, 75.0), fence, _UPPER_EARLY_FACTOR)


def _rule_of_quartiles(
    history: NormHistory,
    percentiles: tuple[float, ...],
    fence: Callable[..., Norms],
    early_factor: float,
) -> ThresholdRule:
    if history.max_percentiles is not None and history.max_percentiles < len(percentiles):
        raise ValueError(
            f"`history` must be able to answer {len(percentiles)} percentiles for autoclip() "
            f"without a percentile, as ring_buffer(size) is, got {history.name}."
        )

    def init(num_groups: int) -> FenceState:
        return FenceState(
            history=history.init(num_groups), num_recorded=jnp.zeros(num_groups, jnp.int32)
        )

    def threshold(state: FenceState, norms: Norms) -> Norms:
        del norms
        quartiles = [history.percentile(state.history, percent) for percent in percentiles]
        median = quartiles[percentiles.index(50.0)]
        is_early = state.num_recorded < _FENCE_MIN_NORMS
        limit = jnp.where(is_early, early_factor * median, fence(*quartiles))
        # States of version 0.1.0 may have zeros recorded, which show no scale to exceed.
        return jnp.where(limit > 0, limit, LARGEST)

    def record(state: FenceState, norms: Norms, thresholds: Norms) -> FenceState:
        del thresholds  # A fence of known norms can overflow.
        # Without a median, no norm is known: the count is that of another clipper, left by a
        # restore that fills what a checkpoint lacks from the initial state.
        median = history.percentile(state.history, 50.0)
        is_known = (median > 0) & (median < LARGEST)
        num_known = jnp.where(is_known, state.num_recorded, 0)
        return FenceState(
            history=history.record(state.history, norms, percentiles),
            num_recorded=optax.safe_increment(num_known),
        )

    return ThresholdRule(init, threshold, record)
