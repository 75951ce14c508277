"""Partitions: how the elements of a list of arrays fall into groups that share one norm.

Norms and scaling need two operations, and do not know which kind of partition serves them:

    partition.total(terms)     sums the elements of each group   arrays -> group values
    partition.spread(values)   gives each array its values back  group values -> arrays

Group values are `[groups]` for whole leaves (`Leaves`), and one array for each leaf that has
several units (`Units`). A partition is a frozen dataclass of tuples: equal ones hash equal, so a
compiled function can take one as a static argument.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

# `[groups]`, or a list of arrays that `spread` knows how to distribute.
GroupValues = Any

# Arrays of one shape that are summed in one reading.
Terms = tuple[Float[Array, "..."], ...]


class Partition(abc.ABC):
    """What norms and scaling need to know of the groups of a list of arrays."""

    @abc.abstractmethod
    def total(self, terms: list[Terms]) -> list[GroupValues]:
        """Sums each group.

        Args:
            terms: For each array, one or several arrays of its shape: as many for all of them.

        Returns:
            The sums over the groups of the first terms, of the second ones, and so on.
        """

    @abc.abstractmethod
    def spread(self, values: GroupValues) -> list[Array]:
        """Returns for each array what broadcasts against it: the values of its groups."""


@dataclasses.dataclass(frozen=True)
class Leaves(Partition):
    """Groups of whole arrays.

    Attributes:
        group: The number of the group of each array.
        num_groups: How many groups there are. Some may have no array.
    """

    group: tuple[int, ...]
    num_groups: int

    def total(self, terms: list[Terms]) -> list[Float[Array, " groups"]]:
        """Sums each group, in a fixed order of additions."""
        # By pairs: this fixes the order also on a GPU, so that a resumed run repeats every bit.
        # Stacking thousands of them first would compile slowly.
        sums = [sum_together(arrays, None) for arrays in terms]
        members: list[list[int]] = [[] for _ in range(self.num_groups)]
        for position, group in enumerate(self.group):
            members[group].append(position)

        def add(numbers: tuple[Float[Array, ""], ...]) -> Float[Array, " groups"]:
            zero = jnp.zeros((), numbers[0].dtype if numbers else jnp.float32)
            totals = [_add_by_pairs([numbers[i] for i in group] or [zero]) for group in members]
            return jnp.stack(totals) if totals else zero[None][:0]

        return [add(numbers) for numbers in zip(*sums, strict=True)] or [add(())]

    def spread(self, values: Float[Array, " groups"]) -> list[Float[Array, ""]]:
        """Returns a scalar for each array."""
        scalars = take_apart(values)
        return [scalars[group] for group in self.group]


def one_group(num_arrays: int) -> Leaves:
    """All arrays are one group."""
    return Leaves((0,) * num_arrays, 1)


@dataclasses.dataclass(frozen=True)
class Units(Partition):
    """Groups within arrays, each of which is summed over some of its axes.

    Group values are a list: first the arrays that are one unit each, stacked, then an array for
    each of the others, with axes of size 1 where it was summed.

    Attributes:
        axes: For each array the axes that are summed; None if it is one unit.
    """

    axes: tuple[tuple[int, ...] | None, ...]

    def total(self, terms: list[Terms]) -> list[list[Array]]:
        """Sums each unit."""
        sums = [sum_together(*pair) for pair in zip(terms, self.axes, strict=True)]
        return [self._gather(list(each)) for each in zip(*sums, strict=True)] or [[]]

    def _gather(self, sums: list[Array]) -> list[Array]:
        pairs = list(zip(sums, self.axes, strict=True))
        single = [unit for unit, axes in pairs if axes is None]
        several = [units for units, axes in pairs if axes is not None]
        return ([jnp.stack(single)] if single else []) + several

    def spread(self, values: list[Array]) -> list[Array]:
        """Returns for each array its units, or a scalar if it is one."""
        has_single = None in self.axes
        single = iter(take_apart(values[0]) if has_single else ())
        several = iter(values[1:] if has_single else values)
        return [next(single if axes is None else several) for axes in self.axes]


def sum_together(terms: Terms, axes: tuple[int, ...] | None) -> tuple[Array, ...]:
    """Sums each of several arrays of one shape.

    XLA's compilers for GPUs and TPUs fuse the sums into one reading of what the arrays are computed
    from. (One reduction of all of them would be split over devices by gathering partial sums.)

    Args:
        terms: Arrays of one shape.
        axes: The axes to sum over, which are kept with size 1; None for the sum of all elements.

    Returns:
        The sums. Dropping the axes and broadcasting later would lose the sharding of an array on
        a mesh with explicit axes.
    """
    return tuple(jnp.sum(term, axis=axes, keepdims=axes is not None) for term in terms)


def _add_by_pairs(terms: list[Float[Array, ""]]) -> Float[Array, ""]:
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(terms) // 2 * 2 :]
    return terms[0]


@jax.jit
def take_apart(values: Float[Array, " n"]) -> tuple[Float[Array, ""], ...]:
    """The values, each as an array of its own."""
    scalars: tuple[Array, ...] = jax.lax.platform_dependent(
        values, cpu=_take_apart_on_cpu, default=tuple
    )
    return scalars


def _take_apart_on_cpu(values: Float32[Array, " n"]) -> tuple[Float32[Array, ""], ...]:
    """Slices that XLA's CPU compiler does not fuse.

    It fuses a slice, and everything that produces it, into each loop that uses it: no two leaves
    of one shape share a program then, and thousands of leaves take minutes to compile. It does not
    fuse across a conditional, so the slices are inside one; where nothing is clipped, all are the
    same.
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
