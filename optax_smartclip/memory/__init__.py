"""Rematerialization (gradient checkpointing) by a plan: `jax.grad` with less memory.

grad = height_compressed_grad(loss)

The forward pass is cut into blocks. The values that pass from block to block are saved, and the
inside of a block is recomputed in the backward pass.
"""

from optax_smartclip.memory.analysis import FrontierReport, analyze_graph, summarize_frontier
from optax_smartclip.memory.api import (
    HeightCompressedGradient,
    NoPlanWarning,
    height_compressed_grad,
    height_compressed_value_and_grad,
)
from optax_smartclip.memory.executor import HeightCompressedExecutor
from optax_smartclip.memory.graph import Graph, Node, capture_graph_jaxpr
from optax_smartclip.memory.planner import Block, CheckpointPlan, ScanPlan

__all__ = [
    "Block",
    "CheckpointPlan",
    "FrontierReport",
    "Graph",
    "HeightCompressedExecutor",
    "HeightCompressedGradient",
    "NoPlanWarning",
    "Node",
    "ScanPlan",
    "analyze_graph",
    "capture_graph_jaxpr",
    "height_compressed_grad",
    "height_compressed_value_and_grad",
    "summarize_frontier",
]
