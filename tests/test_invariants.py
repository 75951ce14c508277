"""Invariants of every step of every clipper: hypothesis looks for a gradient that breaks one.

The tests compute norms, groups and AGC's thresholds themselves, in float64 NumPy.
"""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from breadth import long_but
from clipper_table import CLIPPERS, WEIGHT_BASED, scope_of
from compat import enable_x64


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A registered dataclass, as some libraries keep their parameters in."""

    kernel: object
    bias: object


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


# Few, because each is compiled for each clipper.
TREES = {
    "scalar": shape(),
    "mixed": {
        "a": {"kernel": shape(2, 3), "bias": shape(3, dtype=jnp.bfloat16), "unused": None},
        "b": shape(dtype=jnp.float16),
    },
    "complex": (shape(3, 2, dtype=jnp.complex64), [shape(0, 2), shape(4)]),
    "dataclass": [Layer(shape(2, 3, 2), shape(2, dtype=jnp.bfloat16)), Layer(shape(1, 4), None)],
    "half": {
        "kernel": shape(2, 1, 1, 3, dtype=jnp.float16),
        "norm": {"bias": shape(4, 1, dtype=jnp.bfloat16), "scale": shape(2, dtype=jnp.float16)},
    },
}

# Two for each clipper, and each for two clippers or more.
TREES_OF = {
    name: [list(TREES)[(number + place) % len(TREES)] for place in (0, 2)]
    for number, name in enumerate(CLIPPERS)
}

# Where JAX has float64 switched on.
TREES["double"] = {"b": shape(2), "w": jax.ShapeDtypeStruct((3, 2), np.dtype(np.float64))}

FACTORS = [np.nan, np.inf, 0.0, 1e-45, 1e-38, 1e-20, 1e-3, 1.0, 1.5, 30.0, 1e4, 1e20, 1e38]

FLOAT32_MAX = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)


def random_tree(name, seed, factor):
    """Random leaves, times `factor`. Elements beyond the dtype of a leaf become infinite."""
    rng = np.random.default_rng(seed)

    def leaf(struct):
        values = rng.normal(size=struct.shape)
        if jnp.issubdtype(struct.dtype, jnp.complexfloating):
            values = values + 1j * rng.normal(size=struct.shape)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return np.asarray(factor * values).astype(struct.dtype)

    return jax.tree.map(leaf, TREES[name])


@functools.cache
def build(name, tree):
    """A clipper's jitted update, the weights, the first state, and the state after a warm-up."""
    tx = CLIPPERS[name]()
    weights = random_tree(tree, 0, 1.0)
    update = jax.jit(tx.update)
    first = state = tx.init(weights)
    for seed in range(12):
        _, state = update(random_tree(tree, 1000 + seed, 1.0), state, weights)
    return update, weights, first, state


def units(leaf):
    """The units of a leaf, whose norms AGC takes: columns, heads, filters, or the whole vector."""
    leaf = np.asarray(leaf)
    if sum(size != 1 for size in leaf.shape) <= 1:
        return [leaf]
    num_units = np.prod(leaf.shape[-2:] if leaf.ndim == 3 else leaf.shape[-1:])
    return list(leaf.reshape(-1, num_units).T)


