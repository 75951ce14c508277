"""Clips the gradient of each micro-batch, or of each example, before they are added up.

The norm of a mean says little about a few damaged examples in it: clipped as a whole, the good ones
are scaled down with them. Here every part of the batch is held to a threshold that was learned from
parts, so that a damaged one costs its own share:

    update = mean_i(min(1, threshold_i / norm_i) * gradient_i)

The parts are judged in turn, each by the norms of those before it, as a loop that calls the clipper
for each of them would do. A clipper's decisions depend on norms and on nothing else, so that the
loop is one over norms: the gradients are read all at once, and may be on several devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Inexact, Int32

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import is_inexact, working_dtype
from optax_smartclip.engine.meshes import (
    AxisName,
    axis_names,
    is_followed,
    replicate,
    vary_as_before,
    varying_axes,
)
from optax_smartclip.engine.metrics import ClipMetrics, metrics_record
from optax_smartclip.engine.norms import LARGEST
from optax_smartclip.engine.rule import ClipperTransformation
from optax_smartclip.engine.states import ClipState, check_is_state, state_dataclass
from optax_smartclip.engine.trees import PyTree, flatten, path_name


@metrics_record
class MicroBatchMetrics(NamedTuple):
    """The record of `clip_micro_batches`: the micro-batches of the last step together.

    Every field has the shape `[groups]`, or `[]` if there is one group. Every number is finite.

    Attributes:
        micro_batches_clipped: int32, how many were over the threshold.
        micro_batches_nonfinite: int32, how many had a NaN or Inf norm.
        micro_batch_norm: float32, the median of their norms before clipping.
        largest_micro_batch_norm: float32, the largest of these; 3.4e38 if one is NaN or Inf.
    """

    micro_batches_clipped: Int32[Array, " *groups"]
    micro_batches_nonfinite: Int32[Array, " *groups"]
    micro_batch_norm: Float32[Array, " *groups"]
    largest_micro_batch_norm: Float32[Array, " *groups"]


@state_dataclass
class MicroBatchState:
    """The state of `clip_micro_batches`.

    Attributes:
        clipper: That of the clipper, which takes each part for a step.
        last: The record of the last update. Reported, never read to decide anything.
    """

    clipper: ClipState
    last: MicroBatchMetrics


def clip_micro_batches(
    clipper: optax.GradientTransformation,
    *,
    axis: int | None = 0,
    axis_name: AxisName = None,
    reduce: str | None = "mean",
) -> optax.GradientTransformationExtraArgs:
    """Clips each micro-batch's gradient against the history of all, and returns their mean.

    A part is a micro-batch or an example. Its norm is compared with a threshold that was learned
    from the norms of parts, and is then recorded. The parts are judged in turn, so that each is
    compared with those before it, in the same batch too: the result is that of a loop that calls
    `clipper.update` for each part. There is one history for all parts, which counts each as a step
    (of warm-up, and in the metrics). A window is best as long as several batches: see `history` of
    `autoclip`.

    The mean divides by the number of all parts. One with a NaN or Inf is a zero in it, so that it
    costs its own share, and the others count as much as they did (with the clipper's
    `nonfinite="zero"`).

    This is an aggregator: `update` takes more gradients than it returns. Put it first in a chain.
    Add a clipper after it to clip the mean as well. Where Optax has
    `optax.experimental.aggregating`, it is an `Aggregator` of that module, for its `process`.

    In a loop that adds gradients up, where only one is there at a time, call `clipper.update` in
    the loop and carry its state. The result is the same.

    Args:
        clipper: `autoclip(...)`, `zscore_clip(...)`, `zclip(...)`, `adagc(...)` or
            `clip_by_rule(...)`, for the gradient of one part.
        axis: The axis of every leaf along which parts are stacked, as `jax.vmap(jax.grad(loss))`
            returns them. None if a leaf is that of one part, and `axis_name` counts them.
        axis_name: Under `shard_map` or `pmap`, the mapped axis or axes along which devices have
            other parts of the batch: those over which the gradients would be summed. They are
            judged in the order of the devices, and the state is the same on all of them. Only norms
            are sent for this.
        reduce: `"mean"`, `"sum"`, or None to return the clipped parts, as they were stacked. With
            `axis_name`, means and sums are taken over devices as well.

    Returns:
        A gradient transformation with a `MicroBatchState`. `params` in `init` and `update` are
        those of the model, without an axis of parts. Leaves without a norm, such as integers, are
        those of the first part.

    Raises:
        ValueError: If an argument is out of range, or `clipper` is none of these; from `update`, if
            the leaves do not have the same number of parts, or do not fit the parameters, or if the
            gradient is the same on all devices of `axis_name`.

    Example:
        Four examples, of which the third is damaged. The norms of the first two are 1.

        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_smartclip as smartclip
        >>> tx = optax.chain(
        ...     smartclip.clip_micro_batches(smartclip.autoclip()), optax.sgd(1.0)
        ... )
        >>> params = {"w": jnp.zeros(2)}
        >>> grads = {"w": jnp.array([[0.0, 1.0], [0.0, 1.0], [1000.0, 0.0], [0.0, 1.0]])}
        >>> updates, opt_state = tx.update(grads, tx.init(params), params)
        >>> print(updates["w"])  # the third is cut to 1.5 times the median
        [-0.375 -0.75 ]
        >>> record = smartclip.metrics(opt_state)
        >>> int(record["micro_batches_clipped"]), float(record["largest_micro_batch_norm"])
        (1, 1000.0)
    """
    if not isinstance(clipper, ClipperTransformation) or not hasattr(clipper, "steps"):
        raise ValueError(
            "`clipper` must be a clipper with a history, as autoclip() is, and not within a chain "
            f"or another wrapper, got {clipper!r}."
        )
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
        raise ValueError(f"`axis` must be a Python int or None, got {axis!r}.")
    names = axis_names(axis_name)
    if axis is None and not names:
        raise ValueError(
            "`axis` must be an int where `axis_name` names no axis: a gradient has parts along one "
            "of them, got None."
        )
    checks.check_choice("reduce", reduce, ("mean", "sum", None))
    measure, judge, scale = clipper.steps

    def judge_part(state: ClipState, norms: Array) -> tuple[ClipState, tuple[Array, ClipMetrics]]:
        state, scales = judge(state, norms)
        return state, (scales, state.last)

    def init_fn(params: PyTree) -> MicroBatchState:
        state = clipper.init(params)
        last = state.last
        return MicroBatchState(
            clipper=state,
            last=MicroBatchMetrics(
                micro_batches_clipped=jnp.zeros_like(last.num_clipped),
                micro_batches_nonfinite=jnp.zeros_like(last.num_clipped),
                micro_batch_norm=jnp.zeros_like(last.grad_norm),
                largest_micro_batch_norm=jnp.zeros_like(last.grad_norm),
            ),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, MicroBatchState]:
        del extra_args
        check_is_state(state, MicroBatchState)
        _check_parts(updates, params, axis)
        _check_varies(updates, names)
        norms = measure(updates, params, axis)
        everyone = _of_all_devices(norms, names)
        next_state, (scales, records) = jax.lax.scan(judge_part, state.clipper, everyone)
        clipped = scale(updates, params, axis, _of_this_device(scales, len(norms), names))
        if reduce is not None:
            count = len(everyone) if reduce == "mean" else 1
            clipped = jax.tree.map(lambda leaf: _reduce(leaf, axis, names, count), clipped)
        next_state = MicroBatchState(clipper=next_state, last=_summary(records))
        return clipped, vary_as_before(next_state, state)

    kind = optax.GradientTransformationExtraArgs if reduce is None else _aggregator()
    transformation: optax.GradientTransformationExtraArgs = kind(init_fn, update_fn)
    return transformation


def _aggregator() -> Callable[..., Any]:
    """The class of what returns fewer gradients than it takes, where Optax has one."""
    aggregating = getattr(getattr(optax, "experimental", None), "aggregating", None)
    kind: Callable[..., Any] = getattr(
        aggregating, "Aggregator", optax.GradientTransformationExtraArgs
    )
    return kind


def _of_all_devices(
    norms: Float[Array, "parts groups"], names: tuple[str, ...]
) -> Float[Array, "all_parts groups"]:
    """The norms of the parts of all devices, in the order of the devices."""
    if not names:
        return replicate(norms)
    device, devices = jax.lax.axis_index(names), jax.lax.psum(1, names)
    # JAX treats the result of all_gather as different on each device. The state must be equal.
    own_row = jnp.zeros((devices, *norms.shape), norms.dtype).at[device].set(norms)
    everyone: Array = jax.lax.psum(own_row, names)
    return everyone.reshape(-1, norms.shape[1])


def _of_this_device(
    scales: Float[Array, "all_parts groups"], num_parts: int, names: tuple[str, ...]
) -> Float[Array, "parts groups"]:
    """The scales of this device's own parts."""
    if not names:
        return scales
    first = jax.lax.axis_index(names) * num_parts
    return jax.lax.dynamic_slice_in_dim(scales, first, num_parts)


