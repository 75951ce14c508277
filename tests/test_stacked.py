"""Stacked leaves: a model with stacked layers is clipped as the same model with listed layers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from breadth import each_value
from clipper_table import CLIPPERS, FUNCTIONS, default_scope
from steps import run

import optax_smartclip as smartclip
from optax_smartclip import masks
from optax_smartclip.clippers.adagc import adagc_rule

LAYERS, EXPERTS, STEPS = 3, 2, 18

# The shapes of one layer and of one expert.
RANDOM = np.random.default_rng(0)
SHAPES = {"kernel": (4, 5), "bias": (5,), "heads": (2, 3, 4), "scale": ()}
EXPERT_SHAPES = {"up": (4, 6), "down": (6, 4)}

# The axes of layers and experts in a stack.
PLACES = {"kernel": 1, "bias": 0, "heads": 3, "scale": 0}
EXPERT_PLACES = {"up": (0, 1), "down": (2, 0)}

STACKED = {
    "experts/up": (0, 1),
    "experts/down": (2, 0),
    "layers/kernel": 1,
    "layers/heads": -1,
    "layers": 0,
}


def listed(numbers):
    """The model with its layers, and their experts, in lists."""
    return {
        "layers": [
            {
                **{name: numbers((layer, name), shape) for name, shape in SHAPES.items()},
                "experts": [
                    {
                        name: numbers((layer, expert, name), shape)
                        for name, shape in EXPERT_SHAPES.items()
                    }
                    for expert in range(EXPERTS)
                ],
            }
            for layer in range(LAYERS)
        ],
        "head": {"kernel": numbers("head", (5, 3)), "bias": numbers("head bias", (3,))},
    }


def stack(tree):
    """The same model with stacks in place of lists."""
    layers = tree["layers"]

    def experts(name):
        layer_axis, expert_axis = EXPERT_PLACES[name]
        rows = [[np.asarray(expert[name]) for expert in layer["experts"]] for layer in layers]
        return np.moveaxis(np.array(rows), (0, 1), (layer_axis, expert_axis))

    return {
        "layers": {
            **{
                name: np.stack([layer[name] for layer in layers], axis=PLACES[name])
                for name in SHAPES
            },
            "experts": {name: experts(name) for name in EXPERT_SHAPES},
        },
        "head": tree["head"],
    }


def gradients():
    """A gradient for each step; in some, one layer or expert differs from the others."""
    steps = []
    for step in range(STEPS):

        def numbers(place, shape, step=step):
            values = RANDOM.normal(size=shape).astype(np.float32)
            for at, where, factor in TROUBLE:
                if step == at and place[: len(where)] == where:
                    values = values * np.float32(factor)
            return values

        steps.append(listed(numbers))
    return steps


# The step, the layer (and its expert), and the factor of its gradient.
TROUBLE = [
    (3, (0, 0), 0.0),
    (7, (1,), np.nan),
    (9, (1,), 1000.0),
    (11, (2, 1), 50.0),
    (12, (0, 0), 0.0),
    (14, (2,), 1e25),
    (15, (0,), 1e-25),
]
GRADIENTS = gradients()
PARAMS = listed(lambda place, shape: RANDOM.normal(size=shape).astype(np.float32))


def by_expert(path):
    """A label for the experts and one for the rest of a layer, whether listed or stacked."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    numbers = [name for name in names if name.isdecimal()]
    return ("experts" if "experts" in names else names[0], *numbers)


SCOPES = {"per_param": "per_param", "per_layer": "per_layer", "labels": by_expert}


assert_close = partial(trees.assert_close, rtol=1e-5)


def group_name(label):
    """A label with the numbers of layer and expert moved to its end, from either form."""
    parts = label.replace("[", "/").replace(",", "/").replace("]", "").split("/")
    numbers = [part for part in parts if part.isdecimal()]
    return "/".join([part for part in parts if not part.isdecimal()] + numbers)


@pytest.mark.parametrize(("name", "scope"), each_value(CLIPPERS, SCOPES))
def test_a_stack_is_clipped_as_the_list_of_its_layers(name, scope):
    clipper = partial(CLIPPERS[name], scope=SCOPES[scope])
    expected, in_list = run(clipper(), PARAMS, GRADIENTS)
    stacks = list(map(stack, GRADIENTS))
    actual, in_stack = run(clipper(stacked=STACKED), stack(PARAMS), stacks)
    for updates, wanted in zip(actual, expected, strict=True):
        assert_close(updates, stack(wanted))
    if scope == "labels":
        return
    labels = list(map(group_name, smartclip.group_labels(SCOPES[scope], PARAMS)))
    stack_labels = smartclip.group_labels(SCOPES[scope], stack(PARAMS), stacked=STACKED)
    order = [labels.index(group_name(label)) for label in stack_labels]
    assert sorted(order) == list(range(len(labels)))
    assert_close(in_stack, jax.tree.map(lambda leaf: leaf[np.array(order)], in_list))


