"""How states are declared: frozen chex dataclasses that Flax and `jax.export` can serialize, too.

A clipper's state is a `ClipState`; what its rule remembers is a dataclass of the rule's own,
declared with `@state_dataclass`:

    @state_dataclass
    class MeanState:
        mean: Norms
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, dataclass_transform

import chex
import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Int32

from optax_smartclip.engine.flax_states import serialize_with_flax
from optax_smartclip.engine.metrics import ClipMetrics, init_metrics
from optax_smartclip.engine.norms import Mask
from optax_smartclip.engine.trees import leaves_by_name

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def state_dataclass(cls: type[T]) -> type[T]:
    """Declares a state: a frozen `chex.dataclass` of arrays.

    Args:
        cls: A class with annotated fields, each an array with a leading `groups` axis, or again
            a state.

    Returns:
        The dataclass, a JAX pytree. Its instances are made with keyword arguments only.
    """
    cls.__iter__ = _values  # type: ignore[attr-defined]
    declared: type[T] = chex.dataclass(cls, frozen=True, kw_only=True, mappable_dataclass=False)
    serialize_with_flax(declared)
    # A name can be registered only once; on module reload the first class keeps it.
    with contextlib.suppress(ValueError):
        export.register_pytree_node_serialization(
            declared,
            serialized_name=f"{cls.__module__}.{cls.__qualname__}",
            serialize_auxdata=lambda names: json.dumps(names).encode(),
            deserialize_auxdata=lambda names: tuple(json.loads(names)),
        )
    return declared


def _values(self: Any) -> Iterator[Any]:
    # `optax.OptState` is an array or an iterable, and some programs check their annotations.
    return (getattr(self, field.name) for field in dataclasses.fields(self))


@state_dataclass
class ClipState:
    """The state of every clipper.

    Attributes:
        rule: What the threshold is computed from: every leaf has a leading `groups` axis.
        num_observed: The finite norms seen so far; `warmup_steps` is compared with it.
        last: The record of the last step. Reported, never read to decide anything.
    """

    rule: Any
    num_observed: Int32[Array, " groups"]
    last: ClipMetrics


def init_state(rule: Any, num_groups: int) -> ClipState:
    """The state before the first step, around what the rule starts with."""
    return ClipState(
        rule=rule,
        num_observed=jnp.zeros(num_groups, jnp.int32),
        last=init_metrics(num_groups),
    )


GRAFT = "`smartclip.graft` puts the rest of a saved optimizer state beside a new clipper."


def check_is_state(state: Any, cls: Any) -> None:
    """Raises ValueError unless `state` has the fields of a state of this class."""
    names = getattr(cls, "_fields", None) or [field.name for field in dataclasses.fields(cls)]
    # Compares fields, because reloading a module creates a new class.
    if not all(hasattr(state, name) for name in names):
        raise ValueError(
            f"`state` must be the {cls.__name__} that `init` or the last `update` returned, "
            f"without which nothing is known, got an object of type {type(state).__name__}. {GRAFT}"
        )


def check_fits(state: Any, num_groups: int, rule_fields: Callable[[], frozenset[str]]) -> None:
    """Raises ValueError unless `state` is one of this clipper, for this number of groups.

    Args:
        state: What `update` was given.
        num_groups: The number of groups of the gradient.
        rule_fields: The names of the leaves in the state of the rule.
    """
    check_num_groups(state, num_groups)
    check_rule_fields(state.rule, rule_fields)


def check_rule_fields(rule_state: Any, rule_fields: Callable[[], frozenset[str]]) -> None:
    """Raises ValueError unless the state of a rule has leaves with these names."""
    expected, found = rule_fields(), leaf_names(rule_state)
    if found != expected:
        raise ValueError(
            f"The state must have the fields {sorted(expected)}, as the rule of this clipper "
            f"has, got {sorted(found)}, as from another clipper. {GRAFT}"
        )


def leaf_names(tree: Any) -> frozenset[str]:
    """The paths of all leaves."""
    return frozenset(leaves_by_name(tree))


def check_num_groups(state: Any, num_groups: int) -> None:
    """Raises ValueError unless `state` is one of a clipper, for this number of groups."""
    check_is_state(state, ClipState)
    check_groups("num_observed", state.num_observed, (num_groups,))


def check_groups(name: str, field: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a field of a state has this shape, with an entry for each group."""
    if field.shape != shape:
        raise ValueError(
            f"The state must have {name!r} of shape {shape}, one entry for each group of the "
            f"gradient, got {field.shape}. Groups are those of the parameters that `init` was "
            "called with. If leaves of the gradient are None where the parameters are not, pass "
            "`params` to `update`."
        )


def select_groups(mask: Mask, new: T, old: T) -> T:
    """The new state for the groups in `mask`, the old one for the others."""

    def select(new: Array, old: Array) -> Array:
        return jnp.where(mask.reshape(mask.shape + (1,) * (old.ndim - 1)), new, old)

    selected: T = jax.tree.map(select, new, old)
    return selected
