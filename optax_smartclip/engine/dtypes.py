"""Types of numbers: which leaves have a norm, and in which type it is computed."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf has a norm: not so for integers, float0 and random keys."""
    return bool(jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact))


def as_float32(value: Any) -> Float32[Array, "..."]:
    """A number or array as float32, whatever it was: also under strict dtype promotion."""
    return jnp.asarray(value).astype(jnp.float32)


def working_dtype(dtype: Any) -> Any:
    """Where values of `dtype` are computed: float32 for narrower types, else the type itself."""
    # By size, because promote_types knows no result for the 8-bit types.
    return max(jnp.dtype(jnp.float32), jnp.dtype(dtype), key=lambda each: each.itemsize)
