"""The saved state of a stateful clipper passes through JSON; a resumed run repeats every bit."""

import copy
import functools
import inspect
import json

import jax
import numpy as np
import pytest
import smartclip.core as original
from breadth import long_but
from trees import assert_same_bits

import optax_smartclip as smartclip

CLASSES = {cls.__name__: cls for cls in (smartclip.AutoClip, smartclip.ZScoreClip, smartclip.AGC)}
each_class = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
ALGOS = {"AutoClip": "autoclip", "ZScoreClip": "zscore", "AGC": "agc"}

# None of them is a default.
ARGUMENTS = {
    "AutoClip": {
        "mode": "percentile",
        "outliers_only": True,
        "percentile": 60.0,
        "history": "window",
        "ema_decay": 0.9,
        "window_size": 5,
    },
    "ZScoreClip": {"zmax": 2.0, "ema_decay": 0.9},
    "AGC": {"clipping": 0.75, "exclude_bias_bn": False},
}
# smartclip has no such argument.
OURS_ALONE = {"outliers_only"}
SHARED = {"warmup_steps": 4, "min_history": 3, "eps": 1e-6}

STEPS = 12
rng = np.random.default_rng(0)
PARAMS = {
    "a": {"w": rng.normal(size=(2, 2)).astype(np.float32)},
    "b": {"v": np.ones(1, np.float32), "w": rng.normal(size=(2, 3)).astype(np.float32)},
}
GRADS = [
    jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), PARAMS)
    for _ in range(STEPS)
]
GRADS[1]["b"]["w"][0, 0] = np.inf
GRADS[5]["b"]["v"][0] = np.nan
for number in (8, 10):
    GRADS[number] = jax.tree.map(lambda leaf: np.float32(100) * leaf, GRADS[number])


def make(cls, **kwargs):
    return cls(**(ARGUMENTS[cls.__name__] | SHARED | kwargs))


def through_json(state):
    return json.loads(json.dumps(state, allow_nan=False))


def in_use(cls, **kwargs):
    clipper = make(cls, **kwargs)
    clipper.init(PARAMS)
    return clipper


def compiled_step(clippers):
    @jax.jit
    def step(grads):
        return [smartclip.apply_grads(grads, PARAMS, clipper) for clipper in clippers]

    return step


@functools.cache
def uninterrupted(scope):
    """The clipped gradients, and the saved states before each step and after the last."""
    clippers = [make(cls, scope=scope) for cls in CLASSES.values()]
    step = compiled_step(clippers)
    clipped, saved = [], []
    for grads in GRADS:
        saved.append([clipper.state_dict() for clipper in clippers])
        clipped.append(step(grads))
    saved.append([clipper.state_dict() for clipper in clippers])
    return clipped, saved


# In warm-up, after an infinite norm; after a NaN; after a spike; before the first step.
PLACES = [("per_layer", 2), ("per_param", 6), ("global", 9), ("global", 0), ("per_layer", 6)]


@pytest.mark.parametrize(
    "place", long_but(PLACES[:3], PLACES), ids=lambda its: f"{its[0]}-{its[1]}"
)
def test_a_run_resumed_from_json_repeats_every_bit(place):
    scope, steps_before = place
    clipped, saved = uninterrupted(scope)
    resumed = [cls() for cls in CLASSES.values()]
    for clipper, state in zip(resumed, saved[steps_before], strict=True):
        clipper.load_state_dict(through_json(state))
    step = compiled_step(resumed)
    for number in range(steps_before, STEPS):
        assert_same_bits(step(GRADS[number]), clipped[number])
    assert [clipper.state_dict() for clipper in resumed] == saved[-1]
    # All of them clip the second spike.
    for tree in clipped[10]:
        ratios = jax.tree.map(lambda a, b: np.linalg.norm(a) / np.linalg.norm(b), tree, GRADS[10])
        assert max(jax.tree.leaves(ratios)) < 0.5


