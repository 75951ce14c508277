"""Norms of groups that are observed and not clipped: who held the norm of a gradient.

A clip of the global norm says that the norm was large, and not which layer made it so.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from optax_smartclip.engine.groups import Groups, LeafMask, Scope, assign_groups, check_scope
from optax_smartclip.engine.meshes import AxisName, vary_as, vary_as_before
from optax_smartclip.engine.metrics import metrics_record, record_shape, reported
from optax_smartclip.engine.norms import group_norms, shares
from optax_smartclip.engine.stacks import Stacked, check_stacked
from optax_smartclip.engine.states import check_groups, check_is_state
from optax_smartclip.engine.trees import PyTree, clippable_leaves


@metrics_record
class NormMetrics(NamedTuple):
    """The record of `observe_norms`, which is all of its state.

    Every field has the shape `[groups]`, or `[]` if there is one group. Every number is finite.

    Attributes:
        observed_norm: float32, the norm; 3.4e38 if it is NaN or Inf.
        norm_share: float32, the share of the squared norm of all observed leaves, in [0, 1]. The
            shares add up to 1, or are all 0 if every norm is. If norms are NaN or Inf, those
            groups have equal shares and the others none.
    """

    observed_norm: Float32[Array, " *groups"]
    norm_share: Float32[Array, " *groups"]


def observe_norms(
    scope: Scope = "per_layer",
    *,
    stacked: Stacked = None,
    mask: LeafMask = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Records the norm of each group and its share of the whole, and changes nothing.

    Put it as a link before the clipper, whose groups may be others. In a compiled step, the
    gradient is not read again for it: XLA merges the sums of a leaf that both take. The sums of a
    leaf that is stacked here and whole to the clipper are others, and cost a reading.

    Before `skip_spikes`, as in `optax.chain(observe_norms(), skip_spikes(...))`, it records dropped
    steps as well. Inside, its record is that of the last step that was not dropped.

    Args:
        scope: Which leaves share one norm; see `clip_by_rule`. So are `stacked`, `mask` and
            `axis_name`.
        stacked: Along which axes a leaf is to be taken for several.
        mask: Which leaves are observed. The others have no share.
        axis_name: Under `shard_map` or `pmap`, mapped axes over which leaves are split.

    Returns:
        A transformation that returns its updates as they are. Its state is a `NormMetrics`, which
        `smartclip.metrics` finds; `group_labels` returns the names of the groups.

    Raises:
        ValueError: If an argument is out of range; from `init`, if `stacked` or `mask` does not fit
            the parameters; from `update`, if the gradient has other groups than the parameters had.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_smartclip as smartclip
        >>> tx = optax.chain(smartclip.observe_norms(), smartclip.autoclip(), optax.sgd(0.1))
        >>> grads = {"body": {"w": jnp.array([1.0])}, "head": {"w": jnp.array([3.0])}}
        >>> _, opt_state = tx.update(grads, tx.init(grads))
        >>> record = smartclip.metrics(opt_state)
        >>> print(record["observed_norm"], record["norm_share"])
        [1. 3.] [0.1 0.9]
    """
    check_scope(scope)
    check_stacked(stacked, scope)

    def groups_of(tree: PyTree) -> Groups:
        return assign_groups(scope, tree, stacked=stacked, mask=mask)

    def init_fn(params: PyTree) -> NormMetrics:
        shape = record_shape(groups_of(params).num_groups)
        record = NormMetrics(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
        return vary_as(record, params, axis_name)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, NormMetrics]:
        del extra_args
        groups = groups_of(updates if params is None else params)
        shape = record_shape(groups.num_groups)
        check_is_state(state, NormMetrics)
        check_groups("observed_norm", state.observed_norm, shape)
        leaves = clippable_leaves(updates, groups.takes_part)
        norms = group_norms(list(leaves.values()), groups.partition(leaves), axis_name=axis_name)
        record = NormMetrics(reported(norms).reshape(shape), shares(norms).reshape(shape))
        return updates, vary_as_before(record, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
