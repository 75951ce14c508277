"""Runs a program and its gradient block by block, as planned."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from optax_smartclip.memory.equations import contains, is_inexact
from optax_smartclip.memory.frontier import last_uses
from optax_smartclip.memory.gates import run_after
from optax_smartclip.memory.graph import Graph
from optax_smartclip.memory.planner import Block, CheckpointPlan, ScanPlan

Values = dict[int, Any]


@dataclasses.dataclass(frozen=True)
class HeightCompressedExecutor:
    """A program and its plan.

    Attributes:
        graph: The program. The values it closed over are not kept.
        checkpoint_plan: How it was cut.
    """

    graph: Graph
    checkpoint_plan: CheckpointPlan

    def value_and_grad(
        self, consts: Values, inputs: Sequence[Any], wanted: Sequence[int]
    ) -> tuple[list[Any], list[Any]]:
        """Runs the program and the backward pass of its first result.

        Args:
            consts: The closed-over values by number.
            inputs: The flat arguments.
            wanted: The indices of those whose gradient is asked for.

        Returns:
            The flat results, and the gradients of the first.
        """
        results, pullback = self.vjp(consts, inputs)
        differentiated = self.graph.outputs[0]
        cotangents: Values = {}
        if differentiated in self.checkpoint_plan.active:
            cotangents[differentiated] = jnp.ones_like(results[0])
        grads = pullback(cotangents)
        places = [self.graph.inputs[index] for index in wanted]
        wanted_grads = [
            grads[place] if place in grads else jnp.zeros_like(inputs[index])
            for place, index in zip(places, wanted, strict=True)
        ]
        return results, wanted_grads

    def vjp(
        self, consts: Values, inputs: Sequence[Any]
    ) -> tuple[list[Any], Callable[[Values], Values]]:
        """Runs the program.

        Args:
            consts: The closed-over values by number.
            inputs: The flat arguments.

        Returns:
            The flat results; the backward pass, a function from cotangents of results to those of
            arguments, all by number.
        """
        graph, plan = self.graph, self.checkpoint_plan
        env: Values = {**consts, **dict(zip(graph.inputs, inputs, strict=True))}
        last = last_uses(graph)
        runs: list[_Run] = []
        before: Values = {}
        for block in plan.blocks:
            part = _Part(graph, block, plan, last)
            run = _forward(part, {v: env[v] for v in part.reads}, before)
            runs.append(run)
            env.update(run.writes)
            before = {v: env[v] for v in part.writes if is_inexact(graph.avals[v])} or before
        results = [env[v] for v in graph.outputs]
        # The backward pass waits for these.
        known = [env[v] for v in graph.outputs if v in plan.active][:1]

        def pullback(cotangents: Values) -> Values:
            cotangents = dict(cotangents)
            grads: list[Any] = []
            for run in reversed(runs):
                grads = _backward(run, cotangents, [*known, *grads])
            return {v: cotangents[v] for v in graph.inputs if v in cotangents}

        return results, pullback


class _Part:
    # A block, with the numbers of the values that it reads and writes. One with an effect is always
    # kept, so that whatever is run again has none.

    def __init__(
        self, graph: Graph, block: Block, plan: CheckpointPlan, last: dict[int, int]
    ) -> None:
        active = plan.active
        self.nodes = graph.nodes[block.start : block.stop]
        self.scan = plan.scans.get(block.start)
        self.kept = block.kept
        inner = {v for node in self.nodes for v in node.outputs}
        self.reads = sorted({v for node in self.nodes for v in node.inputs} - inner)
        self.writes = sorted(v for v in inner if last.get(v, -1) >= block.stop)
        self.active_reads = [v for v in self.reads if v in active]
        self.active_writes = [v for v in self.writes if v in active]
        self.graph = graph
        self.convolves = any(contains(node.jaxpr, "conv_general_dilated") for node in self.nodes)

    def run(self, reads: Values, only: Sequence[int] | None = None) -> Values:
        env = dict(reads)
        for node in self.nodes:
            env.update(zip(node.outputs, node(*(env[v] for v in node.inputs)), strict=True))
        return {v: env[v] for v in (self.writes if only is None else only)}

    def vjp(self, reads: Values, only: Sequence[int] | None = None) -> tuple[Any, Values]:
        if self.scan is not None:
            return self.scan_vjp(self.scan, reads)

        def run(*moving: Any) -> tuple[list[Any], Values]:
            writes = self.run({**reads, **dict(zip(self.active_reads, moving, strict=True))}, only)
            return [writes[v] for v in only or self.active_writes], writes

        moving = [reads[v] for v in self.active_reads]
        _, pullback, writes = jax.vjp(run, *moving, has_aux=True)
        return pullback, writes

    def scan_vjp(self, plan: ScanPlan, reads: Values) -> tuple[Any, Values]:
        (node,) = self.nodes
        body = HeightCompressedExecutor(plan.scan.body, plan.body)
        outputs, scan_pullback = plan.scan.vjp(
            body.vjp, plan.block_length, [reads[v] for v in node.inputs]
        )

        def pullback(cotangents: Sequence[Any]) -> list[Any]:
            given = dict(zip(self.active_writes, cotangents, strict=True))
            grads = scan_pullback([given.get(v) for v in node.outputs])
            places = [node.inputs.index(v) for v in self.active_reads]
            return [
                grads[place] if place in grads else jnp.zeros_like(reads[v])
                for place, v in zip(places, self.active_reads, strict=True)
            ]

        env = dict(zip(node.outputs, outputs, strict=True))
        return pullback, {v: env[v] for v in self.writes}

    def could_run_before(self, written: Sequence[int]) -> bool:
        # Whether there is work that does not wait for these values.
        late = set(written)
        for node in self.nodes:
            if late.isdisjoint(node.inputs):
                return True
            late.update(node.outputs)
        return False


class _Run(NamedTuple):
    # A part that has run forward, with a pullback if it is kept.
    part: _Part
    reads: Values
    writes: Values
    pullback: Any


def _forward(part: _Part, reads: Values, before: Values) -> _Run:
    if part.kept:
        if part.active_reads and part.active_writes:
            pullback, writes = part.vjp(reads)
            return _Run(part, reads, writes, pullback)
        return _Run(part, reads, part.run(reads), None)
    if not before or part.convolves or not part.could_run_before(list(before)):
        return _Run(part, reads, part.run(reads), None)

    def run(reads: Values, _: Any) -> Values:
        return part.run(reads)

    def never(reads: Values, _: Any) -> Values:
        shapes = jax.eval_shape(part.run, reads)
        return {v: jax.lax.full_like(shape, 0) for v, shape in shapes.items()}

    writes = run_after(list(before.values()), run, reads, None, never=never)
    return _Run(part, reads, writes, None)


def _backward(run: _Run, cotangents: Values, done: Sequence[Shaped[Array, "..."]]) -> list[Any]:
    part = run.part
    outer = {v: cotangents.pop(v) for v in part.active_writes if v in cotangents}
    if not outer or not part.active_reads:
        return []
    before = {v: cotangents[v] for v in part.active_reads if v in cotangents}
    if run.pullback is not None:
        filled = [
            outer[v] if v in outer else jnp.zeros_like(run.writes[v]) for v in part.active_writes
        ]
        sums = _add(part.active_reads, run.pullback(filled), before)
    else:
        sums = _recompute(part, run.reads, outer, before, done)
    cotangents.update(zip(part.active_reads, sums, strict=True))
    return sums


def _recompute(
    part: _Part,
    reads: Values,
    outer: Values,
    before: Values,
    done: Sequence[Shaped[Array, "..."]],
) -> list[Any]:
    arguments = set(part.graph.inputs).intersection(reads)
    # A selection of an argument would be a copy of it.
    late = reads
    if part.convolves and any(v not in arguments for v in part.active_reads):
        late = {v: reads[v] for v in part.active_reads if v not in arguments}

    def backward(late: Values, incoming: tuple[Values, Values]) -> list[Any]:
        outer, before = incoming
        pullback, _ = part.vjp({**reads, **late}, list(outer))
        # Added up within, or XLA keeps the gradients of all blocks and adds them at the end.
        return _add(part.active_reads, pullback(list(outer.values())), before)

    def never(late: Values, _: Any) -> list[Any]:
        return [late[v] for v in part.active_reads]

    return list(
        run_after(
            [done[0], *outer.values()],
            backward,
            late,
            (outer, before),
            # Otherwise XLA delays the gradients of weights, and keeps the values they need alive.
            finished=done[1:],
            never=never,
            convolves=part.convolves,
        )
    )


def _add(places: Sequence[int], grads: Sequence[Any], before: Values) -> list[Any]:
    both = zip(places, grads, strict=True)
    return [before[v] + grad if v in before else grad for v, grad in both]
