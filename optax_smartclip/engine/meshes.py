"""Arrays on several devices: what JAX knows of how they are split, and sums that respect it.

Inside `shard_map` each device sees its own part. JAX records along which mapped axes a value
varies, and so which arrays are parts and which are whole on every device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from optax_smartclip.engine import checks

T = TypeVar("T")

AxisName = str | Sequence[str] | None


def axis_names(axis_name: AxisName | Array) -> tuple[str, ...]:
    """The named axes, none for None."""
    if axis_name is None:
        return ()
    if isinstance(axis_name, jax.Array):
        raise ValueError(
            "`axis_name` must be a name of a mapped axis, a sequence of names or None, got "
            f"{axis_name!r}.{checks.static_hint(axis_name)}"
        )
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def varying_axes(array: Any) -> frozenset[Any]:
    """The mapped axes along which a value varies; none where JAX does not follow them."""
    kind = jax.typeof(array)
    # JAX 0.9 and older have `vma`.
    manual = getattr(kind, "manual_axis_type", None)
    axes = getattr(kind, "vma", None) if manual is None else manual.varying
    return frozenset(axes or ())


def is_followed(axis: str) -> bool:
    """Whether JAX follows which values vary along an axis: not under `check_vma=False`."""
    return axis in varying_axes(jax.lax.axis_index(axis))


class SumOverDevices:
    """Sums over the named axes along which some array is split; a whole array counts once.

    Where JAX does not follow what varies, every array counts as split along all of them.
    """

    def __init__(self, arrays: Sequence[Array], names: tuple[str, ...]) -> None:
        varying = [varying_axes(array) for array in arrays]
        followed = {name for name in names if is_followed(name)}
        self._names = tuple(
            name for name in names if name not in followed or any(name in axes for axes in varying)
        )
        self._whole_along = [sorted(followed.intersection(self._names) - axes) for axes in varying]

    def counted_once(self, number: int, term: Array) -> Array:
        """The term of array `number` in a sum: zero on all but one device with the same data."""
        for name in self._whole_along[number]:
            term = jnp.where(jax.lax.axis_index(name) == 0, term, 0)
        return term

    def __call__(self, totals: T) -> T:
        """The sums of totals over the devices."""
        summed: T = jax.lax.psum(totals, self._names) if self._names else totals
        return summed


# JAX 0.8 and older have it under its first name.
_cast_to_varying: Callable[[Any, tuple[Any, ...]], Any] = (
    functools.partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary  # type: ignore[attr-defined]
)


def vary_as(tree: T, like: Any, axis_name: AxisName = None) -> T:
    """Makes arrays vary along all mapped axes along which some array of another tree does.

    A `scan` inside `shard_map` asks that what it carries varies alike before and after a step.

    Args:
        tree: The arrays.
        like: The other tree.
        axis_name: Axes to leave out, because sums are taken over them.
    """
    arrays = [leaf for leaf in jax.tree.leaves(like) if isinstance(leaf, jax.Array)]
    axes = frozenset().union(*map(varying_axes, arrays)) - set(axis_names(axis_name))
    varying: T = jax.tree.map(lambda leaf: _vary_along(leaf, axes), tree) if axes else tree
    return varying


def vary_as_before(new: T, old: T) -> T:
    """Makes each array of a state vary at least along the axes that it varied along before."""
    varying: T = jax.tree.map(
        lambda leaf, before: _vary_along(leaf, varying_axes(before)), new, old
    )
    return varying


def _vary_along(leaf: Any, axes: frozenset[Any]) -> Any:
    missing = tuple(sorted(axes - varying_axes(leaf))) if axes else ()
    return _cast_to_varying(leaf, missing) if missing else leaf


def replicate(array: Array) -> Array:
    """The array, whole on every device of a mesh that `jax.set_mesh` has set."""
    # Inside `shard_map`, an axis that is left to the compiler stays so.
    if set(jax.sharding.get_abstract_mesh().axis_types) == {AxisType.Auto}:
        whole: Array = jax.lax.with_sharding_constraint(array, _nowhere(array))
        return whole
    return gather(array)


def gather(array: Array) -> Array:
    """The array, whole on every device where its type says how it is split: an Explicit mesh."""
    return _reshard(array, _nowhere(array))


def split_as(array: Array, like: Array) -> Array:
    """A whole array, split as another one where that one's type says how it is."""
    return _reshard(array, jax.typeof(like).sharding.spec)


def _nowhere(array: Array) -> PartitionSpec:
    return PartitionSpec(*[None] * array.ndim)


def _reshard(array: Array, spec: PartitionSpec) -> Array:
    sharding = jax.typeof(array).sharding
    if AxisType.Explicit in sharding.mesh.axis_types and sharding.spec != spec:
        resharded: Array = jax.sharding.reshard(array, spec)
        return resharded
    return array
