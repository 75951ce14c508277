"""The groups of leaves that share a norm: every form of `scope` on every kind of tree."""

import dataclasses
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_smartclip as smartclip
from optax_smartclip.engine.groups import assign_groups, broadcast_prefix, check_scope

X = jax.ShapeDtypeStruct((2, 3), jnp.float32)


class Layer(NamedTuple):
    """A NamedTuple."""

    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A dataclass."""

    stem: Any
    layers: Any


MODEL = Model(stem={"scale": X}, layers=[Layer(X, X), (Layer(X, X), X)])
LEAVES = (
    "stem/scale",
    "layers/0/kernel",
    "layers/0/bias",
    "layers/1/0/kernel",
    "layers/1/0/bias",
    "layers/1/1",
)


def numbers(scope, tree):
    """The group of each leaf, in the order of the leaves."""
    return list(assign_groups(scope, tree).first.values())


def last_key(path):
    return jax.tree_util.keystr(path[-1:], simple=True)


@pytest.mark.parametrize(
    ("scope", "labels", "expected"),
    [
        ("global", ("global",), [0] * 6),
        (
            "per_layer",
            ("stem", "layers/0", "layers/1/0", "layers/1"),
            [0, 1, 1, 2, 2, 3],
        ),
        ("per_param", LEAVES, [0, 1, 2, 3, 4, 5]),
        (last_key, ("scale", "kernel", "bias", "1"), [0, 1, 2, 1, 2, 3]),
        (lambda path: len(path), ("2", "3", "4"), [0, 1, 1, 2, 2, 1]),
        (lambda path: path[:2], ("stem/scale", "layers/0", "layers/1"), [0, 1, 1, 2, 2, 2]),
        (
            Model({"scale": "b"}, [Layer("w", "b"), (Layer("w", "b"), "w")]),
            ("b", "w"),
            [0, 1, 0, 1, 0, 1],
        ),
        (Model("stem", ["first", (Layer(7, 7), "last")]), ("stem", "first", "7", "last"), None),
        (Model("all", "all"), ("all",), [0] * 6),
    ],
)
def test_groups_are_numbered_as_they_first_occur(scope, labels, expected):
    assert smartclip.group_labels(scope, MODEL) == labels
    assert numbers(scope, MODEL) == (expected or [0, 1, 1, 2, 2, 3])


def test_the_order_is_that_in_which_jax_flattens():
    params = {"b": X, "a": [X, {"d": X, "c": X}]}
    assert smartclip.group_labels("per_param", params) == ("a/0", "a/1/c", "a/1/d", "b")
    assert smartclip.group_labels("per_layer", params) == ("a", "a/1", "")


@pytest.mark.parametrize("hole", [None, optax.MaskedNode(), (), {}])
@pytest.mark.parametrize("scope", ["per_layer", "per_param", last_key])
def test_holes_do_not_belong_to_a_group(hole, scope):
    with_holes = {"a": {"b": X, "w": hole}, "c": hole, "d": {"b": X}}
    without = {"a": {"b": X}, "d": {"b": X}}
    assert smartclip.group_labels(scope, with_holes) == smartclip.group_labels(scope, without)
    assert numbers(scope, with_holes) == numbers(scope, without)


def test_labels_without_leaves_are_groups():
    # The groups must not depend on the mask.
    scope = {"a": "first", "b": "second", "c": "third"}
    for tree in ({"a": X, "b": None, "c": X}, {"a": X, "b": optax.MaskedNode(), "c": X}):
        assert smartclip.group_labels(scope, tree) == ("first", "second", "third")
        assert numbers(scope, tree) == [0, 2]


@pytest.mark.parametrize("scope", [{"a": "x"}, {"a": "x", "b": {"d": "y"}}, {"a": "x", "b": None}])
def test_a_tree_of_labels_must_have_one_for_every_leaf(scope):
    with pytest.raises(ValueError, match=r"`scope` must be a tree .* it has nothing for 'b/c'"):
        smartclip.group_labels(scope, {"a": X, "b": {"c": X}})


def test_a_function_must_return_a_label_for_every_leaf():
    with pytest.raises(ValueError, match=r"`scope` must return a label .* got None for 'b/0'"):
        smartclip.group_labels(lambda path: "x" if len(path) == 1 else None, {"a": X, "b": [X]})


@pytest.mark.parametrize("scope", ["globl", "", "unit", "per-layer"])
def test_an_unknown_scope_is_named_next_to_the_known_ones(scope):
    with pytest.raises(ValueError, match="`scope` must be") as error:
        smartclip.group_labels(scope, {"a": X})
    for expected in (repr(scope), "'global'", "'per_layer'", "'per_param'"):
        assert expected in str(error.value)


def test_no_scope_is_none():
    with pytest.raises(ValueError, match=r"`scope` must be .* got None"):
        check_scope(None)


def test_a_clipper_may_know_other_scopes():
    check_scope("unit", ("unit", "global"))
    with pytest.raises(ValueError, match="one of 'unit', 'global', got 'per_layer'"):
        check_scope("per_layer", ("unit", "global"))


@pytest.mark.parametrize("scope", ["per_param", "per_layer"])
def test_paths_of_one_name_are_two_groups(scope):
    leaf = {"per_param": X, "per_layer": {"w": X}}[scope]
    params = {"a/b": leaf, "a": {"b": leaf}}
    assert numbers(scope, params) == [0, 1]
    labels = smartclip.group_labels(scope, params)
    assert len(labels) == 2
    assert labels[0] == labels[1]


def test_labels_of_one_name_are_two_groups():
    assert numbers({"a": 1, "b": "1"}, {"a": X, "b": X}) == [0, 1]


@pytest.mark.parametrize("empty", [{}, None, [], {"a": None}])
def test_an_empty_tree_has_one_global_group_and_no_others(empty):
    assert smartclip.group_labels("global", empty) == ("global",)
    assert smartclip.group_labels("per_layer", empty) == ()
    assert smartclip.group_labels("per_param", empty) == ()


@pytest.mark.parametrize("scope", ["global", "per_layer", "per_param"])
def test_a_bare_array_is_a_tree_of_one_group(scope):
    assert numbers(scope, X) == [0]


def test_one_label_is_a_prefix_of_every_tree():
    assert numbers(7, {"a": X, "b": [X]}) == [0, 0]
    assert smartclip.group_labels(7, {"a": X, "b": [X]}) == ("7",)


class Network(nnx.Module):
    """A Flax NNX module with a list of modules."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)])
        self.head = nnx.Linear(2, 1, rngs=rngs)


