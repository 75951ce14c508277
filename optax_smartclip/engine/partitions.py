"""Partitions: how the elements of a list of arrays fall into groups that share one norm.

Norms and scaling need two operations, and do not know which kind of partition serves them:

    partition.group_sums(terms)    sums the elements of each group   arrays -> group values
    partition.per_array(values)    gives each array its values back  group values -> arrays

Group values are `[groups]` for whole leaves and slices of leaves (`Leaves`), and one array for
each leaf that has several units (`Units`). A partition is a frozen dataclass of tuples: equal ones
hash equal, so a compiled function can take one as a static argument.
"""

import abc
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from optax_smartclip.engine.meshes import replicate

# `[groups]`, or a list of arrays that `per_array` knows how to distribute.
GroupValues = Any

# Arrays of one shape that are summed in one reading.
Terms = tuple[Float[Array, "..."], ...]


class Partition(abc.ABC):
    """The groups of a list of arrays, as norms and scaling need them.

    Attributes:
        has_scaled_sums: Whether a group is large enough for sums that neither overflow nor lose
            small squares: they are taken for all groups or for none.
    """

    has_scaled_sums: ClassVar[bool] = True

    @abc.abstractmethod
    def group_sums(self, terms: list[Terms]) -> list[GroupValues]:
        """Sums each group.

        Args:
            terms: For each array, one or several arrays of its shape: as many for all of them.

        Returns:
            The sums over the groups of the first terms, of the second ones, and so on.
        """

    @abc.abstractmethod
    def per_array(self, values: GroupValues) -> list[Array]:
        """Returns for each array what broadcasts against it: the values of its groups."""


