"""Layers that a framework stacks for a scan train as the same layers in a list."""

import dataclasses
import functools
import itertools
import sys
import types
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from breadth import each_value, long_but
from flax import nnx
from trees import assert_close, assert_same_bits, random_tree

import optax_smartclip as smartclip
from optax_smartclip import masks

LAYERS, WIDTH, STEPS = 3, 4, 8
BATCHES = np.random.default_rng(0).normal(size=(STEPS, 5, WIDTH)).astype(np.float32)
# A damaged batch, whose gradients are clipped.
BATCHES[5] *= 30

CLIPPERS = {
    "autoclip": partial(smartclip.autoclip, scope="per_layer", history=smartclip.ring_buffer(4)),
    "adagc": partial(smartclip.adagc, warmup_steps=3),
    "agc": partial(smartclip.agc, 0.05),
}


def clippers(short):
    """Parametrizes by one clipper, and by the others in `make test-long`."""
    return pytest.mark.parametrize("name", long_but({short}, CLIPPERS))


def train(apply, params, clipper):
    """The losses of all steps, the last parameters, and the number of clipped steps per group."""
    tx = optax.chain(clipper, optax.sgd(0.05))

    @jax.jit
    def step(params, state, batch):
        loss = lambda params: jnp.mean((apply(params, batch) - 1.0) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    losses = []
    for batch in BATCHES:
        params, state, value = step(params, state, batch)
        losses.append(value)
    return np.array(losses), params, smartclip.metrics(state)["num_clipped"]


def assert_trains_as_a_list(name, params, apply_stack, apply_block, axis=0):
    """Compares a stack of layers, and a function that applies it, with its slices in a list."""

    def apply_list(layers, batch):
        for layer in layers:
            batch = apply_block(layer, batch)
        return batch

    layers = [
        jax.tree.map(lambda leaf, layer=layer: np.take(np.asarray(leaf), layer, axis=axis), params)
        for layer in range(LAYERS)
    ]
    expected, in_list, _ = train(apply_list, layers, CLIPPERS[name]())
    losses, in_stack, num_clipped = train(apply_stack, params, CLIPPERS[name](stacked={"": axis}))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    restacked = jax.tree.map(lambda *leaves: np.stack(leaves, axis), *in_list)
    assert_close(in_stack, restacked, rtol=1e-4, atol=1e-6)
    assert np.max(num_clipped) > 0


class LinenBlock(nn.Module):
    """A residual block with the signature that `nn.scan` needs."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(WIDTH)(nn.tanh(nn.Dense(2 * WIDTH)(x))), None


LINEN = long_but({("autoclip", 0), ("adagc", 1)}, itertools.product(CLIPPERS, [0, 1]))


@pytest.mark.parametrize("case", LINEN, ids=lambda case: f"{case[0]}-{case[1]}")
def test_linen_scan(case):
    name, axis = case

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            # The scan adds the axis to kernels and to biases.
            scan = nn.scan(
                LinenBlock,
                variable_axes={"params": axis},
                split_rngs={"params": True},
                length=LAYERS,
            )
            return scan(name="layers")(x, None)[0]

    params = Stack().init(jax.random.key(0), BATCHES[0])["params"]
    assert_trains_as_a_list(
        name,
        params,
        lambda params, x: Stack().apply({"params": params}, x),
        lambda layer, x: LinenBlock().apply({"params": layer["layers"]}, x, None)[0],
        axis,
    )


class NnxBlock(nnx.Module):
    """The block in NNX."""

    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


@clippers("agc")
def test_nnx_scan(name):
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return NnxBlock(rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, block):
        return block(x)

    definition, params = nnx.split(make(nnx.Rngs(0)))
    assert_trains_as_a_list(
        name,
        params,
        lambda params, x: forward(x, nnx.merge(definition, params)),
        lambda layer, x: nnx.merge(definition, layer)(x),
    )


@clippers("autoclip")
def test_haiku_layer_stack(name):
    def block(x):
        return x + hk.Linear(WIDTH)(jnp.tanh(hk.Linear(2 * WIDTH)(x)))

    stack = hk.without_apply_rng(hk.transform(lambda x: hk.layer_stack(LAYERS)(block)(x)))
    alone = hk.without_apply_rng(hk.transform(block))
    params = stack.init(jax.random.key(0), BATCHES[0])

    def apply_block(layer, x):
        return alone.apply({path.rpartition("/")[2]: leaves for path, leaves in layer.items()}, x)

    assert_trains_as_a_list(name, params, stack.apply, apply_block)


class EquinoxBlock(eqx.Module):
    """The block in Equinox, for one example."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.up = eqx.nn.Linear(WIDTH, 2 * WIDTH, key=up)
        self.down = eqx.nn.Linear(2 * WIDTH, WIDTH, key=down)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


@clippers("adagc")
def test_vmapped_equinox_modules(name):
    blocks = eqx.filter_vmap(EquinoxBlock)(jax.random.split(jax.random.key(0), LAYERS))
    params, static = eqx.partition(blocks, eqx.is_array)

    def apply_block(layer, x):
        return jax.vmap(eqx.combine(layer, static))(x)

    def apply_stack(params, x):
        return jax.lax.scan(lambda x, layer: (apply_block(layer, x), None), x, params)[0]

    assert_trains_as_a_list(name, params, apply_stack, apply_block)


# Boxes.


class Partitioned(nn.Module):
    """Kernels with names of their axes, as a mesh needs them."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("inputs", "outputs"))
        for name in ("first", "second"):
            x = nn.Dense(WIDTH, kernel_init=init, name=name)(x)
        return x


@functools.cache
def boxed_params():
    return Partitioned().init(jax.random.key(0), BATCHES[0])["params"]


@pytest.mark.parametrize("scope", ["per_layer", "per_param"])
def test_a_box_is_not_a_level_of_the_path(scope):
    params = boxed_params()
    labels = smartclip.group_labels(scope, params)
    assert labels == smartclip.group_labels(scope, nn.unbox(params))
    assert "first" in labels or "first/kernel" in labels


@pytest.mark.parametrize(("name", "masked"), each_value(CLIPPERS, [False, True]))
def test_boxed_parameters_are_clipped_like_bare_ones(name, masked):
    options = {"mask": masks.except_paths("kernel$")} if masked else {}
    tx = CLIPPERS[name](max_norm=0.1, **options)
    boxed, update = boxed_params(), jax.jit(tx.update)
    bare = nn.unbox(boxed)
    state = tx.init(boxed)
    in_boxes, _ = update(boxed, state, boxed)
    # Some trainers unbox between `init` and `update`.
    expected, _ = update(bare, state, bare)
    assert_same_bits(nn.unbox(in_boxes), expected)
    assert jax.tree.structure(in_boxes) == jax.tree.structure(boxed)
    kernels_are_clipped = np.any(expected["first"]["kernel"] != bare["first"]["kernel"])
    assert kernels_are_clipped != masked


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class NamedArray:
    """Like the class of Haliax: an array with names of its axes, without key paths."""

    array: Any
    axes: tuple[str, ...]

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(*children, axes)


BOXES = {
    "nn.with_logical_partitioning": nn.LogicallyPartitioned,
    "haliax": NamedArray,
}
BARE = random_tree(0, 1.0, {name: {"bias": (4,), "kernel": (3, 4)} for name in ("first", "second")})


def in_boxes(tree, box):
    """The tree with its kernels in boxes."""
    return {
        name: layer | {"kernel": box(layer["kernel"], ("i", "o"))} for name, layer in tree.items()
    }


def is_kernel(path):
    return jax.tree_util.keystr(path).endswith("['kernel']")


def kernels(params):
    """A mask of a user who does not think of boxes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path), params)


