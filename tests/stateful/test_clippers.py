"""The stateful clippers against float64 NumPy, and against the smartclip package.

They give the numbers that smartclip documents. Where smartclip computes something else, a test
shows both. Only the core of that package is used: its JAX backend calls `jax.tree_map`, which JAX
has removed.
"""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import smartclip.core as original
from breadth import each_value

import optax_smartclip as smartclip

CLASSES = {cls.__name__: cls for cls in (smartclip.AutoClip, smartclip.ZScoreClip, smartclip.AGC)}
each_class = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)

STEPS = 16
WARMUP = {"warmup_steps": 4, "min_history": 3}
rng = np.random.default_rng(0)


def nested(flat):
    return {"a": {"b": flat["a/b"], "w": flat["a/w"]}, "c": {"w": flat["c/w"]}}


SHAPES = {"a/b": (3,), "a/w": (3, 2), "c/w": (2, 2)}
WEIGHTS = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
STREAM = {name: rng.normal(size=(STEPS, *shape)) for name, shape in SHAPES.items()}
for leaf in STREAM.values():
    leaf[9] *= 100
STREAM["a/w"][12] *= 1000
STREAM["c/w"][14] *= 1000
STREAM["c/w"][6, 0, 0] = np.nan
STREAM = {name: leaf.astype(np.float32) for name, leaf in STREAM.items()}
PARAMS, GRADS = nested(WEIGHTS), nested(STREAM)

GROUPS = {
    "global": [["a/b", "a/w", "c/w"]],
    "per_layer": [["a/b", "a/w"], ["c/w"]],
    "per_param": [["a/b"], ["a/w"], ["c/w"]],
}
KEYS = {
    "global": [("global",)],
    "per_layer": [("layer", "a"), ("layer", "c")],
    "per_param": [("param", "a/b"), ("param", "a/w"), ("param", "c/w")],
}

# By name: a factory, and the thresholds by hand as a function of norms and the weight norm.
MAKE = {
    "auto": lambda **kwargs: smartclip.AutoClip(**kwargs),
    "outliers_only": lambda **kwargs: smartclip.AutoClip(outliers_only=True, **kwargs),
    "window": lambda **kwargs: smartclip.AutoClip(
        mode="percentile", percentile=60, history="window", window_size=5, **kwargs
    ),
    "ema": lambda **kwargs: smartclip.AutoClip(
        mode="percentile", percentile=60, ema_decay=0.9, **kwargs
    ),
    "zscore": lambda **kwargs: smartclip.ZScoreClip(zmax=2, ema_decay=0.9, **kwargs),
    "agc": lambda **kwargs: smartclip.AGC(clipping=2, exclude_bias_bn=False, **kwargs),
}
BY_HAND = {
    "auto": lambda norms, _: reference.lower_fence_thresholds(norms, warmup_steps=3),
    "outliers_only": lambda norms, _: reference.upper_fence_thresholds(norms, warmup_steps=3),
    "window": lambda norms, _: reference.percentile_thresholds(norms, 60, 5),
    "ema": lambda norms, _: reference.geometric_estimates(norms, 60, 0.1),
    "zscore": lambda norms, _: reference.zscore_thresholds(norms, 2, 0.9, warmup_steps=3),
    "agc": lambda norms, weight_norm: np.full(len(norms), 2 * max(weight_norm, 1e-3)),
}


def clip_by_hand(name, scope):
    """The stream clipped by hand, and the number of clipped norms in each group."""
    clipped, counts = {}, []
    for group in GROUPS[scope]:
        norms = np.array(
            [reference.norm([STREAM[leaf][step] for leaf in group]) for step in range(STEPS)]
        )
        thresholds = BY_HAND[name](norms, reference.norm([WEIGHTS[leaf] for leaf in group]))
        finite = np.isfinite(norms)
        # The fourth finite norm is the first that may be clipped.
        thresholds = np.where(np.cumsum(finite) >= 4, thresholds, np.inf)
        scales = np.where(finite, np.minimum(1, thresholds / norms), 0)
        counts.append(np.sum(scales[finite] < 1))
        for leaf in group:
            shape = (STEPS,) + (1,) * len(SHAPES[leaf])
            scaled = np.float64(STREAM[leaf]) * scales.reshape(shape)
            clipped[leaf] = np.where(finite.reshape(shape), scaled, 0)
    return nested(clipped), counts


