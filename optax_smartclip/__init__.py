"""Adaptive gradient clipping as native Optax gradient transformations.

tx = optax.chain(smartclip.autoclip(), optax.adamw(3e-4))
"""

from optax_smartclip import masks
from optax_smartclip.checkpoints.graft import graft
from optax_smartclip.clippers.adagc import adagc
from optax_smartclip.clippers.agc import agc
from optax_smartclip.clippers.autoclip import autoclip
from optax_smartclip.clippers.clip_micro_batches import (
    MicroBatchMetrics,
    MicroBatchState,
    clip_micro_batches,
)
from optax_smartclip.clippers.keep_last_good import (
    LastGoodMetrics,
    LastGoodState,
    keep_last_good,
    restore_last_good,
)
from optax_smartclip.clippers.observe_norms import NormMetrics, observe_norms
from optax_smartclip.clippers.skip_spikes import (
    GiveUpMetrics,
    GiveUpState,
    SkipMetrics,
    SkipState,
    skip_spikes,
)
from optax_smartclip.clippers.spectral_clip import spectral_clip
from optax_smartclip.clippers.stable_adamw import (
    StableAdamState,
    scale_by_stable_adam,
    stable_adamw,
)
from optax_smartclip.clippers.where_skipped import where_skipped
from optax_smartclip.clippers.zclip import zclip
from optax_smartclip.clippers.zscore_clip import zscore_clip
from optax_smartclip.engine.culprits import Culprits, culprits
from optax_smartclip.engine.groups import group_labels
from optax_smartclip.engine.learning import ThresholdRule
from optax_smartclip.engine.metrics import ClipMetrics, metrics
from optax_smartclip.engine.rule import clip_by_rule
from optax_smartclip.engine.states import ClipState, state_dataclass
from optax_smartclip.histories.geometric_quantile import geometric_quantile
from optax_smartclip.histories.history import NormHistory
from optax_smartclip.histories.log_histogram import log_histogram
from optax_smartclip.histories.ring_buffer import ring_buffer
from optax_smartclip.stateful.clippers import AGC, AutoClip, ZScoreClip
from optax_smartclip.stateful.context import apply_grads, clip_context

__version__ = "0.1.0"

__all__ = [
    "AGC",
    "AutoClip",
    "ClipMetrics",
    "ClipState",
    "Culprits",
    "GiveUpMetrics",
    "GiveUpState",
    "LastGoodMetrics",
    "LastGoodState",
    "MicroBatchMetrics",
    "MicroBatchState",
    "NormHistory",
    "NormMetrics",
    "SkipMetrics",
    "SkipState",
    "StableAdamState",
    "ThresholdRule",
    "ZScoreClip",
    "adagc",
    "agc",
    "apply_grads",
    "autoclip",
    "clip_by_rule",
    "clip_context",
    "clip_micro_batches",
    "culprits",
    "geometric_quantile",
    "graft",
    "group_labels",
    "keep_last_good",
    "log_histogram",
    "masks",
    "metrics",
    "observe_norms",
    "restore_last_good",
    "ring_buffer",
    "scale_by_stable_adam",
    "skip_spikes",
    "spectral_clip",
    "stable_adamw",
    "state_dataclass",
    "where_skipped",
    "zclip",
    "zscore_clip",
]
