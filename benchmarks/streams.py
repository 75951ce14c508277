"""Ten streams of gradient norms, S1 to S10, and what a good clipper does on each.

Six thousand norms of log-normal noise around 1 (a coefficient of variation of 0.2) and what goes
wrong in training: drift, one spike, a spike in warm-up, a burst, NaN and Inf, a level shift,
heavy tails, another scale, zeros and constants. A clipper is given as a function from a stream of
norms to the clipped norms and the thresholds; each check returns its figures and whether they are
within the marks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 6000
SPIKE = 1000.0

# norms -> clipped norms, thresholds
Clipper = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Result(NamedTuple):
    """What a clipper did on one stream."""

    passed: bool
    figures: dict[str, float]


def from_transformation(
    tx: optax.GradientTransformation, threshold: float = float("nan")
) -> Clipper:
    """What an Optax transformation does to gradients with these norms.

    Each gradient has one element that is not zero, in another leaf or place at each step, so that
    its norm is exact. Thresholds are read from the metrics of a clipper of ours; for another
    transformation, `threshold` is the one that it keeps.
    """
    zeros = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(3)}
    size = sum(leaf.size for leaf in jax.tree.leaves(zeros))

    def step(carry, norm):
        state, place = carry
        elements = jnp.zeros(size).at[place].set(norm)
        grads = {"kernel": elements[:4].reshape(2, 2), "bias": elements[4:]}
        updates, state = tx.update(grads, state, zeros)
        clipped = jnp.sum(jnp.stack([jnp.sum(jnp.abs(leaf)) for leaf in updates.values()]))
        learnt = optax.tree.get(state, "clip_threshold", default=jnp.float32(threshold))
        return (state, (place + 1) % size), (clipped, learnt)

    @jax.jit
    def run(norms):
        return jax.lax.scan(step, (tx.init(zeros), 0), norms)[1]

    def clipper(norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        clipped, thresholds = run(jnp.asarray(norms, jnp.float32))
        return np.asarray(clipped, np.float64), np.asarray(thresholds, np.float64)

    return clipper


def noise(seed: int = 0) -> np.ndarray:
    """S1: log-normal noise with the median 1."""
    return np.exp(0.2 * np.random.default_rng(seed).normal(size=STEPS))


def heavy_tails(seed: int = 0) -> np.ndarray:
    """S8: Student's t with two degrees of freedom, folded; median 1.3, some norms over 50."""
    generator = np.random.default_rng(seed)
    generator.normal(size=STEPS)
    return np.abs(generator.standard_t(2, size=STEPS)) + 0.5


def _clipped_percent(norms, clipped) -> float:
    return 100 * float(np.mean(clipped < norms * (1 - 1e-6)))


def check_noise(clipper: Clipper, seed: int = 0) -> Result:
    """S1: ordinary noise is left alone."""
    norms = noise(seed)
    clipped, _ = clipper(norms)
    percent = _clipped_percent(norms[1000:], clipped[1000:])
    scale = float(np.mean(clipped[1000:] / norms[1000:]))
    return Result(percent <= 6 and scale > 0.99, {"clip %": percent, "mean scale": scale})


def check_drift(clipper: Clipper, seed: int = 0) -> Result:
    """S2: the level falls by a factor of 100 over the run."""
    level = np.logspace(0, -2, STEPS)
    norms = noise(seed) * level
    clipped, thresholds = clipper(norms)
    ratio = float(np.median(thresholds[-1000:] / level[-1000:]))
    percent = _clipped_percent(norms[-1000:], clipped[-1000:])
    return Result(ratio <= 4 and percent <= 5, {"threshold / level": ratio, "clip %": percent})


def check_spike(clipper: Clipper, seed: int = 0) -> Result:
    """S3: one norm of 1000."""
    norms = noise(seed)
    before, _ = clipper(norms)
    spiked = norms.copy()
    spiked[3000] = SPIKE
    clipped, thresholds = clipper(spiked)
    after = slice(3001, 3201)
    figures = {
        "out": float(clipped[3000]),
        "threshold after / before": float(thresholds[3001] / thresholds[2999]),
        "extra clip %": _clipped_percent(spiked[after], clipped[after])
        - _clipped_percent(norms[after], before[after]),
    }
    out, growth, extra = figures.values()
    return Result(out <= 3 and growth <= 1.1 and extra <= 2, figures)


def check_early_spike(clipper: Clipper, seed: int = 0) -> Result:
    """S4: a norm of 1000 as the eleventh."""
    norms = noise(seed)
    _, undisturbed = clipper(norms)
    norms[10] = SPIKE
    clipped, thresholds = clipper(norms)
    figures = {
        "out": float(clipped[10]),
        "threshold at 110": float(thresholds[110] / undisturbed[110]),
    }
    out, ratio = figures.values()
    return Result(out <= 5 and ratio <= 1.5, figures)


