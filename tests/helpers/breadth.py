"""How broad the tests are: which combinations `make test` runs, and which `make test-long` adds.

A mistake that shows in one clipper, one layout and one mode together, and in none of them with
others, is rare, and each combination compiles programs of its own. `make test` runs each value of a
product at least once. Where each clipper takes seconds, it runs one clipper of each kind. The other
combinations have the mark `long`.
"""

import itertools

import pytest
from clipper_table import CLIPPERS

# Each has a scope, a memory and a rule that the others do not have.
KINDS = {"autoclip", "autoclip_p95_per_param", "zclip", "agc"}


def _param(values, is_long):
    return pytest.param(*values, marks=pytest.mark.long if is_long else ())


def long_but(short, values):
    """All values, those marked `long` that are not among the short ones."""
    return [_param((value,), value not in short) for value in values]


one_of_each_kind = pytest.mark.parametrize("name", long_but(KINDS, CLIPPERS))


def each_value(*axes):
    """All combinations, those marked `long` that are not needed to have each value once."""
    axes = [list(axis) for axis in axes]
    most = max(map(len, axes))
    needed = {tuple(number % len(axis) for axis in axes) for number in range(most)}
    return [
        _param(
            [axis[place] for axis, place in zip(axes, places, strict=True)], places not in needed
        )
        for places in itertools.product(*(range(len(axis)) for axis in axes))
    ]
