"""beartype, applied once to a function that is defined many times.

A function inside another one is defined again at each call, tens of thousands of times in a run of
the tests. To check it, jaxtyping gives the type checker a stand-in with its signature and a trivial
body. So one stand-in serves all functions of the same name and signature.
"""

import functools
from types import FunctionType

from beartype import beartype


class Definition:
    """A stand-in. Equal to those that differ in nothing but their defaults, which are unused."""

    def __init__(self, function):
        self.function = function
        self._key = (
            function.__module__,
            function.__qualname__,
            function.__code__,
            tuple(function.__annotations__.items()),
        )

    def __hash__(self):
        return hash(self._key)

    def __eq__(self, other):
        return self._key == other._key


@functools.cache
def _check_definition(definition):
    return beartype(definition.function)


def check(function):
    """Checks arguments and results as beartype does."""
    if isinstance(function, FunctionType) and not function.__closure__:
        return _check_definition(Definition(function))
    return beartype(function)
