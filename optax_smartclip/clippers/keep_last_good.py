"""Keeps copies of parameters and optimizer state that a training step can return to.

Dropping steps does not help once the parameters themselves are where training fails. A copy from
before that is the last resort of a training program, usually a checkpoint and a restart. Here it is
in the optimizer state, and a compiled step can return to it.

Two copies are kept, and the older one is returned to: the newer may have been taken in the step
before the trouble began.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Bool, Float32, Int32

from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import as_float32, is_inexact
from optax_smartclip.engine.meshes import AxisName, vary_as, vary_as_before
from optax_smartclip.engine.metrics import (
    fields_named,
    increment_where,
    metrics,
    metrics_record,
)
from optax_smartclip.engine.norms import norms_in_range
from optax_smartclip.engine.partitions import one_group
from optax_smartclip.engine.scaling import has_reached, scale_array
from optax_smartclip.engine.states import check_is_state, state_dataclass
from optax_smartclip.engine.trees import PyTree, clippable_leaves

_PINNED_HOST = "pinned_host"

# In place of the age of a copy that has not been taken.
_NONE = -1


@metrics_record
class LastGoodMetrics(NamedTuple):
    """The record of `keep_last_good`. Every field is a scalar.

    Attributes:
        copy_age: int32, how many steps `restore_last_good` would undo, dropped ones not counted;
            -1 if there is no copy yet. Stops at 2 ** 31 - 1.
        rate_scale: float32, what updates are multiplied by: 1 until a restore cuts the rate.
        num_restores: int32, how often a copy has been returned to. Stops at 2 ** 31 - 1.
    """

    copy_age: Int32[Array, ""]
    rate_scale: Float32[Array, ""]
    num_restores: Int32[Array, ""]


@state_dataclass
class KeptState:
    """The state of `keep_last_good`.

    Attributes:
        copies: Two pairs of parameters and inner state. In the inner state, tuples replace named
            tuples, dataclasses and dictionaries, so that `metrics` and `optax.tree.get` find each
            name once: in the state of the optimizer.
        ages: The age of each copy in steps; -1 if it has not been taken.
        last: The record of the last step, whose `rate_scale` multiplies the updates.
    """

    copies: Any
    ages: Int32[Array, " 2"]
    last: LastGoodMetrics


@state_dataclass
class LastGoodState:
    """The state of `keep_last_good`.

    Attributes:
        inner_state: That of the optimizer inside.
        kept: The copies.
    """

    inner_state: Any
    kept: KeptState


def keep_last_good(
    inner: optax.GradientTransformation,
    *,
    every: Any,
    memory_kind: str | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its state has copies of the parameters and of itself.

    `smartclip.restore_last_good` returns to a copy within a compiled step, when the program says
    so. It is not a cure: if training fails because of the model or the rate, it fails again.

    A copy is taken at the start of the first step and then every `every` steps. It waits while
    parameters or gradient are not finite or have a norm over about 1e19, or if `skip_spikes` inside
    dropped the step before or found a spike in it. Steps that are dropped do not count.

    Two copies are kept, and one returns to the older, because the newer may have been taken just
    before the trouble began. Once there are two, the older is `every` to `2 * every` steps old, or
    more if a copy had to wait.

    Wrap the whole optimizer, `skip_spikes` included.

    Args:
        inner: The optimizer.
        every: How many steps there are from one copy to the next, >= 1.
        memory_kind: None to keep the copies where the parameters are, or `"pinned_host"` to keep
            them in the memory of the host, which JAX does not support under `vmap`. They are read
            and written only in steps that take a copy or return to one.
        axis_name: Under `shard_map` or `pmap`, mapped axes over which leaves are split; see
            `clip_by_rule`.

    Returns:
        A gradient transformation with a `LastGoodState`, whose `update` needs `params` and passes
        all extra arguments on. Its memory is two times that of parameters and inner state.
        `smartclip.metrics` finds its record, `LastGoodMetrics`.

    Raises:
        ValueError: If an argument is out of range; from `init`, if the backend has no such memory;
            from `update`, if `params` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_smartclip as smartclip
        >>> tx = smartclip.keep_last_good(optax.sgd(1.0), every=10)
        >>> params = jnp.zeros(())
        >>> opt_state = tx.init(params)
        >>> for step in range(25):
        ...     updates, opt_state = tx.update(jnp.array(-1.0), opt_state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> float(params), int(smartclip.metrics(opt_state)["copy_age"])
        (25.0, 15)
        >>> params, opt_state = smartclip.restore_last_good(params, opt_state, True)
        >>> float(params)
        10.0
    """
    checks.check_steps("every", every, low=1)
    checks.check_transformation("inner", inner)
    checks.check_choice("memory_kind", memory_kind, (None, _PINNED_HOST))
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> LastGoodState:
        _check_has_memory(memory_kind)
        inner_state = inner.init(params)
        like = params, _without_names(inner_state, jax.tree.structure(params))
        ages = jnp.full(2, _NONE, jnp.int32)
        last = LastGoodMetrics(
            copy_age=jnp.full((), _NONE, jnp.int32),
            rate_scale=jnp.ones((), jnp.float32),
            num_restores=jnp.zeros((), jnp.int32),
        )
        ages, last = vary_as((ages, last), params, axis_name)
        copies = tuple(
            jax.tree.map(lambda leaf: _move(jnp.copy(leaf), memory_kind), like) for _ in range(2)
        )
        return LastGoodState(
            inner_state=inner_state, kept=KeptState(copies=copies, ages=ages, last=last)
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, LastGoodState]:
        check_is_state(state, LastGoodState)
        if params is None:
            raise ValueError("`params` must be passed to `update`, which keeps copies of them.")
        kept, now = state.kept, (params, state.inner_state)
        _check_same_kinds(now, kept.copies)
        is_due = has_reached(_steps_since_copy(kept.ages), every) & ~_was_bad(state.inner_state)
        takes = jax.lax.cond(
            is_due, lambda: _is_finite((params, updates), axis_name), lambda: is_due
        )
        takes_slot = takes & (jnp.arange(2) == _next_slot(kept.ages))
        copies = [
            _copy_where(takes_slot[slot], now, copy, memory_kind)
            for slot, copy in enumerate(kept.copies)
        ]
        (params, inner_state), *copies = _in_order(now, *copies)
        inner_updates, inner_state = inner.update(updates, inner_state, params, **extra_args)

        ages = jnp.where(takes_slot, 0, kept.ages)
        ages = increment_where(_is_taken(ages) & ~_was_dropped(inner_state), ages)
        last = kept.last._replace(copy_age=jnp.max(ages))
        next_state = LastGoodState(
            inner_state=inner_state, kept=KeptState(copies=tuple(copies), ages=ages, last=last)
        )

        def cut(leaf: Any) -> Any:
            if not is_inexact(leaf):
                return leaf
            return scale_array(jnp.asarray(leaf), last.rate_scale, "propagate")

        return jax.tree.map(cut, inner_updates), vary_as_before(next_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def restore_last_good(
    params: PyTree, opt_state: Any, when: Any, *, rate_factor: Any = 1.0
) -> tuple[PyTree, LastGoodState]:
    """Returns to the older copy of `keep_last_good` where `when` is true, else changes nothing.

    Parameters and the state of the optimizer inside are those of the copy in every bit: moments,
    counts, schedules, and what `skip_spikes` and clippers inside know, their metrics included. The
    copies are not used up, so that one can return again. Before the first copy nothing changes.

    Values outside of the optimizer, such as batch statistics, stay as they are. So does the place
    in the data: do not feed the same batches again.

    Args:
        params: The parameters after `optax.apply_updates`.
        opt_state: The state that `update` returned, of `keep_last_good` around all the rest.
        when: A bool, Python's or a traced scalar.
        rate_factor: What the updates of all later steps are multiplied by, in (0, 1]. Several
            restores multiply: `rate_scale` in the metrics is the product.

    Returns:
        Parameters and optimizer state, with the types of those that were given.

    Raises:
        ValueError: If `opt_state` is not of `keep_last_good`, `params` are not those of its copies,
            `when` is not a bool or `rate_factor` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_smartclip as smartclip
        >>> inner = smartclip.skip_spikes(optax.sgd(1.0), give_up_after=3)
        >>> tx = smartclip.keep_last_good(inner, every=5)
        >>> params = jnp.zeros(())
        >>> opt_state = tx.init(params)
        >>> for size in [1.0] * 20 + [float("nan")] * 3:
        ...     updates, opt_state = tx.update(jnp.array(-size), opt_state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     exhausted = smartclip.metrics(opt_state)["exhausted"]
        ...     params, opt_state = smartclip.restore_last_good(
        ...         params, opt_state, exhausted, rate_factor=0.5
        ...     )
        >>> record = smartclip.metrics(opt_state)
        >>> float(params), int(record["num_restores"]), float(record["rate_scale"])
        (10.0, 1, 0.5)
    """
    checks.check_number("rate_factor", rate_factor, 0.0, 1.0, allowed="in (0, 1]", strict_low=True)
    check_is_state(opt_state, LastGoodState)
    kept, now = opt_state.kept, (params, opt_state.inner_state)
    _check_same_kinds(now, kept.copies)
    older = jnp.argmax(kept.ages)
    returns = _check_condition(when) & jnp.any(_is_taken(kept.ages))

    def leaves_of(tree: PyTree) -> list[Array]:
        return [_move(leaf, None) for leaf in jax.tree.leaves(tree)]

    branches = [functools.partial(leaves_of, tree) for tree in (now, *kept.copies)]
    leaves = jax.lax.switch(jnp.where(returns, 1 + older, 0), branches)
    params, inner_state = jax.tree.unflatten(jax.tree.structure(now), leaves)

    # The newer copy is of a way that has been left.
    only_older = jnp.where(jnp.arange(2) == older, 0, _NONE)
    ages = jnp.where(returns, only_older.astype(jnp.int32), kept.ages)
    last = LastGoodMetrics(
        copy_age=jnp.max(ages),
        rate_scale=kept.last.rate_scale * jnp.where(returns, as_float32(rate_factor), 1.0),
        num_restores=increment_where(returns, kept.last.num_restores),
    )
    restored = LastGoodState(
        inner_state=inner_state, kept=KeptState(copies=kept.copies, ages=ages, last=last)
    )
    return params, restored


def _was_dropped(opt_state: Any) -> Bool[Array, ""]:
    """Whether `skip_spikes` in a state dropped the last step; not so where there is none."""
    return _any(fields_named(metrics(opt_state), "skipped"))


def _was_bad(opt_state: Any) -> Bool[Array, ""]:
    """Whether `skip_spikes` in a state dropped the last step, or let a spike through."""
    record = metrics(opt_state)
    over = [
        value > threshold
        for name in ("skip_norm", "skip_value")
        for value, threshold in zip(
            fields_named(record, name), fields_named(record, f"{name}_threshold"), strict=True
        )
    ]
    return _any([*fields_named(record, "skipped"), *over])


def _any(flags: list[Array]) -> Bool[Array, ""]:
    return functools.reduce(jnp.logical_or, map(jnp.any, flags), jnp.zeros((), bool))


def _is_finite(tree: PyTree, axis_name: AxisName) -> Bool[Array, ""]:
    arrays = list(clippable_leaves(tree, lambda _: True).values())
    # Without scaled sums: nothing good has a norm that needs them.
    (norm,) = norms_in_range(arrays, one_group(len(arrays)), axis_name=axis_name)
    return jnp.isfinite(norm)


def _is_taken(ages: Int32[Array, " 2"]) -> Bool[Array, " 2"]:
    """Which of the copies are there."""
    return ages >= 0


def _steps_since_copy(ages: Int32[Array, " 2"]) -> Int32[Array, ""]:
    """The age of the newer copy; the largest number if there is none."""
    return jnp.min(jnp.where(_is_taken(ages), ages, jnp.iinfo(jnp.int32).max))


def _next_slot(ages: Int32[Array, " 2"]) -> Int32[Array, ""]:
    """Where the next copy goes: where there is none, or in place of the older one."""
    return jnp.where(jnp.all(_is_taken(ages)), jnp.argmax(ages), jnp.argmin(ages))


def _copy_where(
    takes: Bool[Array, ""], now: PyTree, copy: PyTree, memory_kind: str | None
) -> PyTree:
    # A conditional, so that the copy is neither read nor written in a step that takes none.
    old, structure = jax.tree.flatten(copy)
    leaves = jax.lax.cond(
        takes,
        lambda: [_move(leaf, memory_kind) for leaf in jax.tree.leaves(now)],
        lambda: [_move(leaf, memory_kind) for leaf in old],
    )
    return jax.tree.unflatten(structure, leaves)


def _in_order(now: PyTree, *copies: PyTree) -> list[PyTree]:
    """The same trees; what uses a leaf of the first runs after its copies are made.

    Otherwise XLA may update it first, and saves what the update overwrites in every step.
    """
    structures = [jax.tree.structure(tree) for tree in (now, *copies)]
    leaves = map(jax.tree.leaves, (now, *copies))
    # Leaf by leaf, because a barrier makes all that is in it vary along the same mapped axes.
    rows = map(jax.lax.optimization_barrier, zip(*leaves, strict=True))
    return list(map(jax.tree.unflatten, structures, zip(*rows, strict=True)))


def _without_names(node: PyTree, of_params: PyTreeDef) -> PyTree:
    """The tree with a tuple for each node that is not one of the structure of the parameters.

    These stay, because `optax.tree.map_params` puts something else in place of each.
    """
    children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    if jax.tree.structure(node) == of_params or any(child is node for child in children):
        return node
    return tuple(_without_names(child, of_params) for child in children)


def _move(leaf: Any, memory_kind: str | None) -> Array:
    """A leaf in the memory of this kind; one that is there already stays."""
    if not hasattr(jax, "memory"):
        return jnp.asarray(leaf)
    space = jax.memory.Space.Device if memory_kind is None else jax.memory.Space.Host
    is_there = jax.typeof(leaf).memory_space == space
    return jnp.asarray(leaf) if is_there else jax.device_put(leaf, space)


def _check_has_memory(memory_kind: str | None) -> None:
    devices = jax.local_devices()
    kinds = {memory.kind for device in devices for memory in device.addressable_memories()}
    if memory_kind is not None and not (memory_kind in kinds and hasattr(jax, "memory")):
        raise ValueError(
            f"`memory_kind` must be None where the backend and JAX have only {sorted(kinds)}, got "
            f"{memory_kind!r}."
        )


def _check_condition(when: Any) -> Bool[Array, ""]:
    if jnp.shape(when) != () or jnp.result_type(when) != jnp.bool_:
        raise ValueError(
            f"`when` must be a bool, or a scalar array of bools, got {when!r}. For a batch of runs "
            "call `restore_last_good` by `jax.vmap`."
        )
    return jnp.asarray(when)


def _check_same_kinds(now: PyTree, copies: tuple[PyTree, ...]) -> None:
    given, *expected = (
        [(jnp.shape(leaf), str(jnp.result_type(leaf))) for leaf in jax.tree.leaves(tree)]
        for tree in (now, *copies)
    )
    if any(kinds != given for kinds in expected):
        raise ValueError(
            "`params` must have the shapes and dtypes of those that `init` was called with, "
            f"got {given[: len(jax.tree.leaves(now[0]))]}."
        )
