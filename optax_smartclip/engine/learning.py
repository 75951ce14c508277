"""The interface of a rule, and one step of it: thresholds for the values, then a record of them.

`clip_by_rule` takes this step with the norms of groups, `skip_spikes` with a norm and a loss.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from optax_smartclip.engine.metrics import increment_where
from optax_smartclip.engine.norms import Mask, Norms
from optax_smartclip.engine.states import leaf_names, select_groups

RuleState = Any


class ThresholdRule(NamedTuple):
    """A history-based clipper's knowledge, as three pure functions.

    `norms` and thresholds are float32[groups]. A rule learns from norms that are positive and
    finite: where a group's norm is zero, NaN or Inf, the rule is shown a zero, its threshold is
    not used and its state is kept as it was.

    Attributes:
        init: Number of groups -> state. Every leaf of it has a leading `groups` axis.
        threshold: State, norms of this step -> thresholds. The rule chooses whether the norms that
            are to be judged have a say in it.
        record: State, norms, what `threshold` returned for them -> next state. The thresholds
            are the rule's own, before warm-up and `max_norm`.
    """

    init: Callable[[int], RuleState]
    threshold: Callable[[RuleState, Norms], Norms]
    record: Callable[[RuleState, Norms, Norms], RuleState]


class Learned(NamedTuple):
    """The outcome of one step of a rule.

    Attributes:
        thresholds: The rule's own, before warm-up.
        rule: The next state of the rule.
        num_observed: The next counts of what each group has observed.
    """

    thresholds: Norms
    rule: RuleState
    num_observed: Int32[Array, " groups"]


def init_rule(rule: ThresholdRule, num_groups: int) -> RuleState:
    """The state that a rule starts with.

    Raises:
        ValueError: If a leaf lacks the `groups` axis.
    """
    state = rule.init(num_groups)
    for leaf in jax.tree.leaves(state):
        if jnp.shape(leaf)[:1] != (num_groups,):
            raise ValueError(
                "`rule.init` must return arrays whose first axis has one entry per group "
                f"({num_groups}), got the shape {jnp.shape(leaf)}."
            )
    # A weakly typed leaf, such as jnp.full(groups, 1.0), would change its type in the first step,
    # and the second would be compiled again.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), state)


def fields_of(rule: ThresholdRule) -> Callable[[], frozenset[str]]:
    """The names of the leaves in the state of a rule, found out when they are first asked for."""
    return functools.cache(lambda: leaf_names(jax.eval_shape(lambda: rule.init(1))))


def learn(
    rule: ThresholdRule,
    state: RuleState,
    num_observed: Any,
    values: Norms,
    live: Mask,
) -> Learned:
    """One step of a rule, which learns from the groups in `live` and from no other.

    A restored state, and with it `num_observed`, may consist of NumPy arrays.

    Raises:
        ValueError: If the thresholds of the rule lack the `groups` axis.
    """
    shown = jnp.where(live, values, 0.0)
    thresholds = rule.threshold(state, shown)
    if jnp.shape(thresholds) != shown.shape:
        raise ValueError(
            f"`rule.threshold` must return one threshold for each of the {len(shown)} groups, "
            f"got the shape {jnp.shape(thresholds)}."
        )
    recorded = rule.record(state, shown, thresholds)
    return Learned(
        thresholds=thresholds,
        rule=select_groups(live, recorded, state),
        num_observed=increment_where(live, num_observed),
    )
