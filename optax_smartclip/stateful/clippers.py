"""`AutoClip`, `AGC` and `ZScoreClip`: the classes of smartclip's JAX guide, on our rules.

They take smartclip's arguments. Where smartclip computes what it says, so do they; where it does
not, docs/migrating.md has a table of what changes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from optax_smartclip.clippers.agc import agc
from optax_smartclip.clippers.autoclip import lower_fence_rule, percentile_rule, upper_fence_rule
from optax_smartclip.clippers.zscore_clip import zscore_rule
from optax_smartclip.engine import checks
from optax_smartclip.engine.dtypes import as_float32
from optax_smartclip.engine.learning import RuleState, ThresholdRule
from optax_smartclip.engine.metrics import reported_threshold
from optax_smartclip.engine.norms import LARGEST, Norms, group_norms
from optax_smartclip.engine.rule import clip_by_rule
from optax_smartclip.engine.states import ClipState
from optax_smartclip.engine.trees import PyTree, flatten
from optax_smartclip.histories.geometric_quantile import geometric_quantile
from optax_smartclip.histories.ring_buffer import MAX_SIZE, ring_buffer
from optax_smartclip.stateful.clipper import StatefulClipper, to_python
from optax_smartclip.stateful.saved import Key

# The weight norm that AGC assumes at least, as in its paper: with smartclip's 1e-8, weights that
# start at zero could never grow.
_MIN_WEIGHT_NORM = 1e-3


@dataclasses.dataclass(kw_only=True, eq=False)
class HistoryClipper(StatefulClipper):
    """The base of `AutoClip` and `ZScoreClip`, which learn a threshold."""

    def _rule(self) -> tuple[ThresholdRule, Callable[[RuleState], Norms]]:
        """The rule, and what it has learned so far: state -> thresholds."""
        raise NotImplementedError

    def _build(self) -> tuple[Callable[[int], Any], optax.GradientTransformationExtraArgs]:
        rule, learned = self._rule()
        self._learned, self._threshold = learned, rule.threshold

        def threshold(state: RuleState, norms: Norms) -> Norms:
            return jnp.maximum(rule.threshold(state, norms), self.eps)

        return rule.init, clip_by_rule(rule._replace(threshold=threshold), **self._shared_options)

    def _limits(
        self, state: ClipState, norms: Norms, grads: PyTree, params: PyTree
    ) -> dict[str, Array]:
        del grads, params
        finite = norms < LARGEST
        limits = self._threshold(state.rule, jnp.where(finite, norms, 0.0))
        # A non-finite norm is not compared with anything, and the rule must not see a zero for it.
        return {"threshold": self._readable(jnp.where(finite, limits, self._learned(state.rule)))}

    def _readable(self, thresholds: Norms) -> Norms:
        return reported_threshold(jnp.maximum(thresholds, self.eps))

    def threshold(self, key: Key | None = None) -> Any:
        """The threshold of a group if warm-up were over.

        Args:
            key: `("global",)`, which is the default, `("layer", path)` or `("param", path)`; the
                place of the group, as in `("param", "0")`, is understood, too.

        Returns:
            A float (while a step is traced, a traced scalar); `eps` if no norm was observed yet.

        Raises:
            ValueError: If there is no such group.
        """
        state = self._state()
        if state is None:
            return self.eps
        group = self._group(("global",) if key is None else key)
        learned = self._readable(self._learned(state.rule))[group]
        return to_python(jnp.where(state.num_observed[group] > 0, learned, self.eps))

    def threshold_any(self) -> Any:
        """The threshold of the only group there is; `eps` if there are several."""
        return self.threshold(self._keys[0]) if len(self._keys) == 1 else self.eps

    def _group(self, key: Key) -> int:
        if key in self._keys:
            return self._keys.index(key)
        places = {(*known[:-1], str(place)): place for place, known in enumerate(self._keys)}
        if key not in places or self.scope == "global":
            raise ValueError(f"`key` must be one of {self._keys}, got {key!r}.")
        return places[key]


@dataclasses.dataclass(kw_only=True, eq=False)
class AutoClip(HistoryClipper):
    """`autoclip` with a state of its own, and the arguments of smartclip's class.

    Args:
        mode: `"auto"`, as `autoclip()`: at a fence above the median of the last 48 norms; or
            `"percentile"`, as `autoclip(percentile)`.
        percentile: In [0, 100]. For the mode "percentile" only, as are `history`, `ema_decay` and
            `window_size`.
        history: `"window"`, exact over the last `window_size` norms; or `"ema"`, one number that
            each norm moves by a fixed factor (`geometric_quantile`).
        ema_decay: How slowly that number moves, in (0, 1): its rate is `1 - ema_decay`.
        window_size: In steps.
        scope: Which leaves share one norm: `"global"` (all), `"per_layer"` (those with the same
            parent path) or `"per_param"` (none).
        warmup_steps: With which norm clipping starts: the 100th by default, that which is to be
            judged among them.
        min_history: The same; the larger of both counts.
        eps: Norms up to this are never clipped.
        guard_nans: Whether a gradient with a NaN or Inf norm becomes zeros; else it passes as it
            is. It is never learned from.
        outliers_only: For the mode "auto" only: whether ordinary noise is left alone, as with
            `autoclip(outliers_only=True)`.
        stacked: Axes that count layers, each with a norm of its own; see `clip_by_rule`. It is
            not saved with the state.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> clipper = smartclip.AutoClip(mode="percentile", percentile=50, history="window",
        ...                              warmup_steps=2, min_history=0)
        >>> for norm in [1.0, 2.0, 10.0]:
        ...     clipped = smartclip.apply_grads(jnp.array([0.6, 0.8]) * norm, None, clipper)
        >>> print(clipped, clipper.threshold())
        [1.2 1.6] 2.0
    """

    algo = "autoclip"

    mode: str = "auto"
    percentile: Any = 95.0
    history: str = "ema"
    ema_decay: Any = 0.99
    window_size: int = 1024
    outliers_only: bool = False

    def _rule(self) -> tuple[ThresholdRule, Callable[[RuleState], Norms]]:
        checks.check_choice("mode", self.mode, ("auto", "percentile"))
        checks.check_flag("outliers_only", self.outliers_only)
        checks.check_number("percentile", self.percentile, 0.0, 100.0, allowed="in [0, 100]")
        checks.check_choice("history", self.history, ("ema", "window"))
        check_decay(self.ema_decay)
        checks.check_size("window_size", self.window_size, MAX_SIZE)
        if self.mode == "auto":
            fence_rule = upper_fence_rule if self.outliers_only else lower_fence_rule
            return rule_of_past_norms(fence_rule())
        window = self.history == "window"
        history = (
            ring_buffer(self.window_size) if window else geometric_quantile(1 - self.ema_decay)
        )
        rule = percentile_rule(history, self.percentile)
        return rule, lambda state: history.percentile(state, self.percentile)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `StatefulClipper`; one that was written by version 0.1.0 is understood, too."""
        own = state.get(self.algo) if isinstance(state, Mapping) else None
        if isinstance(own, Mapping) and "outliers_only" not in own:
            # Then, the mode "auto" was what it is with `outliers_only`.
            own = {**own, "outliers_only": own.get("mode") == "auto"}
            state = {**state, self.algo: own}
        super().load_state_dict(state)


