"""Makes the mutants of a module with cosmic-ray's operators: one small mistake in each.

We use cosmic-ray with our own runner rather than mutmut. Mutmut does not mutate decorated
functions, which are many of ours, and runs mutants in forks of a process that has already compiled
the original.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider

# One or two replacements for each operator suffice: others fail the same tests.
_BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul LShift_RShift RShift_LShift"
_BINARY += " BitOr_BitAnd BitAnd_BitOr"
_COMPARISONS = "Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Eq_NotEq NotEq_Eq"
_COMPARISONS += " Is_IsNot IsNot_Is"
_OPERATORS = [
    *(f"ReplaceBinaryOperator_{change}" for change in _BINARY.split()),
    *(f"ReplaceComparisonOperator_{change}" for change in _COMPARISONS.split()),
    *(f"ReplaceUnaryOperator_Delete_{sign}" for sign in ("USub", "Invert", "Not")),
    *(
        "ReplaceTrueWithFalse",
        "ReplaceFalseWithTrue",
        "ReplaceAndWithOr",
        "ReplaceOrWithAnd",
    ),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"),
    *("AddNot", "RemoveDecorator"),
]

_OPPOSITES = {
    "minimum": "maximum",
    "min": "max",
    "fmin": "fmax",
    "any": "all",
    "floor": "ceil",
}
_OPPOSITES |= {"zeros": "ones", "zeros_like": "ones_like", "argmin": "argmax"}
_OPPOSITES |= {new: old for old, new in _OPPOSITES.items()}


class _OwnOperator(Operator):
    @classmethod
    def examples(cls):
        return ()


class ReplaceNumber(_OwnOperator):
    """Adds one to an integer, and doubles other numbers."""

    def mutation_positions(self, node):
        if node.type == "number":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        number = ast.literal_eval(node.value)
        other = number + 1 if isinstance(number, int) or number == 0 else 2 * number
        node.value = repr(other)
        return node


class ReplaceFunction(_OwnOperator):
    """Calls the opposite function, the counterpart in array code of a reversed comparison."""

    def mutation_positions(self, node):
        if node.type == "name" and node.value in _OPPOSITES:
            after = node.parent.get_next_sibling() if node.parent.type == "trailer" else None
            after = after or (node.get_next_sibling() if node.parent.type == "atom_expr" else None)
            if after is not None and after.type == "trailer":
                yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        node.value = _OPPOSITES[node.value]
        return node


class SwapBranches(_OwnOperator):
    """Swaps the two branches of a condition on arrays."""

    def mutation_positions(self, node):
        if node.type == "arglist" and len(node.children) >= 5:
            name = node.parent.get_previous_sibling().get_last_leaf().value
            if name in ("where", "select_groups", "cond"):
                yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        children = node.children
        children[2], children[4] = children[4], children[2]
        return node


def operators() -> dict[str, Operator]:
    """All operators, by name."""
    provider = OperatorProvider()
    own = (ReplaceNumber, ReplaceFunction, SwapBranches)
    return {name: provider[name]() for name in _OPERATORS} | {op.__name__: op() for op in own}


class Mutant(NamedTuple):
    """One mistake. `before` and `after` are the text of its line, whose number may change."""

    path: str
    line: int
    operator: str
    before: str
    after: str
    occurrence: int

    def mutate(self, source: str) -> str:
        """Returns the source of the module with the mistake."""
        return mutate_code(source, operators()[self.operator], self.occurrence)


def find_mutants(path: str, source: str) -> Iterator[Mutant]:
    """Yields the mutants of a module, except those that cannot change its behavior."""
    skipped = list(_skipped(ast.parse(source)))
    original = ast.dump(ast.parse(source))
    nodes = list(ast_nodes(get_ast(source)))
    for name, operator in operators().items():
        positions = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(positions):
            if any(first <= start < last for first, last in skipped):
                continue
            mutated = mutate_code(source, operator, occurrence)
            try:
                same = ast.dump(ast.parse(mutated)) == original
            except SyntaxError:
                continue  # The mutated asterisk may have marked keyword arguments.
            if not same:
                line, before, after = _difference(source, mutated)
                yield Mutant(path, line, name, before, after, occurrence)


def _difference(source: str, mutated: str) -> tuple[int, str, str]:
    """The number and both versions of the first line that differs; a removed line is empty."""
    old, new = source.splitlines(), mutated.splitlines()
    line = next(i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1])
    after = new[line] if len(new) == len(old) else ""
    return line + 1, " ".join(old[line].split()), " ".join(after.split())


def _skipped(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yields the ranges of annotations, `raise` statements and zip's `strict=`, a mere check."""
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef):
            args = node.args
            every = [
                *args.posonlyargs,
                *args.args,
                *args.kwonlyargs,
                args.vararg,
                args.kwarg,
            ]
            parts = [node.returns, *(arg.annotation for arg in every if arg)]
            # Decorators for type checkers.
            parts += [part for part in node.decorator_list if "transform" in ast.dump(part)]
            # The asterisk before keyword-only arguments, which may become a slash.
            if args.kwonlyargs and args.args:
                last, first = (args.defaults or args.args)[-1], args.kwonlyargs[0]
                yield (last.end_lineno, last.end_col_offset), (first.lineno, first.col_offset)
        elif isinstance(node, ast.AnnAssign):
            parts = [node.annotation]
        elif isinstance(node, ast.Raise) or (
            isinstance(node, ast.keyword) and node.arg == "strict"
        ):
            parts = [node]
        elif isinstance(node, ast.Module):
            parts = [x for x in node.body if isinstance(x, ast.Assign) and _is_union(x.value)]
        for part in filter(None, parts):
            # The range of a decorator includes its @.
            yield (
                (part.lineno, part.col_offset - 1),
                (part.end_lineno, part.end_col_offset),
            )


def _is_union(node: ast.expr) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)
