"""A history of the last `size` norms, with exact percentiles and no sorting.

Next to the ring, which knows which norm is the oldest, the same norms are kept in ascending
order. A step deletes the oldest norm from the ordered copy and inserts the newest, each by one
elementwise pass:

    delete:  keep the values below the oldest, move the rest down by one
    insert:  new[i] = max(old[i - 1], min(old[i], norm))

Empty places hold the largest float32, so that they are the tail of the ordered copy, and filling
one is deleting it and inserting a norm, like any other step.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from optax_smartclip.engine import checks
from optax_smartclip.engine.norms import Norms
from optax_smartclip.engine.states import state_dataclass
from optax_smartclip.histories.history import EMPTY, NormHistory, Percentile
from optax_smartclip.histories.ranks import rank

# Each step reads and writes all of it: 128 MiB per group.
MAX_SIZE = 2**24


@state_dataclass
class RingBufferState:
    """The last norms of each group.

    Attributes:
        ring: In the order of arrival, from `cursor` on the oldest first.
        ordered: In ascending order. Empty places hold the largest float32 in both.
        cursor: Where in `ring` the next norm goes.
        length: How many norms there are.
    """

    ring: Float32[Array, "groups size"]
    ordered: Float32[Array, "groups size"]
    cursor: Int32[Array, " groups"]
    length: Int32[Array, " groups"]


def ring_buffer(size: int) -> NormHistory:
    """The last `size` finite norms of each group, with their exact percentiles.

    Percentiles are those of `numpy.percentile` (linear interpolation) over the norms recorded so
    far, at most `size` of them, in float32. A step costs two passes over the ordered copy; the
    state is `8 * size + 8` bytes per group.

    Args:
        size: The length of the window, in steps: a Python int from 1 to 16,777,216.

    Returns:
        A history that answers any number of percentiles.

    Raises:
        ValueError: If `size` is not such an int; from `record`, if the state is of another size.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> history = smartclip.ring_buffer(3)
        >>> state = history.init(1)
        >>> for norm in [9.0, 1.0, 2.0, 4.0]:
        ...     state = history.record(state, jnp.array([norm]), (50.0,))
        >>> history.percentile(state, 50.0), history.percentile(state, 25.0)
        (Array([2.], dtype=float32), Array([1.5], dtype=float32))
    """
    checks.check_size("size", size, MAX_SIZE)

    def init(num_groups: int) -> RingBufferState:
        return RingBufferState(
            ring=jnp.full((num_groups, size), EMPTY, jnp.float32),
            ordered=jnp.full((num_groups, size), EMPTY, jnp.float32),
            cursor=jnp.zeros(num_groups, jnp.int32),
            length=jnp.zeros(num_groups, jnp.int32),
        )

    def record(
        state: RingBufferState, norms: Norms, percentiles: Sequence[Percentile] = ()
    ) -> RingBufferState:
        del percentiles
        if state.ring.shape[1] != size:
            raise ValueError(
                f"The state must have 'ring' of shape {(len(norms), size)}, as this history is a "
                f"ring_buffer({size}), got {state.ring.shape}, as from another run's checkpoint."
            )
        newest = norms[:, None]
        here = jnp.arange(size, dtype=jnp.int32)[None, :] == state.cursor[:, None]
        oldest = jnp.sum(jnp.where(here, state.ring, 0.0), axis=1, keepdims=True)
        return RingBufferState(
            ring=jnp.where(here, newest, state.ring),
            ordered=_replace(state.ordered, oldest, newest),
            cursor=(state.cursor + 1) % size,
            length=jnp.minimum(state.length + 1, size),
        )

    def percentile(state: RingBufferState, percentile: Percentile) -> Norms:
        lower, fraction = rank(percentile, jnp.maximum(state.length - 1, 0))
        upper = jnp.minimum(lower + 1, size - 1)
        below, above = (_pick(state.ordered, place) for place in (lower, upper))
        # An empty place is never mixed in: the fraction is 0 at the last norm.
        return jnp.where(fraction > 0, below + fraction * (above - below), below)

    return NormHistory(
        init=init,
        record=record,
        percentile=percentile,
        max_percentiles=None,
        name=f"ring_buffer({size})",
    )


def _pick(
    norms: Float32[Array, "groups size"], place: Int32[Array, " groups"]
) -> Float32[Array, " groups"]:
    """The norm at one place of each group."""
    picked = jnp.take_along_axis(norms, place[:, None], axis=1, mode="promise_in_bounds")
    return jnp.squeeze(picked, axis=1)


def _replace(
    ordered: Float32[Array, "groups size"],
    oldest: Float32[Array, "groups 1"],
    newest: Float32[Array, "groups 1"],
) -> Float32[Array, "groups size"]:
    """Takes one occurrence of `oldest` out, and puts `newest` into its place in the order.

    Only the norms between the two move, by one place, and each is computed from its neighbors.
    """
    first, last = jnp.full_like(newest, -EMPTY), jnp.full_like(newest, EMPTY)
    previous = jnp.concatenate([first, ordered[:, :-1]], axis=1)
    following = jnp.concatenate([ordered[:, 1:], last], axis=1)
    risen = jnp.where(
        ordered < oldest, ordered, jnp.maximum(ordered, jnp.minimum(following, newest))
    )
    fallen = jnp.where(
        ordered > oldest, ordered, jnp.minimum(ordered, jnp.maximum(previous, newest))
    )
    return jnp.where(newest > oldest, risen, fallen)