@pytest.mark.parametrize("scope", ["global", "per_layer", "per_param"])
def test_the_loaded_state_equals_the_saved_one_after_every_step(scope):
    _, saved = uninterrupted(scope)
    for number, states in enumerate(saved):
        # All norms of layer a and of its leaf are finite.
        observed = number - (number > 1) - (number > 5) if scope == "global" else number
        for cls, state in zip(CLASSES.values(), states, strict=True):
            clipper = cls()
            clipper.load_state_dict(through_json(state))
            assert clipper.state_dict() == state
            assert clipper.num_steps == number
            assert clipper.can_clip() is (observed >= 4)
            assert state["gate"]["steps"] == number
            assert state["gate"]["observations"] == observed
            # Neither in warm-up nor after it does `init` change a loaded state.
            if number in (1, STEPS):
                clipper.init(PARAMS)
                assert clipper.state_dict() == state


@each_class
def test_an_eager_run_resumed_from_json_repeats_every_bit(cls):
    # One clipper loads all of the states, because each new one would compile again.
    clipper, resumed = make(cls), make(cls)
    clipped, saved = [], []
    for grads in GRADS:
        clipper.init(PARAMS)
        saved.append(clipper.state_dict())
        clipped.append(smartclip.apply_grads(grads, PARAMS, clipper))
    saved.append(clipper.state_dict())
    for number in (0, 2, 6, 9):
        resumed.load_state_dict(through_json(saved[number]))
        for grads, expected in zip(GRADS[number:], clipped[number:], strict=True):
            assert_same_bits(smartclip.apply_grads(grads, PARAMS, resumed), expected)
        assert resumed.state_dict() == saved[-1]


@each_class
def test_the_layout_is_that_of_smartclip_except_for_the_state(cls):
    arguments = ARGUMENTS[cls.__name__] | SHARED | {"scope": "per_layer", "guard_nans": False}
    ours = make(cls, scope="per_layer", guard_nans=False).state_dict()
    common = {name: value for name, value in arguments.items() if name not in OURS_ALONE}
    theirs = getattr(original, cls.__name__)(**common).state_dict()
    algo = ALGOS[cls.__name__]
    assert list(ours) == list(theirs)
    assert {**ours, algo: None} == {**theirs, algo: None}
    for name in ARGUMENTS[cls.__name__].keys() - OURS_ALONE:
        assert ours[algo][name] == theirs[algo][name] == arguments[name]
    assert set(ours[algo]) == {*ARGUMENTS[cls.__name__], "keys", "state"}


@each_class
def test_all_numbers_are_finite_because_json_has_no_others(cls):
    _, saved = uninterrupted("global")
    algo = ALGOS[cls.__name__]
    place = list(CLASSES).index(cls.__name__)
    for step in (2, 6):
        json.dumps(saved[step][place], allow_nan=False)
        assert saved[step][place][algo]["state"]["last/grad_norm"] == np.finfo(np.float32).max
    assert saved[2][place][algo]["keys"] == [["global"]]


@pytest.mark.parametrize("number", ["inf", "nan"])
def test_strings_for_infinite_numbers_from_version_0_1_0_are_understood(number):
    clipper = smartclip.AutoClip()
    clipper.init(np.ones(2, np.float32))
    saved = clipper.state_dict()
    saved["autoclip"]["state"]["last/grad_norm"] = number
    other = smartclip.AutoClip()
    other.load_state_dict(saved)
    assert other.state_dict() == saved


@each_class
def test_a_clipper_that_is_not_in_use_takes_the_arguments(cls):
    state = make(cls, scope="per_param", guard_nans=False).state_dict()
    clipper = cls()
    clipper.load_state_dict(through_json(state))
    assert clipper.state_dict() == state != cls().state_dict()
    assert (clipper.scope, clipper.eps, clipper.guard_nans) == ("per_param", 1e-6, False)
    clipped = smartclip.apply_grads(GRADS[5], PARAMS, clipper)
    assert np.isnan(clipped["b"]["v"][0])


