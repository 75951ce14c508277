"""One table of all clippers, for the tests and the benchmarks that must hold for each of them.

A new clipper is a new row: the batteries, the state machine, `make soak`, `make spikes` and the
stored states read the table.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import reference
import running_reference
from running_reference import Reference, each

import optax_smartclip as smartclip

# Who uses a row: all of them, unless the row says otherwise.
BATTERIES, MACHINE, SOAK, SPIKES = "batteries", "state machine", "soak", "spikes"

# Exact histories keep the norms, and only the interpolation between two of them is rounded.
EXACT = 1e-6
# Moving averages are rounded by 6e-8 at each step, and remember that for some 100 steps. The
# difference to a mean magnifies it. A quantile that is moved by factors is rounded as well, until a
# norm between it and the reference makes the two equal again.
AVERAGES = 1e-4
# As published, ZClip locks up after a rise. Its standard deviation is then almost zero, and the
# last digits of the mean decide which norm is an outlier.
LOCKED = 1e-2

# The norm of each group of weights in the soak.
WEIGHT = 200.0


def only_num_recorded(count: int) -> dict[str, int]:
    """The counters of a rule that counts the norms that it has recorded."""
    return {"num_recorded": count}


def ring(size: int) -> Callable[[int], dict[str, int]]:
    """The counters of a ring buffer."""
    return lambda count: {"length": min(count, size), "cursor": count % size}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A clipper, its reference, and its users.

    Attributes:
        factory: Makes the clipper. Any argument that all clippers share can be added.
        label: Its name in the tables that `make soak` and `make spikes` print.
        thresholds: Its thresholds in float64. The state machine and the soak need them.
        tolerance: The largest relative error of a threshold in a million steps.
        counters: From the number of positive, finite norms to the counters of its rule.
        in_batteries: Arguments that the batteries change, for instance to shorten a warm-up.
        used_by: Who uses the row.
        weight_based: Whether it compares the gradient with the weights, and has no history.
        stands_for_its_kind: Whether it is the one of its kind where each clipper takes seconds.
            Each kind has a scope, a memory and a rule that the others do not have.
    """

    factory: Callable[..., Any]
    label: str
    thresholds: Reference | None = None
    tolerance: float = EXACT
    counters: Callable[[int], dict[str, int]] = only_num_recorded
    in_batteries: Mapping[str, Any] = field(default_factory=dict)
    used_by: tuple[str, ...] = (BATTERIES, MACHINE, SOAK, SPIKES)
    weight_based: bool = False
    stands_for_its_kind: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        """The public function that the factory calls."""
        return getattr(self.factory, "func", self.factory)


