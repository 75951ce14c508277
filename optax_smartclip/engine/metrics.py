"""The record of a clipper's last step, and functions that read it from any optimizer state.

Inside or outside `jit`:

    smartclip.metrics(opt_state)["grad_norm"]
    optax.tree.get(opt_state, "grad_norm")
"""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import export
from jaxtyping import Array, Bool, Float, Float32, Int32

from optax_smartclip.engine.dtypes import as_float32
from optax_smartclip.engine.norms import LARGEST, LARGEST_NORM
from optax_smartclip.engine.trees import path_name, unbox

T = TypeVar("T")

RECORDS: list[type[Any]] = []


def metrics_record(cls: type[T]) -> type[T]:
    """Declares a record that `metrics` finds: a NamedTuple of arrays.

    It is a NamedTuple because `optax.tree.get` looks into those and not into dataclasses. The names
    of its fields must not collide with those in Optax's own states.
    """
    RECORDS.append(cls)
    # A name can be registered only once; on module reload the first class keeps it.
    with contextlib.suppress(ValueError):
        export.register_namedtuple_serialization(
            cls, serialized_name=f"{__name__}.{cls.__qualname__}"
        )
    return cls


@metrics_record
class ClipMetrics(NamedTuple):
    """The record of a clipper's last step. No clipper's decisions depend on it.

    Every field has the shape `[groups]`, or `[]` if there is one group. Every number is finite:
    the largest float32, 3.4e38, stands for a norm that is NaN or Inf, and for a threshold if there
    is none.

    Attributes:
        grad_norm: float32, the norm before clipping; 3.4e38 if it is NaN or Inf.
        clip_threshold: float32, the largest norm allowed; 3.4e38 if there is none (in
            warm-up).
        clip_scale: float32, what the gradient was multiplied by, in [0, 1].
        clipped: bool, whether the norm was over the threshold. For the units of `agc`, float32:
            the share of them that were.
        num_steps: int32, the updates so far. Counts stop at 2 ** 31 - 1.
        num_clipped: int32, those that were clipped.
        num_nonfinite: int32, those with a NaN or Inf norm.
    """

    grad_norm: Float32[Array, " *groups"]
    clip_threshold: Float32[Array, " *groups"]
    clip_scale: Float32[Array, " *groups"]
    clipped: Bool[Array, " *groups"] | Float32[Array, ""]
    num_steps: Int32[Array, " *groups"]
    num_clipped: Int32[Array, " *groups"]
    num_nonfinite: Int32[Array, " *groups"]


def record_shape(num_groups: int) -> tuple[int, ...]:
    """The shape of the fields of a record."""
    return () if num_groups == 1 else (num_groups,)


def init_metrics(num_groups: int) -> ClipMetrics:
    """The metrics before the first step: zero norms, no thresholds, no steps."""
    shape = record_shape(num_groups)

    # A new array for each field: one array in two fields could not be donated.
    def count() -> Int32[Array, " *groups"]:
        return jnp.zeros(shape, jnp.int32)

    return ClipMetrics(
        grad_norm=jnp.zeros(shape, jnp.float32),
        clip_threshold=jnp.full(shape, LARGEST, jnp.float32),
        clip_scale=jnp.ones(shape, jnp.float32),
        clipped=jnp.zeros(shape, bool),
        num_steps=count(),
        num_clipped=count(),
        num_nonfinite=count(),
    )


Values = Float[Array, " groups"]


def next_metrics(
    previous: ClipMetrics, norms: Values, thresholds: Values, scales: Values, nonfinite: str
) -> ClipMetrics:
    """The metrics of a step with these norms, thresholds and signed scales."""
    shape = previous.grad_norm.shape
    norms, thresholds, scales = (x.reshape(shape) for x in (norms, thresholds, scales))
    finite = jnp.isfinite(norms)
    clipped = finite & (norms > thresholds)
    dropped = 0.0 if nonfinite == "zero" else 1.0
    return ClipMetrics(
        grad_norm=reported(norms),
        clip_threshold=reported_threshold(thresholds),
        clip_scale=as_float32(jnp.where(finite, scales, dropped)),
        clipped=clipped,
        num_steps=optax.safe_increment(previous.num_steps),
        num_clipped=increment_where(clipped, previous.num_clipped),
        num_nonfinite=increment_where(~finite, previous.num_nonfinite),
    )


def reported(values: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Norms or losses as a record holds them: float32, and finite."""
    in_range = jnp.clip(values, -LARGEST_NORM, LARGEST_NORM)
    return as_float32(jnp.where(jnp.isfinite(values), in_range, LARGEST))


def reported_threshold(thresholds: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Thresholds as a record holds them: float32, and finite."""
    return as_float32(jnp.minimum(thresholds, LARGEST))


def observed(record: ClipMetrics) -> Bool[Array, " *groups"]:
    """Which groups had a norm that was positive and finite."""
    return (record.grad_norm > 0) & (record.grad_norm < LARGEST)


def increment_where(
    mask: Bool[Array, " *groups"], count: Int32[Array, " *groups"]
) -> Int32[Array, " *groups"]:
    """Adds one where `mask` holds, up to the largest int32."""
    return jnp.where(mask, optax.safe_increment(count), count)


def metrics(opt_state: Any) -> dict[str, Array]:
    """The last step's record of every clipper, `skip_spikes` and so on in an optimizer state.

    A pure function of arrays: call it outside of `jit` on the state that a step returned, or
    inside and return the dictionary.

    Args:
        opt_state: Any optimizer state, however nested, as `init` or `update` returned it, or as
            Flax or Orbax read it without a target: a record may also be a mapping with its fields,
            as in a state dict, a pure dict or an `nnx.State`.

    Returns:
        The fields of `ClipMetrics` by name, each of shape `[]` or `[groups]`, and those of
        `SkipMetrics`, `GiveUpMetrics`, `LastGoodMetrics`, `NormMetrics` and `MicroBatchMetrics`. If
        there are several clippers, each name is preceded by the place of its clipper in the state,
        as in `"0/grad_norm"` for the first link of a chain. Empty if there is no record.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_smartclip as smartclip
        >>> tx = optax.chain(smartclip.autoclip(max_norm=1.0), optax.sgd(0.1))
        >>> params = {"w": jnp.zeros(2)}
        >>> _, opt_state = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(params))
        >>> record = smartclip.metrics(opt_state)
        >>> float(record["grad_norm"]), round(float(record["clip_scale"]), 6)
        (5.0, 0.2)
    """
    nodes = jax.tree_util.tree_flatten_with_path(
        unbox(opt_state), is_leaf=lambda node: bool(_read(node))
    )[0]
    found = {path[:-1]: record for path, node in nodes if (record := _read(node))}
    kinds = [tuple(record) for record in found.values()]
    return {
        f"{path_name(path)}/{name}" if kinds.count(tuple(record)) > 1 else name: value
        for path, record in found.items()
        for name, value in record.items()
    }


def fields_named(records: Mapping[str, Array], field: str) -> list[Array]:
    """The values that `metrics` returned for one field, of every record that has it."""
    return [value for name, value in records.items() if name.rpartition("/")[2] == field]


def _read(node: Any) -> dict[str, Array]:
    """The record that a node is, or is a mapping of; empty if it is neither."""
    fields: Any = node
    if isinstance(node, tuple(RECORDS)):
        fields = fields._asdict()
    for kind in RECORDS:
        if isinstance(fields, Mapping) and set(fields) == set(kind._fields):
            return {name: fields[name] for name in kind._fields}
    return {}
