"""The float64 references of `reference.py` for long streams and several groups.

Each function returns a `Reference`: from norms [steps, groups] to the threshold of each step, or to
a lower and an upper bound of it, [2, steps, groups]. A window is kept in order instead of sorted at
every step, so that a million steps take seconds. `tests/test_soak.py` compares the two.
"""

import bisect
import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import reference

Reference = Callable[[np.ndarray], np.ndarray]

LARGEST = float(np.finfo(np.float32).max)


def each(rule: Callable[[np.ndarray], Any]) -> Reference:
    """Applies a rule for the norms [steps] of one group to every group."""
    return lambda norms: np.stack([rule(group) for group in norms.T], axis=-1)


def of_window(limit: Callable[[list[float]], float], size: int, before: bool) -> Reference:
    """`limit` of the last `size` norms in ascending order.

    These are the positive, finite norms before each step, or up to and including its own.
    """

    def rule(norms: np.ndarray) -> np.ndarray:
        arrived: deque[float] = deque()
        ordered: list[float] = []
        thresholds = [math.inf]
        for norm in norms.tolist():
            if 0 < norm < math.inf:
                if len(arrived) == size:
                    del ordered[bisect.bisect_left(ordered, arrived.popleft())]
                arrived.append(norm)
                bisect.insort(ordered, norm)
            thresholds.append(limit(ordered) if ordered else math.inf)
        return np.array(thresholds[:-1] if before else thresholds[1:])

    return each(rule)


def quantile(ordered: list[float], fraction: float) -> float:
    """Linear interpolation between order statistics, as in `numpy.percentile`."""
    place = fraction * (len(ordered) - 1)
    lower = int(place)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (place - lower) * (ordered[upper] - ordered[lower])


def percentile(percent: float, size: int) -> Reference:
    """AutoClip: the percentile of a window that includes the current norm."""
    return of_window(lambda ordered: quantile(ordered, percent / 100), size, before=False)


def fence(
    limit: Callable[[float, float, float], float], size: int, early_factor: float
) -> Reference:
    """A limit made of the three quartiles; of fewer than 10 norms, a multiple of their median."""

    def threshold(ordered: list[float]) -> float:
        q25, median, q75 = (quantile(ordered, share) for share in (0.25, 0.5, 0.75))
        return early_factor * median if len(ordered) < 10 else limit(q25, median, q75)

    return of_window(lambda ordered: threshold(ordered) or math.inf, size, before=True)


def lower_fence() -> Reference:
    """Median + 2.5 (median - q25) of 48 norms."""
    return fence(lambda q25, median, _: median + 2.5 * (median - q25), 48, early_factor=1.5)


def upper_fence() -> Reference:
    """Tukey's inner fence of 112 norms."""
    return fence(lambda q25, _, q75: q75 + 1.5 * (q75 - q25), 112, early_factor=3.0)


def outliers() -> Reference:
    """`skip_spikes`: the median + 6 spreads of 128 norms, from the tenth norm on."""

    def threshold(ordered: list[float]) -> float:
        q25, median, q75 = (quantile(ordered, share) for share in (0.25, 0.5, 0.75))
        spread = max((q75 - q25) / 1.349, 0.003 * median)
        return median + 6 * spread if len(ordered) >= 10 and spread > 0 else math.inf

    return of_window(threshold, 128, before=True)


def levels(norms: np.ndarray) -> np.ndarray:
    """Norms as a histogram sees them: those beyond its levels are moved to the last one."""
    beyond = (norms > 1e12) & np.isfinite(norms)
    moved = np.where(beyond, LARGEST, np.maximum(norms, np.float32(1e-12)))
    return np.where(norms == 0, 0.0, moved.astype(np.float64))


def percentile_of_all(percent: float, error: float) -> Reference:
    """A percentile of all norms so far, which a histogram may round up by `error`.

    One heap holds the norms below the percentile, the largest first. The other one holds the rest.
    """

    def rule(norms: np.ndarray) -> np.ndarray:
        below: list[float] = []
        above: list[float] = []
        percentiles = []
        for norm in levels(norms).tolist():
            if 0 < norm < math.inf:
                place = percent / 100 * (len(below) + len(above))
                heapq.heappush(above, -heapq.heappushpop(below, -norm))
                while len(below) < int(place) + 1:
                    heapq.heappush(below, -heapq.heappop(above))
            if not below:
                percentiles.append(0.0)
                continue
            largest = -below[0]
            share = place - int(place)
            percentiles.append(largest + share * (above[0] - largest) if above else largest)
        return np.outer([1, 1 + error], percentiles)

    return each(rule)


def fading_percentile(percent: float, error: float, decay: float) -> Reference:
    """The same of norms whose weight fades, at 200 of the steps. The others have no bounds."""

    def rule(norms: np.ndarray) -> np.ndarray:
        bounds = np.array([[0.0], [math.inf]]) + np.zeros(len(norms))
        for step in np.linspace(0, len(norms) - 1, 200).astype(int):
            seen = levels(norms[: step + 1])
            # All earlier norms together have a weight of e ** -15.
            seen = seen[np.isfinite(seen) & (seen > 0)][int(-15 / (1 - decay)) :]
            # Weights are rounded to float32, so that the percentile may be a little off.
            low, high = (
                reference.fading_percentile(seen, percent + off, decay) for off in (-0.01, 0.01)
            )
            bounds[:, step] = low, (1 + error) * high
        return bounds

    return each(rule)
