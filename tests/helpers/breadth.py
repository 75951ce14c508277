"""Which combinations of test values `make test` runs, and which ones `make test-long` adds.

Each combination compiles programs of its own. A mistake that shows in one combination of clipper,
layout and mode, and in none of their other combinations, is rare. `make test` therefore runs each
value of a product at least once. Where each clipper takes seconds, it runs one clipper of each
kind. The other combinations have the mark `long`.
"""

import itertools

import pytest
from clipper_table import CLIPPERS, KINDS


def _param(values, is_long):
    return pytest.param(*values, marks=pytest.mark.long if is_long else ())


def long_but(short, values):
    """All values. Those that are not among the short ones have the mark `long`."""
    return [_param((value,), value not in short) for value in values]


one_of_each_kind = pytest.mark.parametrize("name", long_but(KINDS, CLIPPERS))


def each_value(*axes):
    """All combinations. Those that are not needed to have each value once have the mark `long`."""
    axes = [list(axis) for axis in axes]
    most = max(map(len, axes))
    needed = {tuple(number % len(axis) for axis in axes) for number in range(most)}
    return [
        _param(
            [axis[place] for axis, place in zip(axes, places, strict=True)], places not in needed
        )
        for places in itertools.product(*(range(len(axis)) for axis in axes))
    ]