def test_a_compiled_step_goes_on_from_the_state_that_was_loaded():
    clipped, saved = uninterrupted("global")
    clippers = [make(cls, scope="global") for cls in CLASSES.values()]
    step = compiled_step(clippers)
    for grads in GRADS[6:11]:
        step(grads)
    at_the_start = [in_use(cls, scope="global").state_dict() for cls in CLASSES.values()]
    for number, states in ((6, saved[6]), (0, at_the_start)):
        for clipper, state in zip(clippers, states, strict=True):
            clipper.load_state_dict(through_json(state))
        for grads, expected in zip(GRADS[number:], clipped[number:], strict=True):
            assert_same_bits(step(grads), expected)
    assert step._cache_size() == 1


OTHERS = {
    "AutoClip": {
        "mode": "auto",
        "outliers_only": False,
        "percentile": 61.0,
        "history": "ema",
        "ema_decay": 0.8,
        "window_size": 6,
    },
    "ZScoreClip": {"zmax": 3.0, "ema_decay": 0.8},
    "AGC": {"clipping": 0.5, "exclude_bias_bn": True},
}
SHARED_OTHERS = {
    "scope": "global",
    "warmup_steps": 5,
    "min_history": 2,
    "eps": 1e-5,
    "guard_nans": False,
}


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (cls, name, value)
        for cls in CLASSES.values()
        for name, value in (OTHERS[cls.__name__] | SHARED_OTHERS).items()
    ],
)
def test_a_clipper_in_use_refuses_a_state_of_other_arguments(cls, name, value):
    clipper = in_use(cls, scope="per_param")
    before = clipper.state_dict()
    message = rf"`state` was saved with {name}={value!r}, but this clipper is in use with"
    with pytest.raises(ValueError, match=message):
        clipper.load_state_dict(make(cls, **{"scope": "per_param", name: value}).state_dict())
    assert clipper.state_dict() == before


@pytest.mark.parametrize(("mode", "outliers_only"), [("auto", True), ("percentile", False)])
def test_a_state_saved_by_version_0_1_0_goes_on_with_its_defaults(mode, outliers_only):
    saved = in_use(smartclip.AutoClip, mode=mode, outliers_only=outliers_only).state_dict()
    clipper = in_use(smartclip.AutoClip, mode=mode, outliers_only=outliers_only)
    for target in (smartclip.AutoClip(), clipper):
        target.load_state_dict(through_json(without(saved, "autoclip", "outliers_only")))
        assert target.state_dict() == saved


@each_class
def test_a_clipper_refuses_a_state_of_other_groups(cls):
    other = make(cls, scope="per_layer")
    other.init({"a": {"w": np.ones((2, 2), np.float32)}})
    clipper = in_use(cls, scope="per_layer")
    before = clipper.state_dict()
    message = r"saved with groups=\(\('layer', 'a'\),\), .* \(\('layer', 'a'\), \('layer', 'b'\)\)"
    with pytest.raises(ValueError, match=message):
        clipper.load_state_dict(other.state_dict())
    assert clipper.state_dict() == before
    # A clipper that is not in use loads it, and then refuses the model.
    clipper = cls()
    clipper.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"`params` must fall into the groups .* \('layer', 'b'\)"):
        smartclip.apply_grads(GRADS[0], PARAMS, clipper)
    assert clipper.state_dict() == other.state_dict()


def without(state, *path):
    state = copy.deepcopy(state)
    *outer, last = path
    del functools.reduce(lambda node, name: node[name], outer, state)[last]
    return state


def unused(cls, scope="per_param"):
    return cls(scope=scope)


def used(cls, scope="per_param"):
    return in_use(cls, scope=scope)


both = pytest.mark.parametrize("target", [unused, used])


@both
@each_class
def test_a_dict_with_something_missing_is_refused_and_changes_nothing(cls, target):
    algo, clipper = ALGOS[cls.__name__], target(cls)
    before = clipper.state_dict()
    whole = in_use(cls, scope="per_param").state_dict()
    argument = next(iter(ARGUMENTS[cls.__name__]))
    for path in [
        ("scope",),
        ("eps",),
        ("gate",),
        ("gate", "min_history"),
        (algo,),
        (algo, argument),
        (algo, "keys"),
        (algo, "state"),
    ]:
        message = (
            rf"`state` must be what `state_dict\(\)` of the same class .* '{path[-1]}' is miss"
        )
        with pytest.raises(ValueError, match=message):
            clipper.load_state_dict(without(whole, *path))
        assert clipper.state_dict() == before


