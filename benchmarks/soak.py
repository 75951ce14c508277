"""Runs every clipper for a million steps, and checks thresholds, updates, counters and states.

The stream of norms has drift, level shifts, spikes, bursts, constants, zeros and norms that are not
finite. The checks compare with float64:

- the threshold of every step (of 200, for a histogram that forgets), within a tolerance;
- the updates: the norm or the threshold, 0 where the norm is not finite, and every bit where
  nothing is clipped;
- every counter after every step, exactly;
- every state, which must not contain NaN or Inf.

Then all counters are set to just below 2 ** 31 - 1. They must stop there, without further effects.
Prints a table; the exit code is 1 if anything is wrong.

    python benchmarks/soak.py [--steps 1000000] [--clippers zscore "autoclip(10"]
"""

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_smartclip as smartclip

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
import running_reference
from clipper_table import EXACT, SOAK, WEIGHT, default_scope, rows_of
from running_reference import LARGEST, Reference

STEPS = 1_000_000
# The number of steps in one compiled program, and of the steps with full counters.
BLOCK = 50_000
TINY = float(np.finfo(np.float32).tiny)
MAX_COUNT = 2**31 - 1
# Counters are set so far below the largest integer that all of them reach it in a block.
ROOM = 5
COUNTERS = ("observed", "recorded", "steps", "clipped", "nonfinite", "skipped")


class Clipper(NamedTuple):
    """A clipper, its reference and the tolerance.

    Attributes:
        tx: The transformation.
        reference: Its thresholds in float64.
        tolerance: The largest relative error of a threshold.
        num_groups: The number of leaves of the gradient. Each of them is a group.
    """

    tx: optax.GradientTransformation
    reference: Reference
    tolerance: float
    num_groups: int = 1


CLIPPERS = {
    row.label: Clipper(
        row.factory(),
        row.thresholds,
        row.tolerance,
        num_groups=1 if default_scope(row.factory) == "global" else 3,
    )
    for row in rows_of(SOAK).values()
}
CLIPPERS["skip_spikes(identity)"] = Clipper(
    smartclip.skip_spikes(optax.identity()), running_reference.outliers(), EXACT
)