def gradient(number):
    return jax.tree.map(lambda leaf: leaf[number], GRADS)


def eagerly(make):
    clippers = make()
    return loop(clippers, lambda grads: clip_by_all(clippers, grads))


def jitted(make):
    clippers = make()
    for clipper in clippers.values():
        clipper.init(PARAMS)
    return loop(clippers, jax.jit(lambda grads: clip_by_all(clippers, grads)))


def created_in_the_trace(make):
    clippers = {}

    @jax.jit
    def step(grads):
        clippers.update(make())
        return clip_by_all(clippers, grads)

    return loop(clippers, step)


def scanned(make):
    clippers = make()

    @jax.jit
    def run(stream):
        return jax.lax.scan(lambda _, grads: (None, clip_by_all(clippers, grads)), None, stream)[1]

    return clippers, run(GRADS)


def clip_by_all(clippers, grads):
    return {
        name: smartclip.apply_grads(grads, PARAMS, clipper) for name, clipper in clippers.items()
    }


def loop(clippers, step):
    steps = [step(gradient(number)) for number in range(STEPS)]
    return clippers, jax.tree.map(lambda *leaves: np.stack(leaves), *steps)


# Not all pairs of a way and a scope: groups do not depend on how the step runs.
@pytest.mark.parametrize(
    ("way", "scope", "names"),
    [
        (eagerly, "per_layer", ["ema", "agc"]),
        (jitted, "global", MAKE),
        (created_in_the_trace, "per_param", ["auto", "agc"]),
        (scanned, "per_param", MAKE),
        pytest.param(eagerly, "per_layer", MAKE, marks=pytest.mark.long),
        pytest.param(created_in_the_trace, "per_param", MAKE, marks=pytest.mark.long),
    ],
)
def test_every_clipper_gives_the_float64_numbers_in_every_way_to_call_it(way, scope, names):
    def make():
        return {name: MAKE[name](scope=scope, **WARMUP) for name in names}

    clippers, clipped = way(make)
    for name, clipper in clippers.items():
        expected, counts = clip_by_hand(name, scope)
        assert min(counts) > 0, name
        assert clipper.num_steps == STEPS
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-4, err_msg=name),
            clipped[name],
            expected,
        )


@each_class
def test_the_arguments_and_their_defaults_are_those_of_smartclip(cls):
    # By name: keyword-only parameters have no order.
    ours, theirs = (
        {
            name: (parameter.default, parameter.kind)
            for name, parameter in inspect.signature(its).parameters.items()
        }
        for its in (cls, getattr(original, cls.__name__))
    )
    others = {"stacked": (None, inspect.Parameter.KEYWORD_ONLY)}
    if cls is smartclip.AutoClip:
        others["outliers_only"] = (False, inspect.Parameter.KEYWORD_ONLY)
    assert ours == theirs | others


def drive_original(clipper, norms):
    """Observes, then asks, as smartclip's backends do. Returns clipped, thresholds, can_clip."""
    rows = []
    for norm in norms:
        clipper.observe(float(norm))
        threshold, can_clip = clipper.threshold(), clipper.can_clip()
        scale = min(1.0, threshold / (norm + clipper.eps)) if can_clip else 1.0
        rows.append((scale * norm, threshold, can_clip))
    return (np.array(column) for column in zip(*rows, strict=True))


def drive_ours(clipper, norms, ask=lambda clipper: ()):
    """Returns the clipped norms and the answers after each step."""

    def step(_, grads):
        clipped = smartclip.apply_grads(grads, None, clipper)
        return None, (clipped[0], *ask(clipper))

    grads = np.float32(norms)[:, None]
    scan = jax.jit(lambda grads: jax.lax.scan(step, None, grads)[1])
    return jax.tree.map(np.asarray, scan(grads))