@pytest.mark.parametrize("scope", ["per_layer", "per_param", last_key])
def test_flax_nnx_parameters_and_their_bare_gradients_have_the_same_groups(scope):
    # An NNX optimizer passes variables to `init` and bare arrays to `update`.
    state = nnx.state(Network(nnx.Rngs(0)), nnx.Param)
    variables = assign_groups(scope, state)
    bare = assign_groups(scope, nnx.to_pure_dict(state))
    assert variables == bare
    assert (
        smartclip.group_labels(scope, state)
        == {
            "per_layer": ("head", "layers/0", "layers/1"),
            "per_param": (
                "head/bias",
                "head/kernel",
                "layers/0/bias",
                "layers/0/kernel",
                "layers/1/bias",
                "layers/1/kernel",
            ),
            last_key: ("bias", "kernel"),
        }[scope]
    )


def test_a_tree_of_labels_may_be_a_prefix_of_nnx_parameters():
    state = nnx.state(Network(nnx.Rngs(0)), nnx.Param)
    assert smartclip.group_labels({"head": "head", "layers": "body"}, state) == ("head", "body")


def test_a_prefix_gives_its_values_to_everything_below():
    tree = {"a": {"b": X, "c": [X, X]}, "d": X}
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    prefix = dict(
        jax.tree_util.tree_flatten_with_path({"a": {"b": 1, "c": np.int32(2)}, "d": False})[0]
    )
    assert list(broadcast_prefix("mask", prefix, paths).values()) == [1, 2, 2, False]
    with pytest.raises(ValueError, match=r"`mask` must be a tree .* nothing for 'a/b'"):
        broadcast_prefix("mask", {}, paths)


@pytest.mark.parametrize("mask", [True, np.bool_(False), jnp.array(True)])
def test_a_mask_of_one_value_for_the_whole_tree_is_refused(mask):
    with pytest.raises(ValueError, match=r"`mask` must be a tree of bools .* not a single value"):
        assign_groups("global", {"a": X}, mask=mask)


def test_labels_of_a_function_may_be_tuples_and_numbers():
    params = {"a": {"w": 0.0, "b": 0.0}, "c": 0.0}
    labels = smartclip.group_labels(lambda path: (len(path), "deep"), params)
    assert labels == ("(2, 'deep')", "(1, 'deep')")
    assert smartclip.group_labels(lambda path: len(path), params) == ("2", "1")
