"""The functions that take a JAX function."""

from optax_smartclip.memory.api import height_compressed_grad, height_compressed_value_and_grad
from optax_smartclip.memory.graph import capture_graph_jaxpr

__all__ = ["capture_graph_jaxpr", "height_compressed_grad", "height_compressed_value_and_grad"]
