"""The arms of the study: clippers between the gradient and the optimizer.

An arm is a clipper, possibly with a guard that drops steps. The arms `fixed(norm)` are the settings
of `clip_by_global_norm`, which must be tuned. The arms that clip updates are in `updates`.
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
    """The clippers around an optimizer.

    Attributes:
        clipper: The clipper before the optimizer.
        skips: Whether `skip_spikes` wraps both.
        after_step: A clipper of the optimizer's step before it is multiplied by the learning rate.
        after_rate: A clipper after the optimizer and its learning rate.
        stable: Whether StableAdamW replaces AdamW.
    """

    clipper: optax.GradientTransformation
    skips: bool = False
    after_step: optax.GradientTransformation | None = None
    after_rate: optax.GradientTransformation | None = None
    stable: bool = False

    def around(
        self, optimizer: Optimizer, schedule: optax.Schedule
    ) -> optax.GradientTransformationExtraArgs:
        """Makes the transformation that trains and that records the scale of the last clipper."""
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
    """The state of a clipper, and the factor by which it scaled the last norm."""

    clipper: Any
    norm_scale: Float32[Array, ""]


def with_scale(clipper: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Adds to a clipper a record of the norm after it divided by the norm before it.

    This figure is defined for every clipper, also for those that scale each unit separately.
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
        # A gradient that is not finite counts as dropped or as unchanged.
        scale = jnp.where(jnp.isfinite(scale), scale, jnp.float32(after > 0))
        return clipped, ScaleState(inner, jnp.float32(scale))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def with_recorded_scale(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Adds the mean scale over tensors to an optimizer that scales its own step."""
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
    """The factor by which the last gradient's norm was scaled; 0 if the step was dropped."""
    skipped = smartclip.metrics(opt_state).get("skipped", False)
    return jnp.where(skipped, 0.0, optax.tree.get(opt_state, "norm_scale"))


NONE = "no clipping"
# These range from a tenth of the smallest median norm of the tasks to ten times the largest.
FIXED_NORMS = (0.01, 0.1, 1.0, 10.0)


def fixed(norm: float) -> str:
    """The name of an arm with a fixed limit."""
    return f"clip_by_global_norm({norm:g})"


AUTO = "autoclip()"
OUTLIERS_ONLY = "autoclip(outliers_only=True)"
PER_PARAM = "autoclip(scope='per_param')"
SKIP_SPIKES = "skip_spikes(chain(autoclip(), tx))"
# The arms with the default rule, which was chosen by comparison with the other arms, or with the
# rule that it replaced.
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
