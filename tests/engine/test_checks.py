"""Arguments out of range: the message names the argument, its value and what is allowed."""

import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from clipper_table import FUNCTIONS

import optax_smartclip as smartclip
from optax_smartclip import masks
from optax_smartclip.engine import checks

NAN, INF = float("nan"), float("inf")

RULE = smartclip.ThresholdRule(
    init=jnp.zeros, threshold=lambda state, norms: norms, record=lambda state, norms, _: state
)


def clip_by_rule(**arguments):
    return smartclip.clip_by_rule(RULE, **arguments)


def skip_spikes(**arguments):
    return smartclip.skip_spikes(optax.identity(), **arguments)


CLIPPERS = [clip_by_rule, *FUNCTIONS.values()]

# Values that no number accepts, whether or not None is allowed.
BAD = (NAN, True, False, np.True_, "1", 1j, [1.0], abs)
NO_NUMBERS = (None, *BAD)

OWN_NUMBERS = [
    (
        smartclip.autoclip,
        "percentile",
        (-0.1, 100.1, INF, *BAD),
    ),
    (smartclip.zscore_clip, "zmax", (-0.1, -INF, *NO_NUMBERS)),
    (smartclip.zscore_clip, "decay", (-0.1, 1, 1.0, 1.5, np.float32(1), *NO_NUMBERS)),
    (smartclip.agc, "clipping", (0, 0.0, -0.01, np.float64(-1), *NO_NUMBERS)),
    (smartclip.agc, "eps", (0, -1e-3, *NO_NUMBERS)),
    (smartclip.geometric_quantile, "rate", (0, 0.0, -0.1, 1.5, INF, *NO_NUMBERS)),
    (
        smartclip.ring_buffer,
        "size",
        (0, -1, 2**24 + 1, True),
    ),
]
SHARED_NUMBERS = [
    ("warmup_steps", (-1, -0.5, INF, 2**31, *BAD)),
    ("max_norm", (0, 0.0, -1.0, -INF, *BAD)),
    ("min_scale", (-0.1, 1.1, INF, *BAD)),
]
SHARED_NAMES = [name for name, _ in SHARED_NUMBERS]
SHARED_CHOICES = [
    ("nonfinite", ("zeros", "")),
    ("scope", ("gobal", "", None)),
]


CASES = [(factory, name, value) for factory, name, values in OWN_NUMBERS for value in values] + [
    (factory, name, value)
    for name, values in SHARED_NUMBERS + SHARED_CHOICES
    for value in values
    for factory in CLIPPERS
]


@pytest.mark.parametrize(("factory", "name", "value"), CASES)
def test_a_bad_argument_is_named_with_its_value(factory, name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be ") as error:
        factory(**{name: value})
    assert f"got {value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("factory", "name", "value", "allowed"),
    [
        (smartclip.autoclip, "percentile", 101, "in [0, 100], or None"),
        (smartclip.zscore_clip, "zmax", -1, ">= 0"),
        (smartclip.zscore_clip, "decay", 1, "in [0, 1)"),
        (smartclip.agc, "clipping", 0, "positive"),
        (smartclip.agc, "eps", 0, "positive"),
        (smartclip.geometric_quantile, "rate", 2, "in (0, 1]"),
        (smartclip.ring_buffer, "size", 0, "a Python int from 1 to 16777216"),
        (clip_by_rule, "warmup_steps", -1, "a number of steps from 0 to 2147483647"),
        (clip_by_rule, "max_norm", 0, "positive, or None"),
        (clip_by_rule, "min_scale", 2, "in [0, 1], or None"),
        (clip_by_rule, "nonfinite", "x", "one of 'zero', 'propagate'"),
        (clip_by_rule, "scope", "x", "one of 'global', 'per_layer', 'per_param'"),
        (smartclip.agc, "scope", "x", "one of 'unit', 'global', 'per_layer', 'per_param'"),
    ],
)
def test_the_message_names_the_allowed_values(factory, name, value, allowed):
    with pytest.raises(ValueError, match=f"`{name}` must be ") as error:
        factory(**{name: value})
    assert f"`{name}` must be {allowed}" in str(error.value)