@pytest.mark.parametrize(
    ("percentile", "warmup_steps", "min_history"),
    [(10, 100, 50), (95, 0, 30), pytest.param(50, 7, 7, marks=pytest.mark.long)],
)
def test_percentiles_of_a_window_are_those_of_smartclip_from_warm_up_on(
    percentile, warmup_steps, min_history
):
    generator = np.random.default_rng(3)
    norms = generator.lognormal(sigma=0.4, size=1000)
    norms[generator.integers(200, 1000, 20)] *= 1000
    arguments = {
        "mode": "percentile",
        "percentile": percentile,
        "history": "window",
        "window_size": 256,
        "warmup_steps": warmup_steps,
        "min_history": min_history,
    }
    expected = drive_original(original.AutoClip(**arguments), norms)
    clipped, thresholds, can_clip = drive_ours(
        smartclip.AutoClip(**arguments), norms, lambda its: (its.threshold(), its.can_clip())
    )
    expected_clipped, expected_thresholds, expected_can_clip = expected
    np.testing.assert_allclose(thresholds, expected_thresholds, rtol=1e-3)
    np.testing.assert_allclose(clipped, expected_clipped, rtol=1e-3)
    np.testing.assert_array_equal(can_clip, expected_can_clip)
    # The norm that ends warm-up is the first that may be clipped.
    first = max(warmup_steps, min_history) - 1
    assert list(can_clip[first - 1 : first + 1]) == [False, True]
    np.testing.assert_array_equal(clipped[:first], np.float32(norms[:first]))
    assert np.mean(clipped[first:] < 0.999 * norms[first:]) > 0.9 - percentile / 100


def test_agc_by_parameter_is_that_of_smartclip():
    arguments = {"clipping": 0.02, "scope": "per_param", "warmup_steps": 100}
    theirs, ours = original.AGC(**arguments), smartclip.AGC(**arguments)
    generator = np.random.default_rng(1)
    shapes = {"kernel": (3, 3), "bias": (3,)}

    def walk(scale, start):
        return {
            name: np.float32(start + scale * generator.normal(size=(1000, *shape)).cumsum(0))
            for name, shape in shapes.items()
        }

    params, grads = walk(0.1, start=1), walk(0.005, start=0)

    def step(_, inputs):
        return None, (smartclip.apply_grads(*inputs, ours), ours.can_clip())

    scan = jax.jit(lambda inputs: jax.lax.scan(step, None, inputs)[1])
    clipped, can_clip = jax.tree.map(np.asarray, scan((grads, params)))
    scales = []
    for grad, weight, may in zip(grads["kernel"], params["kernel"], can_clip, strict=True):
        grad_norm, weight_norm = np.linalg.norm(grad), np.linalg.norm(weight)
        theirs.observe(grad_norm, weight_norm)
        assert theirs.can_clip() == may
        scales.append(theirs.scale(grad_norm, weight_norm) if may else 1.0)
    scales = np.array(scales)[:, None, None]
    assert 100 < np.sum(scales < 1) < 900
    np.testing.assert_allclose(clipped["kernel"], scales * grads["kernel"], rtol=1e-3)
    np.testing.assert_array_equal(clipped["bias"], grads["bias"])


def test_the_ema_percentile_of_smartclip_only_rises_and_ours_follows_the_norms_down():
    norms = np.r_[np.full(20, 100.0), np.random.default_rng(0).lognormal(sigma=0.1, size=300), 50.0]
    arguments = {"mode": "percentile", "percentile": 50, "ema_decay": 0.9, "warmup_steps": 10}
    clipped, thresholds, _ = drive_original(original.AutoClip(**arguments), norms)
    assert np.all(np.diff(thresholds) >= 0)
    np.testing.assert_allclose(clipped[-1], 50)
    clipped, thresholds = drive_ours(
        smartclip.AutoClip(**arguments), norms, lambda its: (its.threshold(),)
    )
    assert thresholds[19] == 100
    assert 0.8 < thresholds[-1] < 1.2
    assert clipped[-1] < 1.2


def test_the_z_score_of_smartclip_passes_a_third_of_any_spike_and_ours_cuts_it_to_the_norms():
    for spike in (1e3, 1e6):
        norms = np.r_[[1.0, 3.0] * 100, spike]
        clipped, _, _ = drive_original(original.ZScoreClip(), norms)
        assert 0.30 < clipped[-1] / spike < 0.32
        (clipped,) = drive_ours(smartclip.ZScoreClip(), norms)
        assert clipped[-1] == pytest.approx(2 + 3 * 1, rel=0.1)
        np.testing.assert_array_equal(clipped[:-1], np.float32(norms[:-1]))


