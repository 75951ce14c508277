"""`apply_grads` reports every group and step to `on_metrics`, wherever the step runs.

NumPy computes the expected records in float64. Training steps are compared with plain loops.
"""

import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from breadth import each_value, long_but
from flax.training import train_state
from trees import random_tree

import optax_smartclip as smartclip
from optax_smartclip.backends import jax as sc_jax

SHAPES = {"body": {"bias": (4,), "kernel": (3, 4)}, "head": {"kernel": (4, 2)}}
PATHS = ["body/bias", "body/kernel", "head/kernel"]


PARAMS = random_tree(0, 1.0, SHAPES)
SIZES = [0.1, 0.2, 0.15, 0.12, 0.3, 100.0, 0.2, 0.1]
GRADS = [random_tree(1 + step, size, SHAPES) for step, size in enumerate(SIZES)]
LARGEST = float(np.finfo(np.float32).max)
WARMUP_STEPS, WINDOW, PERCENTILE, CLIPPING = 3, 5, 70.0, 0.1
GATE = {"warmup_steps": WARMUP_STEPS, "min_history": 0}

CLIPPERS = {
    "percentile": lambda **options: smartclip.AutoClip(
        mode="percentile", percentile=PERCENTILE, history="window", window_size=WINDOW, **options
    ),
    "auto": lambda **options: smartclip.AutoClip(**options),
    "zscore": lambda **options: smartclip.ZScoreClip(**options),
    "agc": lambda **options: smartclip.AGC(clipping=CLIPPING, **options),
}
ALGOS = {"percentile": "autoclip", "auto": "autoclip", "zscore": "zscore", "agc": "agc"}
LEARNED = {
    "percentile": lambda norms: reference.percentile_thresholds(norms, PERCENTILE, WINDOW),
    "auto": lambda norms: reference.lower_fence_thresholds(norms, warmup_steps=1),
    "zscore": lambda norms: reference.zscore_thresholds(norms, warmup_steps=0),
}
LABELS = {
    "global": lambda path: ("global",),
    "per_layer": lambda path: ("layer", path.split("/")[0]),
    "per_param": lambda path: ("param", path),
}


def leaf(tree, path):
    layer, name = path.split("/")
    return tree[layer][name]


def groups_by_hand(name, scope):
    """The paths of each group; AGC leaves vectors alone."""
    groups = {}
    for path in PATHS:
        if name != "agc" or leaf(PARAMS, path).ndim > 1:
            groups.setdefault(LABELS[scope](path), []).append(path)
    return groups


def records_by_hand(name, scope, grads=GRADS, warmup_steps=WARMUP_STEPS):
    """The expected records, in the order of the steps and, in each step, of the groups."""
    columns = []
    for key, paths in groups_by_hand(name, scope).items():
        norms = [reference.norm([leaf(tree, path) for path in paths]) for tree in grads]
        if name == "agc":
            weight_norm = reference.norm([leaf(PARAMS, path) for path in paths])
            limits = [CLIPPING * weight_norm] * len(norms)
            of_group = [{"weight_norm": weight_norm, "target": limit} for limit in limits]
        else:
            limits = LEARNED[name](norms)
            of_group = [{"threshold": limit} for limit in limits]
        column = []
        for step, (norm, limit) in enumerate(zip(norms, limits, strict=True)):
            # Warm-up counts the norm that is compared with the threshold.
            ready = np.isfinite(norms[:step]).sum() + 1 >= warmup_steps
            over = bool(ready and norm > limit)
            scale = (limit / norm if over else 1.0) if math.isfinite(norm) else 0.0
            column.append(
                {"algo": ALGOS[name], "key": key, "scope": scope, "grad_norm": norm}
                | of_group[step]
                | {"scale": scale, "clipped": over}
            )
        columns.append(column)
    return [record for step in zip(*columns, strict=True) for record in step]


TYPES = {"algo": str, "key": tuple, "scope": str, "clipped": bool}


def assert_records(actual, records):
    assert len(actual) == len(records)
    for record, by_hand in zip(actual, records, strict=True):
        assert type(record) is dict
        assert record.keys() == by_hand.keys()
        for name, value in by_hand.items():
            assert type(record[name]) is TYPES.get(name, float)
            if TYPES.get(name, float) is float:
                expected = reference.reported(value)
                np.testing.assert_allclose(record[name], expected, rtol=1e-5, err_msg=name)
            else:
                assert record[name] == value
        assert all(type(part) is str for part in record["key"])