@pytest.mark.parametrize("unit_axes", [None, "flax", lambda path, shape: len(shape) - 1])
def test_units_are_those_of_one_slice(unit_axes):
    agc = partial(smartclip.agc, 0.3, unit_axes=unit_axes, mask=masks.except_paths("scale$"))
    expected, in_list = run(agc(), PARAMS, GRADIENTS)
    stacks = list(map(stack, GRADIENTS))
    actual, in_stack = run(agc(stacked=STACKED), stack(PARAMS), stacks)
    for updates, wanted in zip(actual, expected, strict=True):
        assert_close(updates, stack(wanted))
    assert_close(in_stack, in_list)


def test_a_mask_sees_the_shape_of_one_slice():
    agc = partial(smartclip.agc, 0.01, mask=masks.except_vectors)
    expected, _ = run(agc(), PARAMS, GRADIENTS[:1])
    (actual,), _ = run(agc(stacked=STACKED), stack(PARAMS), [stack(GRADIENTS[0])])
    assert_close(actual, stack(expected[0]))
    np.testing.assert_array_equal(actual["layers"]["bias"], stack(GRADIENTS[0])["layers"]["bias"])


def test_stacked_may_be_a_function_of_path_and_shape():
    def stacked(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.startswith("layers"):
            return None
        return {"up": (0, 1), "down": (2, 0), "kernel": 1, "heads": len(shape) - 1}.get(
            name.rpartition("/")[2], 0
        )

    params = stack(PARAMS)
    labels = partial(smartclip.group_labels, "per_param", params)
    assert labels(stacked=stacked) == labels(stacked=STACKED)


def test_leaves_of_one_layer_share_the_group_of_their_index():
    labels = smartclip.group_labels("per_layer", stack(PARAMS), stacked=STACKED)
    assert sorted(labels) == [
        "head",
        *(f"layers/experts[{layer},{e}]" for layer in range(LAYERS) for e in range(EXPERTS)),
        *(f"layers[{layer}]" for layer in range(LAYERS)),
    ]


def test_stacks_of_different_lengths_under_one_label_are_separate_groups():
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((4, 3)), "c": jnp.zeros(3)}
    scope = {"a": "all", "b": "all", "c": "all"}
    labels = smartclip.group_labels(scope, params, stacked={"a|b": 0})
    assert labels == (*(f"all[{i}]" for i in range(2)), *(f"all[{i}]" for i in range(4)), "all")


@pytest.mark.parametrize("name", [*CLIPPERS, "agc_unit"])
def test_the_program_does_not_grow_with_the_number_of_layers(name):
    clipper = smartclip.agc if name == "agc_unit" else partial(CLIPPERS[name], scope="per_layer")
    tx = clipper(stacked={"layers": 0})

    def size(layers):
        shapes = {"layers": {"w": (layers, 4, 4), "b": (layers, 4)}}
        params = trees.random_tree(0, 1.0, shapes)
        state = jax.eval_shape(tx.init, params)
        return len(jax.jit(tx.update).lower(params, state, params).as_text().splitlines())

    assert size(16) == size(2)


@pytest.mark.parametrize(
    "factory",
    [
        partial(smartclip.clip_by_rule, adagc_rule(1.04, 0.99, None, None, 0)),
        *(make for make in FUNCTIONS.values() if default_scope(make) == "global"),
        partial(smartclip.group_labels, "global", {}),
    ],
)
def test_stacked_is_refused_in_the_scope_global(factory):
    with pytest.raises(ValueError, match="`stacked` must be None with scope='global'"):
        factory(stacked={"layers": 0})


@pytest.mark.parametrize(
    ("stacked", "message"),
    [
        (0, "must be a mapping from regular expressions to axes"),
        ({}, "must be a mapping from regular expressions to axes"),
        ({"(": 0}, r"must have regular expressions for keys, got '\('"),
        ({0: 0}, "must have regular expressions for keys, got 0"),
        ({"layers": "0"}, "must map to an axis .* got '0' for 'layers'"),
        ({"layers": True}, "must map to an axis .* got True for 'layers'"),
        ({"layers": (0, 1.0)}, "must map to an axis"),
    ],
)
def test_a_wrong_argument_is_refused_by_the_factory(stacked, message):
    with pytest.raises(ValueError, match=message):
        smartclip.autoclip(scope="per_param", stacked=stacked)
    with pytest.raises(ValueError, match=message):
        smartclip.agc(stacked=stacked)


