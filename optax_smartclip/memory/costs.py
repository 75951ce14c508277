"""The costs of a block between any two cuts: bytes to save, peak bytes, operations to repeat.

A matrix has the first cut of a block in its rows and the last cut in its columns; entries under the
diagonal mean nothing. A stretch is what lies between two neighboring cuts.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from optax_smartclip.memory.frontier import births, last_uses, live_bytes
from optax_smartclip.memory.graph import Graph
from optax_smartclip.memory.residuals import Residuals

Square = Float64[np.ndarray, "cuts cuts"]


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of all blocks, in bytes; those of work in floating point operations.

    Attributes:
        cuts: The indices of the nodes before which a block may begin or end.
        saved: What a block writes and later blocks read.
        residuals: What its derivative reads and it has computed itself.
        at_once: What it needs at most while it runs, forward or backward, its residuals included
            and what was saved before it left out.
        flops: The work to run it forward.
        pinned: For each cut, whether the node after it is a block of its own, which does not run
            twice as a whole: one with an effect, or a scan with a plan of its own.
    """

    cuts: Int64[np.ndarray, " cuts"]
    saved: Square
    residuals: Square
    at_once: Square
    flops: Square
    pinned: Bool[np.ndarray, " cuts"]


def find_costs(
    graph: Graph,
    residuals: Sequence[Residuals],
    active: frozenset[int],
    wanted: frozenset[int],
    cuts: Sequence[int],
    pinned: Collection[int] = (),
) -> Costs:
    """Returns the costs of all blocks.

    Args:
        graph: The program.
        residuals: For each node, what its derivative reads.
        active: The values that have cotangents.
        wanted: The arguments whose gradients are asked for.
        cuts: Where blocks may begin and end: increasing, from 0 to the number of nodes.
        pinned: The indices of the nodes that are blocks of their own.

    Returns:
        The costs.
    """
    places = np.asarray(cuts, np.int64)
    stretches = np.searchsorted(places, np.arange(len(graph.nodes) + 1), side="right") - 1
    kept = _residual_bytes(graph, residuals, stretches)
    backward = kept + _cotangent_bytes(graph, active, places)
    backward += _accumulator_bytes(graph, active & wanted, stretches)
    backward += _sums([needs.scratch for needs in residuals], stretches)
    return Costs(
        cuts=places,
        saved=_saved_bytes(graph, stretches),
        residuals=kept,
        at_once=np.maximum(backward, _forward_bytes(graph, places)),
        flops=_sums([node.flops for node in graph.nodes], stretches),
        pinned=np.isin(places, list(pinned)),
    )


def _sums(
    of_nodes: Sequence[float] | Sequence[int] | Sequence[bool],
    stretches: Int64[np.ndarray, " places"],
) -> Square:
    last = int(stretches[-1])
    of_stretches = np.bincount(stretches[:-1], np.asarray(of_nodes, np.float64), last)
    before = np.concatenate([[0.0], np.cumsum(of_stretches)])
    sums: Square = before[None, :] - before[:, None]
    return sums


def _saved_bytes(graph: Graph, stretches: Int64[np.ndarray, " places"]) -> Square:
    last = last_uses(graph)
    num = int(stretches[-1]) + 1
    table = np.zeros((num, num))  # By stretch of birth and of last use.
    for v, birth in births(graph).items():
        if v in last:
            table[stretches[birth], stretches[last[v]]] += graph.size(v)
    used_from = np.cumsum(table[:, ::-1], axis=1)[:, ::-1]
    born_before = np.concatenate([np.zeros((1, num)), np.cumsum(used_from, axis=0)])[:num]
    saved: Square = np.diagonal(born_before)[None, :] - born_before
    return saved


def _residual_bytes(
    graph: Graph, residuals: Sequence[Residuals], stretches: Int64[np.ndarray, " places"]
) -> Square:
    first_need: dict[int, int] = {}
    for index, needs in enumerate(residuals):
        for v in needs.values:
            first_need.setdefault(v, index)
    num = int(stretches[-1]) + 1
    table = np.zeros((num, num))  # By stretch of birth and of first need.
    for v, birth in births(graph).items():
        if v in first_need:
            table[stretches[birth], stretches[first_need[v]]] += graph.size(v)
    born_from = np.cumsum(table[::-1], axis=0)[::-1]
    needed_before = np.concatenate([np.zeros((num, 1)), np.cumsum(born_from, axis=1)], axis=1)
    extra = _sums([needs.extra for needs in residuals], stretches)
    total: Square = needed_before[:, :num] + extra
    return total


def _cotangent_bytes(
    graph: Graph, active: frozenset[int], cuts: Int64[np.ndarray, " cuts"]
) -> Square:
    live = live_bytes(graph, active).astype(np.float64)
    widest = np.zeros((len(cuts), len(cuts)))
    for first in range(len(cuts)):
        widest[first, first:] = _running_maximum(live, cuts[first:])
    return widest


def _forward_bytes(graph: Graph, cuts: Int64[np.ndarray, " cuts"]) -> Square:
    last = last_uses(graph)
    change = np.zeros(len(graph.nodes) + 2)
    widest = np.zeros((len(cuts), len(cuts)))
    # From the end, so that values from before the block have not been counted yet.
    for first in reversed(range(len(cuts) - 1)):
        for index in range(cuts[first], cuts[first + 1]):
            for v in graph.nodes[index].outputs:
                change[index + 1] += graph.size(v)
                change[last.get(v, index) + 1] -= graph.size(v)
        widest[first, first:] = _running_maximum(np.cumsum(change)[:-1], cuts[first:])
    return widest


def _running_maximum(
    live: Float64[np.ndarray, " places"],
    cuts: Int64[np.ndarray, " some"],
) -> Float64[np.ndarray, " some"]:
    # The most from the first cut up to each of them.
    most: Float64[np.ndarray, " some"] = np.maximum.accumulate(live[cuts[0] :])[cuts - cuts[0]]
    return most


def _accumulator_bytes(
    graph: Graph, wanted: frozenset[int], stretches: Int64[np.ndarray, " places"]
) -> Square:
    uses: dict[int, list[int]] = {v: [] for v in wanted}
    for index, node in enumerate(graph.nodes):
        for v in wanted.intersection(node.inputs):
            uses[v].append(index)
    total = np.zeros((int(stretches[-1]) + 1,) * 2)
    for v, readers in uses.items():
        # The gradient of a value that is read once is a result, which takes no temporary memory.
        if len(readers) > 1:
            total += graph.size(v) * _terms(readers, stretches)
    return total


def _terms(readers: Sequence[int], stretches: Int64[np.ndarray, " places"]) -> Square:
    reads = np.isin(np.arange(len(stretches) - 1), readers)
    within = _sums(reads.tolist(), stretches)
    before, after = within[0][:, None] > 0, (within[0, -1] - within[0])[None, :] > 0
    # XLA adds the terms and the sum so far in one fusion, for which all of them live. The new sum
    # is one more, unless it is the result.
    terms = within + after
    summed = np.where(terms > 1, terms, 0.0) + before
    total: Square = np.where(within > 0, summed, before & after)
    return total