def test_one_spike_ends_the_auto_mode_of_smartclip_and_does_not_touch_ours():
    norms = np.random.default_rng(0).uniform(1, 3, size=1000)
    norms[200] = 1e6
    norms[[300, 600, 999]] = 1e3
    spikes = norms == 1e3
    clipped, thresholds, _ = drive_original(original.AutoClip(), norms)
    assert np.all(thresholds[200:] > 1e4)
    np.testing.assert_array_equal(clipped[spikes], norms[spikes])
    (clipped,) = drive_ours(smartclip.AutoClip(), norms)
    # The fence of uniform norms is about 2.5 + 1.5 * 1.
    assert np.all(clipped[spikes] < 5)


def test_warm_up_counts_parameters_in_smartclip_and_steps_here():
    params = {str(number): np.ones(1, np.float32) for number in range(5)}
    theirs = original.ZScoreClip(scope="per_param", warmup_steps=10, min_history=0)
    ours = smartclip.ZScoreClip(scope="per_param", warmup_steps=10, min_history=0)
    ours.init(params)
    clip = jax.jit(lambda grads: smartclip.apply_grads(grads, None, ours))
    for step in range(1, 11):
        for number in range(5):
            theirs.observe(1.0, ("param", str(number)))
        clip(params)
        assert theirs.can_clip() == (step >= 2)
        assert ours.can_clip() == (step >= 10)


@each_class
def test_norms_up_to_eps_are_cut_by_smartclip_and_pass_here(cls):
    arguments = {"scope": "global", "warmup_steps": 2, "min_history": 0, "eps": 1e-8}
    norms = np.array([1e-10, 1.1e-10] * 20 + [9e-9, 5e-7])
    theirs, ours = getattr(original, cls.__name__)(**arguments), cls(**arguments)
    if cls is smartclip.AGC:
        # A hundredth of the norm of this weight is far below eps.
        weights = np.full((1, 1), 1e-7, np.float32)
        assert theirs.scale(1e-10, 1e-7) < 0.11
    else:
        weights = None
        clipped, _, _ = drive_original(theirs, norms)
        assert clipped[38] < 0.02 * norms[38]
    step = jax.jit(lambda grads: smartclip.apply_grads(grads, weights, ours))
    clipped = [np.asarray(step(np.full((1, 1), norm, np.float32)))[0, 0] for norm in norms]
    np.testing.assert_array_equal(clipped[:-1], np.float32(norms[:-1]))
    # The floor of the threshold: eps, and for AGC a hundredth of 1e-3.
    assert clipped[-1] == pytest.approx(5e-7 if cls is smartclip.AGC else 1e-8)


def test_weights_that_are_zero_cannot_move_under_smartclip_and_do_here():
    theirs, ours = original.AGC(clipping=0.1), smartclip.AGC(clipping=0.1)
    assert theirs.scale(1.0, 0.0) < 1e-8
    params, grads = ({"w": np.full((2, 2), value, np.float32)} for value in (0.0, 0.5))
    clipped = jax.jit(lambda: smartclip.apply_grads(grads, params, ours))()
    np.testing.assert_allclose(clipped["w"], np.full((2, 2), 0.5 * 0.1 * 1e-3), rtol=1e-6)


def test_the_floor_of_the_threshold_of_agc_is_eps_if_eps_is_larger():
    clipper = smartclip.AGC(clipping=0.1, eps=0.25)
    params, grads = ({"w": np.full((2, 2), value, np.float32)} for value in (0.0, 0.5))
    clipped = jax.jit(lambda: smartclip.apply_grads(grads, params, clipper))()
    np.testing.assert_allclose(clipped["w"], np.full((2, 2), 0.125), rtol=1e-6)


