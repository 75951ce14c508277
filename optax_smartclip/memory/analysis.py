"""How many bytes live after each node of a program, and how few could."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int64

from optax_smartclip.memory.frontier import last_uses, live_bytes
from optax_smartclip.memory.graph import Graph


@dataclasses.dataclass(frozen=True)
class FrontierReport:
    """The live bytes of a program that runs forward, without arguments and constants.

    Attributes:
        live_bytes: After each node, what later nodes or the results still need.
        peak_bytes: The most of them.
        peak_node: The index of the node after which it is reached; -1 without nodes.
        peak_primitive: Its operation.
        total_bytes: All that the nodes write: what lives if nothing is ever freed.
        argument_bytes: The arguments.
        const_bytes: The closed-over values.
        result_bytes: The results.
        lower_bound: No order of these nodes has a lower peak: the most that one node reads, or that
            it writes, or the results.
        total_flops: The estimated work.
        num_nodes: The nodes.
    """

    live_bytes: Int64[np.ndarray, " nodes"] = dataclasses.field(repr=False)
    peak_bytes: int
    peak_node: int
    peak_primitive: str
    total_bytes: int
    argument_bytes: int
    const_bytes: int
    result_bytes: int
    lower_bound: int
    total_flops: float
    num_nodes: int

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.num_nodes} nodes, {self.total_flops:.4g} FLOPs",
                f"peak {self.peak_bytes:,} bytes after node {self.peak_node}"
                f" ({self.peak_primitive})",
                f"total {self.total_bytes:,} bytes, lower bound {self.lower_bound:,} bytes",
                f"arguments {self.argument_bytes:,} bytes, constants {self.const_bytes:,} bytes,"
                f" results {self.result_bytes:,} bytes",
            )
        )

    def plot(self, ax: Any = None) -> Any:
        """Draws the live bytes over the nodes; needs Matplotlib, which `plotting` brings.

        Args:
            ax: Where to draw; by default, in a new figure of `matplotlib.pyplot`.

        Returns:
            The axes.

        Raises:
            ImportError: If Matplotlib is missing.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.figure().add_subplot()
        nodes = np.arange(self.num_nodes)
        ax.step(nodes, self.live_bytes, where="post", color="#0072B2", label="live")
        if self.num_nodes:
            label = f"peak: {self.peak_bytes:,} after {self.peak_primitive}"
            style = {"color": "#D55E00", "marker": "v", "linestyle": ""}
            ax.plot([self.peak_node], [self.peak_bytes], label=label, **style)
        label = f"lower bound: {self.lower_bound:,}"
        ax.axhline(self.lower_bound, color="gray", linestyle="--", label=label)
        # Room for the legend.
        ax.set_ylim(0, 1.35 * max(self.peak_bytes, 1))
        ax.set_xlabel("node of the forward pass")
        ax.set_ylabel("live memory (bytes)")
        ax.legend()
        return ax


def summarize_frontier(graph: Graph) -> FrontierReport:
    """Returns what lives after each node of a program.

    Args:
        graph: What `capture_graph_jaxpr` returned.

    Returns:
        The report, which can be printed and plotted.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_smartclip.memory import capture_graph_jaxpr, summarize_frontier
        >>> x = jnp.ones((4, 4))
        >>> graph = capture_graph_jaxpr(lambda x: jnp.sum(jnp.sin(x) * jnp.cos(x)), (x,))
        >>> report = summarize_frontier(graph)
        >>> print(report.live_bytes)
        [ 64 128  64   4]
        >>> print(report)
        4 nodes, 49 FLOPs
        peak 128 bytes after node 1 (cos)
        total 196 bytes, lower bound 128 bytes
        arguments 64 bytes, constants 0 bytes, results 4 bytes
    """
    live = live_bytes(graph)[1:]
    outer = {*graph.inputs, *graph.consts}
    read = last_uses(graph).keys()
    at_once = [{*graph.outputs} - outer]
    for node in graph.nodes:
        at_once += [{*node.inputs} - outer, {*node.outputs} & read]
    peak = int(np.argmax(live)) if len(live) else -1
    return FrontierReport(
        live_bytes=live,
        peak_bytes=int(live.max(initial=0)),
        peak_node=peak,
        peak_primitive=graph.nodes[peak].primitive if len(live) else "",
        total_bytes=sum(node.bytes for node in graph.nodes),
        argument_bytes=sum(graph.size(v) for v in graph.inputs),
        const_bytes=sum(graph.size(v) for v in graph.consts),
        result_bytes=sum(graph.size(v) for v in set(graph.outputs)),
        lower_bound=max(sum(graph.size(v) for v in values) for values in at_once),
        total_flops=float(sum(node.flops for node in graph.nodes)),
        num_nodes=len(graph.nodes),
    )


def analyze_graph(graph: Graph) -> dict[str, Any]:
    """Returns the figures of a program, as a dictionary that can be written as JSON.

    Args:
        graph: What `capture_graph_jaxpr` returned.

    Returns:
        The attributes of `FrontierReport` without the bytes after each node; `primitives`, how
        many nodes there are of each operation; and `frontier_gap`, the peak in units of the lower
        bound.

    Example:
        >>> import jax.numpy as jnp
        >>> from optax_smartclip.memory import analyze_graph, capture_graph_jaxpr
        >>> graph = capture_graph_jaxpr(lambda x: jnp.sin(jnp.sin(x)), (jnp.ones(8),))
        >>> report = analyze_graph(graph)
        >>> report["primitives"], report["peak_bytes"], report["lower_bound"]
        ({'sin': 2}, 32, 32)
    """
    report = summarize_frontier(graph)
    figures = {
        field.name: getattr(report, field.name)
        for field in dataclasses.fields(report)
        if field.name != "live_bytes"
    }
    primitives: dict[str, int] = {}
    for node in graph.nodes:
        primitives[node.primitive] = primitives.get(node.primitive, 0) + 1
    gap = report.peak_bytes / report.lower_bound if report.lower_bound else 1.0
    return {**figures, "primitives": primitives, "frontier_gap": gap}