@dataclasses.dataclass(kw_only=True, eq=False)
class ZScoreClip(HistoryClipper):
    """`zscore_clip` with a state of its own, and the arguments of smartclip's class.

    Args:
        zmax: Standard deviations above the mean at which to clip, > 0.
        ema_decay: The decay of the moving averages per step, in (0, 1).
        scope: As in `AutoClip`, and so are the others.
        warmup_steps: See `AutoClip`.
        min_history: See `AutoClip`.
        eps: See `AutoClip`.
        guard_nans: See `AutoClip`.
        stacked: See `AutoClip`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> clipper = smartclip.ZScoreClip(zmax=2.0)
        >>> for norm in [1.0, 3.0] * 200 + [1000.0]:  # mean 2, standard deviation 1
        ...     clipped = smartclip.apply_grads(jnp.array([norm]), None, clipper)
        >>> print(clipped.round(1))
        [4.]
    """

    algo = "zscore"

    zmax: Any = 3.0
    ema_decay: Any = 0.99

    def _rule(self) -> tuple[ThresholdRule, Callable[[RuleState], Norms]]:
        checks.check_number(
            "zmax", self.zmax, 0.0, float("inf"), allowed="positive", strict_low=True
        )
        check_decay(self.ema_decay)
        return rule_of_past_norms(zscore_rule(self.zmax, self.ema_decay))


