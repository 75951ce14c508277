"""The residuals of each node: the values that its derivative reads. Tracing finds them.

A rule of thumb per primitive would go wrong with every new one, and would know nothing of
`custom_vjp`. JAX knows: what its vector-Jacobian product closes over.
"""

import dataclasses
from typing import Any

import jax
from jax.extend import core

from optax_smartclip.memory.equations import aval_bytes, is_inexact
from optax_smartclip.memory.graph import Graph, Node


@dataclasses.dataclass(frozen=True)
class Residuals:
    """The values that the derivative of a node reads.

    Attributes:
        values: The numbers of those inputs and outputs that it reads.
        extra: The bytes of values that are computed for the derivative only.
        scratch: The bytes that it needs while it runs, and no longer.
    """

    values: frozenset[int]
    extra: int
    scratch: int = 0


def active_values(graph: Graph, wanted: frozenset[int], outputs: frozenset[int]) -> frozenset[int]:
    """Returns the values through which the outputs may depend on the wanted inputs.

    Args:
        graph: The program.
        wanted: The numbers of the inputs whose gradient is asked for.
        outputs: The numbers of the results that are differentiated.

    Returns:
        The numbers of the values, of an inexact dtype all.
    """
    after = set(wanted)
    for node in graph.nodes:
        if not after.isdisjoint(node.inputs) and node.primitive != "stop_gradient":
            after.update(v for v in node.outputs if is_inexact(graph.avals[v]))
    before = set(outputs)
    for node in reversed(graph.nodes):
        if not before.isdisjoint(node.outputs):
            before.update(v for v in node.inputs if is_inexact(graph.avals[v]))
    return frozenset(after & before)


def find_residuals(graph: Graph, active: frozenset[int]) -> list[Residuals]:
    """Returns what each node leaves for the backward pass.

    Args:
        graph: The program.
        active: What `active_values` returned.

    Returns:
        One entry for each node.
    """
    known: dict[Any, tuple[list[int], list[int], int]] = {}
    result = []
    for node in graph.nodes:
        if active.isdisjoint(node.inputs) or active.isdisjoint(node.outputs):
            result.append(Residuals(frozenset(), 0))
            continue
        moved = tuple(v in active for v in node.inputs)
        key = (_identity(node), tuple(str(graph.avals[v]) for v in node.inputs), moved)
        if key not in known:
            known[key] = _trace(graph, node, moved)
        reads, writes, extra = known[key]
        values = [node.inputs[i] for i in reads] + [node.outputs[i] for i in writes]
        result.append(Residuals(frozenset(values), extra))
    return result


def _identity(node: Node) -> Any:
    eqn = node.jaxpr.eqns[0]
    places = tuple(
        None if isinstance(atom, core.Literal) else node.jaxpr.invars.index(atom)
        for atom in eqn.invars
    )
    params = tuple((name, _hashable(value)) for name, value in sorted(eqn.params.items()))
    return eqn.primitive, places, params


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _trace(graph: Graph, node: Node, moved: tuple[bool, ...]) -> tuple[list[int], list[int], int]:
    def primal_and_residuals(*values: Any) -> tuple[Any, Any]:
        def run(*moving: Any) -> Any:
            rest = iter(moving)
            both = zip(values, moved, strict=True)
            return node(*(next(rest) if moves else value for value, moves in both))

        moving = [value for value, moves in zip(values, moved, strict=True) if moves]
        outputs, pullback = jax.vjp(run, *moving)
        return outputs, jax.tree.leaves(pullback)

    avals = [graph.avals[v] for v in node.inputs]
    jaxpr = jax.make_jaxpr(primal_and_residuals)(*avals).jaxpr
    outputs = list(jaxpr.outvars[: len(node.outputs)])
    reads, writes, extra = set(), set(), {}
    for atom in jaxpr.outvars[len(node.outputs) :]:
        if isinstance(atom, core.Literal):
            continue
        if atom in jaxpr.invars:
            reads.add(jaxpr.invars.index(atom))
        elif atom in outputs:
            writes.add(outputs.index(atom))
        else:
            extra[atom] = aval_bytes(atom.aval)
    return sorted(reads), sorted(writes), sum(extra.values())
