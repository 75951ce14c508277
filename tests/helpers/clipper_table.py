"""Every clipper by name, for the tests that must hold for all of them: a new clipper, a new row.

Each entry is a factory, called without arguments or with those that all clippers share.
"""

import inspect
from functools import partial

import optax_smartclip as smartclip

CLIPPERS = {
    "autoclip": smartclip.autoclip,
    "autoclip_outliers_only": partial(smartclip.autoclip, outliers_only=True),
    "autoclip_p10": partial(smartclip.autoclip, percentile=10.0),
    "autoclip_p90_per_layer": partial(
        smartclip.autoclip,
        percentile=90.0,
        history=smartclip.ring_buffer(7),
        scope="per_layer",
    ),
    "autoclip_p95_per_param": partial(
        smartclip.autoclip,
        percentile=95.0,
        history=smartclip.geometric_quantile(),
        scope="per_param",
    ),
    "autoclip_whole_run": partial(
        smartclip.autoclip, percentile=50.0, history=smartclip.log_histogram(0.1)
    ),
    "zscore_clip": smartclip.zscore_clip,
    "zclip": partial(smartclip.zclip, warmup_steps=5, max_norm=None),
    "adagc": partial(smartclip.adagc, warmup_steps=5, absolute_clip=None),
    "agc": smartclip.agc,
    "agc_per_param": partial(smartclip.agc, scope="per_param"),
}

# Those that compare the gradient with the weights, and have no history.
WEIGHT_BASED = {"agc", "agc_per_param"}


def scope_of(name):
    """The `scope` of a row."""
    return inspect.signature(CLIPPERS[name]).parameters["scope"].default
