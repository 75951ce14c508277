"""The arms of the study: what stands between the gradient and the optimizer.

An arm is a clipper, and whether a step may be dropped as well. `fixed(norm)` are the settings of
one arm, `clip_by_global_norm`, that has to be tuned. Those that clip the update are in `updates`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

import optax_smartclip as smartclip

PyTree = Any
Optimizer = Callable[[optax.Schedule], optax.GradientTransformation]


class Arm(NamedTuple):
    """What stands around the optimizer.

    Attributes:
        clipper: Before the optimizer.
        skips: Whether `skip_spikes` stands around both.
        after_step: After the optimizer, before the learning rate multiplies its step.
        after_rate: After the optimizer and its learning rate.
        stable: Whether StableAdamW takes the place of AdamW.
    """

    clipper: optax.GradientTransformation
    skips: bool = False
    after_step: optax.GradientTransformation | None = None
    after_rate: optax.GradientTransformation | None = None
    stable: bool = False

    def around(
        self, optimizer: Optimizer, schedule: optax.Schedule
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation that trains. It records the scale of the last of the clippers."""
        if self.after_step is not None:
            unit_rate = optimizer(lambda count: jnp.ones_like(count, jnp.float32))
            rate = optax.scale_by_schedule(schedule)
            tx = optax.chain(self.clipper, unit_rate, with_scale(self.after_step), rate)
        elif self.after_rate is not None:
            tx = optax.chain(self.clipper, optimizer(schedule), with_scale(self.after_rate))
        elif self.stable:
            tx = optax.chain(self.clipper, with_recorded_scale(optimizer(schedule)))
        else:
            tx = optax.chain(with_scale(self.clipper), optimizer(schedule))
        return optax.with_extra_args_support(smartclip.skip_spikes(tx) if self.skips else tx)


class ScaleState(NamedTuple):
    """What a clipper keeps, and by which factor it scaled the last norm."""

    clipper: Any
    norm_scale: Float32[Array, ""]


def with_scale(clipper: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The clipper, and a record of the norm behind it in units of the norm before it.

    It is the same figure for every clipper, also for those that scale each unit for itself.
    """
    clipper = optax.with_extra_args_support(clipper)

    def init_fn(params: PyTree) -> ScaleState:
        return ScaleState(clipper.init(params), jnp.ones((), jnp.float32))

    def update_fn(
        updates: PyTree, state: ScaleState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ScaleState]:
        clipped, inner = clipper.update(updates, state.clipper, params, **extra_args)
        before, after = optax.tree.norm(updates), optax.tree.norm(clipped)
        scale = jnp.where(before > 0, after / before, 1.0)
        # Of a gradient that is not finite, nothing is left, or all.
        scale = jnp.where(jnp.isfinite(scale), scale, jnp.float32(after > 0))
        return clipped, ScaleState(inner, jnp.float32(scale))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def with_recorded_scale(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that scales its own step, and the mean over tensors of those scales."""
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: PyTree) -> ScaleState:
        return ScaleState(optimizer.init(params), jnp.ones((), jnp.float32))

    def update_fn(
        updates: PyTree, state: ScaleState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ScaleState]:
        updates, inner = optimizer.update(updates, state.clipper, params, **extra_args)
        return updates, ScaleState(inner, jnp.mean(smartclip.metrics(inner)["clip_scale"]))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def last_scale(opt_state: PyTree) -> Float32[Array, ""]:
    """By which factor the last gradient's norm was scaled: 0 if the step was dropped."""
    skipped = smartclip.metrics(opt_state).get("skipped", False)
    return jnp.where(skipped, 0.0, optax.tree.get(opt_state, "norm_scale"))


NONE = "no clipping"
# From a tenth of the smallest median norm of the tasks to ten times the largest.
FIXED_NORMS = (0.01, 0.1, 1.0, 10.0)


def fixed(norm: float) -> str:
    """The name of an arm with a fixed limit."""
    return f"clip_by_global_norm({norm:g})"


AUTO = "autoclip()"
OUTLIERS_ONLY = "autoclip(outliers_only=True)"
PER_PARAM = "autoclip(scope='per_param')"
SKIP_SPIKES = "skip_spikes(chain(autoclip(), tx))"
# What was chosen by comparison with the other arms, and what it replaced.
AUTO_ARMS = (AUTO, OUTLIERS_ONLY, PER_PARAM, SKIP_SPIKES)
ARMS: dict[str, Arm] = {
    NONE: Arm(optax.identity()),
    **{fixed(norm): Arm(optax.clip_by_global_norm(norm)) for norm in FIXED_NORMS},
    AUTO: Arm(smartclip.autoclip()),
    OUTLIERS_ONLY: Arm(smartclip.autoclip(outliers_only=True)),
    "autoclip(10)": Arm(smartclip.autoclip(10.0)),
    "autoclip(50)": Arm(smartclip.autoclip(50.0)),
    "autoclip(90)": Arm(smartclip.autoclip(90.0)),
    PER_PARAM: Arm(smartclip.autoclip(scope="per_param")),
    "zscore_clip()": Arm(smartclip.zscore_clip()),
    "zclip()": Arm(smartclip.zclip()),
    "zclip(record_limit=3)": Arm(smartclip.zclip(record_limit=3.0)),
    "adagc()": Arm(smartclip.adagc()),
    "adagc(record_limit=3)": Arm(smartclip.adagc(record_limit=3.0)),
    "agc()": Arm(smartclip.agc()),
    SKIP_SPIKES: Arm(smartclip.autoclip(), skips=True),
}
