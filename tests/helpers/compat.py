"""Names that depend on the version of JAX, and a workaround where Optax promotes dtypes."""

import jax
import optax

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:
    from jax.experimental import enable_x64  # noqa: F401


def lenient(tx):
    """Lets Optax promote dtypes: Adam raises a float to the power of an int32."""

    def update(grads, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(grads, state, params)

    return optax.GradientTransformation(tx.init, update)
