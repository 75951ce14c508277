"""Exponentially weighted mean and standard deviation of norms: three numbers per group.

With delta = norm - mean and w = 1 - decay, a norm changes them to

    mean <- mean + w * delta
    std  <- sqrt((1 - w) * (std ** 2 + w * delta ** 2))

West, `Updating mean and variance estimates <https://doi.org/10.1145/359146.359153>`_, 1979. The
deviation is taken before it is squared, so nothing cancels when the mean is large, and no square
is stored, so nothing overflows. With w = 1 / n for the n-th norm they are the plain mean and
standard deviation of n norms.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from optax_smartclip.engine.dtypes import as_float32, is_inexact
from optax_smartclip.engine.norms import Norms, safe_hypot
from optax_smartclip.engine.scaling import has_reached
from optax_smartclip.engine.states import state_dataclass

# The smallest standard deviation, in units of the mean, so that rounding noise on a constant norm
# is not a spike.
_MIN_STD = 0.01


@state_dataclass
class MomentsState:
    """The moments of each group's norms.

    Attributes:
        mean: In the unit of the norms.
        std: In the unit of the norms.
        num_recorded: How many norms are in them. Stops at 2 ** 31 - 1.
    """

    mean: Float32[Array, " groups"]
    std: Float32[Array, " groups"]
    num_recorded: Int32[Array, " groups"]


def init_moments(num_groups: int) -> MomentsState:
    """The moments of no norms."""
    return MomentsState(
        mean=jnp.zeros(num_groups, jnp.float32),
        std=jnp.zeros(num_groups, jnp.float32),
        num_recorded=jnp.zeros(num_groups, jnp.int32),
    )


def count_known(moment: Norms, num_recorded: Int32[Array, " groups"]) -> Int32[Array, " groups"]:
    """How many norms are in a mean: none if it is zero, as no norm is.

    A restore that fills what a checkpoint lacks from the initial state, as Flax's by way of Orbax
    does, makes states with the count of one clipper and without the moments of another.
    """
    return jnp.where(moment > 0, num_recorded, 0)


def is_warm(
    moment: Norms, num_recorded: Int32[Array, " groups"], warmup_steps: Any
) -> Bool[Array, " groups"]:
    """Whether at least `warmup_steps` norms are in a mean, and at least one."""
    num_known = count_known(moment, num_recorded)
    return has_reached(num_known, jnp.maximum(as_float32(warmup_steps), 1.0))


def update_moments(mean: Norms, std: Norms, value: Norms, weight: Norms) -> tuple[Norms, Norms]:
    """Mean and standard deviation after one more value."""
    delta = value - mean
    spread = safe_hypot(std, jnp.sqrt(weight) * delta)
    return mean + weight * delta, jnp.sqrt(1.0 - weight) * spread


def above_mean(state: MomentsState, z: Any) -> Norms:
    """`z` standard deviations above the mean, each at least 1 % of it."""
    return state.mean + as_float32(z) * jnp.maximum(state.std, _MIN_STD * state.mean)


def averaging_weight(num_recorded: Int32[Array, " groups"]) -> Norms:
    """The weight with which the last of so many values enters their plain average."""
    return 1.0 / as_float32(jnp.maximum(num_recorded, 1))


def new_weight(decay: Any) -> Float32[Array, ""]:
    """The weight of a new value, `1 - decay`, also when rounding has made `decay` 1.

    `optax.inject_hyperparams` rounds to bfloat16 with bfloat16 parameters, where every decay from
    0.998 on is 1; the nearest decay that could have been meant is then used, 0.999.
    """
    # Decays above 1 - eps / 4 round to 1; the middle of those is what may have been meant.
    rounded = isinstance(decay, jax.Array) and is_inexact(decay)
    eps = float(jnp.finfo(decay.dtype if rounded else jnp.float32).eps)
    return jnp.maximum(as_float32(1 - decay), eps / 8)
