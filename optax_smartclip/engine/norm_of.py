"""`norm_of`: the norms of another tree than the gradient, such as the gradient times weights."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import is_inexact
from optax_smartclip.engine.trees import KeyPath, PyTree, flatten, path_name

# The tree whose norms are taken, from the gradient and the parameters; None for the gradient. Any,
# because a wrong type is refused with a message.
NormOf = Callable[[PyTree, PyTree], PyTree] | Any


def check_norm_of(norm_of: Any) -> None:
    """Raises ValueError unless it is a function or None."""
    if norm_of is not None and not callable(norm_of):
        raise ValueError(
            "`norm_of` must be a function of the gradient and the parameters, or None, "
            f"got {norm_of!r}.{checks.static_hint(norm_of)}"
        )


def measured_arrays(
    norm_of: NormOf, updates: PyTree, params: PyTree | None, leaves: dict[KeyPath, Array]
) -> list[Array]:
    """The arrays whose norms are taken, one for each of the leaves."""
    if norm_of is None:
        return list(leaves.values())
    if params is None:
        raise ValueError(
            "`params` must be passed to `update`, because `norm_of` is a function of them."
        )
    measured = flatten(norm_of(updates, params))
    for path, leaf in leaves.items():
        found: Any = measured.get(path)
        if not is_inexact(found) or jnp.shape(found) != leaf.shape:
            kind = "nothing" if found is None else f"{jnp.result_type(found)}{jnp.shape(found)}"
            raise ValueError(
                "`norm_of` must return a tree of floats with the structure and shapes of the "
                f"gradient, whose leaf {path_name(path)!r} has the shape {leaf.shape}, got {kind}."
            )
    return [jnp.asarray(measured[path]) for path in leaves]
