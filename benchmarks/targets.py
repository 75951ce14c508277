"""The targets of a benchmark, and the lines that report whether they are met."""

from typing import NamedTuple


class Target(NamedTuple):
    """A limit and the measured value."""

    text: str
    limit: float
    value: float
    quartiles: tuple[float, float] | None = None

    @property
    def met(self) -> bool:
        """Whether the measured value, rounded as in print, is within the limit."""
        return bool(round(self.value, 3) <= self.limit)


def format_targets(targets: list[Target]) -> str:
    """Formats one line for each target."""
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
