"""Checks of arguments, made where the user wrote them: in the factories.

Each error names the argument, its value and the allowed values. A traced number, such as one of
`optax.inject_hyperparams` in a compiled step, has no value yet and passes unchecked.
"""

import numbers
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# The size of a float32.
_EXACT_BYTES = 4

# Steps are counted in int32.
_MOST_STEPS = 2**31 - 1

STATIC_HINT = " (Under optax.inject_hyperparams, name it in `static_args`.)"


def static_hint(value: Any) -> str:
    """For the end of a message: the way out if the value may be an array against its will.

    `optax.inject_hyperparams` makes one of each number and of what a function returns.
    """
    return STATIC_HINT if isinstance(value, jax.Array) else ""


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    allowed: str,
    strict_low: bool = False,
    strict_high: bool = False,
    may_be_array: bool = True,
) -> None:
    """Raises ValueError unless `low <= value <= high`, with `<` where strict.

    Of an array, every element is checked. A traced one passes unchecked; where none may be, it does
    not pass at all. One of low precision may lie on a bound that others may not: `decay=0.999` is 1
    in bfloat16, which `optax.inject_hyperparams` makes of it for parameters of that dtype.
    """
    if isinstance(value, bool | np.bool_):
        valid = False
    elif isinstance(value, numbers.Real):
        valid = _is_within(float(value), low, high, strict_low, strict_high)
    elif may_be_array and isinstance(value, jax.Array | np.ndarray):
        known, is_exact = _known_values(value), value.dtype.itemsize >= _EXACT_BYTES
        strict = is_exact and strict_low, is_exact and strict_high
        valid = known is None or _is_within(known, low, high, *strict)
    else:
        valid = False
    if not valid:
        hint = "" if may_be_array else static_hint(value)
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.{hint}")


def _is_within(value: Any, low: float, high: float, strict_low: bool, strict_high: bool) -> bool:
    # Written so that NaN fails.
    above = value > low if strict_low else value >= low
    below = value < high if strict_high else value <= high
    return bool(np.all(above & below))


def _known_values(value: jax.Array | np.ndarray) -> np.ndarray | None:
    """The numbers in an array; None if it is traced, or in another process."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, jax.core.Tracer) or not value.is_fully_addressable:
        return None
    return np.asarray(jax.device_get(value))


def check_positive(name: str, value: Any, *, none: str = "") -> None:
    """Raises ValueError unless `value > 0`, or None where `none` says what that is for."""
    if value is not None or not none:
        allowed = f"positive, or None {none}" if none else "positive"
        check_number(name, value, 0.0, float("inf"), allowed=allowed, strict_low=True)


def check_decay(decay: Any, name: str = "decay") -> None:
    """Raises ValueError unless `0 <= decay < 1`."""
    check_number(name, decay, 0.0, 1.0, allowed="in [0, 1)", strict_high=True)


def check_steps(name: str, value: Any, *, low: int = 0, optional: bool = False) -> None:
    """Raises ValueError unless `value` is a number from `low` to the largest int32, or None."""
    if value is not None or not optional:
        allowed = f"a number of steps from {low} to {_MOST_STEPS}{', or None' if optional else ''}"
        check_number(name, value, float(low), float(_MOST_STEPS), allowed=allowed)


def check_size(
    name: str, value: Any, high: int, *, low: int = 1, why: str = "it sets the shape of the state"
) -> None:
    """Raises ValueError unless `value` is a Python int from `low` to `high`, as JAX needs it."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(
            f"`{name}` must be a Python int from {low} to {high} ({why}), got "
            f"{value!r}.{static_hint(value)}"
        )


def check_scalar(name: str, value: Any) -> Float[Array, ""]:
    """The value as a scalar in at least float32; raises ValueError if its shape is not ()."""
    if jnp.shape(value) != ():
        raise ValueError(f"`{name}` must be a scalar, got the shape {jnp.shape(value)}.")
    scalar = jnp.asarray(value)
    return scalar.astype(jnp.float64 if scalar.dtype == jnp.float64 else jnp.float32)


def check_transformation(name: str, value: Any) -> None:
    """Raises ValueError unless `value` has the two functions of a gradient transformation."""
    if not all(callable(getattr(value, function, None)) for function in ("init", "update")):
        raise ValueError(
            f"`{name}` must be a gradient transformation, as optax.adamw(3e-4) is, got {value!r}."
        )


def check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.{static_hint(value)}")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.{static_hint(value)}")


def compile_pattern(must: str, pattern: Any) -> re.Pattern[str]:
    """A regular expression; raises ValueError if it is none. `must` says where they are allowed."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{must}, got {pattern!r}: {error}.") from error


def check_patterns_match(
    must: str, patterns: Iterable[re.Pattern[str]], names: list[str], hint: str = ""
) -> None:
    """Raises ValueError if a pattern matches no name of a leaf: it is a misspelled one."""
    for pattern in patterns:
        if names and not any(pattern.search(name) for name in names):
            raise ValueError(
                f"{must} each match a parameter's path, but {pattern.pattern!r} "
                f"matches none of {', '.join(names[:8])}{', ...' if names[8:] else ''}.{hint}"
            )


def check_clip_options(
    warmup_steps: Any, max_norm: Any, nonfinite: Any, min_scale: Any = None
) -> None:
    """Checks the arguments that all clippers share."""
    check_steps("warmup_steps", warmup_steps)
    check_positive("max_norm", max_norm, none="for no ceiling")
    check_choice("nonfinite", nonfinite, ("zero", "propagate"))
    if min_scale is not None:
        check_number("min_scale", min_scale, 0.0, 1.0, allowed="in [0, 1], or None for any scale")