def run_eagerly(clip, grads):
    return [clip(tree) for tree in grads]


def run_jitted(clip, grads):
    step = jax.jit(clip)
    clipped = [step(tree) for tree in grads]
    assert step._cache_size() == 1
    return clipped


def run_in_scan(clip, grads):
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *grads)
    _, clipped = jax.jit(lambda xs: jax.lax.scan(lambda _, x: (None, clip(x)), None, xs))(stacked)
    return [jax.tree.map(lambda leaf, step=step: leaf[step], clipped) for step in range(len(grads))]


def run(way, name, scope, grads=GRADS, **options):
    """The clipped gradients and the records."""
    records = []
    clipper = CLIPPERS[name](scope=scope, **GATE, **options)

    def clip(tree):
        return smartclip.apply_grads(tree, PARAMS, clipper, on_metrics=records.append)

    clipped = jax.block_until_ready(way(clip, grads))
    jax.effects_barrier()
    return clipped, records


def check_run(way, name, scope):
    clipped, records = run(way, name, scope)
    expected = records_by_hand(name, scope)
    assert_records(records, expected)
    assert any(record["clipped"] for record in records)
    scales = iter(expected)
    for actual, grads in zip(clipped, GRADS, strict=True):
        for paths in groups_by_hand(name, scope).values():
            scale = np.float32(next(scales)["scale"])
            for path in paths:
                np.testing.assert_allclose(leaf(actual, path), scale * leaf(grads, path), rtol=2e-5)


SHORT = [("percentile", "global"), ("agc", "per_layer"), ("auto", "per_layer")]
SHORT.append(("zscore", "per_param"))


@pytest.mark.parametrize("case", long_but(SHORT, itertools.product(CLIPPERS, LABELS)), ids="-".join)
def test_each_group_of_each_jitted_step_is_reported_as_by_hand(case):
    check_run(run_jitted, *case)


@pytest.mark.parametrize(
    ("case", "way"),
    each_value([("percentile", "per_param"), ("agc", "per_layer")], [run_eagerly, run_in_scan]),
)
def test_eager_and_scanned_steps_are_reported_in_the_same_way(case, way):
    check_run(way, *case)


@pytest.mark.parametrize(("name", "way"), each_value(["auto", "zscore"], [run_eagerly, run_jitted]))
def test_in_warm_up_the_threshold_is_unknown_and_then_the_learned_one(name, way):
    _, records = run(way, name, "global")
    in_warmup = records[: WARMUP_STEPS - 1]
    assert in_warmup[0]["threshold"] == LARGEST
    learned = LEARNED[name]([record["grad_norm"] for record in in_warmup])[1]
    np.testing.assert_allclose(in_warmup[1]["threshold"], learned, rtol=1e-5)
    assert [(record["scale"], record["clipped"]) for record in in_warmup] == [(1.0, False)] * 2


def test_in_warm_up_a_norm_over_the_threshold_is_reported_but_not_clipped():
    # The second norm is six times the first, of which the threshold is one and a half.
    grads = [jax.tree.map(lambda x, factor=factor: factor * x, PARAMS) for factor in (1, 6)]
    clipped, (first, second) = run(run_eagerly, "auto", "global", grads)
    np.testing.assert_allclose(second["threshold"], 1.5 * first["grad_norm"], rtol=1e-6)
    assert second["grad_norm"] > 3.9 * second["threshold"]
    assert (second["scale"], second["clipped"]) == (1.0, False)
    jax.tree.map(np.testing.assert_array_equal, clipped[1], grads[1])


NAN_AT = 4


def grads_with_nan():
    """The gradients with a NaN in one leaf of one step."""
    grads = [jax.tree.map(np.array, tree) for tree in GRADS]
    grads[NAN_AT]["head"]["kernel"][0, 0] = np.nan
    return grads


@pytest.mark.parametrize(("name", "way"), each_value(CLIPPERS, [run_jitted, run_eagerly]))
def test_a_nan_gradient_has_the_largest_norm_and_the_scale_zero(name, way):
    clipped, records = run(way, name, "per_layer", grads_with_nan())
    assert_records(records, records_by_hand(name, "per_layer", grads_with_nan()))
    _, head = records[2 * NAN_AT : 2 * NAN_AT + 2]
    assert head["grad_norm"] == LARGEST
    assert (head["scale"], head["clipped"]) == (0.0, False)
    assert not np.any(clipped[NAN_AT]["head"]["kernel"])


