"""What the package should compute, in float64 NumPy and as plainly as possible.

Nothing here imports the package. Norm streams are arrays of shape [steps]; each function returns
one number per step.
"""

import jax
import numpy as np


def norm(tree) -> float:
    """The Euclidean norm of all leaves of a tree."""
    leaves = [np.abs(np.asarray(leaf).astype(np.complex128)) for leaf in jax.tree.leaves(tree)]
    largest = max((leaf.max() for leaf in leaves if leaf.size), default=0.0)
    if largest == 0.0 or not np.isfinite(largest):
        return float(largest)
    return float(largest * np.sqrt(sum(np.sum((leaf / largest) ** 2) for leaf in leaves)))


def window(norms, step: int, size: int) -> np.ndarray:
    """The finite norms among `norms[:step]`, at most the last `size` of them."""
    seen = np.asarray(norms[:step], np.float64)
    return seen[np.isfinite(seen)][-size:]


def percentile_thresholds(norms, percentile: float, size: int) -> np.ndarray:
    """AutoClip: the percentile of the norms up to and including each step's."""
    return np.array(
        [np.percentile(window(norms, t + 1, size), percentile) for t in range(len(norms))]
    )


def fence_thresholds(norms, size: int = 112, warmup_steps: int = 10) -> np.ndarray:
    """Tukey's inner fence of the norms before each step's; infinite in warm-up."""
    thresholds = []
    for t in range(len(norms)):
        past = window(norms, t, size)
        if np.isfinite(np.asarray(norms[:t])).sum() < warmup_steps:
            thresholds.append(np.inf)
            continue
        q25, q75 = np.percentile(past, [25, 75])
        fence = q75 + 1.5 * (q75 - q25)
        thresholds.append(fence if fence > 0 else np.inf)
    return np.array(thresholds)


def zscore_thresholds(
    norms, zmax: float = 3.0, decay: float = 0.99, warmup_steps: int = 10
) -> np.ndarray:
    """Mean + zmax * std of the norms before each step's, each recorded as at most mean + 3 std."""
    mean = variance = 0.0
    recorded = observed = 0
    thresholds = []
    for value in np.asarray(norms, np.float64):
        std = max(np.sqrt(variance), 0.01 * mean)
        thresholds.append(mean + zmax * std if observed >= warmup_steps and recorded else np.inf)
        if not np.isfinite(value):
            continue
        observed += 1
        if value == 0:
            continue
        recorded += 1
        if recorded == 1:
            mean, variance = value, value**2
            continue
        weight = max(1 - decay, 1 / recorded)
        delta = min(value, mean + 3 * std) - mean
        mean, variance = mean + weight * delta, (1 - weight) * (variance + weight * delta**2)
    return np.array(thresholds)


def geometric_estimates(norms, percentile: float, rate: float) -> np.ndarray:
    """The estimate after each step; the median of up to 8 first norms, then fixed factors."""
    fraction = percentile / 100
    seed: list[float] = []
    estimate = float(np.finfo(np.float32).max)
    estimates = []
    for value in np.asarray(norms, np.float64):
        if np.isfinite(value) and value > 0:
            if len(seed) < 8:
                seed.append(value)
                estimate = float(np.median(seed))
            elif value > estimate:
                estimate = min(estimate * np.exp(rate * fraction), value)
            else:
                estimate = max(estimate * np.exp(-rate * (1 - fraction)), value)
        estimates.append(estimate)
    return np.array(estimates)


def clip(norms, thresholds) -> np.ndarray:
    """The norms after clipping; non-finite ones become zero."""
    return np.where(np.isfinite(norms), np.minimum(norms, thresholds), 0.0)
