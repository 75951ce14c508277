"""Undoes what a step has changed outside of the optimizer, if `skip_spikes` has dropped the step.

Batch statistics, step counters and averages of parameters are computed beside the optimizer. The
optimizer can leave its own state as it was, and cannot reach theirs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from optax_smartclip.engine.metrics import fields_named, metrics
from optax_smartclip.engine.trees import KeyPath, PyTree, leaves_by_name, path_name


def where_skipped(opt_state: Any, old: PyTree, new: PyTree) -> PyTree:
    """Returns `old` if `skip_spikes` dropped the step that returned `opt_state`, else `new`.

    A dropped step changes neither the parameters nor the state of the optimizer. Everything else
    that the step computes moves on: batch statistics, which one NaN makes NaN forever, a step
    counter, an average of the parameters. Pass these through here, after `update`.

    Every leaf is that of `old` or that of `new` in every bit. This is a pure function of arrays,
    for use in a training step: inside `jit`, `scan` and `vmap`. Do not pass `opt_state` itself
    through it: `skip_spikes` would forget what it has seen in the dropped step.

    Inside `optax.MultiSteps`, the record of `skip_spikes` is that of the last real step. If that
    step was dropped, this function returns `old` in every call until the next real step, and the
    earlier small batches of the dropped step are not undone. A small batch that `MultiSteps` itself
    leaves out, by `should_skip_update_fn`, is not in the record. Put `skip_spikes` around
    `MultiSteps` instead: then each small batch is judged, and undone if it is dropped. The same
    holds for other wrappers that leave its state as it was in some steps, such as
    `optax.apply_if_finite`.

    Args:
        opt_state: The optimizer state that `update` returned in this step, with `skip_spikes`
            anywhere in it. If there are several, as in the parts of `optax.partition`, the step
            counts as dropped if any of them dropped it.
        old: A tree as it was before the step. Leaves are arrays of any dtype, random keys or Python
            numbers.
        new: The tree after the step, with the structure, shapes and dtypes of `old`. Leaves that
            are neither arrays nor numbers, such as functions and strings, are taken from here.

    Returns:
        A tree with the structure of `new`. Numbers become arrays.

    Raises:
        ValueError: If `opt_state` has no `skip_spikes` in it or is a batch of states; if `old` and
            `new` differ in structure, or in the shape or dtype of a leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_smartclip as smartclip
        >>> tx = smartclip.skip_spikes(optax.sgd(0.1))
        >>> params, mean, step = jnp.zeros(2), jnp.zeros(()), 0
        >>> opt_state = tx.init(params)
        >>> for size in [1.0, float("nan"), 3.0]:
        ...     updates, opt_state = tx.update(jnp.full(2, size), opt_state, params)
        ...     now = 0.5 * mean + 0.5 * size, step + 1
        ...     mean, step = smartclip.where_skipped(opt_state, (mean, step), now)
        >>> float(mean), int(step)
        (1.75, 2)
    """
    skipped = _was_skipped(opt_state)
    _check_same_structure(old, new)

    def select(path: KeyPath, old: Any, new: Any) -> Any:
        if _kind(old) != _kind(new):
            raise ValueError(
                f"`new` must have the shape and dtype of `old` at {path_name(path)!r}, "
                f"{_kind(old)}, got {_kind(new)}."
            )
        return new if _kind(new) is None else jnp.where(skipped, old, new)

    return jax.tree_util.tree_map_with_path(select, old, new)


def _was_skipped(opt_state: Any) -> Bool[Array, ""]:
    flags = fields_named(metrics(opt_state), "skipped")
    if not flags:
        raise ValueError(
            "`opt_state` must be the state of an optimizer within `skip_spikes`, as `update` "
            f"returned it, got an object of type {type(opt_state).__name__} without one."
        )
    skipped = functools.reduce(jnp.logical_or, flags[1:], jnp.asarray(flags[0]))
    if skipped.shape:
        raise ValueError(
            "`opt_state` must be the state of one run, got a batch of them, of shape "
            f"{skipped.shape}. Call `where_skipped` for each by `jax.vmap`."
        )
    return skipped


def _check_same_structure(old: PyTree, new: PyTree) -> None:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (old, new)]
    if structures[0] != structures[1]:
        of_old, of_new = leaves_by_name(old).keys(), leaves_by_name(new).keys()
        if of_old != of_new:
            structures = [f"{sorted(of_old - of_new)} alone", f"{sorted(of_new - of_old)} alone"]
        raise ValueError(
            f"`new` must have the structure of `old`, got {structures[1]} in `new` "
            f"and {structures[0]} in `old`."
        )


def _kind(leaf: Any) -> tuple[tuple[int, ...], str] | None:
    """Shape and dtype; None if a leaf has no value that one could select."""
    try:
        kind = jax.typeof(leaf)
    except TypeError:
        return None
    return None if kind.dtype == jax.dtypes.float0 else (kind.shape, str(kind.dtype))
