"""Drops whole steps whose gradient norm or loss is not finite or stands out from recent ones.

    dropped if norm > median + sigma * spread, or loss > median + sigma * spread

with the median and the spread, (q75 - q25) / 1.349, of the last norms and losses *as they were*,
dropped or not, the current one left out. Where a mean and a standard deviation are taken instead,
the first four spikes of a burst raise the standard deviation so far that the others pass.

It differs from clipping in what the optimizer sees: a clipped spike still enters its moments, a
dropped one has not happened.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int32

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import as_float32
from optax_smartclip.engine.groups import LeafMask, assign_groups
from optax_smartclip.engine.known_norms import known_norm
from optax_smartclip.engine.learning import ThresholdRule, fields_of, init_rule, learn
from optax_smartclip.engine.meshes import AxisName, vary_as, vary_as_before
from optax_smartclip.engine.metrics import (
    increment_where,
    metrics_record,
    reported,
    reported_threshold,
)
from optax_smartclip.engine.norms import LARGEST, Norms, group_norms
from optax_smartclip.engine.partitions import one_group
from optax_smartclip.engine.scaling import after_warmup, has_reached
from optax_smartclip.engine.states import (
    check_is_state,
    check_rule_fields,
    state_dataclass,
)
from optax_smartclip.engine.trees import PyTree, clippable_leaves
from optax_smartclip.histories.history import HistoryState
from optax_smartclip.histories.ring_buffer import MAX_SIZE, ring_buffer

_QUARTILES = (25.0, 50.0, 75.0)

# The distance between the quartiles of normally distributed values, in standard deviations.
_IQR = 1.349

# The smallest spread, in units of the median, so that rounding noise on constant values is not a
# spike. Losses in bfloat16 are up to 0.8 % apart, and that must stay below six spreads.
_MIN_SPREAD = 0.003


@metrics_record
class SkipMetrics(NamedTuple):
    """The record of `skip_spikes`. Every field is a scalar; no decision depends on it.

    Every number is finite, as in `ClipMetrics`.

    Attributes:
        skip_norm: float32, the norm of the gradient as it arrived; 3.4e38 if it is NaN or Inf.
        skip_norm_threshold: float32, the largest that is not dropped; 3.4e38 in warm-up.
        skip_value: float32, the loss that was given, 0 if none was; 3.4e38 if it is NaN or Inf.
        skip_value_threshold: float32, the largest that is not dropped; 3.4e38 in warm-up.
        skipped: bool, whether the last step was dropped.
        num_skipped: int32, how many were. Counts stop at 2 ** 31 - 1.
    """

    skip_norm: Float32[Array, ""]
    skip_norm_threshold: Float32[Array, ""]
    skip_value: Float32[Array, ""]
    skip_value_threshold: Float32[Array, ""]
    skipped: Bool[Array, ""]
    num_skipped: Int32[Array, ""]


@metrics_record
class GiveUpMetrics(NamedTuple):
    """The additional metrics of `skip_spikes(..., give_up_after=n)`. Both fields are scalars.

    Attributes:
        num_bad_in_a_row: int32, the steps with a spike or a NaN or Inf since the last one without,
            dropped or not. Stops at 2 ** 31 - 1.
        exhausted: bool, whether these are `give_up_after` or more.
    """

    num_bad_in_a_row: Int32[Array, ""]
    exhausted: Bool[Array, ""]


@state_dataclass
class SpikeDetectorState:
    """The memory of past norms and losses. Arrays of two have an entry for each of the two.

    Attributes:
        history: The state of the rule, by default the last finite norms and losses: two groups.
        num_observed: How many of each have been seen; `warmup_steps` is compared with it.
        num_in_a_row: How many spikes have been dropped since the last step that was not.
        last: The record of the last step. Reported, never read to decide anything.
    """

    history: HistoryState
    num_observed: Int32[Array, " 2"]
    num_in_a_row: Int32[Array, ""]
    last: SkipMetrics


@state_dataclass
class SkipState:
    """The state of `skip_spikes`.

    Attributes:
        inner_state: That of the optimizer inside, as if dropped steps had never been.
        detector: What spikes stand out from.
    """

    inner_state: Any
    detector: SpikeDetectorState


@state_dataclass
class GiveUpState(SkipState):
    """The state of `skip_spikes` with `give_up_after`.

    Attributes:
        give_up: For how long there has been nothing but bad steps.
    """

    give_up: GiveUpMetrics


def skip_spikes(
    inner: optax.GradientTransformation,
    *,
    sigma: Any = 6.0,
    window: int = 128,
    rule: Any = None,
    max_consecutive: Any = 32,
    warmup_steps: Any = 10,
    give_up_after: Any = None,
    mask: LeafMask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that steps with a spike do not happen.

    A step is dropped if the norm of its gradient, or the loss if it is given as Optax's `value=`,
    is NaN or Inf or more than `sigma` spreads above the median of the last `window` ones. Its
    updates are zero, the state of `inner` stays as it is in every bit (counts and schedules do not
    advance, weight decay is not applied), and the count `num_skipped` goes up.

    A lasting rise of norm or loss is dropped too, at first: until it is a quarter of what the
    window holds, or for `max_consecutive` steps, after which one step is let through, however
    large, and so on. Steps that are not finite are dropped always, and do not count among these.
    A norm of zero is not a spike and is not recorded.
    Note that batches which always stand out, and are fewer than a quarter of all, are always
    dropped, even if they are legitimate but rare.

    With `give_up_after`, the metric `exhausted` is true from that many bad steps in a row on, and
    until a step is neither a spike nor NaN or Inf. A training loop can then stop or return to an
    earlier state, as `smartclip.restore_last_good` does. It changes nothing about which steps are
    dropped: those after it are as well. A spike that `max_consecutive` lets through is a bad step
    and does not end the row. A step without a norm or loss, such as one with a gradient of zero, is
    neither good nor bad.

    What the training step computes outside of the optimizer, such as batch statistics and step
    counters, moves on in a dropped step: `smartclip.where_skipped` undoes this.

    Wrap the whole chain, clippers included. Inside `optax.MultiSteps` the accumulated gradient is
    judged; give that `should_skip_update_fn=optax.skip_not_finite`, because it never gets a NaN
    out of its sum again. Around `MultiSteps` each small batch is judged, and one that is dropped is
    made up for.

    Args:
        inner: The optimizer. It is called in every step, with a zero gradient where the step is
            dropped.
        sigma: How many spreads above the median a norm or loss may be, > 0. A spread is a standard
            deviation if the values are normally distributed; it is at least 0.3 % of the median.
        window: How many steps the median and the spread are taken over: a Python int from 4 to
            16,777,216.
        rule: None for the rule above, or another one: a step is dropped if the norm or the loss
            exceeds its threshold. It has two groups, the norm and the loss, which may be negative.
            `sigma` and `window` are then not used.
        max_consecutive: After how many spikes in a row one is let through, >= 1.
        warmup_steps: How many finite ones are observed before steps are dropped for a spike.
        give_up_after: After how many steps in a row that are spikes, NaN or Inf the metrics say
            `exhausted`, >= 1; None to leave this and `num_bad_in_a_row` out of state and metrics.
        mask: Which leaves take part in the norm; see `clip_by_rule`. The others have no say in
            whether a step is dropped.
        axis_name: Under `shard_map` or `pmap`, mapped axes over which leaves are split; see
            `clip_by_rule`. A `value` must be the same on all devices.

    Returns:
        A gradient transformation. `update` accepts `value=` and `grad_norm=`, scalars, and passes
        these and all other extra arguments on. `smartclip.metrics` finds its record, `SkipMetrics`,
        and `GiveUpMetrics` with `give_up_after`.

    Raises:
        ValueError: If an argument is out of range; from `update`, if `value` or `grad_norm` is not
            a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_smartclip as smartclip
        >>> tx = smartclip.skip_spikes(optax.chain(smartclip.autoclip(), optax.sgd(0.1)))
        >>> params = {"w": jnp.zeros(2)}
        >>> opt_state = tx.init(params)
        >>> for size in [1.0, 1.1, 0.9] * 5 + [1000.0, float("nan")]:
        ...     updates, opt_state = tx.update({"w": jnp.full(2, size)}, opt_state, params)
        >>> print(updates["w"], int(smartclip.metrics(opt_state)["num_skipped"]))
        [0. 0.] 2
        >>> int(optax.tree.get(opt_state.inner_state, "num_steps"))
        15
    """
    checks.check_number(
        "sigma",
        sigma,
        0.0,
        float("inf"),
        allowed="positive and finite",
        strict_low=True,
        strict_high=True,
    )
    checks.check_size("window", window, MAX_SIZE, low=4)
    if rule is not None and not isinstance(rule, ThresholdRule):
        raise ValueError(f"`rule` must be a ThresholdRule or None, got {rule!r}.")
    checks.check_steps("max_consecutive", max_consecutive, low=1)
    checks.check_steps("give_up_after", give_up_after, low=1, optional=True)
    checks.check_clip_options(warmup_steps, None, "zero")
    checks.check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    detect = outlier_rule(window, sigma) if rule is None else rule
    rule_fields = fields_of(detect)

    def init_fn(params: PyTree) -> SkipState:
        assign_groups("global", params, mask=mask)  # a wrong mask is found before the first step
        detector = SpikeDetectorState(
            history=init_rule(detect, 2),
            num_observed=jnp.zeros(2, jnp.int32),
            num_in_a_row=jnp.zeros((), jnp.int32),
            last=SkipMetrics(
                skip_norm=jnp.zeros((), jnp.float32),
                skip_norm_threshold=jnp.full((), LARGEST, jnp.float32),
                skip_value=jnp.zeros((), jnp.float32),
                skip_value_threshold=jnp.full((), LARGEST, jnp.float32),
                skipped=jnp.zeros((), bool),
                num_skipped=jnp.zeros((), jnp.int32),
            ),
        )
        give_up = None
        if give_up_after is not None:
            give_up = GiveUpMetrics(
                num_bad_in_a_row=jnp.zeros((), jnp.int32), exhausted=jnp.zeros((), bool)
            )
        return vary_as(_as_state(inner.init(params), detector, give_up), params, axis_name)

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        value: Any = None,
        grad_norm: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SkipState]:
        check_is_state(state, SkipState if give_up_after is None else GiveUpState)
        tree = updates if params is None else params
        takes_part = assign_groups("global", tree, mask=mask).takes_part
        if grad_norm is None:
            arrays = list(clippable_leaves(updates, takes_part).values())
            (norm,) = group_norms(arrays, one_group(len(arrays)), axis_name=axis_name)
        else:
            norm = checks.check_scalar("grad_norm", grad_norm)
            extra_args["grad_norm"] = grad_norm
        if value is None:
            loss = jnp.zeros((), jnp.float32)
        else:
            loss = checks.check_scalar("value", value)
            extra_args["value"] = value

        detector = state.detector
        seen_norm, seen_value = reported(norm), reported(loss)
        seen = jnp.stack([seen_norm, seen_value])
        given = jnp.stack([seen_norm != 0, jnp.asarray(value is not None)])
        finite = given & jnp.stack([jnp.isfinite(norm), jnp.isfinite(loss)])
        check_rule_fields(detector.history, rule_fields)
        learned = learn(detect, detector.history, detector.num_observed, seen, finite)
        thresholds = after_warmup(learned.thresholds, detector.num_observed, warmup_steps)
        norm_threshold, value_threshold = reported_threshold(thresholds)

        invalid = jnp.any(given & ~finite)
        spike = jnp.any(finite & (seen > thresholds))
        may_pass = has_reached(detector.num_in_a_row, max_consecutive)
        skip = invalid | (spike & ~may_pass)
        judged = ~invalid & jnp.any(given)

        # Zeros in place of a dropped gradient, so that nothing is computed from its NaN.
        passed_on = _zero_where(skip, updates)
        arrays = list(clippable_leaves(passed_on, takes_part).values())
        with known_norm(arrays, jnp.where(skip, 0.0, norm), axis_name):
            inner_updates, inner_state = inner.update(
                passed_on, state.inner_state, params, **extra_args
            )
        in_a_row = jnp.where(skip, optax.safe_increment(detector.num_in_a_row), 0)
        next_detector = SpikeDetectorState(
            history=learned.rule,
            num_observed=learned.num_observed,
            num_in_a_row=jnp.where(judged, in_a_row, detector.num_in_a_row),
            last=SkipMetrics(
                skip_norm=seen_norm,
                skip_norm_threshold=norm_threshold,
                skip_value=seen_value,
                skip_value_threshold=value_threshold,
                skipped=skip,
                num_skipped=increment_where(skip, detector.last.num_skipped),
            ),
        )
        kept = jax.tree.map(
            lambda old, new: jnp.where(skip, old, new), state.inner_state, inner_state
        )
        give_up = None
        if give_up_after is not None:
            is_bad, is_judged = invalid | spike, jnp.any(given)
            give_up = _next_give_up(state.give_up, is_bad, is_judged, give_up_after)
        next_state = _as_state(kept, next_detector, give_up)
        return _zero_where(skip, inner_updates), vary_as_before(next_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _as_state(
    inner_state: Any, detector: SpikeDetectorState, give_up: GiveUpMetrics | None
) -> SkipState:
    # Without `give_up_after`, the fields are those of version 0.1.0, which states are saved with.
    if give_up is None:
        return SkipState(inner_state=inner_state, detector=detector)
    return GiveUpState(inner_state=inner_state, detector=detector, give_up=give_up)


def _next_give_up(
    previous: GiveUpMetrics, is_bad: Bool[Array, ""], is_judged: Bool[Array, ""], limit: Any
) -> GiveUpMetrics:
    in_a_row = jnp.where(is_bad, optax.safe_increment(previous.num_bad_in_a_row), 0)
    num_bad = jnp.where(is_judged, in_a_row, previous.num_bad_in_a_row)
    return GiveUpMetrics(num_bad_in_a_row=num_bad, exhausted=has_reached(num_bad, limit))


def outlier_rule(window: int, sigma: Any) -> ThresholdRule:
    """Threshold: `sigma` spreads above the median of the last values, which may be negative."""
    history = ring_buffer(window)

    def threshold(state: HistoryState, values: Norms) -> Norms:
        q25, median, q75 = (history.percentile(state, quartile) for quartile in _QUARTILES)
        spread = jnp.maximum((q75 - q25) / _IQR, _MIN_SPREAD * jnp.abs(median))
        # Values that were mostly zero have shown no scale that one could exceed.
        return jnp.where(spread > 0, median + as_float32(sigma) * spread, LARGEST)

    def record(state: HistoryState, values: Norms, thresholds: Norms) -> HistoryState:
        return history.record(state, values, _QUARTILES)

    return ThresholdRule(history.init, threshold, record)


def _zero_where(skip: Bool[Array, ""], updates: PyTree) -> PyTree:
    def select(leaf: Any) -> Any:
        is_number = jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.number)
        return jnp.where(skip, jnp.zeros_like(leaf), leaf) if is_number else leaf

    return jax.tree.map(select, updates)
