"""Compares candidates for the default rule of `autoclip()`, without a percentile, on streams.

Runs candidates, written in NumPy, over the streams of `streams.py` with several seeds, and prints
the number of seeds at which each passes. There are three families: a multiple of the rolling
median; the upper quartile plus a multiple of the interquartile range; and the median plus a
multiple of its distance to the lower quartile. From the first norm on and until there are 10 norms,
the threshold is a multiple of their median: 3 times for the first two families, 1.5 times for the
third.

The streams show which candidates are safe. `make study-rules` shows which of those train best.

    python benchmarks/auto_rules.py [--seeds 20]
"""

import argparse
import bisect
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import streams

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from running_reference import quantile

Threshold = Callable[[list[float]], float]

EARLY_NORMS = 10


def median_rule(factor: float) -> Threshold:
    """`factor` times the median."""
    return lambda ordered: factor * quantile(ordered, 0.5)


def lower_fence_rule(factor: float) -> Threshold:
    """The median plus `factor` times its distance to the lower quartile."""

    def fence(ordered: list[float]) -> float:
        q25, q50 = quantile(ordered, 0.25), quantile(ordered, 0.5)
        return q50 + factor * (q50 - q25)

    return fence


def upper_fence_rule(factor: float) -> Threshold:
    """The upper quartile plus `factor` times the interquartile range."""

    def fence(ordered: list[float]) -> float:
        q25, q75 = quantile(ordered, 0.25), quantile(ordered, 0.75)
        return q75 + factor * (q75 - q25)

    return fence


def from_the_start(threshold: Threshold, early_factor: float) -> Threshold:
    """Uses a multiple of the median until there are ten norms; a limit of 0 becomes infinite."""
    early = median_rule(early_factor)

    def limit(ordered: list[float]) -> float:
        found = (threshold if len(ordered) >= EARLY_NORMS else early)(ordered)
        return found if found > 0 else np.inf

    return limit


def clipper(threshold: Threshold, window: int, early_factor: float = 3.0) -> streams.Clipper:
    """Clips by a function of the last `window` finite raw norms before this one, sorted."""
    rule = from_the_start(threshold, early_factor)

    def run(norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        arrived: list[float] = []
        ordered: list[float] = []
        clipped, thresholds = [], []
        for norm in norms:
            limit = rule(ordered) if ordered else np.inf
            thresholds.append(limit)
            clipped.append(min(norm, limit) if np.isfinite(norm) else 0.0)
            if np.isfinite(norm):
                arrived.append(norm)
                bisect.insort(ordered, norm)
                if len(ordered) > window:
                    ordered.remove(arrived[-window - 1])
        return np.array(clipped), np.array(thresholds)

    return streams.global_scope(run)


CANDIDATES = {
    **{f"{factor} median, 128": clipper(median_rule(factor), 128) for factor in (2.5, 3.0, 3.5)},
    "3.0 median, 112": clipper(median_rule(3.0), 112),
    **{
        f"q75 + 1.5 IQR, {window}": clipper(upper_fence_rule(1.5), window)
        for window in (64, 96, 112, 128, 256)
    },
    **{
        f"q75 + {factor} IQR, 112": clipper(upper_fence_rule(factor), 112)
        for factor in (1.0, 2.0, 3.0)
    },
    **{
        f"q50 + {factor} (q50 - q25), {window}": clipper(lower_fence_rule(factor), window, 1.5)
        for factor, window in (
            (2.5, 32),
            (2.5, 40),
            (2.5, 48),
            (2.5, 64),
            (2.5, 112),
            (1.5, 48),
            (2.0, 48),
            (3.0, 48),
        )
    },
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    seeds = range(parser.parse_args().seeds)
    print(f"Seeds (of {len(seeds)}) that pass; Python {platform.python_version()}, ", end="")
    print(f"NumPy {np.__version__}")
    print(f"{'rule, window':28}" + "".join(f"{name:>5}" for name in streams.CHECKS) + "  all")
    for name, candidate in CANDIDATES.items():
        passed = np.array(
            [[check(candidate, seed).passed for check in streams.CHECKS.values()] for seed in seeds]
        )
        counts = "".join(f"{count:5d}" for count in passed.sum(axis=0))
        print(f"{name:28}{counts}{passed.all(axis=1).sum():5d}", flush=True)


if __name__ == "__main__":
    main()
