"""Norms that a wrapper has computed already, for the clippers inside it.

A wrapper announces the norm that it knows while it calls its inner transformation:

    with known_norm(arrays, norm, axis_name):
        inner.update(...)  # `group_norms` of these very arrays, as one group, is `norm`
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

from jaxtyping import Array, Float, Inexact

from optax_smartclip.engine.meshes import AxisName, axis_names
from optax_smartclip.engine.partitions import Partition, one_group


class _KnownNorm(NamedTuple):
    arrays: list[Array]
    norm: Float[Array, ""]
    names: tuple[str, ...]


_known: contextvars.ContextVar[_KnownNorm | None] = contextvars.ContextVar("known", default=None)


@contextlib.contextmanager
def known_norm(
    arrays: list[Inexact[Array, "..."]], norm: Float[Array, ""], axis_name: AxisName
) -> Iterator[None]:
    """While it lasts, the norm of all of these very arrays, as one group, is `norm`.

    Clippers find it by the identity of the arrays, so whatever else they measure (other leaves, a
    gradient that a link before them has changed) is measured as always, however deep in a chain
    they are.
    """
    token = _known.set(_KnownNorm(arrays, norm, axis_names(axis_name)))
    try:
        yield
    finally:
        _known.reset(token)


def find_known_norm(
    arrays: list[Inexact[Array, "..."]], partition: Partition, names: tuple[str, ...]
) -> Float[Array, ""] | None:
    """The norm of these arrays, summed over these mapped axes, if it is known."""
    known = _known.get()
    if known is None or names != known.names or partition != one_group(len(known.arrays)):
        return None
    same = all(one is other for one, other in zip(arrays, known.arrays, strict=True))
    return known.norm if same else None