def test_axes_are_counted_from_either_end_and_an_array_without_elements_is_whole():
    params = {"empty": jnp.zeros((0, 3)), "scale": jnp.zeros(2), "w": jnp.zeros((3, 1))}
    stacked = {"empty": 0, "scale": -1, "w": (-2, 1)}
    labels = smartclip.group_labels("per_param", params, stacked=stacked)
    assert labels == ("empty", "scale[0]", "scale[1]", "w[0,0]", "w[1,0]", "w[2,0]")


@pytest.mark.parametrize(
    ("stacked", "message"),
    [
        ({"layer_s": 0}, "'layer_s' matches none of head/bias, head/kernel, layers/bias"),
        ({"layers": 1}, r"must name axes of 'layers/bias', which has the shape \(3,\), .* got 1"),
        ({"kernel": (0, 3)}, "must name axes of 'head/kernel'"),
        ({"kernel": (0, -2)}, "must name axes of 'head/kernel', .* each once"),
        (lambda path, shape: "0", "must name axes of 'head/bias'"),
    ],
)
def test_stacks_that_do_not_fit_the_parameters_are_refused_by_init(stacked, message):
    params = {
        "layers": {"bias": jnp.zeros(3), "kernel": jnp.zeros((3, 2))},
        "head": {"bias": jnp.zeros(3), "kernel": jnp.zeros((3, 2))},
    }
    for clipper in (partial(smartclip.autoclip, scope="per_param"), smartclip.agc):
        tx = clipper(stacked=stacked)
        with pytest.raises(ValueError, match=message):
            tx.init(params)


def test_counters_and_keys_need_no_axis():
    params = {"layers": {"w": np.ones((2, 3), np.float32), "count": np.int32(0)}}
    tx = smartclip.autoclip(scope="per_param", stacked={"layers": 0}, max_norm=1.0)
    (updates,), _ = run(tx, params, [params])
    np.testing.assert_allclose(updates["layers"]["w"], np.full((2, 3), 3**-0.5), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_long_sums_over_a_stack_are_right(axis):
    shape = [512, 512]
    shape.insert(axis, 3)
    gradient = np.random.default_rng(1).normal(size=shape).astype(np.float32) + 1.0
    others = tuple(i for i in range(3) if i != axis)
    expected = np.sqrt(np.sum(np.float64(gradient) ** 2, axis=others))
    tx = smartclip.autoclip(scope="per_param", stacked={"": axis})
    _, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    np.testing.assert_allclose(smartclip.metrics(state)["grad_norm"], expected, rtol=1e-5)


def test_a_vmapped_ensemble_is_clipped_as_a_stack_of_its_members():
    params = {"w": RANDOM.normal(size=(4, 3, 2)), "b": RANDOM.normal(size=(4, 2))}
    params = jax.tree.map(np.float32, params)
    grads = [jax.tree.map(lambda p, i=i: p * np.float32(1 + i % 3), params) for i in range(8)]
    options = {"scope": "per_param", "history": smartclip.ring_buffer(4)}
    expected = jax.vmap(smartclip.autoclip(**options).init)(params)
    update = jax.jit(jax.vmap(smartclip.autoclip(**options).update))
    stack_updates, _ = run(smartclip.autoclip(**options, stacked={"": 0}), params, grads)
    for gradient, updates in zip(grads, stack_updates, strict=True):
        wanted, expected = update(gradient, expected)
        assert_close(updates, wanted)


STATEFUL = [
    partial(smartclip.AutoClip, warmup_steps=0, min_history=0),
    partial(smartclip.ZScoreClip, zmax=1.0, warmup_steps=3, min_history=0),
    partial(smartclip.AGC, clipping=0.1),
]


@pytest.mark.parametrize(("make", "scope"), each_value(STATEFUL, ["per_param", "per_layer"]))
def test_stateful_clippers_clip_each_layer_of_a_stack(make, scope):
    in_list, in_stack = make(scope=scope), make(scope=scope, stacked=STACKED)
    records = []
    # From the first unusual gradient on: these steps are eager and slow.
    for step, gradient in enumerate(GRADIENTS[3:15]):
        expected = smartclip.apply_grads(gradient, PARAMS, in_list)
        if step == 6:
            # The resumed run defines the stacks, not the saved state.
            saved = in_stack.state_dict()
            in_stack = make(scope=scope, stacked=STACKED)
            in_stack.load_state_dict(saved)
        actual = smartclip.apply_grads(
            stack(gradient), stack(PARAMS), in_stack, on_metrics=records.append
        )
        assert_close(actual, stack(expected))
    assert any("[1]" in record["key"][1] and record["clipped"] for record in records)