# The next two tests call the checks directly: beartype, which is on in these tests, would refuse
# such values before them.
@pytest.mark.parametrize("value", [3.0, "3", None, np.int64(3), jnp.zeros, NAN])
def test_a_size_is_a_python_int(value):
    with pytest.raises(ValueError, match=r"^`size` must be a Python int from 1 to 8 ") as error:
        checks.check_size("size", value, 8)
    assert f"got {value!r}" in str(error.value)


@pytest.mark.parametrize("value", [1, 1.0, np.float64(1), jnp.bfloat16(1), jnp.int32(1)])
def test_a_scalar_becomes_a_float32_and_other_shapes_are_refused(value):
    scalar = checks.check_scalar("value", value)
    assert (scalar, scalar.shape, scalar.dtype) == (1, (), jnp.float32)
    with pytest.raises(ValueError, match=r"^`value` must be a scalar, got the shape \(1,\)\.$"):
        checks.check_scalar("value", jnp.asarray(value)[None])


@pytest.mark.parametrize("value", [None, 0, True, ("zero",)])
def test_a_choice_is_one_of_the_strings(value):
    with pytest.raises(
        ValueError, match=r"^`nonfinite` must be one of 'zero', 'propagate', got "
    ) as error:
        checks.check_clip_options(0, None, value)
    assert f"got {value!r}" in str(error.value)


@pytest.mark.parametrize("value", ["kernel", True, (True,), (0, False)])
def test_unit_axes_has_its_own_forms(value):
    with pytest.raises(ValueError, match="`unit_axes` must be None, a Python int") as error:
        smartclip.agc(unit_axes=value)
    assert f"got {value!r}" in str(error.value)


def test_unit_axes_is_refused_outside_scope_unit():
    with pytest.raises(ValueError, match="`unit_axes` must be None unless scope='unit', got 0"):
        smartclip.agc(unit_axes=0, scope="per_param")


@pytest.mark.parametrize("percentile", [None, 90.0])
@pytest.mark.parametrize("history", [128, "ring_buffer", smartclip.ring_buffer])
def test_a_value_that_is_not_a_history_is_an_error(percentile, history):
    with pytest.raises(ValueError, match=r"`history` must be a NormHistory, .* got .*[r1]"):
        smartclip.autoclip(percentile, history=history)


def test_the_auto_mode_refuses_a_history_of_one_percentile():
    with pytest.raises(ValueError, match=r"`history` must .* got geometric_quantile\(0.1\)"):
        smartclip.autoclip(history=smartclip.geometric_quantile(0.1))


