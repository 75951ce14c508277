"""Counts traffic, operations and collectives of a compiled program from the text that XLA prints.

Traffic is the number of bytes that instructions read and write in main memory: operands and
results, each once, by the size of their shapes. An array whose layout names another memory space,
such as `S(1)` on a TPU, is not in main memory: the asynchronous copy that fetches an array into
fast memory reads it once, and computations on it there read nothing. A slice, also at the start of
a fusion, reads only its own size, and an update of a slice reads and writes only the update. A
tuple, a bitcast and the end of an asynchronous operation move nothing.

The body of a loop and the branches of a conditional are counted apart, since they do not run in
every step.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple


class Array(NamedTuple):
    """The size of an array in bytes, and whether it is in main memory."""

    bytes: int
    in_main_memory: bool


class Instruction(NamedTuple):
    """One line of a computation; `shape` and `attributes` are in XLA's format."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    attributes: str

    def arrays(self) -> list[Array]:
        """The arrays of the result, with nested tuples flattened."""
        return arrays(self.shape)

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names."""
        found = re.search(rf"\b{attribute}=(?:\{{(.*?)\}}|%?([\w.-]+))", self.attributes)
        return re.findall(r"[\w.-]+", found[1] or found[2]) if found else []

    def within(self) -> list[str]:
        """The computations that run as a part of it, for fusions and calls."""
        if self.operation == "call":
            return self.called("to_apply")
        return self.called("calls")

    def apart(self) -> list[str]:
        """The body of a loop, or the branches of a conditional."""
        if self.operation == "while":
            return self.called("body")
        if self.operation == "conditional":
            listed = self.called("branch_computations")
            return listed or self.called("true_computation") + self.called("false_computation")
        return []


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape or a tuple, in XLA's format: `f32[3,4]{1,0:T(8,128)S(1)}`."""
    found = []
    for kind, dimensions, layout in re.findall(
        r"([a-z]+\d*)\w*\[([\d,<=]*)\](\{[^}]*\})?", re.sub(r"/\*.*?\*/", "", shape)
    ):
        bits = int(re.sub(r"\D", "", kind) or 8)
        sizes = (int(size.strip("<=")) for size in dimensions.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(math.prod(sizes) * bits // 8, space is None or space[1] == "0"))
    return found


def shape_bytes(shape: str) -> int:
    """The bytes of an array or of a tuple of arrays, in any memory."""
    return sum(array.bytes for array in arrays(shape))


def elements(shape: str) -> list[str]:
    """The shapes in a tuple, which may themselves be tuples."""
    depth, parts = 0, [""]
    for character in shape[1:-1]:
        if character == "," and depth == 0:
            parts.append("")
            continue
        depth += (character in "([{") - (character in ")]}")
        parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def closing(text: str, start: int) -> int:
    """The index at which the bracket closes that opens at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"a bracket does not end: {text[start : start + 80]}")


def read_instruction(line: str) -> Instruction | None:
    """Parses a line; returns None if it is not an instruction."""
    line = re.sub(r"/\*.*?\*/", "", line)
    head = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)
    if not head:
        return None
    start = head.end()
    end = closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    last = closing(line, opening)
    inner, operation = line[opening + 1 : last], line[end:opening].strip()
    # A parameter's operand is its number.
    operands = [inner] if operation == "parameter" else re.findall(r"%([\w.-]+)", inner)
    return Instruction(head[1], line[start:end], operation, tuple(operands), line[last + 1 :])


# These move nothing, or their traffic is counted at other instructions.
FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "conditional",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
# These custom calls move nothing either: a view of several slices as one array, and empty memory.
FREE_CALLS = ("ConcatBitcast", "AllocateBuffer")
# These read only as much of their first operand as they return.
SLICES = {"slice", "dynamic-slice", "gather"}
UPDATE = "dynamic-update-slice"
COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}
KERNELS = ("fusion", "copy", "reduce", "reduce-window")


class ProgramText:
    """A compiled program, as a dict of computations."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, str] = {}
        self.entry = ""
        name = ""
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
            if header and not line.startswith("HloModule"):
                name = header[2]
                self.computations[name] = {}
                if header[1]:
                    self.entry = name
            elif name and (instruction := read_instruction(line)):
                self.computations[name][instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    self.roots[name] = instruction.name

    def instructions(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """Yields the instructions of a computation and of its calls, each with its computation."""
        for instruction in self.computations[name].values():
            if instruction.operation == "call":
                for called in instruction.within():
                    yield from self.instructions(called)
            else:
                yield name, instruction

    def everywhere(self) -> Iterator[Instruction]:
        """Yields all instructions of all computations."""
        for computation in self.computations.values():
            yield from computation.values()

    def traffic(self, name: str | None = None) -> int:
        """Bytes that a computation, the entry by default, reads and writes in main memory."""
        return sum(
            self.moved(computation, instruction)
            for computation, instruction in self.instructions(name or self.entry)
        )

    def traffic_apart(self, name: str | None = None) -> int:
        """The traffic of one iteration of each loop and the costliest branch of conditionals."""
        total = 0
        for _, instruction in self.instructions(name or self.entry):
            costs = [self.traffic(part) + self.traffic_apart(part) for part in instruction.apart()]
            total += max(costs, default=0)
        return total

    def operations(self, name: str | None = None) -> collections.Counter[str]:
        """Counts the operations in a computation by name, asynchronous ones as `copy-start` etc."""
        return collections.Counter(
            instruction.operation for _, instruction in self.instructions(name or self.entry)
        )

    def collectives(self, name: str | None = None) -> collections.Counter[str]:
        """Counts the collectives in a computation by kind, also in fusions.

        The start and the end of an asynchronous one count once.
        """
        found: collections.Counter[str] = collections.Counter()
        for _, instruction in self.instructions(name or self.entry):
            base = instruction.operation.removesuffix("-start")
            if base in COLLECTIVES:
                found[base] += 1
            elif base in ("fusion", "async"):
                for part in instruction.within():
                    found += self.collectives(part)
        return found

    def moved(self, computation: str, instruction: Instruction) -> int:
        """Bytes that an instruction of a computation reads and writes in main memory."""
        operation = instruction.operation
        if operation in FREE or operation.endswith(("-done", "-update")):
            return 0
        if any(f'custom_call_target="{name}"' in instruction.attributes for name in FREE_CALLS):
            return 0
        known = self.computations[computation]
        operands = [known[name].arrays() for name in instruction.operands]
        base = operation.removesuffix("-start")
        results = arrays(instruction.shape)
        if operation == "copy-start":
            results = arrays(elements(instruction.shape)[0])
        elif operation != base and base != "all-reduce":
            # The shape has operands, results, and buffers for the duration of the operation.
            results = arrays(elements(instruction.shape)[1])
        reads: dict[int, list[Array]] = {}
        writes: dict[int, list[Array]] = {}
        if base in ("fusion", "async"):
            reads, writes = self.parts(instruction.within()[0])
        elif base in SLICES:
            reads = {0: results}
        elif base == UPDATE:
            reads, writes = {0: []}, {0: operands[1]}
        total = 0
        for number, operand in enumerate(operands):
            total += bytes_of(operand, reads.get(number))
        for number, result in enumerate(results):
            total += bytes_of([result], writes.get(number))
        return total

    def parts(self, name: str) -> tuple[dict[int, list[Array]], dict[int, list[Array]]]:
        """Returns the slices that a fusion reads of its parameters, and the updates of its results.

        Parameters that are read as a whole and results that are written as a whole are missing.
        """
        instructions = self.computations[name]
        users = collections.defaultdict(list)
        for instruction in instructions.values():
            for number, operand in enumerate(instruction.operands):
                users[operand].append((number, instruction))

        def taken(operand: str) -> list[Array] | None:
            found: list[Array] = []
            for number, user in users[operand]:
                if user.operation == "bitcast":
                    part = taken(user.name)
                elif user.operation in SLICES and number == 0:
                    part = user.arrays()
                elif user.operation == UPDATE and number == 0:
                    part = []
                else:
                    part = None
                if part is None:
                    return None
                found += part
            return found

        reads = {}
        for instruction in instructions.values():
            if instruction.operation == "parameter":
                part = taken(instruction.name)
                if part is not None:
                    reads[int(instruction.operands[0])] = part
        root = instructions[self.roots[name]]
        writes = {}
        for number, output in enumerate(
            root.operands if root.operation == "tuple" else [root.name]
        ):
            last, updates = instructions[output], []
            while last.operation in ("bitcast", UPDATE):
                if last.operation == UPDATE:
                    updates += instructions[last.operands[1]].arrays()
                last = instructions[last.operands[0]]
            if updates:
                writes[number] = updates
        return reads, writes


def bytes_of(whole: list[Array], part: list[Array] | None) -> int:
    """The bytes of those arrays that are in main memory, or of the accessed part of them."""
    if not any(array.in_main_memory for array in whole):
        return 0
    if part is not None:
        return sum(array.bytes for array in part)
    return sum(array.bytes for array in whole if array.in_main_memory)


def xla_bytes(compiled: Any) -> float | None:
    """XLA's count of bytes that a program reads and writes; None if it does not report it."""
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return (analysis or {}).get("bytes accessed")


def usual_bytes(compiled: Any) -> float | None:
    """XLA's count, but with the cheapest branch of each conditional and without loop bodies."""
    total = xla_bytes(compiled)
    if total is None:
        return None
    program = ProgramText(compiled.as_text())
    for instruction in program.everywhere():
        each = [program.traffic(name) for name in instruction.apart()]
        total -= max(each) - min(each) if len(each) > 1 else sum(each)
    return total


def temporary_bytes(compiled: Any) -> int | None:
    """Temporary memory in bytes; None if XLA does not report it."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes
