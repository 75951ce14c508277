"""The arguments of one call, split into array and non-array leaves."""

import copy
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ARRAYS = (jax.Array, np.ndarray, np.generic)


class Call:
    """The arguments of one call.

    Attributes:
        arrays: The leaves that are traced: arrays, and all that is differentiated.
        wanted: The indices of those of them that are differentiated.
        in_range: Whether the arguments that are to be differentiated exist.
    """

    def __init__(
        self, argnums: int | Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._single = not isinstance(argnums, Sequence)
        places = argnums if isinstance(argnums, Sequence) else (argnums,)
        self.in_range = all(-len(args) <= operator.index(place) < len(args) for place in places)
        self._argnums = [place % max(len(args), 1) for place in places]
        leaves, self._tree = jax.tree.flatten((args, kwargs))
        chosen = [
            place in self._argnums for place, arg in enumerate(args) for _ in jax.tree.leaves(arg)
        ]
        chosen += [False] * len(jax.tree.leaves(kwargs))
        self._traced = [
            wanted or isinstance(leaf, _ARRAYS) for leaf, wanted in zip(leaves, chosen, strict=True)
        ]
        self.arrays = [leaf for leaf, traced in zip(leaves, self._traced, strict=True) if traced]
        self._rest = [leaf for leaf, traced in zip(leaves, self._traced, strict=True) if not traced]
        marks = (wanted for wanted, traced in zip(chosen, self._traced, strict=True) if traced)
        self.wanted = [index for index, wanted in enumerate(marks) if wanted]

    def can_differentiate(self) -> bool:
        """Returns whether the chosen arguments exist and are real."""
        return self.in_range and all(
            isinstance(self.arrays[index], (*_ARRAYS, float))
            and jnp.issubdtype(jax.dtypes.result_type(self.arrays[index]), jnp.floating)
            for index in self.wanted
        )

    def key(self) -> Hashable | None:
        """Returns the same for all calls that run the same program; None if that is not known."""
        avals = tuple(jax.typeof(leaf) for leaf in self.arrays)
        rest = tuple((type(leaf), leaf) for leaf in self._rest)
        key = (self._tree, avals, tuple(self._traced), rest)
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def without_arrays(self) -> "Call":
        """Returns the call without its arrays, for `unflatten` with other arrays."""
        call = copy.copy(self)
        call.arrays = [None] * len(self.arrays)
        return call

    def unflatten(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns positional and keyword arguments with these arrays."""
        traced, rest = iter(arrays), iter(self._rest)
        leaves = [next(traced if is_traced else rest) for is_traced in self._traced]
        args, kwargs = jax.tree.unflatten(self._tree, leaves)
        return args, kwargs

    def as_arguments(self, grads: Sequence[Any]) -> Any:
        """Returns the gradients in the shape of the chosen arguments."""
        filled: list[Any] = [None] * len(self.arrays)
        for index, grad in zip(self.wanted, grads, strict=True):
            filled[index] = grad
        args, _ = self.unflatten(filled)
        return args[self._argnums[0]] if self._single else tuple(args[i] for i in self._argnums)
