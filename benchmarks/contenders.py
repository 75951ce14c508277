"""The clippers and optimizers whose cost the benchmarks compare, by the names in their tables."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_smartclip as smartclip

Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]


def before(clipper: optax.GradientTransformation) -> Wrap:
    """Puts a clipper before an optimizer."""
    return lambda optimizer: optax.chain(clipper, optimizer)


def mean_over_parts() -> optax.GradientTransformation:
    """Takes the mean over the first axis of each leaf, along which parts of a batch are stacked."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def percentile(size: int, scope: str = "global") -> Wrap:
    """AutoClip's percentile over a window."""
    return before(smartclip.autoclip(90.0, history=smartclip.ring_buffer(size), scope=scope))


NONE = "no clipping"
GLOBAL, ADAPTIVE = "clip_by_global_norm(1)", "adaptive_grad_clip(0.01)"
AUTO, AGC = "autoclip()", "agc()"
WINDOW128, WINDOW1024, WINDOW65536 = (f"autoclip(90, window={size})" for size in (128, 1024, 65536))
PER_PARAM = "autoclip(90, window=1024, per_param)"
ZSCORE, SKIP = "zscore_clip()", "skip_spikes(chain(autoclip(), tx))"
OBSERVE, UPDATES = "observe_norms(), autoclip()", "tx, autoclip()"
STABLE = "stable_adamw"
KEEP, FLOOR = "keep_last_good(tx)", "autoclip(min_scale=0.001)"
GIVE_UP = "skip_spikes(chain(autoclip(), tx), give_up_after=8)"
MEAN, MICRO = "mean of 4 parts, autoclip()", "clip_micro_batches(autoclip())"
SPECTRAL = "tx, spectral_clip()"

CLIPPERS: dict[str, Wrap] = {
    NONE: lambda optimizer: optimizer,
    GLOBAL: before(optax.clip_by_global_norm(1.0)),
    ADAPTIVE: before(optax.adaptive_grad_clip(0.01)),
    "clip_by_block_rms(1)": before(optax.clip_by_block_rms(1.0)),
    AUTO: before(smartclip.autoclip()),
    WINDOW128: percentile(128),
    WINDOW1024: percentile(1024),
    WINDOW65536: percentile(65536),
    PER_PARAM: percentile(1024, "per_param"),
    "autoclip(10, log_histogram)": before(
        smartclip.autoclip(10.0, history=smartclip.log_histogram())
    ),
    ZSCORE: before(smartclip.zscore_clip()),
    AGC: before(smartclip.agc()),
    SKIP: lambda optimizer: smartclip.skip_spikes(optax.chain(smartclip.autoclip(), optimizer)),
    OBSERVE: before(optax.chain(smartclip.observe_norms(), smartclip.autoclip())),
    UPDATES: lambda optimizer: optax.chain(optimizer, smartclip.autoclip()),
    STABLE: lambda _: smartclip.stable_adamw(3e-4),
    FLOOR: before(smartclip.autoclip(min_scale=1e-3)),
    GIVE_UP: lambda optimizer: smartclip.skip_spikes(
        optax.chain(smartclip.autoclip(), optimizer), give_up_after=8
    ),
    KEEP: lambda optimizer: smartclip.keep_last_good(optimizer, every=1000),
    MEAN: before(optax.chain(mean_over_parts(), smartclip.autoclip())),
    MICRO: before(smartclip.clip_micro_batches(smartclip.autoclip())),
    SPECTRAL: lambda optimizer: optax.chain(optimizer, smartclip.spectral_clip()),
}
# Optimizers whose states do not consist of the clipper's state and one state of the optimizer.
WITH_OWN_STATE = (STABLE, KEEP)
# The number of parts in the gradient of a step.
PARTS = {MEAN: 4, MICRO: 4}

ADAMW, ADAM, SGD, ALONE = "adamw", "adam", "sgd", "alone"
OPTIMIZERS = {
    ADAMW: lambda: optax.adamw(3e-4),
    ADAM: lambda: optax.adam(3e-4),
    SGD: lambda: optax.sgd(1e-3),
    ALONE: optax.identity,
}


def is_chosen(name: str, words: list[str] | None) -> bool:
    """Whether a name contains one of the words of an option; always true without the option."""
    return words is None or any(word.lower() in name.lower() for word in words)
