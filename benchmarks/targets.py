"""What a benchmark has to reach, and the lines that say whether it did."""

from typing import NamedTuple


class Target(NamedTuple):
    """What was promised and what was measured."""

    text: str
    limit: float
    value: float
    quartiles: tuple[float, float] | None = None

    @property
    def met(self) -> bool:
        """Whether the measured figure, as it is printed, is within the limit."""
        return bool(round(self.value, 3) <= self.limit)


def format_targets(targets: list[Target]) -> str:
    """A line for each."""
    lines = ["\nTargets"]
    for target in targets:
        spread = ""
        if target.quartiles is not None:
            spread = f" ({target.quartiles[0]:.3f}-{target.quartiles[1]:.3f})"
        verdict = "met" if target.met else "MISSED"
        lines.append(
            f"{verdict:7} {target.value:7.3f}{spread:18} <= {target.limit:<5g} {target.text}"
        )
    return "\n".join(lines)
