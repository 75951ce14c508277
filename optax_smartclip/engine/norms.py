"""Euclidean norms of groups of elements, right for every finite gradient.

The sum of squares is taken in float32 (float64 where a leaf is float64) whatever the dtype of the
leaves, in one reading. Where it overflows, or is so small that squares may have been flushed to
zero, the norm comes from a sum that is scaled by a power of two, which rounds nothing:

    norm = sqrt(sum((f * x) ** 2)) / f        with f = 2 ** 70, or 2 ** -70, in float32

A GPU or TPU adds up all three sums while it reads the gradient once: that is arithmetic, which it
has to spare, and a loop or conditional might make it wait for the host. On a CPU three sums take
two to four times as long as one, and a loop costs nothing: there the scaled sums are a second
reading, in the rare step that needs them. The choice is made when a program is lowered.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Inexact

from optax_smartclip.engine.dtypes import as_float32
from optax_smartclip.engine.known_norms import find_known_norm
from optax_smartclip.engine.meshes import AxisName, SumOverDevices, axis_names
from optax_smartclip.engine.partitions import GroupValues, Partition, Terms

Norms = Float32[Array, " groups"]
Mask = Bool[Array, " groups"]

# Stands for an infinite threshold, and for a norm that is NaN or Inf. It is finite because
# Inf - Inf is NaN, and because debuggers search states for Inf and NaN.
LARGEST = float(jnp.finfo(jnp.float32).max)
# The largest norm in a record.
LARGEST_NORM = float(np.nextafter(np.float32(LARGEST), np.float32(-np.inf)))

# A history holds norms in float64 between these as they are, and others as the nearer bound. A few
# times the larger bound is still a float32, so that means and spreads are finite.
LEARNABLE = float(jnp.finfo(jnp.float32).tiny), 2.0**126


def group_norms(
    arrays: list[Inexact[Array, "..."]], partition: Partition, *, axis_name: AxisName = None
) -> GroupValues:
    """The Euclidean norm of each group: in float32, or in float64 if an array is float64.

    A norm in float64 is rounded to what a float32 can hold, if it can, because it is compared with
    thresholds that were learned in float32: a constant norm is never over itself.

    Args:
        arrays: Floating-point or complex arrays of any dtype and shape.
        partition: How their elements fall into groups.
        axis_name: Mapped axes over which arrays are split; sums are taken across them. An array
            that does not vary along one of them is counted once.

    Returns:
        Norms; NaN or Inf where a group has a NaN or Inf, or where the true norm is beyond
        their type. Elements below the smallest normal number may count as zero. In float32, a
        partition without scaled sums has those of `norms_in_range`.
    """
    is_double = accumulator(arrays) == jnp.float64
    if not arrays or not (partition.has_scaled_sums or is_double):
        return norms_in_range(arrays, partition, axis_name=axis_name)
    names = axis_names(axis_name)
    norm = find_known_norm(arrays, partition, names)
    if norm is not None:
        return norm[None]
    return _compiled_group_norms(partition, names, arrays)


def norms_in_range(
    arrays: list[Inexact[Array, "..."]], partition: Partition, *, axis_name: AxisName = None
) -> GroupValues:
    """The same norms, if they are between about 5e-10 and 1e19 (in float32): no scaled sums.

    Smaller ones may be too small, zero at the least, and larger ones are infinite.
    """
    (norms,) = _reader(arrays, partition, axis_names(axis_name))([None])
    return norms


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _group_norms(
    partition: Partition, names: tuple[str, ...], arrays: list[Inexact[Array, "..."]]
) -> GroupValues:
    def norms(
        in_range: Callable[[Reader, Any], GroupValues], arrays: list[Inexact[Array, "..."]]
    ) -> GroupValues:
        found = in_range(_reader(arrays, partition, names), accumulator(arrays))
        return jax.tree.map(_rounded, found)

    on_cpu = _read_again if partition.has_scaled_sums else _read_at_three_scales
    return jax.lax.platform_dependent(
        arrays,
        cpu=functools.partial(norms, on_cpu),
        default=functools.partial(norms, _read_at_three_scales),
    )


# Root sums of squares of the groups, for each factor by which elements are multiplied first.
Reader = Callable[[Sequence[Array | None]], list[GroupValues]]


def _reader(
    arrays: list[Inexact[Array, "..."]], partition: Partition, names: tuple[str, ...]
) -> Reader:
    dtype = accumulator(arrays)

    def read(factors: Sequence[Array | None]) -> list[GroupValues]:
        terms = [tuple(_squares(array, dtype, by) for by in factors) for array in arrays]
        totals = _total_over_devices(arrays, terms, partition, names)
        return [jax.tree.map(safe_sqrt, each) for each in totals]

    return read


def _total_over_devices(
    arrays: list[Array], terms: list[Terms], partition: Partition, names: tuple[str, ...]
) -> list[GroupValues]:
    sum_over_devices = SumOverDevices(arrays, names)
    counted = [
        tuple(sum_over_devices.counted_once(number, term) for term in of_array)
        for number, of_array in enumerate(terms)
    ]
    return sum_over_devices(partition.group_sums(counted))


def _range(dtype: Any) -> tuple[float, float]:
    """The factor that brings squares back into range, and the norm below which they are not."""
    finfo = jnp.finfo(dtype)
    # Half the exponent range, plus 6 bits of headroom for the sum.
    factor = 2.0 ** (finfo.maxexp // 2 + 6)
    # 2 ** 40 elements may each lose a square just below `tiny`: from here on, all of them
    # together are less than the rounding of the sum.
    floor = math.sqrt(float(finfo.tiny) * 2.0**64)
    return factor, floor


def _read_at_three_scales(read: Reader, dtype: Any) -> GroupValues:
    factor, floor = _range(dtype)
    # Constants would overflow: the compiler may square them.
    up, down = jax.lax.optimization_barrier(
        (jnp.asarray(factor, dtype), jnp.asarray(1 / factor, dtype))
    )

    def choose(plain: Array, raised: Array, lowered: Array) -> Array:
        large = jnp.where(jnp.isinf(plain), lowered / down, plain)
        return jnp.where(plain < floor, raised / up, large)

    return jax.tree.map(choose, *read([None, up, down]))


def _read_again(read: Reader, dtype: Any) -> GroupValues:
    """The norms, those whose squares were out of range from a second reading.

    Usually runs zero iterations of the loop. One body serves norms that are too small, in the
    first iteration, and too large, in the second. It is a loop because `lax.cond` runs both
    branches under `vmap`, and because what uses the norms is then compiled without the sums, which
    XLA would otherwise add up again in each place.
    """
    factor, floor = _range(dtype)

    def is_wanted(carry: tuple[Array, GroupValues]) -> Array:
        number, norms = carry
        found = jnp.zeros((), bool)
        for norm in jax.tree.leaves(norms):
            found |= (number == 0) & jnp.any(norm < floor)
            found |= (number <= 1) & jnp.any(jnp.isinf(norm))
        return found

    def again(carry: tuple[Array, GroupValues]) -> tuple[Array, GroupValues]:
        number, norms = carry
        first = number == 0
        # The same for all groups, as factors that differ would make each leaf's loop a program of
        # its own; and not a constant, which the compiler would square, and overflow.
        by = jnp.where(first, factor, 1 / factor).astype(dtype)
        (read_again,) = read([by])

        def replace(norm: Array, scaled: Array) -> Array:
            wanted = jnp.where(first, norm < floor, jnp.isinf(norm))
            return _replace_where(wanted, scaled / by, norm)

        return number + 1, jax.tree.map(replace, norms, read_again)

    (norms,) = read([None])
    _, norms = jax.lax.while_loop(is_wanted, again, (jnp.zeros((), jnp.int32), norms))
    return norms


def _replace_where(
    wanted: Bool[Array, " groups"], new: Float[Array, " groups"], old: Float[Array, " groups"]
) -> Float[Array, " groups"]:
    """The same as `jnp.where`, with a scatter.

    Without one, JAX 0.12 compiles a loop over small arrays as one kernel, in which LLVM unrolls
    every leaf's sum: 40 leaves took 37 seconds. XLA expands a scatter to a single place, so there
    is one more place, to which all goes that is not wanted.
    """
    size = old.size
    numbers = np.arange(size + 1, dtype=np.int32)
    places = jnp.where(jnp.pad(wanted, (0, 1)), numbers, np.int32(size))
    return jnp.pad(old, (0, 1)).at[places].set(jnp.pad(new, (0, 1)))[:size]


# The sum of (x / norm) * dx, in which no square overflows or is lost, and no root is taken of 0.
@_group_norms.defjvp
def _group_norms_jvp(
    partition: Partition,
    names: tuple[str, ...],
    primals: tuple[list[Array]],
    tangents: tuple[list[Array]],
) -> tuple[GroupValues, GroupValues]:
    (arrays,), (changes,) = primals, tangents
    dtype = accumulator(arrays)
    norms = _group_norms(partition, names, arrays)

    def product(array: Array, norm: Array, change: Array) -> Array:
        known = jnp.isfinite(norm) & (norm > 0)
        divisor = jnp.where(known, norm, 1.0).astype(dtype)
        pairs = zip(_parts(array), _parts(change), strict=True)
        terms = [
            jnp.where(known, x.astype(dtype), 0.0) / divisor * dx.astype(dtype) for x, dx in pairs
        ]
        return functools.reduce(operator.add, terms)

    products = [
        product(*values) for values in zip(arrays, partition.per_array(norms), changes, strict=True)
    ]
    terms: list[Terms] = [(each,) for each in products]
    (changes,) = _total_over_devices(arrays, terms, partition, names)
    return norms, changes


# Without jit, eager steps would trace it every time.
_compiled_group_norms = jax.jit(_group_norms, static_argnums=(0, 1))


def has_gradient(norms: Float[Array, " *groups"]) -> Bool[Array, " *groups"]:
    """Which groups have a norm from which a rule can learn.

    A zero says nothing about a scale: experts without tokens, frozen layers and heads that are
    trained in turn have it in many steps.
    """
    return jnp.isfinite(norms) & (norms > 0)


def shares(norms: Float[Array, "*steps groups"]) -> Float32[Array, "*steps groups"]:
    """The share of each group in the squared norm of all; 0 if all norms are 0.

    Norms that are not finite share it among themselves.
    """
    finite = jnp.isfinite(norms)
    culprits = jnp.where(finite.all(axis=-1, keepdims=True), norms, jnp.where(finite, 0.0, 1.0))
    # In units of the largest, so that no square overflows and the sum is not lost. Shares do not
    # depend on the unit, whose derivative would overflow.
    largest = jax.lax.stop_gradient(jnp.max(culprits, axis=-1, keepdims=True, initial=0.0))
    squares = jnp.square(culprits / safe_divisor(largest))
    total = jnp.sum(squares, axis=-1, keepdims=True)
    return as_float32(squares / safe_divisor(total))


def _rounded(norms: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    if norms.dtype == jnp.float32:
        return norms
    rounded = as_float32(norms).astype(norms.dtype)
    return jnp.where(jnp.clip(norms, *LEARNABLE) == norms, rounded, norms)


def learnable(norms: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Positive, finite values as a history holds them: float32, whatever their size."""
    return norms if norms.dtype == jnp.float32 else as_float32(jnp.clip(norms, *LEARNABLE))


def accumulator(arrays: list[Array]) -> Any:
    """The dtype in which squares are summed."""
    is_double = any(jnp.finfo(array.dtype).bits == 64 for array in arrays)
    return jnp.float64 if is_double else jnp.float32


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


def safe_divisor(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The positive numbers of `x`, and 1 in place of the others."""
    return jnp.where(x > 0, x, 1.0)


def safe_hypot(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`sqrt(x ** 2 + y ** 2)`, in which no square overflows, with a derivative of 0 at 0.

    The derivative of `jnp.hypot` is NaN at 0 since JAX 0.12, and NaN for small numbers, whose
    squares underflow.
    """
    # The result does not depend on the unit, so no derivative passes through it.
    unit = jax.lax.stop_gradient(safe_divisor(jnp.maximum(jnp.abs(x), jnp.abs(y))))
    return unit * safe_sqrt(jnp.square(x / unit) + jnp.square(y / unit))
