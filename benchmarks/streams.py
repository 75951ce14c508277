"""Thirteen streams of gradient norms, S1 to S13, and checks of a good clipper on each.

Six thousand norms of log-normal noise around 1 (a coefficient of variation of 0.2) are combined
with typical problems of training: drift, one spike, a spike in warm-up, a burst, NaN and Inf, a
level shift, heavy tails, another scale, zeros and constants, spikes in one layer, spikes at 1 % of
all steps, and a spike as the second norm. A clipper is given as a function from a stream of norms
to the clipped norms and the thresholds. Each check returns its figures with their marks.

The marks of safety are strict: those for bursts, NaN, shifts, scale, and the effect of a spike on
later steps. The marks of noise allow an occasional small cut, but not that most steps are
normalized. In benchmarks/study, rules that cut an eighth of the steps slightly train better over
learning rates than rules that cut only outliers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 6000
SPIKE = 1000.0
LAYERS = 8
# The norm of each unit of the weights, with which some clippers compare gradients: 0.01 of it is
# twice the median norm of the gradient.
WEIGHT_NORM = 200.0

# Norms [steps] of whole gradients, or norms [steps, layers] -> clipped norms of the same shape,
# thresholds [steps], or [steps, groups] for layers.
Clipper = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Mark(NamedTuple):
    """The furthest from the ideal that a figure may be."""

    limit: float
    ideal: float = 0.0

    def excess(self, figure: float) -> float:
        """The distance from the ideal in units of the limit's distance; up to 1 passes."""
        if math.isnan(figure):
            return math.inf
        if self.limit == self.ideal:
            return 0.0 if figure == self.ideal else math.inf
        # Clipped norms are in float32: a norm clipped to 3 may be 3.0000001.
        return max(0.0, (figure - self.ideal) / (self.limit - self.ideal) - 1e-6)


class Result(NamedTuple):
    """The figures of a clipper on one stream.

    Attributes:
        figures: The measured figures, by name.
        marks: The marks of those figures that have one.
    """

    figures: dict[str, float]
    marks: dict[str, Mark]

    @property
    def excesses(self) -> dict[str, float]:
        """The distance of each figure from its ideal; over 1 is a failure."""
        return {name: mark.excess(self.figures[name]) for name, mark in self.marks.items()}

    @property
    def passed(self) -> bool:
        """Whether all figures are within their marks."""
        return max(self.excesses.values()) <= 1

    @property
    def worst(self) -> str:
        """The name of the figure that is furthest from its ideal."""
        return max(self.excesses, key=self.excesses.__getitem__)


