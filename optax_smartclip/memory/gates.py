"""Delays part of a program until given values are available.

Rematerialization depends on this. XLA may otherwise recompute a block long before its turn, or find
that it was computed before and keep it. `jax.checkpoint` puts an optimization barrier there, which
XLA drops on a CPU, and no memory is saved.

So on a CPU the part is a branch of a conditional, whose condition reads the values to wait for. It
is always true, but no compiler knows. XLA on a CPU runs convolutions in a branch many times
slower: a part with one gets its inputs by a selection on the same condition instead. On other
platforms, where a conditional costs a round trip to the host, a barrier holds the inputs and the
values to wait for together. The program contains both until it is lowered for a platform, which
need not be the one on which it is traced.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float32, Int32, Shaped

Tree = Any


def run_after(
    known: Sequence[Shaped[Array, "..."]],
    part: Callable[[Tree, Tree], Tree],
    late: Tree,
    other: Tree,
    *,
    finished: Sequence[Shaped[Array, "..."]] = (),
    never: Callable[[Tree, Tree], Tree],
    convolves: bool = False,
) -> Tree:
    """Returns `part(late, other)`, which runs when `known` is known.

    Args:
        known: The values to wait for, real or complex.
        part: What to run: a function of two trees of arrays.
        late: Its inputs that may be known long before.
        other: Its other inputs.
        finished: What a barrier waits for as well: results of an earlier part, which a conditional
            has all at once and a barrier one by one.
        never: Returns any values of the types that `part` returns; a branch that is not taken.
        convolves: Whether `part` contains convolutions.
    """
    # Both ways trace the part, and the second time finds it in the cache.
    part = jax.jit(part, inline=True)

    def after_a_barrier(
        known: Sequence[Any], finished: Sequence[Any], late: Tree, other: Tree
    ) -> Tree:
        return part(*_hold((late, other), [*known, *finished]))

    def under_a_condition(known: Sequence[Any], _: Sequence[Any], late: Tree, other: Tree) -> Tree:
        ready = _opaque_true(known)
        if convolves:
            zeros = jax.tree.map(lambda x: jax.lax.full_like(x, 0), late)
            late = jax.tree.map(lambda x, zero: jax.lax.select(ready, x, zero), late, zeros)
            return part(late, other)
        return jax.lax.cond(ready, part, never, late, other)

    return jax.lax.platform_dependent(
        list(known),
        list(finished),
        late,
        other,
        cpu=under_a_condition,
        default=after_a_barrier,
    )


def _hold(values: Tree, known: Sequence[Any]) -> Tree:
    # A barrier gives all that it holds one type under shard_map: a weight that is the same on all
    # devices would come out as one that is not. Each type has a barrier of its own.
    leaves, treedef = jax.tree.flatten(values)
    for kind in dict.fromkeys(map(_manual_type, leaves)):
        places = [i for i, leaf in enumerate(leaves) if _manual_type(leaf) == kind]
        same = [value for value in known if _manual_type(value) == kind]
        held, _ = jax.lax.optimization_barrier(([leaves[i] for i in places], same))
        for i, value in zip(places, held, strict=True):
            leaves[i] = value
    return jax.tree.unflatten(treedef, leaves)


def _manual_type(value: Any) -> Any:
    # Over which axes of a shard_map it varies; the name depends on the version of JAX.
    aval = jax.typeof(value)
    return getattr(aval, "mat", None) or getattr(aval, "vma", None)


def _opaque_true(values: Sequence[Shaped[Array, "..."]]) -> Bool[Array, ""]:
    # n (n + 1) is even, also when it wraps around; NaN and Inf are as good as any number.
    bits = jnp.zeros((), jnp.int32)
    for value in values:
        if value.size:
            number = _one_number(jax.lax.stop_gradient(value))
            bits = bits ^ jax.lax.bitcast_convert_type(number, jnp.int32)
    even: Bool[Array, ""] = _is_even(bits * (bits + 1))
    return even


def _one_number(value: Shaped[Array, "..."]) -> Float32[Array, ""]:
    real = jnp.real(value).astype(jnp.float32)
    # One element of an array that is sharded on an explicit axis cannot be taken.
    if any(axis is not None for axis in jax.typeof(value).sharding.spec):
        return jnp.max(real)
    for axis in range(value.ndim):
        real = jax.lax.slice_in_dim(real, 0, 1, axis=axis)
    return real.reshape(())


@custom_vmap
def _is_even(number: Int32[Array, ""]) -> Bool[Array, ""]:
    return (number & 1) == 0


@_is_even.def_vmap
def _is_even_for_all(
    axis_size: int, batched: list[bool], number: Int32[Array, " batch"]
) -> tuple[Bool[Array, ""], bool]:
    # One answer for the whole batch. With one each, both branches would run.
    return _is_even(number[0]), False
