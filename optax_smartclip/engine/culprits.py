"""Who caused a spike: the groups that held the norm, and those that were furthest over a threshold.

found = smartclip.culprits(smartclip.metrics(opt_state))  # arrays, inside jit as well
print(found.describe(labels))  # names
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from optax_smartclip.engine.dtypes import as_float32
from optax_smartclip.engine.norms import LARGEST, LARGEST_NORM, safe_divisor, shares


class Culprits(NamedTuple):
    """The groups that `culprits` found, the first the worst. Every number is finite.

    Attributes:
        by_share: int32[top], the numbers of the groups with the largest share.
        share: float32[top], their share of the squared norm, in [0, 1], as in `NormMetrics`.
        by_excess: int32[top], the numbers of the groups that were furthest over the threshold.
        excess: float32[top], their norm divided by the threshold; 0 if there is none, and 3.4e38
            for a norm that is NaN or Inf.
    """

    by_share: Int32[Array, "*steps top"]
    share: Float32[Array, "*steps top"]
    by_excess: Int32[Array, "*steps top"]
    excess: Float32[Array, "*steps top"]

    def describe(self, labels: Sequence[str]) -> str:
        """One line of text for one step, outside of `jit`.

        Args:
            labels: The name of each group, from `group_labels`.

        Returns:
            The groups that have a share or were over the threshold, in this order.

        Raises:
            ValueError: If there are several steps, or no label for a group.
        """
        found: Culprits = jax.tree.map(np.asarray, self)
        if found.share.ndim != 1:
            raise ValueError(
                "`describe` needs the culprits of one step, got those of the shape "
                f"{found.share.shape}. With jax.tree.map(lambda x: x[step], culprits), pick one."
            )
        numbers = [*found.by_share, *found.by_excess]
        if isinstance(labels, str) or any(number >= len(labels) for number in numbers):
            raise ValueError(f"`labels` must have one entry for each group, got {labels!r}.")
        parts = {
            group: [f"{100 * share:.3g} % of the squared norm"]
            for group, share in zip(found.by_share, found.share, strict=True)
            if share > 0
        }
        for group, excess in zip(found.by_excess, found.excess, strict=True):
            if excess > 1:
                text = "NaN or Inf" if excess == LARGEST else f"{excess:.3g} x the threshold"
                parts.setdefault(group, []).append(text)
        described = [f"{labels[group]} {', '.join(texts)}" for group, texts in parts.items()]
        return "; ".join(described) or "a gradient of zero"


def culprits(metrics: Mapping[str, Any], *, top: int = 5) -> Culprits:
    """Finds the groups with the largest share of the norm, and those furthest over a threshold.

    A pure function of arrays, inside or outside `jit`. The groups are those of `observe_norms` if
    it is there, else those of a clipper with several groups. A norm is compared with the threshold
    of its group, or with that of the whole gradient if the clipper has one group.

    Args:
        metrics: What `smartclip.metrics` returned, with the record of `observe_norms`, of a
            clipper, or both. A clipper with several groups must have the `scope` of
            `observe_norms`. The threshold of the units of `agc` is not one of a norm: leave
            `clip_threshold` out. Values may have leading axes, such as the steps of a scan.
        top: How many groups to return at most.

    Returns:
        Indices and values, of shape `[top]`, or `[groups]` if there are fewer, after the leading
        axes. `describe` makes a line of text from those of one step.

    Raises:
        ValueError: If `metrics` has neither record, several clippers, or groups that differ; if
            `top` is not a positive Python int.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import optax_smartclip as smartclip
        >>> tx = optax.chain(smartclip.observe_norms(), smartclip.autoclip(max_norm=1.0))
        >>> grads = {"body": {"w": jnp.array([1.0])}, "head": {"w": jnp.array([7.0])}}
        >>> _, opt_state = tx.update(grads, tx.init(grads))
        >>> found = smartclip.culprits(smartclip.metrics(opt_state), top=1)
        >>> found.describe(smartclip.group_labels("per_layer", grads))
        'head 98 % of the squared norm, 7 x the threshold'
    """
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise ValueError(f"`top` must be a Python int >= 1, got {top!r}.")
    observed = "norm_share" in metrics
    names = ("observed_norm", "norm_share") if observed else ("grad_norm", "clip_threshold")
    several = any(name.endswith("/clip_threshold") for name in metrics)
    if several or not all(name in metrics for name in names):
        raise ValueError(
            "`metrics` must have 'observed_norm' and 'norm_share', or 'grad_norm' and "
            "'clip_threshold', as smartclip.metrics returns them, and those of one clipper at "
            f"most, got the names {sorted(metrics)}."
        )
    norms = jnp.atleast_1d(as_float32(metrics[names[0]]))
    share = jnp.atleast_1d(metrics["norm_share"]) if observed else shares(_known(norms))
    thresholds = as_float32(metrics.get("clip_threshold", jnp.full(norms.shape, LARGEST)))
    if thresholds.ndim < norms.ndim:
        thresholds = thresholds[..., None]
    if thresholds.shape[-1] not in (1, norms.shape[-1]):
        raise ValueError(
            "`metrics` must have the same groups in 'clip_threshold' as in 'observed_norm', or one "
            f"for all, got the shapes {thresholds.shape} and {norms.shape}."
        )
    found = [_top(values, top) for values in (share, _excess(norms, thresholds))]
    return Culprits(*found[0], *found[1])


def _known(norms: Float32[Array, "*steps groups"]) -> Float32[Array, "*steps groups"]:
    """Norms as they were before they were reported."""
    return jnp.where(norms < LARGEST, norms, jnp.inf)


def _excess(
    norms: Float32[Array, "*steps groups"], thresholds: Float32[Array, "*steps #groups"]
) -> Float32[Array, "*steps groups"]:
    """Norms in units of their thresholds."""
    ratios = jnp.where(thresholds > 0, norms, LARGEST_NORM) / safe_divisor(thresholds)
    over = jnp.where(norms > 0, jnp.minimum(ratios, LARGEST_NORM), 0.0)
    return jnp.where(norms < LARGEST, jnp.where(thresholds < LARGEST, over, 0.0), LARGEST)


def _top(
    values: Float32[Array, "*steps groups"], top: int
) -> tuple[Int32[Array, "*steps top"], Float32[Array, "*steps top"]]:
    largest, groups = jax.lax.top_k(values, min(top, values.shape[-1]))
    return groups.astype(jnp.int32), largest
