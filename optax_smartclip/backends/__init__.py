"""The module names of smartclip's guide: `from optax_smartclip.backends import jax as sc_jax`."""