def split(scope, tree):
    """The leaves of each group, or the piece of a leaf that is a unit."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if scope == "unit":
        return [[unit] for _, leaf in leaves for unit in units(leaf)]
    groups = {}
    for path, leaf in leaves:
        key = {"global": (), "per_layer": path[:-1], "per_param": path}[scope]
        groups.setdefault(key, []).append(np.asarray(leaf))
    return list(groups.values())


def smallest(array):
    """The largest element that may be lost, as numbers below the normal ones may become zero."""
    return max(TINY, float(jnp.finfo(array.dtype).smallest_subnormal))


def check_untouched(grad, update):
    """Checks that an array was multiplied by 1, which may flush subnormal numbers to zero."""
    real = np.finfo(grad.dtype).dtype if np.iscomplexobj(grad) else grad.dtype
    grad, update = (
        np.ascontiguousarray(array).view(real).astype(np.float64) for array in (grad, update)
    )
    normal = np.abs(grad) >= TINY
    np.testing.assert_array_equal(update[normal], grad[normal])
    assert np.all(np.abs(update[~normal]) < TINY)


def check_group(grads, updates, norm, threshold):
    """Checks that the arrays of a group are clipped to the threshold, or else unchanged."""
    if not np.isfinite(norm):
        assert not any(np.any(update) for update in updates)
        return
    if norm <= threshold:
        for grad, update in zip(grads, updates, strict=True):
            check_untouched(grad, update)
        return
    scale = threshold / norm
    for grad, update in zip(grads, updates, strict=True):
        eps = float(jnp.finfo(grad.dtype).eps)
        wide = np.complex128 if np.iscomplexobj(grad) else np.float64
        expected = scale * grad.astype(wide)
        # A scale below the normal numbers may be flushed to zero as well.
        expected, update = (0, 0) if scale < TINY else (expected, update.astype(wide))
        atol = 2 * smallest(grad)
        np.testing.assert_allclose(update, expected, rtol=eps + 1e-6, atol=atol)
    rounding = max(float(jnp.finfo(grad.dtype).eps) for grad in grads)
    lost = np.sqrt(sum(update.size * smallest(update) ** 2 for update in updates))
    assert reference.norm(updates) <= threshold * (1 + rounding + 1e-6) + lost


def check_step(name, grads, weights, updates, before, after):
    """Checks all invariants of one step."""
    scope = scope_of(name)
    groups, clipped_groups, weight_groups = (split(scope, x) for x in (grads, updates, weights))
    norms = np.array([reference.norm(group) for group in groups])
    is_double = any(grad.dtype == np.float64 for grad in jax.tree.leaves(grads))
    if not is_double:
        # Whether the sum at the very end of float32 is still finite depends on rounding.
        hypothesis.assume(not np.any(np.abs(norms / FLOAT32_MAX - 1) < 1e-4))
        norms = np.where(norms > FLOAT32_MAX, np.inf, norms)
    if scope == "unit" and not is_double:
        # A unit whose square overflows counts as not finite.
        hypothesis.assume(not np.any(np.abs(norms / np.sqrt(FLOAT32_MAX) - 1) < 1e-4))
        norms = np.where(norms > np.sqrt(FLOAT32_MAX), np.inf, norms)
    finite = np.isfinite(norms)
    last, previous = (jax.tree.map(np.atleast_1d, state.last) for state in (after, before))
    if name in WEIGHT_BASED:
        thresholds = [0.01 * max(reference.norm(group), 1e-3) for group in weight_groups]
    if scope == "unit":
        # The record sums up all units.
        ratios = np.where(finite, norms / thresholds, np.inf)
        assert (last.grad_norm[0] < FLOAT32_MAX) == finite.all()
        if finite.all():
            np.testing.assert_allclose(
                last.clip_scale, min(1, 1 / max(ratios.max(), TINY)), rtol=1e-5, atol=TINY
            )
        finite = finite.all(keepdims=True)
    else:
        np.testing.assert_array_equal(last.grad_norm < FLOAT32_MAX, finite)
        # AGC may round norms whose squares underflow to zero: its thresholds are far above.
        atol = 1e-18 if name in WEIGHT_BASED else 4 * TINY
        expected = np.minimum(norms[finite], FLOAT32_MAX)
        np.testing.assert_allclose(last.grad_norm[finite], expected, rtol=1e-6, atol=atol)
        if name in WEIGHT_BASED:
            np.testing.assert_allclose(last.clip_threshold, thresholds, rtol=1e-6)
        # Compared in every bit from here on, so that both sides agree whether a norm is above.
        thresholds = reference.unreported(last.clip_threshold.astype(np.float64))
        norms = np.where(norms < FLOAT32_MAX, last.grad_norm.astype(np.float64), norms)

    for group, clipped_group, norm, threshold in zip(
        groups, clipped_groups, norms, thresholds, strict=True
    ):
        check_group(group, clipped_group, norm, threshold)

    clipped = finite & (last.grad_norm > last.clip_threshold)
    # For units, `clipped` is a share. Next to a unit that is not finite, others may be clipped.
    if scope != "unit" or finite.all():
        np.testing.assert_array_equal(last.clipped > 0, clipped)
    assert np.all((last.clip_scale >= 0) & (last.clip_scale <= 1))
    np.testing.assert_array_equal(last.clip_scale == 1, finite & ~clipped)
    np.testing.assert_array_equal(last.num_steps, previous.num_steps + 1)
    np.testing.assert_array_equal(last.num_clipped, previous.num_clipped + clipped)
    np.testing.assert_array_equal(last.num_nonfinite, previous.num_nonfinite + ~finite)
    observed = np.asarray(after.num_observed) - np.asarray(before.num_observed)
    reported = np.asarray(last.grad_norm)
    live = (reported < FLOAT32_MAX) & (reported > 0)
    # A norm below the normal numbers may be flushed to zero in one place and not in another.
    assert np.all((observed == live) | (reported < TINY))
    assert np.all((observed == 0) | (observed == 1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def check_stream(name, trees, factors, data):
    """Checks the invariants along a stream that hypothesis draws."""
    tree = data.draw(st.sampled_from(trees), label="tree")
    factors = data.draw(st.lists(st.sampled_from(factors), min_size=1, max_size=12))
    warmed_up = data.draw(st.booleans(), label="warmed up")
    seed = data.draw(st.integers(0, 999), label="seed")
    update, weights, first, warm = build(name, tree)
    state = warm if warmed_up else first
    for step, factor in enumerate(factors):
        grads = random_tree(tree, seed + step, factor)
        before = state
        updates, state = update(grads, before, weights)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
        check_step(name, grads, weights, updates, before, state)


@pytest.mark.parametrize("name", CLIPPERS)
@hypothesis.given(data=st.data())
def test_every_step_keeps_what_clipping_promises(name, data):
    check_stream(name, TREES_OF[name], FACTORS, data)


@pytest.mark.parametrize(
    "name", long_but({"autoclip_p95_per_param", "zscore_clip", "agc"}, CLIPPERS)
)
@hypothesis.given(data=st.data())
def test_float64_gradients_are_no_exception(name, data):
    with enable_x64(True):
        check_stream(name, ["double"], [*FACTORS, 1e-200, 1e39, 1e200], data)
