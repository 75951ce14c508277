"""The equations of the package, in float64 NumPy and as plain as possible.

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


def reported(values) -> np.ndarray:
    """Norms, losses or thresholds as metrics have them: the largest float32 for NaN and Inf."""
    return np.where(np.isfinite(values), values, np.finfo(np.float32).max)


def unreported(values) -> np.ndarray:
    """From metrics, with Inf where they have the largest float32."""
    return np.where(values < np.finfo(np.float32).max, values, np.inf)


def window(norms, step: int, size: int) -> np.ndarray:
    """The positive, finite norms among `norms[:step]`, at most the last `size` of them."""
    seen = np.asarray(norms[:step], np.float64)
    return seen[np.isfinite(seen) & (seen > 0)][-size:]


def percentile_thresholds(norms, percentile: float, size: int) -> np.ndarray:
    """AutoClip: the percentile of the norms up to and including each step's."""
    pasts = [window(norms, t + 1, size) for t in range(len(norms))]
    return np.array([np.percentile(past, percentile) if past.size else np.inf for past in pasts])


def fence_thresholds(norms, size: int, fence, early_factor: float, warmup_steps: int) -> np.ndarray:
    """A fence of the norms before each step's; of fewer than 10, a multiple of their median."""
    thresholds = []
    for t in range(len(norms)):
        past = window(norms, t, len(norms))
        if len(past) < max(warmup_steps, 1):
            thresholds.append(np.inf)
            continue
        q25, median, q75 = np.percentile(past[-size:], [25, 50, 75])
        limit = early_factor * median if len(past) < 10 else fence(q25, median, q75)
        thresholds.append(limit if limit > 0 else np.inf)
    return np.array(thresholds)


def lower_fence_thresholds(norms, warmup_steps: int = 1) -> np.ndarray:
    """Median + 2.5 (median - q25) of 48 norms; 1.5 times the median of few."""

    def fence(q25, median, _):
        return median + 2.5 * (median - q25)

    return fence_thresholds(norms, 48, fence, 1.5, warmup_steps)


def upper_fence_thresholds(norms, warmup_steps: int = 1) -> np.ndarray:
    """Tukey's inner fence of 112 norms; 3 times the median of few."""

    def fence(q25, _, q75):
        return q75 + 1.5 * (q75 - q25)

    return fence_thresholds(norms, 112, fence, 3.0, warmup_steps)


def zscore_thresholds(
    norms, zmax: float = 3.0, decay: float = 0.99, warmup_steps: int = 1
) -> np.ndarray:
    """Mean + zmax * std of the norms before each step's, each recorded as at most mean + 3 std."""
    mean = variance = 0.0
    recorded = observed = 0
    thresholds = []
    for value in np.asarray(norms, np.float64):
        std = max(np.sqrt(variance), 0.01 * mean)
        thresholds.append(mean + zmax * std if observed >= warmup_steps and recorded else np.inf)
        if not np.isfinite(value) or value == 0:
            continue
        observed += 1
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


def skipped_steps(
    norms,
    losses=None,
    *,
    sigma: float = 6.0,
    size: int = 128,
    max_consecutive: int = 32,
    warmup_steps: int = 10,
) -> tuple[np.ndarray, np.ndarray]:
    """The steps that are dropped, and the thresholds [steps, 2] of norm and loss.

    Steps with NaN or Inf are dropped, and those above the median + sigma * spread of the last
    `size` finite values, but never more than `max_consecutive` of the latter in a row.
    """
    nothing = np.zeros(len(norms))
    streams = [
        np.asarray(stream, np.float64) for stream in (norms, nothing if losses is None else losses)
    ]
    skipped = np.zeros(len(norms), bool)
    thresholds = np.full((len(norms), 2), np.inf)
    in_a_row = 0
    for t in range(len(norms)):
        for kind, stream in enumerate(streams[: 1 if losses is None else 2]):
            past = stream[:t][np.isfinite(stream[:t])]
            # A norm of zero is not remembered; a loss of zero is.
            past = past[past > 0] if kind == 0 else past
            if len(past) >= max(warmup_steps, 1):
                q25, median, q75 = np.percentile(past[-size:], [25, 50, 75])
                spread = max((q75 - q25) / 1.349, 0.003 * abs(median))
                thresholds[t, kind] = median + sigma * spread if spread > 0 else np.inf
        now = np.array([stream[t] for stream in streams])
        if not np.isfinite(now).all():
            skipped[t] = True
            continue
        skipped[t] = (now > thresholds[t]).any() and in_a_row < max_consecutive
        if now[0] > 0 or losses is not None:
            in_a_row = in_a_row + 1 if skipped[t] else 0
    return skipped, thresholds