def from_transformation(
    tx: optax.GradientTransformation, threshold: float = float("nan")
) -> Clipper:
    """Makes a clipper of streams from an Optax transformation.

    Each layer has one kernel. Its gradient has one nonzero element, at a different place in each
    step, so norms are exact. Thresholds are read from the metrics of our clippers; for other
    transformations, `threshold` is their fixed threshold.
    """

    def init(num_layers):
        weights = jnp.full((2, 2), WEIGHT_NORM / 2**0.5)
        params = {f"layer_{number}": {"kernel": weights} for number in range(num_layers)}
        return params, tx.init(params)

    @jax.jit
    def run(norms):
        params, state = init(norms.shape[1])

        def step(carry, layers):
            state, place = carry
            kernels = jnp.zeros((len(layers), 4)).at[:, place].set(layers).reshape(-1, 2, 2)
            grads = {name: {"kernel": kernel} for name, kernel in zip(params, kernels, strict=True)}
            updates, state = tx.update(grads, state, params)
            clipped = jnp.stack([jnp.sum(jnp.abs(updates[name]["kernel"])) for name in params])
            learned = jnp.float32(threshold)
            for name in ("skip_norm_threshold", "clip_threshold"):
                learned = optax.tree.get(state, name, default=learned)
            return (state, (place + 1) % 4), (clipped, jnp.atleast_1d(learned))

        return jax.lax.scan(step, (state, 0), norms)[1]

    def clipper(norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        layers = np.asarray(norms, np.float32).reshape(len(norms), -1)
        # Shorter streams are padded with zeros, so streams of all lengths run as one program.
        padding = max(0, STEPS + 3 - len(layers))
        clipped, thresholds = run(np.pad(layers, ((0, padding), (0, 0))))
        clipped, thresholds = (
            np.asarray(array, np.float64)[: len(norms)] for array in (clipped, thresholds)
        )
        # In metrics, the largest float32 stands for a missing threshold.
        thresholds[thresholds == np.finfo(np.float32).max] = np.inf
        return (clipped, thresholds) if np.ndim(norms) == 2 else (clipped[:, 0], thresholds[:, 0])

    return clipper


def global_scope(clipper: Clipper) -> Clipper:
    """Extends a clipper of norms [steps] to layers, which it scales by a common number."""

    def run(norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if np.ndim(norms) == 1:
            return clipper(norms)
        whole = np.linalg.norm(norms, axis=1)
        clipped, thresholds = clipper(whole)
        return norms * (clipped / whole)[:, None], thresholds[:, None]

    return run


def noise(seed: int = 0) -> np.ndarray:
    """S1: log-normal noise with median 1."""
    return np.exp(0.2 * np.random.default_rng(seed).normal(size=STEPS))


def heavy_tails(seed: int = 0) -> np.ndarray:
    """S8: Student's t with two degrees of freedom, folded; median 1.3, some norms over 50."""
    generator = np.random.default_rng(seed)
    generator.normal(size=STEPS)
    return np.abs(generator.standard_t(2, size=STEPS)) + 0.5


def layer_noise(seed: int = 0) -> np.ndarray:
    """Norms [steps, layers]: independent noise in each layer, with a global norm of about 1."""
    return np.exp(0.2 * np.random.default_rng(seed).normal(size=(STEPS, LAYERS))) / LAYERS**0.5


def _clipped_percent(norms, clipped) -> float:
    return 100 * float(np.mean(clipped < norms * (1 - 1e-6)))


def _ratio(after, before) -> np.ndarray:
    """The ratio, which is 1 if both are infinite because a clipper has no threshold."""
    same = np.equal(after, before)
    return np.where(same, 1.0, after / np.where(same, 1.0, before))


def check_noise(clipper: Clipper, seed: int = 0) -> Result:
    """S1: ordinary noise is cut rarely, and only slightly."""
    norms = noise(seed)
    clipped, _ = clipper(norms)
    percent = _clipped_percent(norms[1000:], clipped[1000:])
    scale = float(np.mean(clipped[1000:] / norms[1000:]))
    figures = {"clip %": percent, "mean scale": scale}
    return Result(figures, {"clip %": Mark(15), "mean scale": Mark(0.98, ideal=1)})


def check_drift(clipper: Clipper, seed: int = 0) -> Result:
    """S2: the level falls by a factor of 100 over the run."""
    level = np.logspace(0, -2, STEPS)
    norms = noise(seed) * level
    clipped, thresholds = clipper(norms)
    ratio = float(np.median(thresholds[-1000:] / level[-1000:]))
    percent = _clipped_percent(norms[-1000:], clipped[-1000:])
    figures = {"threshold / level": ratio, "clip %": percent}
    return Result(figures, {"threshold / level": Mark(4, ideal=1), "clip %": Mark(15)})


SPIKE_MARKS = {
    "out": Mark(3, ideal=1),
    "threshold after / before": Mark(1.1, ideal=1),
    "extra clip %": Mark(2),
}


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
        "threshold after / before": float(_ratio(thresholds[3001], thresholds[2999])),
        "extra clip %": _clipped_percent(spiked[after], clipped[after])
        - _clipped_percent(norms[after], before[after]),
    }
    return Result(figures, SPIKE_MARKS)


def check_early_spike(clipper: Clipper, seed: int = 0, *, place: int = 10) -> Result:
    """S4: the eleventh norm is 1000. S13: the second one is, at place 1."""
    norms = noise(seed)
    _, undisturbed = clipper(norms)
    norms[place] = SPIKE
    clipped, thresholds = clipper(norms)
    figures = {
        "out": float(clipped[place]),
        "threshold at 110": float(_ratio(thresholds[110], undisturbed[110])),
    }
    return Result(figures, {"out": Mark(5, ideal=1), "threshold at 110": Mark(1.5, ideal=1)})


def check_burst(clipper: Clipper, seed: int = 0) -> Result:
    """S5: twenty norms of 1000 in a row."""
    norms = noise(seed)
    norms[3000:3020] = SPIKE
    clipped, thresholds = clipper(norms)
    figures = {
        "largest out": float(clipped[3000:3020].max()),
        "threshold after / before": float(_ratio(thresholds[3020:3220].max(), thresholds[2999])),
    }
    marks = {"largest out": Mark(4, ideal=1), "threshold after / before": Mark(2, ideal=1)}
    return Result(figures, marks)


def check_nonfinite(clipper: Clipper, seed: int = 0) -> Result:
    """S6: NaN, Inf and NaN become zeros, without an effect on other steps."""
    norms = noise(seed)
    disturbed = np.insert(norms, 3000, [np.nan, np.inf, np.nan])
    clipped, thresholds = clipper(disturbed)
    nonzero = np.count_nonzero(clipped[3000:3003])
    expected, expected_thresholds = clipper(norms)
    rest = np.r_[0:3000, 3003 : STEPS + 3]
    same = np.array_equal(clipped[rest], expected) and np.array_equal(
        thresholds[rest], expected_thresholds
    )
    figures = {"updates not zero": float(nonzero), "others changed": float(not same)}
    return Result(figures, {name: Mark(0) for name in figures})


def check_level_shift(clipper: Clipper, seed: int = 0) -> Result:
    """S7: the level rises tenfold, either at once or over 100 or 1000 steps."""
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
    marks = {name: Mark(0.85, ideal=1) for name in figures} | {"steps to recover": Mark(200)}
    return Result(figures, marks)


def check_heavy_tails(clipper: Clipper, seed: int = 0) -> Result:
    """S8: the noise itself has heavy tails."""
    norms = heavy_tails(seed)
    clipped, _ = clipper(norms)
    figures = {
        "clip %": _clipped_percent(norms[1000:], clipped[1000:]),
        "largest out": float(clipped[1000:].max()),
    }
    return Result(figures, {"clip %": Mark(25), "largest out": Mark(6, ideal=1)})


def check_scale(clipper: Clipper, seed: int = 0) -> Result:
    """S9: thresholds scale with the norms, from 1e-6 to 1e4."""
    norms = noise(seed)
    _, thresholds = clipper(norms)
    warm = np.isfinite(thresholds)
    error = 0.0
    for factor in (1e-6, 1e-3, 50.0, 1e4):
        _, scaled = clipper(factor * norms)
        if not np.array_equal(np.isfinite(scaled), warm):
            error = math.inf
        elif warm.any():
            errors = np.abs(scaled[warm] / (factor * thresholds[warm]) - 1)
            error = max(error, float(errors.max()))
    return Result({"relative error": error}, {"relative error": Mark(1e-4)})


def check_constants(clipper: Clipper, seed: int = 0) -> Result:
    """S10: constant norms, zeros, and a lower constant, none of which should be clipped."""
    del seed
    norms = np.r_[np.ones(1000), np.zeros(10), np.full(500, 0.1)]
    clipped, _ = clipper(norms)
    # The norms may be in either precision, but must be exact.
    changed = np.count_nonzero((clipped != norms) & (clipped != norms.astype(np.float32)))
    return Result({"changed": float(changed)}, {"changed": Mark(0)})


def check_layer_spikes(clipper: Clipper, seed: int = 0) -> Result:
    """S11: from step 3000 on, one layer of eight is multiplied by 1000 every 100 steps."""
    norms = layer_noise(seed)
    undisturbed, _ = clipper(norms)
    spikes = np.arange(3000, 5000, 100)
    layers = np.random.default_rng(seed + 1).integers(LAYERS, size=len(spikes))
    spiked = norms.copy()
    spiked[spikes, layers] *= SPIKE
    clipped, thresholds = clipper(spiked)
    ordinary = np.setdiff1d(np.arange(3000, 5000), spikes)
    before = np.median(thresholds[2000:3000], axis=0)
    after = np.median(thresholds[ordinary], axis=0)
    innocent = np.ones((len(spikes), LAYERS), bool)
    innocent[np.arange(len(spikes)), layers] = False
    whole = np.linalg.norm(clipped[spikes], axis=1) / np.median(np.linalg.norm(norms, axis=1))
    figures = {
        "out": float(whole.max()),
        # The worst group counts if layers have separate thresholds.
        "threshold after / before": float(_ratio(after, before).max()),
        "extra clip %": _clipped_percent(spiked[ordinary], clipped[ordinary])
        - _clipped_percent(norms[ordinary], undisturbed[ordinary]),
        # The mean scale of the other seven layers at the spikes. It has no mark: a global clipper
        # keeps the gradient's direction at the expense of the innocent layers.
        "rest kept": float(np.mean((clipped[spikes] / spiked[spikes])[innocent])),
    }
    return Result(figures, SPIKE_MARKS)


def check_frequent_spikes(clipper: Clipper, seed: int = 0) -> Result:
    """S12: from step 200 on, a random 1 % of all norms are 1000."""
    norms = noise(seed)
    undisturbed, undisturbed_thresholds = clipper(norms)
    spikes = np.random.default_rng(seed + 1).random(STEPS) < 0.01
    spikes[:200] = False
    clipped, thresholds = clipper(np.where(spikes, SPIKE, norms))
    ordinary = ~spikes
    ordinary[:200] = False
    ratios = _ratio(thresholds[ordinary], undisturbed_thresholds[ordinary])
    figures = {
        "largest out": float(clipped[spikes].max()),
        "threshold / without spikes": float(np.median(ratios)),
        "extra clip %": _clipped_percent(norms[ordinary], clipped[ordinary])
        - _clipped_percent(norms[ordinary], undisturbed[ordinary]),
    }
    return Result(figures, dict(zip(figures, SPIKE_MARKS.values(), strict=True)))


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
    "S11": check_layer_spikes,
    "S12": check_frequent_spikes,
    "S13": partial(check_early_spike, place=1),
}