TABLE = {
    "autoclip": Row(
        factory=smartclip.autoclip,
        label="autoclip()",
        thresholds=running_reference.lower_fence(),
        counters=lambda count: only_num_recorded(count) | ring(48)(count),
        stands_for_its_kind=True,
    ),
    "autoclip_outliers_only": Row(
        factory=partial(smartclip.autoclip, outliers_only=True),
        label="autoclip(outliers_only=True)",
        thresholds=running_reference.upper_fence(),
        used_by=(BATTERIES, SOAK),
    ),
    "autoclip_per_layer": Row(
        factory=partial(smartclip.autoclip, scope="per_layer"),
        label="autoclip(scope='per_layer')",
        used_by=(SPIKES,),
    ),
    "autoclip_p10": Row(
        factory=partial(smartclip.autoclip, percentile=10.0),
        label="autoclip(10)",
        thresholds=running_reference.percentile(10.0, 1024),
        used_by=(BATTERIES, SOAK, SPIKES),
    ),
    "autoclip_p90": Row(
        factory=partial(smartclip.autoclip, percentile=90.0),
        label="autoclip(90)",
        used_by=(SPIKES,),
    ),
    "autoclip_p90_per_layer": Row(
        factory=partial(
            smartclip.autoclip,
            percentile=90.0,
            history=smartclip.ring_buffer(7),
            scope="per_param",
        ),
        label="autoclip(90, ring_buffer(7), per_param)",
        thresholds=running_reference.percentile(90.0, 7),
        counters=ring(7),
        in_batteries={"scope": "per_layer"},
        used_by=(BATTERIES, MACHINE, SOAK),
    ),
    "autoclip_p95_per_param": Row(
        factory=partial(
            smartclip.autoclip, percentile=95.0, history=smartclip.geometric_quantile()
        ),
        label="autoclip(95, geometric_quantile)",
        thresholds=each(partial(reference.geometric_estimates, percentile=95.0, rate=0.02)),
        tolerance=AVERAGES,
        counters=lambda count: ring(8)(min(count, 8)),
        in_batteries={"scope": "per_param"},
        stands_for_its_kind=True,
    ),
    "autoclip_whole_run": Row(
        factory=partial(smartclip.autoclip, percentile=10.0, history=smartclip.log_histogram()),
        label="autoclip(10, log_histogram)",
        thresholds=running_reference.percentile_of_all(10.0, error=0.01),
        counters=lambda count: {"num_at_most": count},
        in_batteries={"percentile": 50.0, "history": smartclip.log_histogram(0.1)},
    ),
    "autoclip_fading": Row(
        factory=partial(
            smartclip.autoclip, percentile=10.0, history=smartclip.log_histogram(decay=0.9999)
        ),
        label="autoclip(10, log_histogram(decay=0.9999))",
        thresholds=running_reference.fading_percentile(10.0, error=0.01, decay=0.9999),
        used_by=(SOAK,),
    ),
    "zscore_clip": Row(
        factory=smartclip.zscore_clip,
        label="zscore_clip()",
        thresholds=each(reference.zscore_thresholds),
        tolerance=AVERAGES,
    ),
    "zclip_with_ceiling": Row(factory=smartclip.zclip, label="zclip()", used_by=(SPIKES,)),
    "zclip": Row(
        factory=partial(smartclip.zclip, max_norm=None),
        label="zclip(max_norm=None)",
        thresholds=each(lambda norms: reference.zclip_thresholds(norms)[0]),
        tolerance=LOCKED,
        in_batteries={"warmup_steps": 5},
        stands_for_its_kind=True,
    ),
    "zclip_record_limit": Row(
        factory=partial(smartclip.zclip, max_norm=None, record_limit=3.0),
        label="zclip(max_norm=None, record_limit=3)",
        thresholds=each(lambda norms: reference.zclip_thresholds(norms, record_limit=3.0)[0]),
        tolerance=AVERAGES,
        used_by=(SOAK, SPIKES),
    ),
    "adagc": Row(
        factory=smartclip.adagc,
        label="adagc()",
        thresholds=reference.adagc_thresholds,
        tolerance=AVERAGES,
        in_batteries={"warmup_steps": 5, "absolute_clip": None},
    ),
    "adagc_without_ceiling": Row(
        factory=partial(smartclip.adagc, absolute_clip=None),
        label="adagc(absolute_clip=None)",
        used_by=(SPIKES,),
    ),
    "adagc_record_limit": Row(
        factory=partial(smartclip.adagc, absolute_clip=None, record_limit=3.0),
        label="adagc(absolute_clip=None, record_limit=3)",
        thresholds=partial(reference.adagc_thresholds, absolute_clip=None, record_limit=3.0),
        tolerance=AVERAGES,
        used_by=(SOAK, SPIKES),
    ),
    # Without thresholds: it does not report those of units.
    "agc": Row(
        factory=smartclip.agc,
        label="agc()",
        used_by=(BATTERIES, SPIKES),
        weight_based=True,
        stands_for_its_kind=True,
    ),
    "agc_per_param": Row(
        factory=partial(smartclip.agc, scope="per_param"),
        label="agc(per_param)",
        thresholds=lambda norms: np.full(norms.shape, 0.01 * WEIGHT),
        used_by=(BATTERIES, SOAK),
        weight_based=True,
    ),
}


def rows_of(user: str) -> dict[str, Row]:
    """The rows that the batteries, the state machine, the soak or the spikes use."""
    return {name: row for name, row in TABLE.items() if user in row.used_by}


def default_scope(factory: Callable[..., Any]) -> str:
    """The default scope of the clippers of a factory."""
    return inspect.signature(factory).parameters["scope"].default


CLIPPERS = {
    name: partial(row.factory, **row.in_batteries) for name, row in rows_of(BATTERIES).items()
}
WEIGHT_BASED = {name for name in CLIPPERS if TABLE[name].weight_based}
KINDS = {name for name in CLIPPERS if TABLE[name].stands_for_its_kind}
# The public functions by name. Each has a row of its name.
FUNCTIONS = {row.function.__name__: row.function for row in TABLE.values()}


def scope_of(name: str) -> str:
    """The scope of a row in the batteries."""
    return default_scope(CLIPPERS[name])
