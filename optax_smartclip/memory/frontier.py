"""Which values live between the nodes of a program when it runs forward."""

from collections.abc import Set

import numpy as np
from jaxtyping import Int64

from optax_smartclip.memory.graph import Graph


def births(graph: Graph) -> dict[int, int]:
    """Returns the index of the node that writes each value; arguments and constants have none."""
    return {v: index for index, node in enumerate(graph.nodes) for v in node.outputs}


def last_uses(graph: Graph) -> dict[int, int]:
    """Returns the index of the last node that reads each value; results live to the end."""
    last = {v: index for index, node in enumerate(graph.nodes) for v in node.inputs}
    last.update((v, len(graph.nodes)) for v in graph.outputs)
    return last


def live_bytes(graph: Graph, values: Set[int] | None = None) -> Int64[np.ndarray, " places"]:
    """Returns how many bytes live before the first node, and after each node.

    Args:
        graph: The program.
        values: The numbers of the values that count; by default, all that nodes write.

    Returns:
        The bytes, one entry more than there are nodes.
    """
    last = last_uses(graph)
    change = np.zeros(len(graph.nodes) + 2, np.int64)
    for v, birth in births(graph).items():
        if values is None or v in values:
            change[birth + 1] += graph.size(v)
            change[last.get(v, birth) + 1] -= graph.size(v)
    total: Int64[np.ndarray, " places"] = np.cumsum(change)[:-1]
    return total
