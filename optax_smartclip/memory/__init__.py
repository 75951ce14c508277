"""Gradients with less memory: the forward pass is cut into blocks, which are computed again.

grad = height_compressed_grad(loss)
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
from optax_smartclip.memory.planner import Block, CheckpointPlan

__all__ = [
    "Block",
    "CheckpointPlan",
    "FrontierReport",
    "Graph",
    "HeightCompressedExecutor",
    "HeightCompressedGradient",
    "NoPlanWarning",
    "Node",
    "analyze_graph",
    "capture_graph_jaxpr",
    "height_compressed_grad",
    "height_compressed_value_and_grad",
    "summarize_frontier",
]
