"""Where a percentile falls among sorted values, exactly, in 32-bit integers.

Histories that keep their norms in order, or count them, find a percentile by its rank:

    rank(percentile, last) = percentile / 100 * last        as an index and a fraction above it

as `numpy.percentile` does with its linear method. In float32 the fraction would be lost beyond
2 ** 24 values, and 50 % of 9 might be 4.4999995.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from optax_smartclip.engine.dtypes import as_float32

# Percentiles are counted in parts of a percent: a power of two of them, so that nothing is
# rounded, and few enough for the products below to fit into 32 bits.
_PARTS = 256
_WHOLE = 100 * _PARTS


def rank(
    percentile: Any, last: Int32[Array, " groups"]
) -> tuple[Int32[Array, " groups"], Float32[Array, " groups"]]:
    """`percentile / 100 * last`, for the indices `0..last` of sorted values.

    Exact for every percentile that is a multiple of 1/256, up to the rounding of the fraction.
    For others the error is below 4e-7 of a 256th of a percent of `last`: 3e-4 of a rank in 16
    million, 0.03 in 2 billion.
    """
    whole, left = divmod(percentile * _PARTS, 1)
    parts = jnp.asarray(whole).astype(jnp.uint32)
    # Long multiplication and division in base 2 ** 16: parts * last is too large for 32 bits.
    high, low = last.astype(jnp.uint32) >> 16, last.astype(jnp.uint32) & 0xFFFF
    upper, carried = parts * high // _WHOLE, parts * high % _WHOLE
    rest = (carried << 16) + parts * low
    index, remainder = (upper << 16) + rest // _WHOLE, rest % _WHOLE
    fraction = (remainder.astype(jnp.float32) + as_float32(left) * as_float32(last)) / _WHOLE
    carry = jnp.floor(fraction)
    return index.astype(jnp.int32) + carry.astype(jnp.int32), fraction - carry