@both
@each_class
def test_the_dict_of_another_class_or_of_smartclip_is_refused_and_changes_nothing(cls, target):
    clipper = target(cls)
    before = clipper.state_dict()
    theirs = getattr(original, cls.__name__)(scope="per_param").state_dict()
    others = [in_use(other).state_dict() for other in CLASSES.values() if other is not cls]
    for state in [theirs, *others, {}]:
        with pytest.raises(ValueError, match=r"must be what `state_dict\(\)` of the same class"):
            clipper.load_state_dict(state)
        assert clipper.state_dict() == before


@both
@pytest.mark.parametrize(
    ("cls", "field", "shape"),
    [
        (smartclip.AutoClip, "rule/ring", (3, 5)),
        (smartclip.AutoClip, "rule/cursor", (3,)),
        (smartclip.ZScoreClip, "rule/mean", (3,)),
        (smartclip.AGC, "num_observed", (3,)),
        (smartclip.AGC, "last/grad_norm", (3,)),
    ],
)
def test_a_field_of_another_shape_is_refused_and_changes_nothing(cls, field, shape, target):
    clipper = target(cls)
    before = clipper.state_dict()
    algo = ALGOS[cls.__name__]
    for change, found in [
        (lambda rows: rows[1:], (2, *shape[1:])),
        (lambda rows: [rows], (1, *shape)),
        (lambda rows: None, ()),
    ]:
        state = in_use(cls, scope="per_param").state_dict()
        state[algo]["state"][field] = change(state[algo]["state"][field])
        message = f"`state` must have '{field}' of shape {shape}, got {found}."
        with pytest.raises(ValueError) as error:  # noqa: PT011
            clipper.load_state_dict(through_json(state))
        assert str(error.value) == message
        assert clipper.state_dict() == before


@both
@pytest.mark.parametrize("scope", ["global", "per_param"])
def test_a_field_that_is_missing_is_refused_and_changes_nothing(target, scope):
    # Some fields of a clipper of one group are scalars.
    clipper = target(smartclip.ZScoreClip, scope)
    before = clipper.state_dict()
    whole = in_use(smartclip.ZScoreClip, scope=scope).state_dict()
    for field in whole["zscore"]["state"]:
        with pytest.raises(ValueError, match=f"`state` must have '{field}' of shape"):
            clipper.load_state_dict(without(whole, "zscore", "state", field))
        assert clipper.state_dict() == before


def test_an_object_that_is_not_a_state_dict_is_refused_and_changes_nothing():
    clipper = in_use(smartclip.ZScoreClip)
    before, whole = clipper.state_dict(), clipper.state_dict()["zscore"]
    for state in [
        None,
        3,
        before | {"gate": 3},
        before | {"zscore": None},
        before | {"zscore": whole | {"keys": None}},
        before | {"zscore": whole | {"keys": []}},
        before | {"zscore": whole | {"state": 3}},
        before | {"zscore": whole | {"state": None}},
    ]:
        with pytest.raises(ValueError, match=r"must be what `state_dict\(\)` of the same class"):
            inspect.unwrap(type(clipper).load_state_dict)(clipper, state)
        assert clipper.state_dict() == before
    words = before | {"zscore": whole | {"state": whole["state"] | {"last/grad_norm": "abc"}}}
    with pytest.raises(ValueError, match="must have numbers for 'last/grad_norm', got 'abc'"):
        clipper.load_state_dict(words)
    assert clipper.state_dict() == before


@each_class
def test_saved_arguments_that_are_out_of_range_are_refused_and_change_nothing(cls):
    clipper = cls()
    before = clipper.state_dict()
    state = in_use(cls).state_dict()
    with pytest.raises(ValueError, match=r"`eps` must be positive, got -1.0"):
        clipper.load_state_dict(state | {"eps": -1.0})
    assert clipper.state_dict() == before
