"""Programs and helpers of the tests of `optax_smartclip.memory`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

X = np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(6, 4)
W = np.linspace(-0.5, 0.5, 16, dtype=np.float32).reshape(4, 4)


def chain(w, x):
    for _ in range(6):
        x = jnp.tanh(x @ w) + x
    return jnp.mean(x**2)


def assert_same(actual, expected):
    def compare(actual, expected):
        # Sums in another order have errors relative to the largest element.
        error = 1e-5 * float(np.max(np.abs(expected), initial=1e-6))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=error)

    jax.tree.map(compare, actual, expected)


def mapped(fn):
    """Maps a function of replicated weights and split inputs over two devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        fn, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec()
    )
