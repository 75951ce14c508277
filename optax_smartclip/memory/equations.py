"""Sizes, types and work of values and equations, without running them."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def aval_bytes(aval: Any) -> int:
    """Returns the bytes of an array with this shape and dtype; 0 for other values."""
    shape, dtype = getattr(aval, "shape", None), getattr(aval, "dtype", None)
    if shape is None or dtype is None:
        return 0
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return int(math.prod(shape)) * 8
    return int(math.prod(shape)) * int(dtype.itemsize)


def is_inexact(aval: Any) -> bool:
    """Returns whether a value of this type can have a derivative."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def eqn_flops(eqn: Any) -> float:
    """Returns an estimate of the floating point operations of an equation."""
    size = float(sum(math.prod(getattr(var.aval, "shape", ())) for var in eqn.outvars))
    params = eqn.params
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * size * float(math.prod(eqn.invars[0].aval.shape[i] for i in contracted))
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * size * float(math.prod(kernel)) / float(features)
    total = sum(eqn_flops(each) for jaxpr in _inner(params) for each in jaxpr.eqns)
    return max(float(size), total * float(params.get("length", 1)))


def contains(jaxpr: core.Jaxpr, primitive: str) -> bool:
    """Returns whether a program or one inside of it has an operation of this name."""
    return any(
        eqn.primitive.name == primitive
        or any(contains(inner, primitive) for inner in _inner(eqn.params))
        for eqn in jaxpr.eqns
    )


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(inner, "jaxpr", inner)
            if isinstance(jaxpr, core.Jaxpr):
                yield jaxpr
