"""Runs a part of a program not before other values are known.

This is what recomputation stands on: XLA may otherwise compute a block anew long before its turn,
or find that it was computed before and keep it. `jax.checkpoint` puts an optimization barrier
there, which XLA drops on a CPU, and no memory is saved.

So on a CPU the part is a branch of a conditional, whose condition reads the values to wait for. It
is always true, but no compiler knows. XLA on a CPU runs convolutions in a branch many times
slower: a part with one gets its inputs by a selection on the same condition instead. On other
platforms, where a conditional costs a round trip to the host, a barrier holds the inputs and the
values to wait for together.
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
    never: Callable[[Tree, Tree], Tree],
    convolves: bool = False,
) -> Tree:
    """Returns `part(late, other)`, which runs when `known` is known.

    Args:
        known: The values to wait for, real or complex.
        part: What to run: a function of two trees of arrays.
        late: Its inputs that may be known long before.
        other: Its other inputs.
        never: Returns any values of the types that `part` returns; a branch that is not taken.
        convolves: Whether `part` contains convolutions.
    """
    if jax.default_backend() != "cpu":
        (late, other), _ = jax.lax.optimization_barrier(((late, other), list(known)))
        return part(late, other)
    ready = _opaque_true(known)
    if convolves:
        zeros = jax.tree.map(lambda x: jax.lax.full_like(x, 0), late)
        return part(
            jax.tree.map(lambda x, zero: jax.lax.select(ready, x, zero), late, zeros), other
        )
    return jax.lax.cond(ready, part, never, late, other)


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
