"""A history of the whole run in fixed memory: norms rounded up to the next of some fixed levels.

    levels = 0, 1e-12, 1e-12 * r, 1e-12 * r ** 2, ..., 1e12        r = 1 + relative_error

Counted is how many norms are *at most* at each level, so that a step is one comparison with all
levels and one addition, and a percentile is the lowest level that enough norms do not exceed.
Rounding up keeps the order of the norms, so the k-th smallest rounded norm is the k-th smallest
norm, rounded: every order statistic, and every interpolation between two, is overestimated by at
most `relative_error`, whatever the distribution of the norms.

The idea of fixed levels in geometric progression is that of Masson, Rim, Lee, `DDSketch: A Fast
and Fully-Mergeable Quantile Sketch with Relative-Error Guarantees
<https://arxiv.org/abs/1908.10693>`_, 2019; it estimates from within a bucket, where ours takes its
upper end: a clipper must not clip a norm for being rounded.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Num

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import as_float32
from optax_smartclip.engine.norms import Norms
from optax_smartclip.engine.states import state_dataclass
from optax_smartclip.histories.history import EMPTY, NormHistory, Percentile
from optax_smartclip.histories.ranks import rank

_LOWEST, _HIGHEST = 1e-12, 1e12
_MOST_COUNTED = 2**31 - 1


@state_dataclass
class LogHistogramState:
    """How the norms of each group are distributed.

    Attributes:
        num_at_most: How many norms were at most at each level. int32, and the last entry of a
            group is how many there were; float32 if counts decay.
    """

    num_at_most: Num[Array, "groups levels"]


def log_histogram(relative_error: float = 0.01, *, decay: float | None = None) -> NormHistory:
    """All norms of the run, with percentiles that are right to a relative error.

    A percentile is that of `numpy.percentile` (linear interpolation) over all norms ever recorded,
    or up to `relative_error` more, never less: for norms from 1e-12 to 1e12, and for zeros
    exactly. Smaller norms count as 1e-12; where a percentile falls among larger ones it is the
    largest float32. Counts are exact up to 2 ** 31 - 1 norms; later norms are not recorded.

    A step costs two passes over the counts. The state is 4 bytes for each level: 22 kB per group
    at 0.01, inversely proportional to the error.

    Args:
        relative_error: How much larger a percentile may be than it is: a Python number from
            0.0001 to 0.5, which sets the shape of the state.
        decay: What each count is multiplied by at each step, in (0, 0.9999999], so that the
            histogram forgets: 0.9999 remembers about the last 10,000 norms. A percentile is then
            the lowest level with that share of the weight at or below it, without interpolation.
            By default nothing is forgotten.

    Returns:
        A history that answers any number of percentiles.

    Raises:
        ValueError: If an argument is out of range; from `record`, if the state has other levels.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> history = smartclip.log_histogram()
        >>> state = history.init(1)
        >>> for norm in range(1, 101):
        ...     state = history.record(state, jnp.full(1, norm, jnp.float32), (50.0,))
        >>> print(history.percentile(state, 50.0).round(2))  # 50.5, or up to 1 % more
        [50.92]
    """
    checks.check_number(
        "relative_error",
        relative_error,
        1e-4,
        0.5,
        allowed="a Python number from 0.0001 to 0.5 (it sets the shape of the state)",
        may_be_array=False,
    )
    if decay is not None:
        checks.check_number(
            "decay",
            decay,
            0.0,
            0.9999999,  # From 0.99999998 on, it would be 1 in float32.
            allowed="in (0, 0.9999999], or None to forget nothing",
            strict_low=True,
        )
    levels = make_levels(relative_error)

    dtype = jnp.dtype(jnp.int32 if decay is None else jnp.float32)

    def init(num_groups: int) -> LogHistogramState:
        return LogHistogramState(num_at_most=jnp.zeros((num_groups, levels.size), dtype))

    def record(
        state: LogHistogramState, norms: Norms, percentiles: Sequence[Percentile] = ()
    ) -> LogHistogramState:
        del percentiles
        shape, got = (len(norms), levels.size), state.num_at_most
        if (got.shape, got.dtype) != (shape, dtype):
            raise ValueError(
                f"The state must have 'num_at_most' of shape {shape} and dtype {dtype}, as this "
                f"history is a log_histogram({relative_error}, decay={decay}), got {got.shape} "
                f"and {got.dtype}, as from another run's checkpoint."
            )
        counted = norms[:, None] <= levels[None, :]
        if decay is None:
            counted &= state.num_at_most[:, -1:] < _MOST_COUNTED
            return LogHistogramState(num_at_most=state.num_at_most + counted.astype(jnp.int32))
        remembered = as_float32(decay) * state.num_at_most
        return LogHistogramState(num_at_most=remembered + as_float32(counted))

    def percentile(state: LogHistogramState, percentile: Percentile) -> Norms:
        total = state.num_at_most[:, -1]
        if decay is not None:
            share = as_float32(percentile / 100) * total
            return _lowest_level(share[:, None] <= state.num_at_most, state, levels)
        last = jnp.maximum(total - 1, 0)
        lower, fraction = rank(percentile, last)
        below, above = (
            _lowest_level(index[:, None] < state.num_at_most, state, levels)
            for index in (lower, jnp.minimum(lower + 1, last))
        )
        return below + fraction * (above - below)

    return NormHistory(
        init=init,
        record=record,
        percentile=percentile,
        max_percentiles=None,
        name=f"log_histogram({relative_error})",
    )


def make_levels(relative_error: float) -> Float32[np.ndarray, " levels"]:
    """Zero, levels from 1e-12 to 1e12 of which none is too far above the one below, infinity.

    In place of infinity is the largest float32, which is as much above all others.
    """
    # Two neighbors may be rounded apart by one unit in the last place.
    ratio = 1 + relative_error - 2 * float(np.finfo(np.float32).eps)
    num_steps = int(np.ceil(np.log(_HIGHEST / _LOWEST) / np.log(ratio)))
    between = np.geomspace(_LOWEST, _HIGHEST, num_steps + 1)
    return np.concatenate([[0.0], between, [EMPTY]]).astype(np.float32)


def _lowest_level(
    enough: Array, state: LogHistogramState, levels: Float32[np.ndarray, " levels"]
) -> Norms:
    """The lowest level that norms have been recorded at or below, and enough of them."""
    return jnp.min(jnp.where(enough & (state.num_at_most > 0), levels[None, :], EMPTY), axis=1)
