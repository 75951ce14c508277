"""Histories: the memory of past norms that a rule can be built on.

A history answers one question, "which norm did this percentage of past steps stay under?", for
each group on its own. It is three pure functions, like a rule, and knows nothing of clipping.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from optax_smartclip.engine.norms import LARGEST, Norms

HistoryState = Any
Percentile = Any

# In place of a norm that has not been recorded. It exceeds every norm that can be.
EMPTY = LARGEST


class NormHistory(NamedTuple):
    """A memory of norms, as three pure functions of arrays.

    `norms` are float32[groups], positive and finite.

    Attributes:
        init: Number of groups -> state. Every leaf of it has a leading `groups` axis.
        record: State, norms, the percentiles that will be asked for -> next state. The same
            percentiles are given at every step.
        percentile: State, a percentile in [0, 100] -> float32[groups], in the unit of the norms.
            `EMPTY`, the largest float32, for a group that has recorded nothing.
        max_percentiles: The number of percentiles that `record` can attend to; None for any.
        name: Its name in error messages, as the user wrote it.
    """

    init: Callable[[int], HistoryState]
    record: Callable[[HistoryState, Norms, Sequence[Percentile]], HistoryState]
    percentile: Callable[[HistoryState, Percentile], Norms]
    max_percentiles: int | None
    name: str
