"""From norms and thresholds to the clipped gradient: `min(1, threshold / norm)` times it.

The functions of arrays here are elementwise and know nothing of groups, so that they serve
clippers whose groups are leaves and clippers whose groups are rows of a leaf alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Inexact

from optax_smartclip.engine.norms import GroupValues, Partition, as_float32, working_dtype


def clip_arrays(
    arrays: list[Array],
    partition: Partition,
    norms: GroupValues,
    limits: GroupValues,
    nonfinite: str,
) -> list[Array]:
    """Each array times the scale of its group, or of each of the groups within it."""
    scales = partition.spread(jax.tree.map(clip_scale, norms, limits))
    finite = partition.spread(jax.tree.map(jnp.isfinite, norms))
    return [
        scale_array(array, scale, keep, nonfinite)
        for array, scale, keep in zip(arrays, scales, finite, strict=True)
    ]


def limit_threshold(
    threshold: Float32[Array, "..."], num_observed: Array, warmup_steps: Any, max_norm: Any
) -> Float32[Array, "..."]:
    """What the threshold becomes after warm-up and `max_norm` have had their say.

    In warm-up it is infinite; the ceiling `max_norm` holds always. A rule that returns NaN clips
    nothing, and one that returns a negative number clips to zero: neither may turn a gradient
    into NaN or against its direction.
    """
    warm = as_float32(num_observed) >= as_float32(warmup_steps)
    ceiling = jnp.inf if max_norm is None else as_float32(max_norm)
    return jnp.maximum(jnp.fmin(jnp.where(warm, threshold, jnp.inf), ceiling), 0.0)


def clip_scale(
    norm: Float32[Array, "*shape"], threshold: Float32[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """`min(1, threshold / norm)`, exactly 1 where `norm <= threshold`, both zero included."""
    over = norm > threshold
    return jnp.where(over, threshold / jnp.where(over, norm, 1.0), 1.0)


def scale_array(
    array: Inexact[Array, "*shape"],
    scale: Float32[Array, "..."],
    finite: Bool[Array, "..."],
    nonfinite: str,
) -> Inexact[Array, "*shape"]:
    """Multiplies in at least float32 and returns the dtype of `array`.

    Where `finite` is False, the result is zero (selected, as NaN times zero would be NaN) or,
    with `nonfinite="propagate"`, the array itself.
    """
    dtype = working_dtype(array.dtype)
    scaled = (array.astype(dtype) * scale.astype(dtype)).astype(array.dtype)
    other = jnp.zeros((), array.dtype) if nonfinite == "zero" else array
    return jnp.where(finite, scaled, other)
