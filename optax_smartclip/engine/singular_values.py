"""The largest singular value, and a soft cut of all of them, by matrix products alone.

    H_c(X) = c (X X' + c^2)^(-1/2) X       a singular value s becomes s / sqrt(1 + s^2 / c^2)

The inverse root is found by Newton-Schulz iterations. They are scaled, so that a small eigenvalue
grows by up to 27 / 4 in each, and not by 9 / 4.

Jiang, Semenov, Stich, `SPECTRA <https://arxiv.org/abs/2603.14315>`_, 2026. Chen, Chow, *A stable
scaling of Newton-Schulz for improving the sign function computation of a Hermitian matrix*, 2014.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from optax_smartclip.engine.meshes import vary_as
from optax_smartclip.engine.norms import safe_divisor, safe_sqrt

Matrix = Float[Array, "rows columns"]
Square = Float[Array, "rows rows"]
Vector = Float[Array, " rows"]
Scalar = Float[Array, ""]

# How many limits the largest singular value may be, by the number of iterations, for a cut that is
# exact to 1e-6. With more of them, the error of rounding in float32 is over 1e-3.
REACH = {6: 18.3, 7: 47.2, 8: 122.1, 9: 316.8, 10: 822.8, 11: 2137.0, 12: 5550.0}
# So that rounding leaves no eigenvalue above the bound of all of them.
_MARGIN = 1 + 2.0**-12
# A limit that is further above all singular values changes none of them in float32.
_WITHOUT_EFFECT = 2.0**20


def multiply(left: Float[Array, "..."], right: Float[Array, "..."]) -> Float[Array, "..."]:
    """The matrix product. Some accelerators would round its factors to fewer bits."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def first_vector(gram: Square, vector: Vector) -> tuple[Vector, Scalar]:
    """One step of power iteration for the largest eigenvalue of a Gram matrix.

    It starts from the vector or from the row of the largest norm, whichever is ahead after the
    step. So a vector that is orthogonal to all rows is left, and the eigenvalue is at least the
    largest squared norm of a row.

    Args:
        gram: The products of all pairs of rows.
        vector: Where the step before has arrived.

    Returns:
        The next vector, of norm 1, and its Rayleigh quotient, which is at most the eigenvalue. Both
        are zero for a matrix of zeros.
    """
    row = gram[jnp.argmax(jnp.diagonal(gram))]
    starts = jnp.stack([multiply(gram, vector), row])
    sizes = safe_sqrt(jnp.sum(jnp.square(starts), axis=1, keepdims=True))
    vectors = starts / safe_divisor(sizes)
    quotients = jnp.sum(vectors * multiply(vectors, gram), axis=1)
    ahead = jnp.argmax(quotients)
    return vectors[ahead], quotients[ahead]


def bound_largest(gram: Square) -> Scalar:
    """No singular value is larger; 1 for a matrix of zeros.

    The smaller of the Frobenius norm and Gershgorin's bound, of the Gram matrix.
    """
    squares = jnp.sum(jnp.square(gram)), jnp.square(jnp.max(jnp.sum(jnp.abs(gram), axis=1)))
    bound = jnp.sqrt(jnp.sqrt(jnp.minimum(*squares))) * _MARGIN
    return jax.lax.stop_gradient(safe_divisor(bound))


def within_reach(limit: Scalar, bound: Scalar, num_iterations: int) -> Scalar:
    """The limit nearest to a given one for which `soft_cut` is exact."""
    return jnp.clip(limit, bound / REACH[num_iterations], bound * _WITHOUT_EFFECT)


def soft_cut(
    matrix: Matrix, gram: Square, bound: Scalar, limit: Scalar, num_iterations: int
) -> Matrix:
    """Each singular value `s` becomes `s / sqrt(1 + s ** 2 / limit ** 2)`.

    It is computed in two halves. The second starts from the Gram matrix of what the first has
    made of the matrix, and not from the first's own, in which rounding has grown with the small
    eigenvalues. Without this, a singular value of 1,000 limits loses all others.

    Args:
        matrix: With at least as many columns as rows.
        gram: `matrix @ matrix.T`.
        bound: From `bound_largest`.
        limit: From `within_reach`.
        num_iterations: Of those in `REACH`.
    """
    scales = _scalings(1 / REACH[num_iterations], num_iterations)
    unit = jnp.sqrt(jnp.square(bound) + jnp.square(limit))
    diagonal = limit / unit
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    # The polar factor of the matrix beside the diagonal one is sought, whose Gram matrix this is.
    of_both = gram / jnp.square(unit) + jnp.square(diagonal) * identity
    middle = num_iterations // 2
    root = _inverse_root(of_both, scales[:middle])
    halfway = multiply(root, matrix / unit)
    of_both = multiply(halfway, halfway.T) + jnp.square(diagonal) * multiply(root, root.T)
    return limit * multiply(_inverse_root(of_both, scales[middle:]), halfway)


def _scalings(smallest: float, num_iterations: int) -> list[float]:
    """Factors before each iteration, for roots of eigenvalues from `smallest` to 1.

    In an iteration, `x` becomes `(3 x - x ** 3) / 2`. The factor is that which maps both ends to
    the same number.
    """
    factors = []
    for _ in range(num_iterations):
        factors.append(math.sqrt(3 / (1 + smallest + smallest**2)))
        scaled = factors[-1] * smallest
        smallest = (3 * scaled - scaled**3) / 2
    return factors


def _inverse_root(matrix: Square, factors: list[float]) -> Square:
    """Newton-Schulz iterations from the identity towards `matrix ** -0.5`."""
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)

    def iterate(carry: tuple[Square, Square], factor: Scalar) -> tuple[tuple[Square, Square], None]:
        root, inverse = carry
        step = 1.5 * factor * identity - 0.5 * factor**3 * multiply(inverse, root)
        return (multiply(root, step), multiply(step, inverse)), None

    start = matrix, vary_as(identity, matrix)
    return jax.lax.scan(iterate, start, jnp.asarray(factors, matrix.dtype))[0][1]