def make_norms(steps: int, num_groups: int, seed: int = 0) -> np.ndarray:
    """Norms float32[steps, groups] with every kind of trouble, most of it in 3000 steps."""
    rng = np.random.default_rng(seed)
    step = np.arange(steps)
    # The level varies slowly over four decades and faster over two. Every 20,000 steps, it may jump
    # by a decade.
    level = 2 * np.sin(step[:, None] / 30_000 + np.arange(num_groups))
    level += np.sin(step[:, None] / 1_000)
    level += rng.choice([0, 1], (steps // 20_000 + 1, num_groups))[step // 20_000]
    norms = 10**level * np.exp(0.3 * rng.normal(size=level.shape))
    trouble = rng.random(level.shape)
    norms *= np.where(trouble < 0.01, 10 ** rng.uniform(1, 6, level.shape), 1)
    norms[step % 5_000 // 20 == 40] *= 100
    norms[(step % 10_000 >= 1_200) & (step % 10_000 < 1_500)] = 2
    for start, share, value in [(0.01, 2e-3, 0), (0.02, 2e-4, 1e30), (0.03, 2e-4, 1e-30)]:
        norms[(trouble > start) & (trouble < start + share)] = value
    norms[(step % 10_000 >= 2_000) & (step % 10_000 < 2_200)] = 0
    norms[trouble > 0.995] = np.inf
    norms[trouble > 0.998] = np.nan
    # The first norms are not damaged, as everything later depends on them.
    norms[:50] = np.exp(0.3 * rng.normal(size=norms[:50].shape))
    return norms.astype(np.float32)


class Run(NamedTuple):
    """The record of a clipper, for each step and group.

    Attributes:
        norms: The norms that it reports.
        thresholds: The thresholds that it reports.
        out: The norms of the updates.
        scales: The scales that it reports.
        clipped: Whether it reports that it clipped or dropped.
        counts: Each of its counters, by path.
        clean: Whether the state after the step is finite.
    """

    norms: np.ndarray
    thresholds: np.ndarray
    out: np.ndarray
    scales: np.ndarray
    clipped: np.ndarray
    counts: dict[str, np.ndarray]
    clean: np.ndarray


def by_path(state: Any) -> dict[str, jax.Array]:
    """The leaves of a state, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): jnp.atleast_1d(leaf) for path, leaf in leaves}


def is_counter(path: str) -> bool:
    """Whether a leaf is one of the counters that never decrease."""
    return path.rsplit(".num_", 1)[-1] in COUNTERS


def compile_steps(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Run]]:
    """From a state and norms [steps, groups] to the next state and the record of all steps."""

    def step(state: Any, norms: jax.Array) -> tuple[Any, Run]:
        grads = list(norms[:, None])
        updates, state = tx.update(grads, state, weights(len(grads)))
        record = smartclip.metrics(state)
        if "skipped" in record:
            names = ("skip_norm", "skip_norm_threshold", "skipped")
            scale = jnp.where(record["skipped"], 0.0, 1.0)
        else:
            names = ("grad_norm", "clip_threshold", "clipped")
            scale = record["clip_scale"]
        norm, threshold, clipped = (jnp.atleast_1d(record[name]) for name in names)
        leaves = by_path(state)
        return state, Run(
            norms=jnp.where(norm < LARGEST, norm, jnp.inf),
            thresholds=jnp.where(threshold < LARGEST, threshold, jnp.inf),
            out=jnp.concatenate(updates),
            scales=jnp.atleast_1d(scale),
            clipped=clipped,
            counts={path: leaf for path, leaf in leaves.items() if is_counter(path)},
            clean=jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves.values()]).all(),
        )

    return jax.jit(lambda state, norms: jax.lax.scan(step, state, norms))


def weights(num_groups: int) -> list[jax.Array]:
    """Weights of one element each, like the gradients, so that norms are exact."""
    return [jnp.full(1, WEIGHT, jnp.float32) for _ in range(num_groups)]


def relative_errors(thresholds: np.ndarray, norms: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The signed relative errors of thresholds [steps, groups]."""
    expected = np.where(expected > LARGEST, np.inf, expected)
    low, high = expected if expected.ndim == 3 else (expected, expected)
    nearest = np.clip(thresholds.astype(np.float64), low, high)
    with np.errstate(all="ignore"):
        # Numbers below the smallest normal one may be flushed to zero.
        errors = (thresholds - nearest) / np.maximum(nearest, TINY)
    errors[(thresholds == nearest) | ~np.isfinite(norms) | (norms == 0)] = 0
    return np.where(np.isnan(errors), np.inf, errors)


def dropped_steps(norms: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The steps that are dropped: not finite, or a spike, but at most 32 spikes in a row."""
    dropped = ~np.isfinite(norms)
    in_a_row = 0
    for place in np.flatnonzero(~dropped & (norms > 0)):
        dropped[place] = norms[place] > thresholds[place] and in_a_row < 32
        in_a_row = in_a_row + 1 if dropped[place] else 0
    return dropped


def first(wrong: np.ndarray) -> str:
    """The first step at which something is wrong."""
    return f"from step {int(np.argmax(wrong.reshape(len(wrong), -1).any(axis=1)))} on"


def check_outputs(norms: np.ndarray, ran: Run) -> list[str]:
    """All errors in norms, decisions, updates and counters, given the thresholds."""
    skips = any("num_skipped" in path for path in ran.counts)
    finite = np.isfinite(norms)
    live = finite & (norms > 0)
    shown = np.where(finite, norms, 0)
    if skips:
        clipped = dropped_steps(norms[:, 0], ran.thresholds[:, 0])[:, None]
        limits, unsure = np.zeros(norms.shape), np.zeros(norms.shape)
    else:
        clipped = finite & (norms > ran.thresholds)
        limits = np.where(clipped, ran.thresholds, 0).astype(np.float64)
        # A scale below the smallest normal number may be flushed to zero.
        unsure = 1e-6 * limits + 2 * TINY * np.maximum(1, shown)
    wrong = {
        "norm": (ran.norms != shown) & finite,
        "scale": ~((ran.scales >= 0) & (ran.scales <= 1))
        | ((ran.scales < 1) != (ran.clipped | ~finite)),
        "update": ~(np.abs(ran.out - np.where(clipped, limits, shown)) <= clipped * unsure),
        "decision": ran.clipped != clipped,
        "state": ~ran.clean,
    }
    expected = {
        "steps": np.ones_like(finite),
        "clipped": clipped,
        "skipped": clipped,
        "nonfinite": ~finite,
        # skip_spikes counts losses as well, and gets none here.
        "observed": np.hstack([live, np.zeros_like(live)]) if skips else live,
        "recorded": live,
    }
    for path, counts in ran.counts.items():
        wrong[path] = counts != expected[path.rsplit(".num_", 1)[-1]].cumsum(axis=0)
    return [f"{name} wrong {first(where)}" for name, where in wrong.items() if where.any()]


def check_saturation(steps: Callable[..., Any], state: Any, norms: np.ndarray) -> list[str]:
    """All errors that appear when counters are near the largest integer."""

    def count_from(path: Any, leaf: jax.Array) -> jax.Array:
        is_one = is_counter(jax.tree_util.keystr(path))
        return jnp.full_like(leaf, MAX_COUNT - ROOM) if is_one else leaf

    def rest(end: Any, ran: Run) -> list[bytes]:
        leaves = by_path((end, ran._replace(counts={}))).items()
        return [np.asarray(leaf).tobytes() for path, leaf in leaves if not is_counter(path)]

    usual = steps(state, norms)
    full = steps(jax.tree_util.tree_map_with_path(count_from, state), norms)
    problems = []
    for path, counts in usual[1].counts.items():
        increase = np.asarray(counts, np.int64) - np.asarray(by_path(state)[path])
        if np.any(full[1].counts[path] != np.minimum(MAX_COUNT - ROOM + increase, MAX_COUNT)):
            problems.append(f"{path} does not stop at 2 ** 31 - 1")
    if rest(*full) != rest(*usual):
        problems.append("full counters change what the clipper does")
    return problems


def soak(clipper: Clipper, num_steps: int = STEPS) -> tuple[float, int, list[str]]:
    """Runs a clipper for `num_steps` steps, and then with full counters.

    Returns:
        The largest relative error of a threshold, with its sign; its step; all errors.
    """
    norms = make_norms(num_steps, clipper.num_groups)
    steps = compile_steps(clipper.tx)
    state = clipper.tx.init(weights(clipper.num_groups))
    parts = []
    for place in range(0, num_steps, BLOCK):
        state, part = steps(state, norms[place : place + BLOCK])
        parts.append(jax.device_get(part))
    ran = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    problems = check_outputs(norms, ran)
    errors = relative_errors(ran.thresholds, norms, clipper.reference(norms))
    outside = np.abs(errors) > clipper.tolerance
    problems += [f"threshold wrong {first(outside)}"] if outside.any() else []
    problems += check_saturation(steps, state, norms[:BLOCK])
    place, group = np.unravel_index(np.argmax(np.abs(errors)), errors.shape)
    return float(errors[place, group]), int(place), problems


def main() -> int:
    """Prints the table; returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--clippers", nargs="+", default=[""], help="parts of their names")
    arguments = parser.parse_args()
    chosen = [label for label in CLIPPERS if any(part in label for part in arguments.clippers)]
    if not chosen:
        parser.error(f"there are {', '.join(CLIPPERS)}")
    libraries = f"jax {jax.__version__}, optax {optax.__version__}, NumPy {np.__version__}"
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, {jax.default_backend()}"
    print(f"Python {platform.python_version()}, {libraries}, {machine}")
    print(
        f"{'clipper':44}{'steps':>10}{'error':>10}{'at step':>10}{'allowed':>9}"
        f"{'counters':>10}{'seconds':>9}"
    )
    start = time.perf_counter()
    failed = 0
    for label in chosen:
        before = time.perf_counter()
        error, place, problems = soak(CLIPPERS[label], arguments.steps)
        failed += bool(problems)
        counts = "wrong" if re.search("num_|counters", "".join(problems)) else "exact"
        line = f"{label:44}{arguments.steps:>10,}{error:>+10.1e}{place:>10,}"
        line += f"{CLIPPERS[label].tolerance:>9.0e}{counts:>10}{time.perf_counter() - before:>9.1f}"
        print("\n    ".join([line, *problems]), flush=True)
    outcome = f"{failed} of {len(chosen)} are wrong" if failed else "All is well"
    print(f"{outcome}, after {time.perf_counter() - start:.0f} s.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