def olmo_skipped_steps(values, sigma: float = 6.0, size: int = 128) -> np.ndarray:
    """The steps not within the mean + sigma * std of the last `size` values of any kind."""
    values = np.asarray(values, np.float64)
    skipped = np.zeros(len(values), bool)
    for t in range(max(2, size // 2), len(values)):
        past = values[max(0, t - size) : t]
        with np.errstate(invalid="ignore"):
            skipped[t] = not values[t] - past.mean() <= sigma * past.std(ddof=1)
    return skipped


def zclip_thresholds(
    norms,
    zmax: float = 2.5,
    decay: float = 0.97,
    clip_to: str = "reciprocal",
    clip_factor: float = 1.0,
    record_limit: float | None = None,
    warmup_steps: int = 25,
) -> tuple[np.ndarray, np.ndarray]:
    """ZClip: what each step's norm is held to, and where outliers begin; infinite in warm-up."""
    first: list[float] = []
    mean = variance = 0.0
    thresholds, edges = [], []
    for value in np.asarray(norms, np.float64):
        std = np.sqrt(variance)
        learned = len(first) >= warmup_steps
        edge = mean + zmax * std if learned else np.inf
        threshold = edge
        if np.isfinite(value) and value > edge:
            reciprocal = mean + zmax * std * zmax * std / (value - mean)
            targets = {"reciprocal": reciprocal * clip_factor, "mean": mean, "max": edge}
            threshold = targets[clip_to]
        thresholds.append(threshold)
        edges.append(edge)
        if not np.isfinite(value) or value == 0:
            continue
        if not learned:
            first.append(value)
            mean, variance = np.mean(first), np.var(first)
            continue
        if record_limit is None:
            recorded = min(value, threshold)
        else:
            recorded = min(value, mean + record_limit * max(std, 0.01 * mean))
        mean = decay * mean + (1 - decay) * recorded
        variance = decay * variance + (1 - decay) * (recorded - mean) ** 2
    return np.array(thresholds), np.array(edges)


def adagc_thresholds(
    norms,
    relative_clip: float = 1.04,
    decay: float = 0.99,
    absolute_clip: float | None = 1.0,
    record_limit: float | None = None,
    warmup_steps: int = 100,
) -> np.ndarray:
    """AdaGC of norms [steps, tensors]: the threshold of each tensor at each step."""
    norms = np.asarray(norms, np.float64)
    average = np.zeros(norms.shape[1])
    recorded = np.zeros(norms.shape[1], int)
    thresholds = np.empty(norms.shape)
    for step, values in enumerate(np.where(np.isfinite(norms), norms, 0.0)):
        whole = np.sqrt(np.sum(values**2))
        cut = absolute_clip is not None and whole > absolute_clip
        for tensor, value in enumerate(values):
            if recorded[tensor] < warmup_steps:
                threshold = value * absolute_clip / whole if cut else np.inf
                clipped = min(value, threshold)
                after = min(average[tensor], clipped) if recorded[tensor] else clipped
            else:
                threshold = relative_clip * average[tensor]
                most = threshold if record_limit is None else record_limit * average[tensor]
                after = decay * average[tensor] + (1 - decay) * min(value, most)
            thresholds[step, tensor] = threshold
            if value > 0:
                average[tensor] = after
                recorded[tensor] += 1
    return thresholds


def fading_percentile(norms, percentile: float, decay: float) -> float:
    """The smallest norm up to which there is that share of the weight, the last one's being 1."""
    ascending = np.sort(norms)
    weights = (decay ** np.arange(len(norms))[::-1].astype(np.float64))[np.argsort(norms)]
    shares = np.cumsum(weights) / np.sum(weights)
    return float(ascending[np.searchsorted(shares, percentile / 100).clip(max=len(norms) - 1)])