@pytest.mark.parametrize("scope", GROUPS)
def test_vectors_and_scalars_are_left_alone_by_agc_unless_it_is_told_otherwise(scope):
    generator = np.random.default_rng(2)
    shapes = {"kernel": (3, 2), "bias": (3,), "scale": ()}
    params, grads = (
        {name: np.float32(generator.normal(size=shape)) for name, shape in shapes.items()}
        for _ in range(2)
    )

    def clip(**kwargs):
        clipper = smartclip.AGC(clipping=0.1, scope=scope, **kwargs)
        return jax.jit(lambda: smartclip.apply_grads(grads, params, clipper))()

    scale = 0.1 * reference.norm(params["kernel"]) / reference.norm(grads["kernel"])
    clipped = clip()
    np.testing.assert_allclose(clipped["kernel"], scale * grads["kernel"], rtol=1e-5)
    for name in ("bias", "scale"):
        np.testing.assert_array_equal(clipped[name], grads[name])
    clipped = clip(exclude_bias_bn=False)
    for name in shapes:
        group = [name] if scope == "per_param" else list(shapes)
        weight_norm, norm = (
            reference.norm([tree[leaf] for leaf in group]) for tree in (params, grads)
        )
        np.testing.assert_allclose(clipped[name], 0.1 * weight_norm / norm * grads[name], rtol=1e-5)


@pytest.mark.parametrize("guard_nans", [True, False])
@each_class
def test_nan_and_inf_become_zeros_or_pass_and_are_never_learned(cls, guard_nans):
    clipper = cls(guard_nans=guard_nans, scope="global", warmup_steps=4, min_history=0)
    params = {"w": np.ones((1, 2), np.float32)}
    step = jax.jit(lambda grads: smartclip.apply_grads({"w": grads}, params, clipper)["w"])
    for bad in ([np.nan, 1], [1, np.inf], [-np.inf, np.nan]):
        grads = np.float32([bad])
        np.testing.assert_array_equal(step(grads), np.zeros((1, 2)) if guard_nans else grads)
    # Steps without a finite norm do not count in warm-up.
    assert clipper.num_steps == 3
    for norm in (1.0, 2.0, 1.0):
        assert not clipper.can_clip()
        np.testing.assert_array_equal(step(np.float32([[norm, 0]])), [[norm, 0]])
        step(np.float32([[np.nan, 1]]))
    spike = np.asarray(step(np.float32([[1000, 0]])))[0, 0]
    limits = {
        "AutoClip": reference.lower_fence_thresholds([1, 2, 1, 1000], warmup_steps=3)[-1],
        "ZScoreClip": reference.zscore_thresholds([1, 2, 1, 1000], warmup_steps=3)[-1],
        "AGC": 0.01 * np.sqrt(2),
    }
    assert spike == pytest.approx(limits[cls.__name__], rel=1e-5)


@pytest.mark.parametrize(("name", "scope"), each_value(["auto", "ema", "zscore"], GROUPS))
def test_the_threshold_of_each_group_is_found_by_its_key_and_by_its_position(name, scope):
    clipper = MAKE[name](scope=scope, **WARMUP)
    assert clipper.threshold() == clipper.threshold_any() == clipper.eps == 1e-8
    assert clipper.threshold(("param", "nothing is known yet")) == clipper.eps

    @jax.jit
    def step(grads):
        smartclip.apply_grads(grads, PARAMS, clipper)
        return [clipper.threshold(key) for key in KEYS[scope]]

    for number in range(STEPS):
        traced = step(gradient(number))
    for place, (key, group) in enumerate(zip(KEYS[scope], GROUPS[scope], strict=True)):
        norms = [reference.norm([STREAM[leaf][step] for leaf in group]) for step in range(STEPS)]
        # The estimate includes the last norm; the other rules use the norms before the next one.
        expected = BY_HAND[name](norms if name == "ema" else [*norms, 0], 0)[-1]
        found = clipper.threshold(key)
        assert isinstance(found, float)
        assert found == pytest.approx(expected, rel=1e-5)
        assert found == pytest.approx(float(traced[place]), rel=1e-6)
        if scope == "global":
            assert clipper.threshold() == clipper.threshold_any() == found
        else:
            assert clipper.threshold((key[0], str(place))) == found
            assert clipper.threshold_any() == clipper.eps
    unknown = [("param", "d"), ("param", "3"), ("layer", "a/w"), ("param", "-1"), ("global", "0")]
    for key in [*unknown, ("0",), *([None] if scope != "global" else [])]:
        with pytest.raises(ValueError, match=r"`key` must be one of \(\(.*, got \('"):
            clipper.threshold(key)