class Stack(NamedTuple):
    """The axes of an array that count slices, each of which is in a group of its own.

    Attributes:
        axes: In the order in which their indices number the groups; none for a whole array.
        shape: The shape of the array, if it is stacked.
    """

    axes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """How long the axes are."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def within(self) -> tuple[int, ...]:
        """The other axes: those of a slice."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.axes)

    def slice_sum(self, array: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum of each slice, `[slices]`; a scalar for a whole array."""
        if not self.axes:
            return jnp.sum(array)
        sums = jnp.sum(array, axis=self.within)
        # The axes that are left are in the array's order.
        places = [sorted(self.axes).index(axis) for axis in self.axes]
        return replicate(jnp.transpose(sums, places)).reshape(-1)

    def expand(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """A value for each slice, as `slice_sum` has them, in a shape that broadcasts."""
        if not self.axes:
            return values
        places = [self.axes.index(axis) for axis in sorted(self.axes)]
        return jnp.expand_dims(jnp.transpose(values.reshape(self.sizes), places), self.within)

    def within_parts(self, shape: tuple[int, ...], axis: int) -> "Stack":
        """The stack of an array of this shape that holds parts along an axis, each sliced so."""
        axis %= len(shape)
        return Stack((axis, *(each + (each >= axis) for each in self.axes)), shape)


WHOLE = Stack()


@dataclasses.dataclass(frozen=True)
class Leaves(Partition):
    """Groups of whole arrays, or of slices of arrays: those of equal index are together.

    Attributes:
        group: The number of the group of each array, or of the first of its slices. Arrays with
            the same number have the same slices.
        num_groups: How many groups there are. Some may have no array.
        stacks: How each array is sliced; by default all of them are whole.
    """

    group: tuple[int, ...]
    num_groups: int
    stacks: tuple[Stack, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stacks", self.stacks or (WHOLE,) * len(self.group))

    def _runs(self) -> list[tuple[int, int]]:
        """Where each run of groups that are summed together starts, and how long it is."""
        sizes = (math.prod(stack.sizes) for stack in self.stacks)
        return sorted(dict(zip(self.group, sizes, strict=True)).items())

    def group_sums(self, terms: list[Terms]) -> list[Float[Array, " groups"]]:
        """Sums each group, in a fixed order of additions."""
        # By pairs: this fixes the order also on a GPU, so that a resumed run repeats every bit.
        # Stacking thousands of them first would compile slowly.
        sums = [
            tuple(stack.slice_sum(term) for term in arrays)
            for arrays, stack in zip(terms, self.stacks, strict=True)
        ]
        runs = self._runs()
        members: dict[int, list[int]] = {first: [] for first, _ in runs}
        for position, first in enumerate(self.group):
            members[first].append(position)

        def add(numbers: tuple[Float[Array, "..."], ...]) -> Float[Array, " groups"]:
            dtype = numbers[0].dtype if numbers else jnp.float32
            pieces, end = [], 0
            for first, size in runs:
                total = _add_by_pairs([numbers[i] for i in members[first]])
                pieces += [jnp.zeros(first - end, dtype), total.reshape(-1)]
                end = first + size
            pieces.append(jnp.zeros(self.num_groups - end, dtype))
            return jnp.concatenate([piece for piece in pieces if piece.size] or pieces)

        return [add(numbers) for numbers in zip(*sums, strict=True)] or [add(())]

    def within_parts(self, shapes: list[tuple[int, ...]], axis: int) -> "Leaves":
        """The groups of every part, of arrays of these shapes that hold parts along an axis.

        `by_part` has their values by part and group.
        """
        parts = num_parts(shapes, axis)
        pairs = zip(self.stacks, shapes, strict=True)
        stacks = tuple(stack.within_parts(shape, axis) for stack, shape in pairs)
        return Leaves(tuple(parts * first for first in self.group), parts * self.num_groups, stacks)

    def by_part(self, parts: int) -> Int32[np.ndarray, "parts groups"]:
        """Where `within_parts` has the value of a group in a part."""
        places = np.add.outer(np.arange(parts), parts * np.arange(self.num_groups))
        for first, size in self._runs():
            of_run = parts * first + np.arange(parts * size).reshape(parts, size)
            places[:, first : first + size] = of_run
        return places.astype(np.int32)

    def per_array(self, values: Float[Array, " groups"]) -> list[Float[Array, "..."]]:
        """Returns a scalar for each whole array, and a value for each slice of the others."""
        runs = self._runs()
        parts = zip(runs, take_apart(values, tuple(runs)), strict=True)
        of_run = {first: part for (first, _), part in parts}
        return [
            stack.expand(of_run[first])
            for first, stack in zip(self.group, self.stacks, strict=True)
        ]


def num_parts(shapes: list[tuple[int, ...]], axis: int) -> int:
    """How many parts arrays of these shapes hold along an axis."""
    return shapes[0][axis] if shapes else 1


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

    # They would cost more than all the rest of a clipper.
    has_scaled_sums = False

    axes: tuple[tuple[int, ...] | None, ...]

    def group_sums(self, terms: list[Terms]) -> list[list[Array]]:
        """Sums each unit."""
        sums = [
            tuple(_unit_sums(term, axes) for term in arrays)
            for arrays, axes in zip(terms, self.axes, strict=True)
        ]
        return [self._gather(list(each)) for each in zip(*sums, strict=True)] or [[]]

    def _gather(self, sums: list[Array]) -> list[Array]:
        pairs = list(zip(sums, self.axes, strict=True))
        single = [unit for unit, axes in pairs if axes is None]
        several = [units for units, axes in pairs if axes is not None]
        return ([jnp.stack(single)] if single else []) + several

    def per_array(self, values: list[Array]) -> list[Array]:
        """Returns for each array its units, or a scalar if it is one."""
        num_single = self.axes.count(None)
        places = tuple((place, 1) for place in range(num_single))
        single = iter(take_apart(values[0], places) if num_single else ())
        several = iter(values[1:] if num_single else values)
        return [next(single if axes is None else several) for axes in self.axes]


def _unit_sums(array: Float[Array, "..."], axes: tuple[int, ...] | None) -> Float[Array, "..."]:
    """Sums over `axes`, which are kept with size 1; the sum of all elements for None.

    Dropping the axes and broadcasting later would lose the sharding of an array on a mesh with
    explicit axes.
    """
    return jnp.sum(array, axis=axes, keepdims=axes is not None)


def _add_by_pairs(terms: list[Float[Array, "..."]]) -> Float[Array, "..."]:
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(terms) // 2 * 2 :]
    return terms[0]


@functools.partial(jax.jit, static_argnums=1)
def take_apart(
    values: Float[Array, " n"], runs: tuple[tuple[int, int], ...]
) -> tuple[Float[Array, "..."], ...]:
    """Parts of the values, each as an array of its own.

    Args:
        values: The values.
        runs: Where each part starts and how long it is. One of length 1 is a scalar.
    """
    parts: tuple[Array, ...] = jax.lax.platform_dependent(
        values,
        cpu=functools.partial(_take_apart_on_cpu, runs=runs),
        default=lambda values: tuple(
            values[start] if size == 1 else values[start : start + size] for start, size in runs
        ),
    )
    return parts


def _take_apart_on_cpu(
    values: Float[Array, " n"], runs: tuple[tuple[int, int], ...]
) -> tuple[Float[Array, "..."], ...]:
    """Slices that XLA's CPU compiler does not fuse.

    It fuses a slice, and everything that produces it, into each loop that uses it: no two leaves
    of one shape share a program then, and thousands of leaves take minutes to compile. It does not
    fuse across a conditional, so the slices are inside one; where nothing is clipped, all are the
    same.
    """

    # Places that are data, chosen by a zero that the compiler does not know, make one program for
    # all slices of a size: n * (n + 1) is even, whatever the bits of the first value are.
    def pick(values: Array, start: int, size: int) -> Array:
        bits = jax.lax.bitcast_convert_type(values[0].astype(jnp.float32), jnp.int32)
        zero = (bits * (bits + 1)) & 1
        place = jnp.asarray(np.array([start, 0], np.int32))[zero]
        if size == 1:
            return values[place]
        return jax.lax.dynamic_slice(values, (place,), (size,))

    parts: tuple[Array, ...] = jax.lax.cond(
        jnp.any(values != 1.0),
        lambda values: tuple(pick(values, start, size) for start, size in runs),
        lambda values: tuple(
            values[0] if size == 1 else jnp.broadcast_to(values[0], (size,)) for _, size in runs
        ),
        values,
    )
    return parts
