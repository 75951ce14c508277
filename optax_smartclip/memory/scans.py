"""Checkpointing inside a `scan`, for models that scan over their layers.

JAX saves the residuals of every iteration. Here the iterations fall into blocks. The forward pass
saves the carry at the start of each block. The backward pass computes the carries of one block
again, and then the body of one iteration after the other, by a plan of its own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from optax_smartclip.engine.meshes import vary_as
from optax_smartclip.memory.equations import is_inexact
from optax_smartclip.memory.graph import Graph, Node, capture_body

Values = dict[int, Any]
# The results of a body, and the function from their cotangents to those of its inputs.
Vjp = Callable[[Values, Sequence[Any]], tuple[list[Any], Callable[[Values], Values]]]

# More memory than the least may be used by this factor, where that saves recomputation.
SLACK = 1.05


@dataclasses.dataclass(frozen=True)
class Scan:
    """A `scan` whose iterations are checkpointed.

    Attributes:
        body: The program of an iteration, without the values that it closed over.
        consts: Those values.
        wanted: The inputs of the body that have cotangents.
        differentiated: The outputs of the body that have cotangents.
        params: Those of the equation.
        num_consts: The number of inputs of the body that are the same in all iterations.
        num_carry: The number of its inputs that are carries.
        operands: For each input of the body, a number that says which input of the node it is, or
            a literal.
    """

    body: Graph = dataclasses.field(repr=False)
    consts: Values = dataclasses.field(repr=False)
    wanted: frozenset[int]
    differentiated: frozenset[int]
    params: dict[str, Any] = dataclasses.field(repr=False)
    num_consts: int
    num_carry: int
    operands: tuple[int | core.Literal, ...] = dataclasses.field(repr=False)

    @property
    def length(self) -> int:
        """The number of iterations."""
        return int(self.params["length"])

    @property
    def first_x(self) -> int:
        """The place of the first scanned array among the inputs of the body."""
        return self.num_consts + self.num_carry

    @property
    def carry_bytes(self) -> int:
        """The bytes of one carry."""
        return sum(map(self.body.size, self.body.inputs[self.num_consts : self.first_x]))

    def block_bytes(self, block: int) -> int:
        """The bytes that are stacked again in the backward pass of a block of iterations.

        They are its carries, and its slices of the scanned arrays and of their gradients.
        """
        x = sum(map(self.body.size, self.body.inputs[self.first_x :]))
        return block * (self.carry_bytes + 2 * x)

    def choose_block(self) -> int:
        """The number of iterations in a block: a divisor of all, with about the least memory."""

        def memory(block: int) -> int:
            return self.length // block * self.carry_bytes + self.block_bytes(block)

        blocks = [size for size in range(1, self.length + 1) if self.length % size == 0]
        enough = SLACK * min(map(memory, blocks))
        return next(block for block in blocks if memory(block) <= enough)

    def vjp(
        self, body_vjp: Vjp, block: int, values: Sequence[Any]
    ) -> tuple[list[Any], Callable[[Sequence[Any]], dict[int, Any]]]:
        """Runs the node and returns its outputs and the pullback.

        Args:
            body_vjp: The derivative of the body.
            block: The number of iterations in a block.
            values: The inputs of the node.

        Returns:
            The outputs; a function from their cotangents, None where there is none, to those of the
            inputs of the node that have one, by their places.
        """
        operands = [
            atom.val if isinstance(atom, core.Literal) else values[atom] for atom in self.operands
        ]
        consts, init = operands[: self.num_consts], operands[self.num_consts : self.first_x]
        xs = [_split(x, block) for x in operands[self.first_x :]]

        def run_block(carry: Any, xs: Any) -> Any:
            last, (_, ys) = self._iterate(self._step(consts), carry, xs, block)
            return last, (carry, ys)

        num_blocks = self.length // block
        last, (starts, ys) = self._iterate(run_block, init, xs, num_blocks)

        def pullback(cotangents: Sequence[Any]) -> dict[int, Any]:
            back = self._back_step(body_vjp, consts)

            def back_block(total: Any, inputs: Any) -> Any:
                start, xs, of_ys = inputs
                _, (carries, _) = self._iterate(self._step(consts), start, xs, block)
                return self._iterate(back, total, (carries, xs, of_ys), block, back=True)

            of_last, of_ys = cotangents[: len(init)], cotangents[len(init) :]
            known = [
                _zeros_like(value) if cotangent is None and is_inexact(value) else cotangent
                for cotangent, value in zip(of_last, last, strict=True)
            ]
            total = known, [self._zero(place, const) for place, const in enumerate(consts)]
            of_ys = [None if y is None else _split(y, block) for y in of_ys]
            (of_init, of_consts), of_xs = self._iterate(
                back_block, total, (starts, xs, of_ys), num_blocks, back=True
            )
            of_xs = [None if x is None else _join(x) for x in of_xs]
            sums: dict[int, Any] = {}
            for atom, grad in zip(self.operands, [*of_consts, *of_init, *of_xs], strict=True):
                if isinstance(atom, int):
                    _add_to(sums, atom, grad)
            return sums

        return [*last, *map(_join, ys)], pullback

    def _iterate(self, step: Any, init: Any, xs: Any, length: int, *, back: bool = False) -> Any:
        reverse = bool(self.params["reverse"]) != back
        return jax.lax.scan(step, init, xs, length, reverse=reverse)

    def _step(self, consts: Sequence[Any]) -> Any:
        # An iteration forward, which returns its carry as well.
        closed = self.params["jaxpr"]

        def step(carry: Any, x: Any) -> Any:
            outputs = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *consts, *carry, *x)
            return outputs[: self.num_carry], (carry, outputs[self.num_carry :])

        return step

    def _back_step(self, body_vjp: Vjp, consts: Sequence[Any]) -> Any:
        # An iteration backward: cotangents of the carry and sums of those of the constants.
        def step(total: Any, inputs: Any) -> Any:
            of_carry, of_consts = total
            carry, x, of_ys = inputs
            values = [*consts, *carry, *x]
            _, pullback = body_vjp(self.consts, values)
            cotangents: Values = {}
            for v, given in zip(self.body.outputs, [*of_carry, *of_ys], strict=True):
                _add_to(cotangents, v, given)
            grads = pullback(cotangents)
            found = [grads.get(v) for v in self.body.inputs]
            found = [
                self._zero(place, value) if grad is None else grad
                for place, (grad, value) in enumerate(zip(found, values, strict=True))
            ]
            sums = [
                None if so_far is None else so_far + grad
                for so_far, grad in zip(of_consts, found[: self.num_consts], strict=True)
            ]
            of_start = found[self.num_consts : self.first_x]
            return (of_start, sums), found[self.first_x :]

        return step

    def _zero(self, place: int, value: Any) -> Any:
        # For an input of the body that has a cotangent, else None.
        return _zeros_like(value) if self.body.inputs[place] in self.wanted else None


def _add_to(sums: Values, key: int, value: Any) -> None:
    # None stands for no cotangent.
    if value is not None:
        sums[key] = sums[key] + value if key in sums else value


def _zeros_like(value: Any) -> Any:
    return vary_as(jnp.zeros_like(value), value)


def _split(x: Any, block: int) -> Any:
    return x.reshape(-1, block, *x.shape[1:])


def _join(x: Any) -> Any:
    return x.reshape(-1, *x.shape[2:])


def _count_inputs(eqn: Any) -> tuple[int, int] | None:
    """The numbers of constants and of carries; None if this version of JAX does not tell."""
    params = eqn.params
    if "num_consts" in params:
        return int(params["num_consts"]), int(params["num_carry"])
    # From JAX 0.12 on, there are trees of constants, carries and scanned arrays.
    unpack = getattr(params.get("ft_in"), "unpack", None)
    counts = [len(tree) for tree in unpack()] if unpack else []
    if len(counts) != 3 or sum(counts) != len(eqn.invars):
        return None
    return counts[0], counts[1]


def open_scan(node: Node, active: frozenset[int]) -> Scan | None:
    """Returns the scan that a node is, or None if it is not one that can be checkpointed."""
    eqn = node.jaxpr.eqns[0]
    if node.primitive != "scan" or node.effects or eqn.params["length"] < 2:
        return None
    counts = _count_inputs(eqn)
    if counts is None:
        return None
    places = {var: place for place, var in enumerate(node.jaxpr.invars)}
    operands = tuple(
        atom if isinstance(atom, core.Literal) else places[atom] for atom in eqn.invars
    )
    body = capture_body(eqn.params["jaxpr"])
    num_consts, num_carry = counts
    moved = {
        body.inputs[place]
        for place, operand in enumerate(operands)
        # A carry that starts as a constant may depend on the others after the first iteration.
        if num_consts <= place < num_consts + num_carry
        or (not isinstance(operand, core.Literal) and node.inputs[operand] in active)
    }
    inexact = {v for v, aval in enumerate(body.avals) if is_inexact(aval)}
    return Scan(
        body=body.without_consts(),
        consts=body.consts,
        wanted=frozenset(moved & inexact),
        differentiated=frozenset(inexact.intersection(body.outputs)),
        params=eqn.params,
        num_consts=num_consts,
        num_carry=num_carry,
        operands=operands,
    )
