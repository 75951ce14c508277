"""Where to cut a program into blocks, and which blocks to recompute (rematerialize).

The forward pass saves only the values that later blocks read. The backward pass recomputes a block.
Its residuals live until its cotangents are known; then the values that were saved for it alone are
freed. So the block from node i to node j needs

    saved before i  +  residuals within (i, j)  +  cotangents and gradients within (i, j)

and the peak is the largest need; or that of the forward pass of a block, if it is larger. Blocks
that are `kept` save their residuals instead, which costs memory until the end and no recomputation;
the last block is always kept, as its backward pass comes first.

That a chain of n equal layers needs only the memory of about the square root of n is from Chen et
al., `Training Deep Nets with Sublinear Memory Cost <https://arxiv.org/abs/1604.06174>`_, 2016,
whose blocks are cut by hand or by a greedy search. Here the least peak for one level of blocks is
exact, for these costs: for a given bound, the least that can be saved up to each cut is found by
dynamic programming over the cuts, and the bound by bisection. Blocks within blocks, with which
Griewank and Walther's `revolve <https://doi.org/10.1145/347837.347846>`_, 2000, reaches the
logarithm of n, are not planned: each node is recomputed once at most.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from jaxtyping import Int64

from optax_smartclip.memory.costs import Costs, find_costs
from optax_smartclip.memory.frontier import live_bytes
from optax_smartclip.memory.graph import Graph
from optax_smartclip.memory.residuals import Residuals, active_values, find_residuals
from optax_smartclip.memory.scans import SLACK, Scan, open_scan

# Time and memory of planning grow with the square of the cuts.
_MAX_CUTS = 400
_NUM_BISECTIONS, _NUM_BOUNDS = 24, 12
_NO_LIMIT = 2**62


@dataclasses.dataclass(frozen=True)
class Block:
    """Nodes `start` to `stop` of the graph; `kept` if they are not recomputed."""

    start: int
    stop: int
    kept: bool


@dataclasses.dataclass(frozen=True)
class CheckpointPlan:
    """A program cut into blocks.

    Attributes:
        blocks: The blocks, in order; together all nodes.
        active: The numbers of the values through which the gradient flows.
        meta: What was planned, as Python numbers: `block_size`, in nodes, as asked for or else of
            the largest block; `num_blocks`; `num_recomputed`, the blocks that are recomputed;
            `num_scans`, the scans with checkpoints inside; `peak_frontier`, the most bytes that
            live between two nodes of the forward pass;
            `predicted_peak` and `predicted_plain_peak`, the bytes of temporary memory of the
            gradient as planned and without recomputation; `saved_bytes`, what is saved at the ends
            of blocks; `recomputed_flops` and `forward_flops`; `memory_budget`, in bytes or None;
            and `within_budget`, whether the predicted peak is.
        scans: The plans of those nodes that are scans with checkpoints inside, by index.
    """

    blocks: tuple[Block, ...]
    active: frozenset[int] = dataclasses.field(repr=False)
    meta: dict[str, Any]
    scans: Mapping[int, "ScanPlan"] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ScanPlan:
    """A `scan` cut into blocks of iterations.

    Attributes:
        scan: The scan itself.
        block_length: The number of iterations in a block. The carry is saved before each block.
        body: The plan of one iteration.
    """

    scan: Scan = dataclasses.field(repr=False)
    block_length: int
    body: CheckpointPlan

    @property
    def length(self) -> int:
        """The number of iterations."""
        return self.scan.length

    @property
    def scratch_bytes(self) -> int:
        """The bytes that the backward pass of one block needs."""
        within = self.scan.block_bytes(self.block_length)
        return within + int(self.body.meta["predicted_peak"])

    @property
    def saved_bytes(self) -> int:
        """The bytes of the carries that are saved."""
        return self.scan.carry_bytes * (self.length // self.block_length)

    @property
    def recomputed_flops(self) -> float:
        """The work that is repeated: the body once, or twice if blocks have several iterations."""
        forward, again = (self.body.meta[k] for k in ("forward_flops", "recomputed_flops"))
        return self.length * float((1 + (self.block_length > 1)) * forward + again)


@dataclasses.dataclass(frozen=True)
class _Path:
    # The places in `Costs.cuts` where blocks begin and end, and the numbers of the kept blocks.
    cuts: list[int]
    kept: frozenset[int]

    @property
    def blocks(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(self.cuts))

    def peak(self, costs: Costs) -> float:
        before = peak = 0.0
        for index, block in enumerate(self.blocks):
            peak = max(peak, before + costs.at_once[block])
            before += costs.saved[block] + (costs.residuals[block] if index in self.kept else 0.0)
        return float(peak)

    def recomputed(self, costs: Costs) -> float:
        redone = (b for index, b in enumerate(self.blocks) if index not in self.kept)
        return float(sum(costs.flops[block] for block in redone))


def make_plan(
    graph: Graph,
    wanted: frozenset[int],
    differentiated: frozenset[int],
    block_size: int | None = None,
    memory_budget: int | None = None,
) -> CheckpointPlan:
    """Plans the gradient of a program.

    Args:
        graph: The program.
        wanted: The numbers of the inputs whose gradient is asked for.
        differentiated: The numbers of the results that are differentiated.
        block_size: If given, all blocks have this many nodes, but the last and those around nodes
            with effects.
        memory_budget: If given, as little as possible is recomputed so that the predicted peak
            stays under this many bytes.

    Returns:
        The plan.
    """
    active = active_values(graph, wanted, differentiated)
    plans = [_plan(graph, wanted, active, {}, block_size, memory_budget)]
    scans = {
        index: scan
        for index, node in enumerate(graph.nodes)
        if not active.isdisjoint(node.outputs) and (scan := open_scan(node, active))
    }

    def is_enough(plan: CheckpointPlan) -> bool:
        return memory_budget is not None and bool(plan.meta["within_budget"])

    # Without a budget, the policy with the least memory.
    policies = _SCAN_POLICIES[-1:] if memory_budget is None else _SCAN_POLICIES
    for plan_scan in policies if scans else ():
        if is_enough(plans[-1]):
            break
        planned = {index: plan_scan(scan) for index, scan in scans.items()}
        plans.append(_plan(graph, wanted, active, planned, block_size, memory_budget))
        plans[-1].meta["predicted_plain_peak"] = plans[0].meta["predicted_plain_peak"]
    if is_enough(plans[-1]):
        return plans[-1]
    return min(plans, key=lambda plan: plan.meta["predicted_peak"])


def _checkpoint_iterations(scan: Scan) -> ScanPlan:
    # This is jax.checkpoint around the body: with a budget that nothing exceeds, all of it is kept.
    return ScanPlan(scan, 1, _plan_body(scan, _NO_LIMIT))


def _checkpoint_within_iterations(scan: Scan) -> ScanPlan:
    return ScanPlan(scan, 1, _plan_body(scan))


def _checkpoint_blocks_of_iterations(scan: Scan) -> ScanPlan:
    return ScanPlan(scan, scan.choose_block(), _plan_body(scan))


# From the least recomputation to the least memory.
_SCAN_POLICIES = (
    _checkpoint_iterations,
    _checkpoint_within_iterations,
    _checkpoint_blocks_of_iterations,
)


def _plan_body(scan: Scan, memory_budget: int | None = None) -> CheckpointPlan:
    return make_plan(scan.body, scan.wanted, scan.differentiated, memory_budget=memory_budget)


def _plan(
    graph: Graph,
    wanted: frozenset[int],
    active: frozenset[int],
    scans: Mapping[int, ScanPlan],
    block_size: int | None,
    memory_budget: int | None,
) -> CheckpointPlan:
    residuals = find_residuals(graph, active)
    for index, scan in scans.items():
        inputs = frozenset(graph.nodes[index].inputs)
        residuals[index] = Residuals(inputs, scan.saved_bytes, scan.scratch_bytes)
    pinned = {i for i, node in enumerate(graph.nodes) if node.effects or i in scans}
    cuts = _choose_cuts(graph, pinned, block_size)
    costs = find_costs(graph, residuals, active, wanted, cuts, pinned)
    whole = _Path([0, len(cuts) - 1], frozenset({0}))
    if block_size is None:
        path = _optimize(costs, memory_budget)
    else:
        path = _with_least_kept(costs, list(range(len(cuts))))
        if memory_budget is not None:
            path = _keep_more(costs, path, memory_budget)
    peak = path.peak(costs)
    blocks = tuple(
        Block(int(costs.cuts[first]), int(costs.cuts[stop]), index in path.kept)
        for index, (first, stop) in enumerate(path.blocks)
    )
    redone = path.recomputed(costs) + sum(scan.recomputed_flops for scan in scans.values())
    meta = {
        "block_size": block_size or max((b.stop - b.start for b in blocks), default=0),
        "num_blocks": len(blocks),
        "num_recomputed": len(blocks) - len(path.kept),
        "num_scans": len(scans),
        "peak_frontier": int(live_bytes(graph).max()),
        "predicted_peak": int(peak),
        "predicted_plain_peak": int(whole.peak(costs)),
        "saved_bytes": int(sum(costs.saved[block] for block in path.blocks)),
        "recomputed_flops": redone,
        "forward_flops": float(sum(node.flops for node in graph.nodes)),
        "memory_budget": memory_budget,
        "within_budget": memory_budget is None or peak <= memory_budget,
    }
    return CheckpointPlan(blocks, active, meta, scans)


def _choose_cuts(graph: Graph, pinned: Set[int], block_size: int | None) -> list[int]:
    num = len(graph.nodes)
    cuts = {0, num} | pinned | {i + 1 for i in pinned}
    if block_size is not None:
        return sorted(cuts | set(range(0, num, block_size)))
    # The narrowest place of each stretch, so that a long program can still be cut everywhere.
    live, stretch = live_bytes(graph), max(-(-num // _MAX_CUTS), 1)
    for start in range(0, num, stretch):
        cuts.add(start + int(np.argmin(live[start : start + stretch])))
    return sorted(cuts)


def _with_least_kept(costs: Costs, cuts: list[int]) -> _Path:
    pinned = {index for index, first in enumerate(cuts[:-1]) if costs.pinned[first]}
    return _Path(cuts, frozenset(pinned | {len(cuts) - 2}))


def _keep_more(costs: Costs, path: _Path, bound: float) -> _Path:
    def gain(index: int) -> float:
        block = path.blocks[index]
        return float(costs.flops[block] / (costs.residuals[block] + 1.0))

    for index in sorted(set(range(len(path.blocks))) - path.kept, key=gain, reverse=True):
        more = _Path(path.cuts, path.kept | {index})
        if more.peak(costs) <= bound:
            path = more
    return path


def _optimize(costs: Costs, memory_budget: int | None) -> _Path:
    # The finest cuts fit under the sum of all that any of their blocks needs.
    finest = np.diagonal(costs.saved + costs.residuals + costs.at_once, 1)
    low, high = 0.0, float(finest.sum())
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if _least_saved(costs, middle) else (middle, high)
    if memory_budget is None or memory_budget <= high:
        bound = high * SLACK
        bounds: Sequence[float] = [bound]
    else:
        bound = float(memory_budget)
        bounds = np.geomspace(max(high, 1.0), bound, _NUM_BOUNDS).tolist()
    candidates = []
    for each in bounds:
        cuts = _least_saved(costs, each)
        if cuts is not None:
            candidates.append(_keep_more(costs, _with_least_kept(costs, cuts), bound))
    return min(candidates, key=lambda path: (path.recomputed(costs), path.peak(costs)))


def _least_saved(costs: Costs, bound: float) -> list[int] | None:
    # The cuts under the bound after which the least has been saved; None if there are none.
    num = len(costs.cuts)
    effects = np.cumsum([0, *costs.pinned[:-1]])
    least, parent = np.full(num, np.inf), np.zeros(num, np.int64)
    least[0] = 0.0
    for stop in range(1, num):
        fits = least[:stop] + costs.at_once[:stop, stop] <= bound
        # A node with an effect is a block of its own.
        fits &= (effects[stop] == effects[:stop]) | (np.arange(stop) == stop - 1)
        kept = np.where(costs.pinned[:stop], costs.residuals[:stop, stop], 0.0)
        total = np.where(fits, least[:stop] + costs.saved[:stop, stop] + kept, np.inf)
        parent[stop] = np.argmin(total)
        least[stop] = total[parent[stop]]
    if not np.isfinite(least[-1]):
        return None
    return _walk_back(parent)


def _walk_back(parent: Int64[np.ndarray, " cuts"]) -> list[int]:
    path = [len(parent) - 1]
    while path[-1]:
        path.append(int(parent[path[-1]]))
    return path[::-1]
