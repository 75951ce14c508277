"""Euclidean norms of groups of elements, right for every finite gradient.

The sum of squares is taken in float32 (float64 where a leaf is float64) whatever the dtype of the
leaves, in one read. Only when a sum overflows, or is so small that squares may have been flushed
to zero, is the gradient read once more, scaled by a power of two that brings its squares back
into range:

    norm = sqrt(sum((f * x) ** 2)) / f        with f = 2 ** -70, or 2 ** 70, in float32

A power of two rounds nothing, so the second reading is as exact as the first would have been.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    return _by_leaf(tuple(index), num_groups)


# One object for each partition, by which eager steps find the program that they have compiled.
@functools.lru_cache(maxsize=64)
def _by_leaf(index: tuple[int, ...], num_groups: int) -> Partition:
    members: list[list[int]] = [[] for _ in range(num_groups)]
    for position, group in enumerate(index):
        members[group].append(position)

    def total(arrays: list[Array]) -> Float[Array, " groups"]:
        sums = [jnp.sum(array) for array in arrays]
        zero = jnp.zeros((), sums[0].dtype if sums else jnp.float32)

        # By pairs: this fixes the order of the additions, also on a GPU, so that a resumed run
        # repeats every bit. Of thousands that are stacked, XLA would make one slow-to-compile loop.
        def add(group: list[int]) -> Float[Array, ""]:
            terms = [sums[position] for position in group] or [zero]
            while len(terms) > 1:
                pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
                terms = pairs + terms[len(terms) // 2 * 2 :]
            return terms[0]

        return jnp.stack([add(group) for group in members]) if members else zero[None][:0]

    def spread(values: Float32[Array, " groups"]) -> list[Array]:
        scalars = _apart(values)
        return [scalars[group] for group in index]

    return Partition(total, spread)


@jax.jit
def _apart(values: Float32[Array, " groups"]) -> tuple[Float32[Array, ""], ...]:
    """The values, each as an array of its own.

    Of a slice, XLA's CPU compiler makes a part of every loop that it is used in, with the whole
    way to the values: no two leaves of one shape share a program then, and thousands of leaves
    take minutes to compile. It does not look behind a branch, so the slices are behind one; where
    nothing is clipped, all are the same.
    """
    num = values.shape[0]

    # Places that are data, chosen by a zero that the compiler does not know, make one program for
    # all slices: n * (n + 1) is even, whatever the bits of the first value are.
    def pick(values: Array, place: int) -> Array:
        bits = jax.lax.bitcast_convert_type(values[0], jnp.int32)
        zero = (bits * (bits + 1)) & 1
        return values[jnp.asarray(np.array([place, -1], np.int32))[zero]]

    scalars: tuple[Array, ...] = jax.lax.cond(
        jnp.any(values != 1.0),
        lambda values: tuple(pick(values, place) for place in range(num)),
        lambda values: tuple(values[0] for _ in range(num)),
        values,
    )
    return scalars


def by_unit(axes: Sequence[tuple[int, ...]]) -> Partition:
    """Groups within arrays: array `i` is summed over `axes[i]`, and what remains are its units."""
    return _by_unit(tuple(axes))


@functools.lru_cache(maxsize=64)
def _by_unit(axes: tuple[tuple[int, ...], ...]) -> Partition:
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
    if isinstance(axis_name, Sequence) and not isinstance(axis_name, str):
        axis_name = tuple(axis_name)
    return _compiled_group_norms(partition, axis_name, exact_below, exact_above, arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _group_norms(
    partition: Partition,
    axis_name: AxisName,
    exact_below: bool,
    exact_above: bool,
    arrays: list[Inexact[Array, "..."]],
) -> GroupValues:
    dtype = _accumulator(arrays)

    def read(factor: Array | None = None) -> GroupValues:
        totals = partition.total([_squares(array, dtype, factor) for array in arrays])
        return jax.tree.map(safe_sqrt, _sum_over(totals, axis_name))

    norms = read()
    if exact_below or exact_above:
        norms = _read_again(read, norms, dtype, exact_below, exact_above)
    return jax.tree.map(as_float32, norms)


def _read_again(
    read: Callable[[Array], GroupValues],
    norms: GroupValues,
    dtype: Any,
    exact_below: bool,
    exact_above: bool,
) -> GroupValues:
    """The norms, those whose squares were out of range from a second reading, if there are any.

    A loop of no rounds, in most steps: one body serves norms that are too small, in the first
    round, and too large, in the second. And what uses the norms is compiled without the sums, which
    XLA would otherwise add up again in each place.
    """
    finfo = jnp.finfo(dtype)
    # Half of the exponents, and 6 more as room for the sum over many elements.
    factor = 2.0 ** (finfo.maxexp // 2 + 6)
    # 2 ** 40 elements may each lose a square just below `tiny`: from here on, all of them
    # together are less than the rounding of the sum.
    floor = math.sqrt(float(finfo.tiny) * 2.0**64)

    def is_wanted(carry: tuple[Array, GroupValues]) -> Array:
        number, norms = carry
        found = jnp.zeros((), bool)
        for norm in jax.tree.leaves(norms):
            if exact_below:
                found |= (number == 0) & jnp.any(norm < floor)
            if exact_above:
                found |= (number <= 1) & jnp.any(jnp.isinf(norm))
        return found

    def again(carry: tuple[Array, GroupValues]) -> tuple[Array, GroupValues]:
        number, norms = carry
        first = number == 0
        # The same for all groups, as factors that differ would make each leaf's loop a program of
        # its own; and not a constant, which the compiler would square, and overflow.
        by = jnp.where(first, factor, 1 / factor).astype(dtype)
        new = jax.tree.map(
            lambda norm, scaled: jnp.where(
                jnp.where(first, norm < floor, jnp.isinf(norm)), scaled / by, norm
            ),
            norms,
            read(by),
        )
        return number + 1, new

    start = jnp.asarray(0 if exact_below else 1, jnp.int32)
    _, norms = jax.lax.while_loop(is_wanted, again, (start, norms))
    return norms


# The sum of (x / norm) * dx, in which no square overflows or is lost, and no root is taken of 0.
@_group_norms.defjvp
def _group_norms_jvp(
    partition: Partition,
    axis_name: AxisName,
    exact_below: bool,
    exact_above: bool,
    primals: tuple[list[Array]],
    tangents: tuple[list[Array]],
) -> tuple[GroupValues, GroupValues]:
    (arrays,), (changes,) = primals, tangents
    dtype = _accumulator(arrays)
    norms = _group_norms(partition, axis_name, exact_below, exact_above, arrays)

    def product(array: Array, norm: Array, change: Array) -> Array:
        known = jnp.isfinite(norm) & (norm > 0)
        divisor = jnp.where(known, norm, 1.0).astype(dtype)
        pairs = zip(_parts(array), _parts(change), strict=True)
        terms = [
            jnp.where(known, x.astype(dtype), 0.0) / divisor * dx.astype(dtype) for x, dx in pairs
        ]
        return functools.reduce(operator.add, terms)

    products = [
        product(*values) for values in zip(arrays, partition.spread(norms), changes, strict=True)
    ]
    return norms, jax.tree.map(as_float32, _sum_over(partition.total(products), axis_name))


# Eager steps would otherwise trace the loop that reads again anew each time.
_compiled_group_norms = jax.jit(_group_norms, static_argnums=(0, 1, 2, 3))


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


def _accumulator(arrays: list[Array]) -> Any:
    """The dtype in which squares are summed."""
    is_double = any(jnp.finfo(array.dtype).bits == 64 for array in arrays)
    return jnp.float64 if is_double else jnp.float32


def _sum_over(totals: GroupValues, axis_name: AxisName) -> GroupValues:
    return totals if axis_name is None else jax.lax.psum(totals, axis_name)


def _parts(array: Inexact[Array, "..."]) -> tuple[Float[Array, "..."], ...]:
    """Real and imaginary part, or the array itself."""
    is_complex = jnp.issubdtype(array.dtype, jnp.complexfloating)
    return (array.real, array.imag) if is_complex else (array,)


def _squares(
    array: Inexact[Array, "..."], dtype: Any, scale: Float[Array, ""] | None = None
) -> Float[Array, "..."]:
    """The squared magnitude of each element of `array`, times `scale` squared if given."""
    lifted = [part.astype(dtype) for part in _parts(array)]
    if scale is not None:
        lifted = [part * scale for part in lifted]
    return functools.reduce(operator.add, [jnp.square(part) for part in lifted])


def safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Square root whose derivative at 0 is 0 and not infinite."""
    zero = x == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))
