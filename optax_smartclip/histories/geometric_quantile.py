"""A history of one number per group: a percentile that moves by a fixed factor at each step.

    up, after a norm above it:       estimate * exp(rate * percentile / 100)
    down, after a norm not above it: estimate * exp(-rate * (1 - percentile / 100))

At the percentile both balance. Andrew, Thakkar, McMahan, Ramaswamy, `Differentially Private
Learning with Adaptive Clipping <https://arxiv.org/abs/1905.03871>`_, 2021 (batch of one norm, no
noise). However large a norm is, it moves the estimate by one factor: nothing can poison it.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import as_float32
from optax_smartclip.engine.norms import Norms
from optax_smartclip.engine.states import select_groups, state_dataclass
from optax_smartclip.histories.history import EMPTY, NormHistory, Percentile
from optax_smartclip.histories.ring_buffer import RingBufferState, ring_buffer

# Norms of which the median is the first estimate. Eight survive three spikes among them.
_SEED_SIZE = 8


@state_dataclass
class GeometricQuantileState:
    """The estimate for each group, and the norms that it starts from.

    Attributes:
        estimate: The percentile, in the unit of the norms.
        seed: The first norms; not changed any more once there are enough.
    """

    estimate: Float32[Array, " groups"]
    seed: RingBufferState


def geometric_quantile(rate: Any = 0.02) -> NormHistory:
    """One percentile of each group's norms, moved by a fixed factor at each exceedance.

    Takes a constant amount of memory, adapts to a new level of the norms exponentially fast, and
    is bounded in its response to any one norm. Two differences from the publication:

    - The first 8 norms are kept, and their median is where the estimate starts, so that the
      scale of the norms never matters.
    - A step stops at the norm that caused it, so that the estimate comes to rest at a constant
      norm where it would otherwise swing around it.

    Args:
        rate: The logarithm of the full step, > 0. 0.02 follows a tenfold rise in about 120 steps
            (for the 95th percentile) while twenty spikes in a row raise the estimate by 1.5.

    Returns:
        A history that answers one percentile.

    Raises:
        ValueError: If `rate` is a Python number and not in (0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> history = smartclip.geometric_quantile(rate=0.1)
        >>> state = history.init(1)
        >>> for norm in [2.0] * 8 + [1000.0]:
        ...     state = history.record(state, jnp.array([norm]), (90.0,))
        >>> print(history.percentile(state, 90.0).round(4))  # 2 * exp(0.1 * 0.9)
        [2.1883]
    """
    checks.check_number("rate", rate, 0.0, 1.0, allowed="in (0, 1]", strict_low=True)
    first_norms = ring_buffer(_SEED_SIZE)

    def init(num_groups: int) -> GeometricQuantileState:
        return GeometricQuantileState(
            estimate=jnp.full(num_groups, EMPTY, jnp.float32),
            seed=first_norms.init(num_groups),
        )

    def record(
        state: GeometricQuantileState, norms: Norms, percentiles: Sequence[Percentile]
    ) -> GeometricQuantileState:
        (percentile,) = percentiles
        fraction, step = (as_float32(x) for x in (percentile / 100, rate))
        seed = first_norms.record(state.seed, norms, ())
        seeding = state.seed.length < _SEED_SIZE
        estimate = jnp.where(
            seeding,
            first_norms.percentile(seed, 50.0),
            move_towards(state.estimate, norms, fraction, step),
        )
        return GeometricQuantileState(
            estimate=estimate, seed=select_groups(seeding, seed, state.seed)
        )

    def percentile(state: GeometricQuantileState, percentile: Percentile) -> Norms:
        del percentile
        return state.estimate

    return NormHistory(
        init=init,
        record=record,
        percentile=percentile,
        max_percentiles=1,
        name=f"geometric_quantile({rate})",
    )


def move_towards(
    estimate: Norms, norms: Norms, fraction: Float32[Array, ""], rate: Float32[Array, ""]
) -> Norms:
    """One step of the estimate towards the `fraction` quantile, at most as far as the norm."""
    above = norms > estimate
    moved = estimate * jnp.exp(rate * (fraction - jnp.where(above, 0.0, 1.0)))
    return jnp.where(above, jnp.minimum(moved, norms), jnp.maximum(moved, norms))