def _reduce(leaf: Any, axis: int | None, names: tuple[str, ...], count: int) -> Any:
    """The sum over the parts of all devices, divided by `count`; rounded once."""
    if not is_inexact(leaf):
        return leaf if axis is None else leaf.take(0, axis)
    wide: Inexact[Array, "..."] = leaf.astype(working_dtype(leaf.dtype))
    total = wide if axis is None else jnp.sum(wide, axis)
    total = jax.lax.psum(total, names) if names else total
    return (total / count).astype(leaf.dtype)


def _summary(records: ClipMetrics) -> MicroBatchMetrics:
    """One record of the records of all parts, which have them along the first axis."""
    norms = records.grad_norm
    return MicroBatchMetrics(
        micro_batches_clipped=jnp.sum(records.clipped, 0, jnp.int32),
        micro_batches_nonfinite=jnp.sum(norms == LARGEST, 0, jnp.int32),
        micro_batch_norm=jnp.median(norms, 0),
        largest_micro_batch_norm=jnp.max(norms, 0),
    )


def _check_parts(updates: PyTree, params: PyTree | None, axis: int | None) -> None:
    """Raises ValueError unless all leaves have the same parts, each of the shape of a parameter."""
    if axis is None:
        return
    shapes = {path: np.shape(leaf) for path, leaf in flatten(updates).items()}
    of_params = {path: np.shape(leaf) for path, leaf in flatten(params).items()}
    counts = set()
    for path, shape in shapes.items():
        has_axis = -len(shape) <= axis < len(shape)
        part = tuple(np.delete(shape, axis)) if has_axis else None
        if not has_axis or part != of_params.get(path, part):
            expected = f" and else the shape {of_params[path]}" if path in of_params else ""
            raise ValueError(
                f"`updates` must have the parts along axis {axis} of every leaf{expected}, "
                f"got the shape {shape} for {path_name(path)!r}."
            )
        counts.add(shape[axis])
    if len(counts) > 1 or 0 in counts:
        raise ValueError(
            f"`updates` must have the same number of parts, at least 1, along axis {axis} of every "
            f"leaf, got {sorted(counts)}."
        )


def _check_varies(updates: PyTree, names: tuple[str, ...]) -> None:
    """Raises ValueError if JAX knows that the gradient is the same on all devices."""
    leaves = jax.tree.leaves(updates)
    for name in names:
        if is_followed(name) and not any(name in varying_axes(leaf) for leaf in leaves):
            raise ValueError(
                f"`updates` must be each device's own along `axis_name` {name!r}, got the same "
                "gradient on all devices. jax.grad has summed it if the parameters are the same on "
                f"all: differentiate with jax.lax.pcast(params, {name!r}, to='varying') (before "
                f"JAX 0.9, jax.lax.pvary(params, {name!r}))."
            )