def test_a_nan_as_the_first_norm_leaves_the_threshold_unknown():
    grads = grads_with_nan()[NAN_AT:]
    _, (record, *_) = run(run_eagerly, "percentile", "global", grads)
    assert record["threshold"] == LARGEST


def test_without_its_guard_a_nan_gradient_passes_with_the_scale_one():
    clipped, records = run(run_jitted, "agc", "global", grads_with_nan(), guard_nans=False)
    assert records[NAN_AT]["grad_norm"] == LARGEST
    assert (records[NAN_AT]["scale"], records[NAN_AT]["clipped"]) == (1.0, False)
    np.testing.assert_array_equal(
        clipped[NAN_AT]["head"]["kernel"], grads_with_nan()[NAN_AT]["head"]["kernel"]
    )


# The program.


def clip_with(clipper, on_metrics):
    return lambda grads: smartclip.apply_grads(grads, PARAMS, clipper, on_metrics=on_metrics)


def num_callbacks(function):
    """The numbers of callbacks in the jaxpr and in the lowered program."""
    jaxpr, lowered = jax.make_jaxpr(function)(PARAMS), jax.jit(function).lower(PARAMS).as_text()
    return str(jaxpr).count("io_callback["), lowered.count("callback(")


@pytest.mark.parametrize("name", CLIPPERS)
def test_without_on_metrics_nothing_in_the_program_leaves_the_device(name):
    clip = clip_with(CLIPPERS[name](scope="per_param"), None)
    assert num_callbacks(clip) == (0, 0)
    assert "callback" not in str(jax.make_jaxpr(clip)(PARAMS))
    assert "callback" not in jax.jit(clip).lower(PARAMS).as_text()


@pytest.mark.parametrize("name", CLIPPERS)
def test_with_on_metrics_there_is_one_callback_for_all_groups_of_a_step(name):
    clip = clip_with(CLIPPERS[name](scope="per_param"), lambda record: None)
    assert num_callbacks(clip) == (1, 1)


# Exceptions of `on_metrics`.


class ComplaintError(Exception):
    """An exception of the user."""


def complain(record):
    raise ComplaintError(f"no {record['algo']} today")


def test_an_exception_of_on_metrics_in_an_eager_step_is_not_changed():
    clip = clip_with(CLIPPERS["agc"](scope="global"), complain)
    with pytest.raises(ComplaintError, match=r"^no agc today$"):
        clip(PARAMS)


def test_an_exception_of_on_metrics_in_a_jitted_step_is_in_the_message_of_the_error():
    step = jax.jit(clip_with(CLIPPERS["agc"](scope="global"), complain))

    def take_step():
        jax.block_until_ready(step(PARAMS))
        jax.effects_barrier()

    with pytest.raises(jax.errors.JaxRuntimeError, match="ComplaintError: no agc today"):
        take_step()
    # It does not affect the steps of other clippers.
    jax.effects_barrier()
    _, records = run(run_jitted, "agc", "global")
    assert len(records) == len(GRADS)


# Other arguments.


NOT_CLIPPERS = {
    "ClipperTransformation": smartclip.autoclip(),
    "GradientTransformation": optax.GradientTransformation(*optax.sgd(0.1)),
    "type": smartclip.AutoClip,
    "float": 1.0,
    "NoneType": None,
}


@pytest.mark.parametrize("given", NOT_CLIPPERS)
def test_an_object_of_another_type_is_refused_by_the_name_of_its_type(given):
    # Without the type checker, which only the tests use.
    apply_grads = inspect.unwrap(smartclip.apply_grads)
    with pytest.raises(TypeError, match=f"^`clipper` must be .* got {given}\\."):
        apply_grads(PARAMS, PARAMS, NOT_CLIPPERS[given])


def mixed_params():
    return {
        "brain": jnp.full((3, 2), 2.0, jnp.bfloat16),
        "count": jnp.arange(3),
        "half": jnp.full((2, 3), 2.0, jnp.float16),
        "none": None,
        "single": jnp.full((2, 2), 2.0, jnp.float32),
    }


def mixed_loss(params, factor):
    floating = [leaf for name, leaf in params.items() if name not in ("count", "none")]
    return factor * sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in floating)


