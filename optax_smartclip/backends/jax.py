"""The functions of smartclip's JAX backend, under the name that its guide imports.

    from optax_smartclip.backends import jax as sc_jax

They are those of `optax_smartclip` itself.
"""

from optax_smartclip.stateful.context import apply_grads, clip_context

__all__ = ["apply_grads", "clip_context"]