def test_a_group_without_a_finite_norm_has_the_threshold_eps():
    clipper = smartclip.AutoClip(mode="percentile", scope="per_param", eps=1e-5)
    smartclip.apply_grads({"a": np.float32([np.nan]), "b": np.ones(1, np.float32)}, None, clipper)
    assert clipper.threshold(("param", "a")) == pytest.approx(1e-5)
    assert clipper.threshold(("param", "b")) == 1.0
    assert clipper.threshold_any() == 1e-5


def test_the_only_group_need_not_be_named():
    clipper = smartclip.AutoClip(mode="percentile", scope="per_param")
    smartclip.apply_grads({"w": np.float32([3.0, 4.0])}, None, clipper)
    assert clipper.threshold_any() == clipper.threshold(("param", "w")) == 5.0


@each_class
def test_can_clip_and_num_steps_are_python_values_outside_of_a_traced_step(cls):
    clipper = cls(warmup_steps=3, min_history=2)
    seen = []

    @jax.jit
    def step(grads):
        seen.append(clipper.num_steps)
        before = clipper.can_clip()
        smartclip.apply_grads(grads, grads, clipper)
        seen.append(clipper.num_steps)
        return before, clipper.can_clip()

    assert clipper.can_clip() is False
    assert clipper.num_steps == 0
    grads = {"w": np.ones((2, 2), np.float32)}
    clipper.init(grads)
    for number in range(1, 5):
        before, after = step(grads)
        assert (bool(before), bool(after)) == (number > 3, number >= 3)
        assert clipper.can_clip() is (number >= 3)
        assert clipper.num_steps == number
    assert seen == [None, None]