def check_burst(clipper: Clipper, seed: int = 0) -> Result:
    """S5: twenty norms of 1000 in a row."""
    norms = noise(seed)
    norms[3000:3020] = SPIKE
    clipped, thresholds = clipper(norms)
    figures = {
        "largest out": float(clipped[3000:3020].max()),
        "threshold after / before": float(thresholds[3020:3220].max() / thresholds[2999]),
    }
    out, growth = figures.values()
    return Result(out <= 4 and growth <= 2, figures)


def check_nonfinite(clipper: Clipper, seed: int = 0) -> Result:
    """S6: NaN, Inf and NaN are as if they had not been there, and come out as zeros."""
    norms = noise(seed)
    disturbed = np.insert(norms, 3000, [np.nan, np.inf, np.nan])
    clipped, thresholds = clipper(disturbed)
    zeros = np.count_nonzero(clipped[3000:3003] == 0)
    expected, expected_thresholds = clipper(norms)
    rest = np.r_[0:3000, 3003 : STEPS + 3]
    same = np.array_equal(clipped[rest], expected) and np.array_equal(
        thresholds[rest], expected_thresholds
    )
    return Result(zeros == 3 and same, {"zero updates": zeros, "others unchanged": same})


def check_level_shift(clipper: Clipper, seed: int = 0) -> Result:
    """S7: the level rises tenfold, at once, or over 100 or 1000 steps."""
    norms = noise(seed)
    norms[3000:] *= 10
    clipped, _ = clipper(norms)
    scale = clipped / norms
    medians = np.array([np.median(scale[t - 49 : t + 1]) for t in range(3000, STEPS)])
    clipped_steps = np.flatnonzero(medians <= 0.9)
    figures = {"steps to recover": float(clipped_steps[-1] + 1 if clipped_steps.size else 0)}
    for length in (100, 1000):
        for shape, ramp in (
            ("linear", np.linspace(1, 10, length)),
            ("geometric", np.geomspace(1, 10, length)),
        ):
            norms = noise(seed)
            norms[3000:] *= np.r_[ramp, np.full(STEPS - 3000 - length, 10.0)]
            clipped, _ = clipper(norms)
            scale = clipped[3000 : 3000 + length] / norms[3000 : 3000 + length]
            figures[f"scale, {shape} ramp of {length}"] = float(scale.mean())
    steps, *scales = figures.values()
    return Result(steps <= 200 and min(scales) > 0.85, figures)


def check_heavy_tails(clipper: Clipper, seed: int = 0) -> Result:
    """S8: the noise itself has tails."""
    norms = heavy_tails(seed)
    clipped, _ = clipper(norms)
    figures = {
        "clip %": _clipped_percent(norms[1000:], clipped[1000:]),
        "largest out": float(clipped[1000:].max()),
    }
    percent, out = figures.values()
    return Result(percent <= 10 and out <= 6, figures)


def check_scale(clipper: Clipper, seed: int = 0) -> Result:
    """S9: thresholds scale with the norms, from 1e-6 to 1e4."""
    norms = noise(seed)
    _, thresholds = clipper(norms)
    warm = np.isfinite(thresholds)
    error = 0.0
    for factor in (1e-6, 1e-3, 50.0, 1e4):
        _, scaled = clipper(factor * norms)
        if not np.array_equal(np.isfinite(scaled), warm):
            return Result(False, {"relative error": float("inf")})
        error = max(error, np.max(np.abs(scaled[warm] / (factor * thresholds[warm]) - 1)))
    return Result(error <= 1e-4, {"relative error": error})


def check_constants(clipper: Clipper, seed: int = 0) -> Result:
    """S10: constant norms, zeros, and a lower constant: nothing to clip."""
    del seed
    norms = np.r_[np.ones(1000), np.zeros(10), np.full(500, 0.1)]
    clipped, _ = clipper(norms)
    # Either precision will do, but it has to be exact.
    changed = np.count_nonzero((clipped != norms) & (clipped != norms.astype(np.float32)))
    return Result(changed == 0, {"changed": changed})


CHECKS = {
    "S1": check_noise,
    "S2": check_drift,
    "S3": check_spike,
    "S4": check_early_spike,
    "S5": check_burst,
    "S6": check_nonfinite,
    "S7": check_level_shift,
    "S8": check_heavy_tails,
    "S9": check_scale,
    "S10": check_constants,
}