@pytest.mark.parametrize(
    ("factory", "name", "values"),
    [
        (smartclip.autoclip, "percentile", (None, 0, 100, 0.0, 100.0, np.float32(50), np.int64(7))),
        (smartclip.zscore_clip, "zmax", (0, 3, INF, np.float64(2))),
        (smartclip.zscore_clip, "decay", (0, 0.0, 0.999999)),
        (smartclip.zclip, "zmax", (0, 0.5, INF)),
        (smartclip.zclip, "decay", (0, 0.5, 0.999999)),
        (smartclip.zclip, "clip_to", ("reciprocal", "mean", "max")),
        (smartclip.zclip, "clip_factor", (1e-30, 0.5, 1)),
        (smartclip.zclip, "record_limit", (None, 1e-30, INF)),
        (smartclip.adagc, "relative_clip", (1e-30, 1, INF)),
        (smartclip.adagc, "decay", (0, 0.5, 0.999999)),
        (smartclip.adagc, "absolute_clip", (None, 1e-30, INF)),
        (smartclip.adagc, "record_limit", (None, 1e-30, INF)),
        (smartclip.agc, "clipping", (1e-30, 5, INF)),
        (smartclip.agc, "eps", (1e-30, 5, INF)),
        (smartclip.agc, "unit_axes", (None, 0, (-1, 0), (), "flax", "equinox", lambda path, s: 0)),
        (smartclip.geometric_quantile, "rate", (1e-6, 1, 1.0)),
        (smartclip.ring_buffer, "size", (1, 2**24)),
        (smartclip.log_histogram, "relative_error", (1e-4, 0.5)),
        (smartclip.log_histogram, "decay", (None, 1e-30, 0.9999999)),
        (skip_spikes, "sigma", (1e-30, 1, 1e38)),
        (skip_spikes, "window", (4, 2**24)),
        (skip_spikes, "max_consecutive", (1, 1.5, 2**31 - 1)),
        (skip_spikes, "warmup_steps", (0, 2.5, 2**31 - 1)),
        (clip_by_rule, "warmup_steps", (0, 10, 2.5, 2**31 - 1)),
        (clip_by_rule, "max_norm", (None, 1, 1e-30, INF)),
        (clip_by_rule, "nonfinite", ("zero", "propagate")),
        (clip_by_rule, "min_scale", (None, 0, 1e-30, 1)),
        (clip_by_rule, "scope", ("global", "per_layer", "per_param", {"a": 1}, lambda path: 1)),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(factory, name, values):
    for value in values:
        assert callable(factory(**{name: value}).init)


SHARED = {
    "stacked": None,
    "mask": None,
    "max_norm": None,
    "nonfinite": "zero",
    "min_scale": None,
    "axis_name": None,
}
# The arguments of clippers with a history.
LEARNS = SHARED | {"norm_of": None}
ADAM = {
    "b1": 0.9,
    "b2": 0.99,
    "eps": 1e-6,
    "mu_dtype": None,
    "mask": None,
    "stacked": None,
    "axis_name": None,
}
DEFAULTS = {
    smartclip.clip_by_rule: {"scope": "global", "warmup_steps": 0} | LEARNS,
    smartclip.autoclip: {
        "percentile": None,
        "outliers_only": False,
        "history": None,
        "scope": "global",
        "warmup_steps": None,
    }
    | LEARNS,
    smartclip.zscore_clip: {"zmax": 3.0, "decay": 0.99, "scope": "global", "warmup_steps": 1}
    | LEARNS,
    smartclip.zclip: {
        "zmax": 2.5,
        "decay": 0.97,
        "clip_to": "reciprocal",
        "clip_factor": 1.0,
        "record_limit": None,
        "scope": "global",
        "warmup_steps": 25,
    }
    | LEARNS
    | {"max_norm": 1.0},
    smartclip.adagc: {
        "relative_clip": 1.04,
        "decay": 0.99,
        "absolute_clip": 1.0,
        "record_limit": None,
        "scope": "per_param",
        "warmup_steps": 100,
    }
    | LEARNS,
    smartclip.agc: {
        "clipping": 0.01,
        "eps": 1e-3,
        "scope": "unit",
        "unit_axes": None,
        "warmup_steps": 0,
    }
    | SHARED,
    smartclip.skip_spikes: {
        "sigma": 6.0,
        "window": 128,
        "rule": None,
        "max_consecutive": 32,
        "warmup_steps": 10,
        "give_up_after": None,
        "mask": None,
        "axis_name": None,
    },
    smartclip.spectral_clip: {
        "factor": 0.3,
        "limit": None,
        "window": 128,
        "num_iterations": 12,
        "stacked": None,
        "mask": None,
        "warmup_steps": 1,
        "nonfinite": "zero",
    },
    smartclip.scale_by_stable_adam: ADAM | {"weight_decay": 0.0},
    smartclip.stable_adamw: ADAM | {"weight_decay": 0.01},
    smartclip.clip_micro_batches: {"axis": 0, "axis_name": None, "reduce": "mean"},
    smartclip.keep_last_good: {"memory_kind": None, "axis_name": None},
    smartclip.observe_norms: {
        "scope": "per_layer",
        "stacked": None,
        "mask": None,
        "axis_name": None,
    },
    smartclip.geometric_quantile: {"rate": 0.02},
    smartclip.log_histogram: {"relative_error": 0.01, "decay": None},
}


# Another default would change the runs of all users who do not set the argument.
@pytest.mark.parametrize("factory", DEFAULTS, ids=lambda factory: factory.__name__)
def test_the_defaults_are_those_that_are_documented(factory):
    parameters = inspect.signature(factory).parameters.values()
    defaults = {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not parameter.empty
    }
    assert defaults == DEFAULTS[factory]


@pytest.mark.parametrize(
    "factory",
    [
        clip_by_rule,
        smartclip.autoclip,
        lambda **shared: smartclip.autoclip(50.0, **shared),
        lambda **shared: smartclip.autoclip(50.0, history=smartclip.geometric_quantile(), **shared),
        smartclip.zscore_clip,
        smartclip.agc,
    ],
)
@pytest.mark.parametrize("warmup_steps", [2**31 - 1, 2.5, np.int64(3), np.float32(3)])
def test_every_number_that_is_allowed_can_be_used(factory, warmup_steps):
    tx = factory(warmup_steps=warmup_steps, max_norm=2)
    params = {"w": jnp.ones(3)}
    updates, _ = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    assert updates["w"].shape == (3,)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize(
    ("factory", "names"),
    [
        (clip_by_rule, ()),
        (smartclip.autoclip, ("percentile",)),
        (smartclip.zscore_clip, ("zmax", "decay")),
        (smartclip.agc, ("clipping", "eps")),
        (
            lambda rate, **shared: smartclip.autoclip(
                50.0, history=smartclip.geometric_quantile(rate), **shared
            ),
            ("rate",),
        ),
    ],
)
def test_traced_arrays_have_no_value_to_check_and_are_used_as_they_are(factory, names, dtype):
    params = {"w": jnp.ones(3)}

    def step(numbers):
        tx = factory(**numbers)
        return tx.update(params, tx.init(params), params)[0]

    # This value is out of range for every argument.
    numbers = {name: jnp.asarray(-1, dtype) for name in (*names, *SHARED_NAMES)}
    assert jax.eval_shape(step, numbers)["w"].dtype == jnp.float32
    # A concrete array is checked.
    good = {name: jnp.asarray(0.5) for name in names}
    factory(**good)
    for name, number in numbers.items():
        for array in (number, np.asarray(number), jnp.stack([-number, number])):
            with pytest.raises(ValueError, match=rf"(?s)`{name}` must be .* got .*-1"):
                factory(**good | {name: array})


def test_an_array_that_was_rounded_to_a_bound_is_allowed():
    smartclip.zscore_clip(decay=jnp.asarray(0.999, jnp.bfloat16))
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\), got"):
        smartclip.zscore_clip(decay=jnp.asarray(1.0))


INJECTED = FUNCTIONS | {
    "clip_by_rule": smartclip.clip_by_rule,
    "skip_spikes": smartclip.skip_spikes,
    "scale_by_stable_adam": smartclip.scale_by_stable_adam,
}
TWO_LAYERS = {"body": {"w": jnp.ones((2, 3))}, "head": {"w": jnp.ones(3)}}
# Values of each argument that is not a number: those that work under inject_hyperparams, and those
# that it converts to an array or calls as a schedule.
NOT_TRACED = {
    "scope": (["per_layer", {"body": "a", "head": "b"}], [0, np.zeros(2, int)]),
    "stacked": ([{"body": 0}], [0, np.zeros(2, int)]),
    "mask": (
        [{"body": True, "head": False}],
        [
            masks.except_vectors,
            masks.except_paths("head"),
            masks.every(masks.except_vectors),
            lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
            lambda params: jax.tree.map(lambda leaf: jnp.sum(leaf) > 1, params),
            np.array(True),
        ],
    ),
    # Unless it is named in `static_args`, inject_hyperparams calls a function as a schedule.
    "norm_of": ([], []),
    "nonfinite": (["propagate"], [0]),
    "axis_name": (["devices", ("devices",)], [0]),
    "unit_axes": ([(0,), "equinox"], [0, np.zeros(2, int)]),
    "outliers_only": ([True, False], [0, jnp.array(True)]),
    "history": ([smartclip.ring_buffer(5)], [5]),
    "clip_to": (["mean"], [0]),
    "window": ([], [8]),
    "mu_dtype": (["bfloat16"], []),
    "rule": ([RULE], []),
    "inner": ([optax.identity()], []),
}
# Other arguments that these need.
NEEDED = {"clip_by_rule": {"rule": RULE}, "skip_spikes": {"inner": optax.identity()}}
NEEDED_BY = {"stacked": {"scope": "per_layer"}}


def not_traced(which):
    return [
        pytest.param(factory, name, value, id=f"{factory}-{name}-{number}")
        for factory in INJECTED
        for name in inspect.signature(INJECTED[factory]).parameters
        for number, value in enumerate(NOT_TRACED.get(name, ([], []))[which])
    ]


def injected(factory, name, value):
    parameters = inspect.signature(INJECTED[factory]).parameters
    static_args = {"window"} & parameters.keys() - {name}
    needed = NEEDED.get(factory, {}) | (NEEDED_BY.get(name, {}) if "scope" in parameters else {})
    arguments = needed | {name: value}
    return optax.inject_hyperparams(INJECTED[factory], static_args=static_args)(**arguments)


@pytest.mark.parametrize(("factory", "name", "value"), not_traced(0))
def test_other_arguments_than_numbers_pass_through_inject_hyperparams(factory, name, value):
    tx = injected(factory, name, value)

    def step(params):
        return tx.update(params, tx.init(params), params)[0]

    members = jax.tree.map(lambda leaf: leaf[None], TWO_LAYERS)
    updates = jax.eval_shape(jax.vmap(step, axis_name="devices"), members)
    assert jax.tree.structure(updates) == jax.tree.structure(TWO_LAYERS)


@pytest.mark.parametrize(("factory", "name", "value"), not_traced(1))
def test_an_argument_that_inject_hyperparams_takes_for_a_number_is_refused_with_a_hint(
    factory, name, value, monkeypatch
):
    # Users run without type checks.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for init in (lambda tx: tx.init(TWO_LAYERS), lambda tx: jax.eval_shape(tx.init, TWO_LAYERS)):
        with pytest.raises(ValueError, match=rf"`({name}|patterns)` must .*`static_args`\.\)"):
            init(injected(factory, name, value))


def test_every_argument_is_a_number_or_among_those_that_cannot_be_traced():
    numbers = {
        "percentile", "zmax", "decay", "clip_factor", "record_limit", "relative_clip",
        "absolute_clip", "clipping", "eps", "sigma", "max_consecutive", "warmup_steps", "max_norm",
        "min_scale", "b1", "b2", "weight_decay", "give_up_after",
    }  # fmt: skip
    for factory in INJECTED.values():
        assert set(inspect.signature(factory).parameters) <= numbers | NOT_TRACED.keys()


@pytest.mark.parametrize("allows", [False, True])
def test_the_way_out_is_named_where_an_array_is_one_against_its_will(allows):
    with pytest.raises(ValueError, match=r"`size` must be small, got Array\(9") as error:
        checks.check_number("size", jnp.array(9), 0.0, 1.0, allowed="small", may_be_array=allows)
    assert str(error.value).endswith(checks.STATIC_HINT) is not allows