SHARED_ERRORS = [
    ({"scope": "layer"}, r"`scope` must be one of 'global', 'per_layer', 'per_param', got 'layer'"),
    (
        {"warmup_steps": -1},
        r"`warmup_steps` must be a number of steps from 0 to 2147483647, got -1",
    ),
    ({"min_history": -2}, r"`min_history` must be a number of steps from 0 to 2147483647, got -2"),
    (
        {"min_history": float("nan")},
        r"`min_history` must be a number of steps from 0 to 2147483647, got nan",
    ),
    ({"eps": 0.0}, r"`eps` must be positive, got 0.0"),
    ({"eps": float("nan")}, r"`eps` must be positive, got nan"),
    ({"eps": True}, r"`eps` must be positive, got True"),
    ({"eps": jnp.float32(-1)}, r"`eps` must be positive, got -1.0"),
    ({"eps": np.ones(2)}, r"`eps` must be a single value, got array\(\[1., 1.\]\)"),
]
DECAY_ERRORS = [
    ({"ema_decay": 0.0}, r"`ema_decay` must be in \(0, 1\), got 0.0"),
    ({"ema_decay": 1.0}, r"`ema_decay` must be in \(0, 1\), got 1.0"),
    ({"ema_decay": jnp.float32(2)}, r"`ema_decay` must be in \(0, 1\), got 2.0"),
    ({"ema_decay": "0.9"}, r"`ema_decay` must be in \(0, 1\), got '0.9'"),
]
ERRORS = {
    "AutoClip": [
        *SHARED_ERRORS,
        *DECAY_ERRORS,
        ({"mode": "median"}, r"`mode` must be one of 'auto', 'percentile', got 'median'"),
        ({"percentile": -0.1}, r"`percentile` must be in \[0, 100\], got -0.1"),
        ({"percentile": jnp.float32(200)}, r"`percentile` must be in \[0, 100\], got 200.0"),
        ({"percentile": 101}, r"`percentile` must be in \[0, 100\], got 101"),
        ({"percentile": None}, r"`percentile` must be in \[0, 100\], got None"),
        ({"history": "p2"}, r"`history` must be one of 'ema', 'window', got 'p2'"),
        ({"window_size": 0}, r"`window_size` must be a Python int from 1 .*, got 0"),
        ({"window_size": True}, r"`window_size` must be a Python int from 1 .*, got True"),
    ],
    "ZScoreClip": [
        *SHARED_ERRORS,
        *DECAY_ERRORS,
        ({"zmax": 0.0}, r"`zmax` must be positive, got 0.0"),
        ({"zmax": jnp.float32(-1)}, r"`zmax` must be positive, got -1.0"),
        ({"zmax": True}, r"`zmax` must be positive, got True"),
    ],
    "AGC": [
        *SHARED_ERRORS,
        ({"clipping": 0.0}, r"`clipping` must be positive, got 0.0"),
        ({"clipping": jnp.float32(0)}, r"`clipping` must be positive, got 0.0"),
        ({"clipping": None}, r"`clipping` must be positive, got None"),
    ],
}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [(name, *error) for name, errors in ERRORS.items() for error in errors],
)
def test_an_argument_out_of_range_is_an_error_that_says_what_is_allowed(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        CLASSES[name](**arguments)


@each_class
def test_arguments_are_keywords_only_as_in_smartclip(cls):
    for its in (cls, getattr(original, cls.__name__)):
        with pytest.raises(TypeError, match="positional argument"):
            its("auto")


SCALARS = {
    "AutoClip": {"percentile": 50, "ema_decay": 0.5},
    "ZScoreClip": {"zmax": 2, "ema_decay": 0.5},
    "AGC": {"clipping": 0.5},
}


@each_class
def test_numbers_may_be_scalars_of_any_kind(cls):
    plain = SCALARS[cls.__name__] | {"warmup_steps": 4, "min_history": 2, "eps": 2.0**-20}
    mode = {"mode": "percentile"} if cls is smartclip.AutoClip else {}
    clippers = [
        cls(scope="global", **mode, **{name: kind(value) for name, value in plain.items()})
        for kind in (lambda value: value, float, np.float32, jnp.float32)
    ]
    saved = [clipper.state_dict() for clipper in clippers]
    assert json.loads(json.dumps(saved)) == [saved[0]] * len(saved)

    @jax.jit
    def step(grads):
        return [
            smartclip.apply_grads(grads, np.ones((1, 1), np.float32), clipper)
            for clipper in clippers
        ]

    for norm in (1.0, 2.0, 1.0, 2.0, 1.0, 1000.0):
        clipped = np.ravel(step(np.full((1, 1), norm, np.float32)))
        np.testing.assert_array_equal(clipped, clipped[:1].repeat(len(clippers)))
    assert clipped[0] < 20


@each_class
def test_a_clipper_refuses_another_model_and_stays_as_it_was(cls):
    clipper = cls(scope="per_param")
    params = {"w": np.ones((2, 2), np.float32), "v": np.ones((2, 2), np.float32)}
    smartclip.apply_grads(params, params, clipper)
    before = clipper.state_dict()
    other = {"w": params["w"], "u": params["v"]}
    message = (
        r"`params` must fall into the groups .* \(\('param', 'v'\), \('param', 'w'\)\), "
        r"got \(\('param', 'u'\), \('param', 'w'\)\)"
    )
    for use in (lambda: smartclip.apply_grads(other, other, clipper), lambda: clipper.init(other)):
        with pytest.raises(ValueError, match=message):
            use()
        assert clipper.state_dict() == before
    smartclip.apply_grads(params, params, clipper)
    assert clipper.num_steps == 2


# Two models whose layers have the same names.


def ones(shape):
    return np.ones(shape, np.float32)


ACTOR = {"Dense_0": {"kernel": ones((2, 3))}, "Dense_1": {"kernel": ones((3, 2))}}
CRITICS = {
    "shape": (
        {**ACTOR, "Dense_1": {"kernel": ones((3, 1))}},
        r"got the shape \(3, 1\) for 'Dense_1/kernel', where there was the shape \(3, 2\)",
    ),
    "more": (
        {**ACTOR, "value": ones((2, 1))},
        r"got the shape \(2, 1\) for 'value', where there was no such leaf",
    ),
    "less": (
        {"Dense_0": ACTOR["Dense_0"]},
        r"got no such leaf for 'Dense_1/kernel', where there was the shape \(3, 2\)",
    ),
    "depth": (
        {**ACTOR, "Dense_1": {"kernel": {"w": ones((3, 2))}}},
        r"got no such leaf for 'Dense_1/kernel', where there was the shape \(3, 2\)",
    ),
}


@pytest.mark.parametrize(("cls", "critic"), each_value(CLASSES, CRITICS))
def test_a_clipper_of_one_group_refuses_the_gradient_of_another_model(cls, critic):
    clipper = CLASSES[cls](scope="global")
    critic, message = CRITICS[critic]
    message = rf"`grads` must have .*, {message}. Use one clipper for each model."
    smartclip.apply_grads(ACTOR, ACTOR, clipper)
    before = clipper.state_dict()

    @jax.jit
    def step(critic):
        return smartclip.apply_grads(critic, critic, clipper)

    for use in (step, lambda critic: smartclip.apply_grads(critic, critic, clipper)):
        with pytest.raises(ValueError, match=message):
            use(critic)
        assert clipper.state_dict() == before
    smartclip.apply_grads(ACTOR, ACTOR, clipper)
    assert clipper.num_steps == 2


def test_two_models_in_one_compiled_step_need_two_clippers():
    clipper, critic = smartclip.AutoClip(), CRITICS["shape"][0]

    @jax.jit
    def step(actor, critic):
        return [smartclip.apply_grads(grads, None, clipper) for grads in (actor, critic)]

    with pytest.raises(ValueError, match="Use one clipper for each model"):
        step(ACTOR, critic)


def test_frozen_and_integer_leaves_that_come_and_go_are_of_the_same_model():
    whole = {**ACTOR, "count": np.int32(3)}
    frozen = [
        {**whole, "Dense_0": {"kernel": None}, "count": None},
        {"Dense_1": ACTOR["Dense_1"], "Dense_0": None},
        {**whole, "Dense_0": optax.MaskedNode(), "count": np.zeros((), jax.dtypes.float0)},
    ]
    other = {**whole, "Dense_1": {"kernel": ones((2, 2))}}
    for gradients in ([whole, *frozen], [frozen[0], whole], [frozen[1], whole]):
        clipper = smartclip.ZScoreClip()
        clip = jax.jit(lambda grads, its=clipper: smartclip.apply_grads(grads, None, its))
        for grads in gradients:
            jax.eval_shape(clip, grads)
        with pytest.raises(ValueError, match=r"got the shape \(2, 2\) for 'Dense_1/kernel'"):
            jax.eval_shape(clip, other)


def test_unrolled_and_scanned_steps_and_a_structure_given_to_init_are_of_the_same_model():
    clipper = smartclip.ZScoreClip()
    clipper.init({"variables": jax.tree.map(lambda leaf: leaf[0], ACTOR)})

    @jax.jit
    def steps(grads):
        for _ in range(2):
            clipped = smartclip.apply_grads(grads, grads, clipper)
        twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), clipped)
        jax.lax.scan(lambda _, g: (None, smartclip.apply_grads(g, None, clipper)), None, twice)

    steps(ACTOR)
    smartclip.apply_grads(ACTOR, None, clipper)
    assert clipper.num_steps == 5


def test_a_clipper_that_has_loaded_the_state_of_another_model_takes_its_gradient():
    critic = CRITICS["shape"][0]
    clippers = [smartclip.ZScoreClip(), smartclip.ZScoreClip()]
    for clipper, grads in zip(clippers, (ACTOR, critic), strict=True):
        smartclip.apply_grads(grads, None, clipper)
    clippers[0].load_state_dict(clippers[1].state_dict())
    smartclip.apply_grads(critic, None, clippers[0])
    assert clippers[0].num_steps == 2


def test_agc_without_params_is_an_error():
    clipper = smartclip.AGC()
    grads = {"w": ones((2, 2))}
    with pytest.raises(ValueError, match=r"`params` must be passed .* compares with the weights"):
        smartclip.apply_grads(grads, None, clipper)
    assert clipper.num_steps == 0
    smartclip.apply_grads(grads, grads, clipper)
    assert clipper.num_steps == 1
