"""What the tests call by one name and the supported versions of JAX by several."""

import jax

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:
    from jax.experimental import enable_x64  # noqa: F401
