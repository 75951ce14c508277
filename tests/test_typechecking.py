"""The type checker of the tests, which checks a function once that is defined many times."""

import jaxtyping
import numpy as np
import pytest
from jaxtyping import Float
from typechecking import check


def adder(amount, shape):
    """Defines a function again at each call, sometimes with other annotations."""
    of_shape = Float[np.ndarray, shape]

    @jaxtyping.jaxtyped(typechecker=check)
    def add(x: of_shape, /) -> of_shape:
        return x[:2] + amount

    return add


def test_each_definition_has_its_own_body_and_annotations():
    pair, matrix = np.zeros(2), np.zeros((2, 2))
    for amount in (1, 2):
        np.testing.assert_array_equal(adder(amount, "2")(pair), pair + amount)
        np.testing.assert_array_equal(adder(amount, "2 2")(matrix), matrix + amount)
        for shape, wrong in (("2", matrix), ("2 2", pair)):
            with pytest.raises(jaxtyping.TypeCheckError, match=r"arguments|parameters"):
                adder(amount, shape)(wrong)
        with pytest.raises(jaxtyping.TypeCheckError, match="return"):
            adder(amount, "3")(np.zeros(3))