@dataclasses.dataclass(kw_only=True, eq=False)
class AGC(StatefulClipper):
    """`agc` by whole parameters, called like smartclip's class and with its arguments.

    A gradient is cut to `clipping * max(norm of the weights, 1e-3)`. For the paper's clipping by
    units, which works better, use `optax_smartclip.agc` in an `optax.chain`.

    Args:
        clipping: The largest ratio of gradient norm to weight norm, > 0.
        exclude_bias_bn: Whether leaves of rank 0 and 1 are left alone.
        scope: See `AutoClip`.
        warmup_steps: See `AutoClip`; 0 by default.
        min_history: See `AutoClip`; 0 by default.
        eps: See `AutoClip`.
        guard_nans: See `AutoClip`.
        stacked: See `AutoClip`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_smartclip as smartclip
        >>> params = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}  # the kernel has norm 2
        >>> grads = {"kernel": jnp.eye(4), "bias": jnp.ones(4)}
        >>> print(smartclip.apply_grads(grads, params, smartclip.AGC(clipping=0.5))["kernel"][0])
        [0.5 0.  0.  0. ]
    """

    algo = "agc"

    clipping: Any = 0.01
    exclude_bias_bn: bool = True
    scope: str = "per_layer"
    warmup_steps: Any = 0
    min_history: Any = 0

    def _build(self) -> tuple[Callable[[int], Any], optax.GradientTransformationExtraArgs]:
        checks.check_number(
            "clipping", self.clipping, 0.0, float("inf"), allowed="positive", strict_low=True
        )
        self.exclude_bias_bn = bool(self.exclude_bias_bn)
        # Here `eps` is the least threshold, and there it is the least weight norm.
        self._min_weight_norm = max(_MIN_WEIGHT_NORM, self.eps / self.clipping)
        options = {"eps": self._min_weight_norm, **self._shared_options}
        return lambda groups: optax.EmptyState(), agc(self.clipping, **options)

    def _covers(self, leaf: Any) -> bool:
        vector = self.exclude_bias_bn and len(jnp.shape(leaf)) <= 1
        return super()._covers(leaf) and not vector

    def _limits(
        self, state: ClipState, norms: Norms, grads: PyTree, params: PyTree
    ) -> dict[str, Array]:
        clipped = flatten(grads)
        weights = {path: leaf for path, leaf in flatten(params).items() if path in clipped}
        partition = self._groups(params).partition(weights)
        weight_norms = group_norms([jnp.asarray(leaf) for leaf in weights.values()], partition)
        least = as_float32(self._min_weight_norm)
        target = as_float32(self.clipping) * jnp.maximum(weight_norms, least)
        return {"weight_norm": weight_norms, "target": target}


def check_decay(ema_decay: Any) -> None:
    """Raises ValueError unless it is in (0, 1)."""
    checks.check_number(
        "ema_decay", ema_decay, 0.0, 1.0, allowed="in (0, 1)", strict_low=True, strict_high=True
    )


def rule_of_past_norms(
    rule: ThresholdRule,
) -> tuple[ThresholdRule, Callable[[RuleState], Norms]]:
    """A rule of which the threshold does not depend on the norms to be judged, and what it is."""

    def learned(state: RuleState) -> Norms:
        return rule.threshold(state, jnp.zeros(len(jax.tree.leaves(state)[0]), jnp.float32))

    return rule, learned
