"""The program of a function as a graph of values with sizes, which the planner cuts into blocks.

Calls of `jax.jit` are opened, since they have no meaning for derivatives. `custom_jvp`,
`custom_vjp` and `jax.checkpoint` stay one node each, so that their own rules hold, and so do
`scan`, `while` and `cond`, which a straight-line plan cannot cut.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from optax_smartclip.memory.equations import aval_bytes, eqn_flops

_OPENED = frozenset({"jit", "pjit", "closed_call", "core_call"})


@dataclasses.dataclass(frozen=True)
class Node:
    """One equation of the program.

    Values are numbered; the number is an index into `Graph.avals`.

    Attributes:
        primitive: The name of the operation.
        inputs: The numbers of the distinct values that it reads; literals are left out.
        outputs: The numbers of the values that it writes.
        bytes: The size of its outputs.
        flops: An estimate: exact for products and convolutions, one per output element otherwise.
        effects: Whether it has a side effect, so that it must run exactly once.
        jaxpr: The equation, as a program of its own from `inputs` to `outputs`.
    """

    primitive: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bytes: int
    flops: float
    effects: bool
    jaxpr: core.Jaxpr = dataclasses.field(repr=False)

    def __call__(self, *values: Any) -> Sequence[Any]:
        """Runs the equation."""
        return list(jax.core.eval_jaxpr(self.jaxpr, (), *values))


@dataclasses.dataclass(frozen=True)
class Graph:
    """A program in the order in which it runs.

    Attributes:
        nodes: The equations, without those that nobody reads.
        inputs: The numbers of the flat arguments.
        outputs: The numbers of the flat results.
        consts: The closed-over values by number.
        avals: Shape and dtype of each value by number.
        out_tree: The structure of the results.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    consts: dict[int, Any] = dataclasses.field(repr=False)
    avals: tuple[Any, ...] = dataclasses.field(repr=False)
    out_tree: Any = dataclasses.field(repr=False)

    def size(self, value: int) -> int:
        """Returns the bytes of a value."""
        return aval_bytes(self.avals[value])

    def without_consts(self) -> "Graph":
        """Returns the graph without the values that the program closed over."""
        return dataclasses.replace(self, consts={})


def capture_graph_jaxpr(fn: Callable[..., Any], example_inputs: Sequence[Any]) -> Graph:
    """Traces a function and returns its program as a graph.

    Args:
        fn: A function that JAX can trace.
        example_inputs: Its positional arguments: trees of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
        The graph.

    Raises:
        TypeError: If an argument or a result is not a tree of arrays.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from optax_smartclip.memory import capture_graph_jaxpr
        >>> x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
        >>> graph = capture_graph_jaxpr(lambda x: jnp.sin(x) @ x.T, example_inputs=(x,))
        >>> [(node.primitive, node.bytes) for node in graph.nodes]
        [('sin', 32), ('transpose', 32), ('dot_general', 16)]
    """
    leaves, treedef = jax.tree.flatten(tuple(example_inputs))
    out_tree: list[Any] = []

    def flat(*values: Any) -> list[Any]:
        results, tree = jax.tree.flatten(fn(*jax.tree.unflatten(treedef, values)))
        out_tree.append(tree)
        return results

    closed = jax.make_jaxpr(flat)(*leaves)
    return _Builder().build(closed, out_tree[-1])


def capture_body(closed: Any) -> Graph:
    """Returns the program in the body of an equation, with its constants, as a graph."""
    return _Builder().build(closed, None)


class _Builder:
    def __init__(self) -> None:
        self.avals: list[Any] = []
        self.consts: dict[int, Any] = {}
        self.nodes: list[Node] = []

    def value(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def const(self, aval: Any, value: Any) -> int:
        number = self.value(aval)
        self.consts[number] = value
        return number

    def build(self, closed: Any, out_tree: Any) -> Graph:
        inputs = [self.value(var.aval) for var in closed.jaxpr.invars]
        outputs = self.inline(closed.jaxpr, closed.consts, inputs)
        return Graph(
            tuple(_without_unread(self.nodes, outputs)),
            tuple(inputs),
            tuple(outputs),
            self.consts,
            tuple(self.avals),
            out_tree,
        )

    def inline(self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[int]) -> list[int]:
        env: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.const(var.aval, const)

        def read(atom: Any) -> int:
            if isinstance(atom, core.Literal):
                return self.const(atom.aval, atom.val)
            return env[atom]

        for eqn in jaxpr.eqns:
            inner: Any = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            if eqn.primitive.name in _OPENED and _is_plain_call(eqn, inner):
                outputs = self.inline(inner.jaxpr, inner.consts, [read(a) for a in eqn.invars])
                env.update(zip(eqn.outvars, outputs, strict=True))
                continue
            # A value that is read twice is one input.
            variables = list(
                dict.fromkeys(a for a in eqn.invars if not isinstance(a, core.Literal))
            )
            outputs = [self.value(var.aval) for var in eqn.outvars]
            reads = tuple(env[var] for var in variables)
            env.update(zip(eqn.outvars, outputs, strict=True))
            self.nodes.append(
                Node(
                    eqn.primitive.name,
                    reads,
                    tuple(outputs),
                    sum(aval_bytes(var.aval) for var in eqn.outvars),
                    eqn_flops(eqn),
                    bool(eqn.effects),
                    _program(jaxpr, eqn, variables),
                )
            )
        return [read(atom) for atom in jaxpr.outvars]


def _program(jaxpr: core.Jaxpr, eqn: Any, variables: list[Any]) -> core.Jaxpr:
    program: core.Jaxpr = jaxpr.replace(
        constvars=[], invars=variables, outvars=list(eqn.outvars), eqns=[eqn], effects=eqn.effects
    )
    return program


def _is_plain_call(eqn: Any, inner: Any) -> bool:
    # Only older versions of JAX have a class, `ClosedJaxpr`, for a program with its constants.
    if not hasattr(inner, "consts"):
        return False
    # Shardings that the user gave to an inner jit are kept, by keeping the call.
    shardings = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    return all(type(sharding).__name__ == "UnspecifiedValue" for sharding in shardings)


def _without_unread(nodes: Sequence[Node], outputs: Sequence[int]) -> list[Node]:
    read = set(outputs)
    kept = []
    for node in reversed(nodes):
        if node.effects or not read.isdisjoint(node.outputs):
            read.update(node.inputs)
            kept.append(node)
    return kept[::-1]
