"""Euclidean norms of groups of elements, right for every finite gradient.

The sum of squares is taken in float32 (float64 where a leaf is float64) whatever the dtype of the
leaves, in one read. Only when a sum overflows, or is so small that squares may have been flushed
to zero, is the gradient read once more, scaled by a power of two that brings its squares back
into range:

    norm = sqrt(sum((f * x) ** 2)) / f        with f = 2 ** -70 or 2 ** 70 in float32

A power of two rounds nothing, so the second reading is as exact as the first would have been.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Inexact

AxisName = str | Sequence[str] | None
Norms = Float32[Array, " groups"]
Mask = Bool[Array, " groups"]

# What a history says where it knows nothing, so that nothing is clipped. Not Inf, of which sums and
# differences are NaN.
LARGEST = float(jnp.finfo(jnp.float32).max)

# A value for each group: [groups] if leaves make up groups, else an array for each leaf.
GroupValues = Any


class Partition(NamedTuple):
    """How the elements of a list of arrays fall into groups.

    Attributes:
        total: Sums the elements of each group: arrays -> group values.
        spread: The way back: group values -> for each array, one that broadcasts against it.
    """

    total: Callable[[list[Array]], GroupValues]
    spread: Callable[[GroupValues], list[Array]]


def by_leaf(index: Sequence[int], num_groups: int) -> Partition:
    """Groups made of whole arrays: array `i` belongs to group `index[i]`."""
    members: list[list[int]] = [[] for _ in range(num_groups)]
    for position, group in enumerate(index):
        members[group].append(position)

    def total(arrays: list[Array]) -> Float[Array, " groups"]:
        sums = [jnp.sum(array) for array in arrays]
        zero = jnp.zeros((), sums[0].dtype if sums else jnp.float32)

        # Stacked and reduced, not scattered: this fixes the order of the additions, also on a
        # GPU, so that a resumed run repeats every bit.
        def add(group: list[int]) -> Float[Array, ""]:
            terms = [sums[position] for position in group]
            return jnp.sum(jnp.stack(terms)) if len(terms) > 1 else (terms or [zero])[0]

        return jnp.stack([add(group) for group in members]) if members else zero[None][:0]

    def spread(values: Float[Array, " groups"] | Mask) -> list[Array]:
        return [values[group] for group in index]

    return Partition(total, spread)


def by_unit(axes: Sequence[tuple[int, ...]]) -> Partition:
    """Groups within arrays: array `i` is summed over `axes[i]`, and what remains are its units."""

    def total(arrays: list[Array]) -> list[Array]:
        # keepdims, because a broadcast of the result would lose the sharding of an array on a
        # mesh with explicit axes.
        return [
            jnp.sum(array, axis=axis, keepdims=True)
            for array, axis in zip(arrays, axes, strict=True)
        ]

    return Partition(total, spread=list)


def group_norms(
    arrays: list[Inexact[Array, "..."]],
    partition: Partition,
    *,
    axis_name: AxisName = None,
    exact_below: bool = True,
    exact_above: bool = True,
) -> GroupValues:
    """The Euclidean norm of each group, as float32 group values.

    Args:
        arrays: Floating-point or complex arrays of any dtype and shape.
        partition: How their elements fall into groups.
        axis_name: Mapped axes over which the arrays are split; sums are taken across them.
        exact_below: Whether norms under about 5e-10 (in float32) are worth a second read. A
            group of zeros cannot be told from one whose squares underflow without it.
        exact_above: Whether norms over about 1e19 (in float32) are; they are infinite otherwise.

    Returns:
        Norms; NaN or Inf where a group has a NaN or Inf, or where the true norm is beyond
        float32. Elements below the smallest normal number may count as zero.
    """
    dtype = jnp.float64 if any(_is_double(array) for array in arrays) else jnp.float32
    finfo = jnp.finfo(dtype)
    # Half of the exponents, and 6 more as room for the sum over many elements.
    power = finfo.maxexp // 2 + 6
    # 2 ** 40 elements may each lose a square just below `tiny`: from here on, all of them
    # together are less than the rounding of the sum.
    floor = float(finfo.tiny) * 2.0**64 if exact_below else 0.0

    def sums(squares: list[Array]) -> GroupValues:
        total = partition.total(squares)
        return total if axis_name is None else jax.lax.psum(total, axis_name)

    def direct(arrays: list[Array], totals: GroupValues) -> GroupValues:
        del arrays
        return jax.tree.map(safe_sqrt, totals)

    def rescaled(arrays: list[Array], totals: GroupValues) -> GroupValues:
        def factor(total: Array) -> Array:
            small = jnp.where(total < floor, 2.0**power, 1.0)
            return jnp.where(jnp.isinf(total), 2.0**-power, small).astype(dtype)

        factors = jax.tree.map(factor, totals)
        scaled = [
            _squares(array, dtype, by)
            for array, by in zip(arrays, partition.spread(factors), strict=True)
        ]
        return jax.tree.map(lambda total, by: safe_sqrt(total) / by, sums(scaled), factors)

    totals = sums([_squares(array, dtype) for array in arrays])
    out_of_range = [
        jnp.any((jnp.isinf(total) & exact_above) | (total < floor))
        for total in jax.tree.leaves(totals)
        if exact_below or exact_above
    ]
    if not out_of_range:
        return jax.tree.map(as_float32, direct([], totals))
    norms = jax.lax.cond(
        functools.reduce(operator.or_, out_of_range), rescaled, direct, arrays, totals
    )
    return jax.tree.map(as_float32, norms)


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf has a norm: not so for integers, float0 and random keys."""
    return bool(jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact))


def as_float32(value: Any) -> Float32[Array, "..."]:
    """A number or array as float32, whatever it was: also under strict dtype promotion."""
    return jnp.asarray(value).astype(jnp.float32)


def working_dtype(dtype: Any) -> Any:
    """Where values of `dtype` are computed: float32 for narrower types, else the type itself."""
    # By size, because promote_types knows no result for the 8-bit types.
    return dtype if jnp.dtype(dtype).itemsize > 4 else jnp.dtype(jnp.float32)


def _is_double(array: Array) -> bool:
    return jnp.finfo(array.dtype).bits == 64


def _squares(
    array: Inexact[Array, "..."], dtype: Any, scale: Float[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """The squared magnitude of each element of `array`, times `scale` squared if given."""
    is_complex = jnp.issubdtype(array.dtype, jnp.complexfloating)
    parts = (array.real, array.imag) if is_complex else (array,)
    lifted = [part.astype(dtype) for part in parts]
    if scale is not None:
        lifted = [part * scale for part in lifted]
    return functools.reduce(operator.add, [jnp.square(part) for part in lifted])


def safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Square root whose derivative at 0 is 0 and not infinite."""
    zero = x == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))