def by_leaf(*numbers):
    """The group of each element, or -1, from one number for each leaf."""
    return jax.tree.unflatten(
        jax.tree.structure(BARE),
        [
            np.full(leaf.shape, number)
            for leaf, number in zip(jax.tree.leaves(BARE), numbers, strict=True)
        ],
    )


ROWS = by_leaf(0, 1, 4, 5)
ROWS["first"]["kernel"] += np.arange(3)[:, None]

FIXED = smartclip.ThresholdRule(
    init=jnp.zeros,
    threshold=lambda state, norms: jnp.full_like(norms, 0.1),
    record=lambda state, norms, thresholds: state,
)
# Options that select leaves; groups of first/bias, first/kernel, second/bias and second/kernel.
SELECTIONS = {
    "except_paths": ({"mask": masks.except_paths("kernel$")}, by_leaf(0, -1, 0, -1)),
    "except_vectors": ({"mask": masks.except_vectors}, by_leaf(-1, 0, -1, 0)),
    "every": (
        {"mask": masks.every(kernels, masks.except_paths("^second/kernel$"))},
        by_leaf(-1, 0, -1, -1),
    ),
    "a function": ({"mask": kernels}, by_leaf(-1, 0, -1, 0)),
    "a tree": ({"mask": kernels(BARE)}, by_leaf(-1, 0, -1, 0)),
    "a boxed tree": ({"mask": in_boxes(kernels(BARE), nn.Partitioned)}, by_leaf(-1, 0, -1, 0)),
    "per_layer": ({"scope": "per_layer"}, by_leaf(0, 0, 1, 1)),
    "per_param": ({"scope": "per_param"}, by_leaf(0, 1, 2, 3)),
    "labels by a function": ({"scope": is_kernel}, by_leaf(0, 1, 0, 1)),
    "labels": ({"scope": kernels(BARE)}, by_leaf(0, 1, 0, 1)),
    "boxed labels": ({"scope": in_boxes(kernels(BARE), nn.Partitioned)}, by_leaf(0, 1, 0, 1)),
    "stacked": ({"scope": "per_param", "stacked": {"^first/kernel$": 0}}, ROWS),
}


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(("options", "groups"), SELECTIONS.values(), ids=SELECTIONS)
def test_leaves_in_boxes_are_selected_like_bare_ones(box, options, groups, monkeypatch):
    monkeypatch.setitem(sys.modules, "haliax.core", types.SimpleNamespace(NamedArray=NamedArray))
    grads, numbers = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (BARE, groups)
    )
    norms = [np.linalg.norm(grads[numbers == number]) for number in range(max(numbers) + 1)]
    expected = np.where(numbers < 0, grads, 0.1 * grads / np.take(norms, numbers))
    tx = smartclip.clip_by_rule(FIXED, **options)
    boxed = in_boxes(BARE, BOXES[box])
    for at_init, at_update in itertools.product([BARE, boxed], repeat=2):
        updates, state = tx.update(at_update, tx.init(at_init), at_update)
        assert jax.tree.structure(updates) == jax.tree.structure(at_update)
        clipped = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(updates)])
        np.testing.assert_allclose(clipped, expected, rtol=1e-6)
        np.testing.assert_allclose(state.last.grad_norm.ravel(), norms, rtol=1e-6)