@pytest.mark.parametrize(("name", "compiled"), each_value(["percentile", "agc"], [True, False]))
def test_floats_keep_their_dtypes_and_other_leaves_pass(name, compiled):
    clipper = CLIPPERS[name](scope="global", warmup_steps=0, min_history=0)
    params, records, passed = mixed_params(), [], []

    # The gradient of an integer is a float0, which has no buffer on a device.
    derive = jax.jit(jax.grad(mixed_loss, allow_int=True))

    def step(factor):
        grads = derive(params, factor)
        given = {**grads, "steps": jnp.arange(4)}
        clipped = smartclip.apply_grads(
            given, {**params, "steps": jnp.arange(4)}, clipper, on_metrics=records.append
        )
        passed.append(clipped.pop("count") is grads["count"] and clipped["none"] is None)
        return clipped

    step = jax.jit(step) if compiled else step
    for factor in (1.0, 4.0):
        clipped = step(factor)
    jax.effects_barrier()
    assert all(passed)
    np.testing.assert_array_equal(clipped.pop("steps"), np.arange(4))
    dtypes = {"brain": jnp.bfloat16, "half": jnp.float16, "none": None, "single": jnp.float32}
    assert {key: leaf if leaf is None else leaf.dtype for key, leaf in clipped.items()} == dtypes
    # 16 elements of 4 and of 16, and weights of 2.
    norms = 16.0, 64.0
    assert [record["grad_norm"] for record in records] == pytest.approx(norms)
    limit = {"percentile": np.percentile(norms, PERCENTILE), "agc": CLIPPING * 8.0}[name]
    assert records[1]["scale"] == pytest.approx(limit / 64)
    for key in ("brain", "half", "single"):
        rtol = 2 * float(jnp.finfo(clipped[key].dtype).eps)
        np.testing.assert_allclose(clipped[key].astype(np.float32), 16 * limit / 64, rtol=rtol)


# Training.

rng = np.random.default_rng(7)
INPUTS = np.float32(rng.normal(size=(8, 6, 3)))
TARGETS = np.float32(rng.normal(size=(8, 6, 2)))
TARGETS[5] *= 100
LEARNING_RATE = 0.05


def predict(params, inputs):
    hidden = jnp.tanh(inputs @ params["body"]["kernel"] + params["body"]["bias"][None])
    return hidden @ params["head"]["kernel"]


def loss(params, batch):
    inputs, targets = batch
    return jnp.mean(jnp.square(predict(params, inputs) - targets))


@functools.cache
def train_by_hand():
    """The parameters and the records of each step, clipped per layer as by "percentile"."""
    derive = jax.jit(jax.grad(loss))
    params, stream, history, records = PARAMS, [], [], []
    for batch in zip(INPUTS, TARGETS, strict=True):
        stream.append(jax.tree.map(np.asarray, derive(params, batch)))
        records = records_by_hand("percentile", "per_layer", stream)
        scales = {record["key"][1]: np.float32(record["scale"]) for record in records[-2:]}
        params = {
            layer: {
                name: weights - np.float32(LEARNING_RATE) * scales[layer] * stream[-1][layer][name]
                for name, weights in leaves.items()
            }
            for layer, leaves in params.items()
        }
        history.append(params)
    return history, records


@pytest.mark.parametrize("donated", long_but([0], [(), 0]), ids=["kept", "donated"])
def test_a_step_of_a_flax_train_state_trains_as_the_loop_by_hand(donated):
    clipper = CLIPPERS["percentile"](scope="per_layer", **GATE)
    records = []
    on_metrics = records.append

    @functools.partial(jax.jit, donate_argnums=donated)
    def train_step(state, batch):
        grads = jax.grad(loss)(state.params, batch)
        grads = sc_jax.apply_grads(grads, state.params, clipper, on_metrics=on_metrics)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    state = train_state.TrainState.create(
        apply_fn=predict,
        params=jax.tree.map(jnp.array, PARAMS),
        tx=optax.sgd(LEARNING_RATE),
    )
    history, records_expected = train_by_hand()
    for batch, expected in zip(zip(INPUTS, TARGETS, strict=True), history, strict=True):
        given = state
        state = train_step(state, batch)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            state.params,
            expected,
        )
        assert given.params["head"]["kernel"].is_deleted() == (donated == 0)
    jax.effects_barrier()
    assert int(state.step) == clipper.num_steps == len(INPUTS)
    assert_records(records, records_expected)
    assert {record["key"] for record in records if record["clipped"]} == {
        ("layer", "body"),
        ("layer", "head"),
    }
