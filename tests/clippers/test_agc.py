"""AGC against optax.adaptive_grad_clip, the paper's equation and the smartclip package."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from smartclip.core import agc as reference_agc
from steps import run
from trees import assert_same_bits

import optax_smartclip as smartclip
from optax_smartclip import masks

SHAPES = {
    "scalar": (),
    "vector": (5,),
    "kernel": (4, 3),
    "row": (1, 6),
    "heads": (4, 2, 3),
    "conv1": (2, 3, 4),
    "conv": (3, 3, 2, 4),
    "conv_bias": (4, 1, 1),
}


def random_tree(seed, shapes=SHAPES, scale=1.0):
    generator = np.random.default_rng(seed)
    return {
        name: np.asarray(scale * generator.normal(size=shape), np.float32)
        for name, shape in shapes.items()
    }


def clip(grads, params, *args, **kwargs):
    tx = smartclip.agc(*args, **kwargs)
    return jax.jit(tx.update)(grads, tx.init(params), params)


def unit_reference(grad, weight, axes, clipping=0.01, eps=1e-3):
    """Equation 3 of Brock et al. in float64; norms over `axes`."""
    grad, weight = np.float64(grad), np.float64(weight)
    norm = np.sqrt(np.sum(grad**2, axis=axes, keepdims=True))
    limit = clipping * np.maximum(np.sqrt(np.sum(weight**2, axis=axes, keepdims=True)), eps)
    return grad * np.where(norm > limit, limit / np.where(norm > limit, norm, 1), 1)


def assert_trees_close(actual, expected, rtol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-30), actual, expected
    )


@pytest.mark.parametrize(("scope", "clipped"), [("unit", np.float32(0)), ("global", np.bool_(0))])
def test_a_new_state_has_clipped_nothing(scope, clipped):
    state = smartclip.agc(scope=scope).init(random_tree(0))
    assert_same_bits(state.last.clipped, clipped)


@pytest.mark.parametrize("scope", ["unit", "global"])
def test_zero_nan_and_inf_do_not_count_as_observed(scope):
    params = {"w": np.float32([[3.0, 4.0]])}
    tx = smartclip.agc(scope=scope)
    state, counts = tx.init(params), []
    for size in (1e-4, 0.0, np.nan, 5.0, np.inf):
        _, state = tx.update({"w": np.float32([[size, size]])}, state, params)
        counts.append(int(np.max(state.num_observed)))
    assert counts == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(("clipping", "eps"), [(0.01, 1e-3), (0.3, 0.5)])
def test_equals_optax_for_every_rank_that_all_versions_of_optax_know(scale, clipping, eps):
    grads, params = random_tree(1, scale=scale), random_tree(2)
    params["kernel"][:, 0] = 0.0
    updates, _ = clip(grads, params, clipping, eps=eps)
    peer = optax.adaptive_grad_clip(clipping, eps)
    expected, _ = jax.jit(peer.update)(grads, peer.init(params), params)
    assert_trees_close(updates, expected)


@pytest.mark.parametrize("shape", [(2, 3, 2, 2, 3), (2, 1, 2, 3, 2, 4)])
def test_clips_tensors_of_more_than_four_axes_by_their_last(shape):
    shapes = {"w": shape}
    grads, params = random_tree(1, shapes), random_tree(2, shapes)
    updates, _ = clip(grads, params)
    expected = unit_reference(grads["w"], params["w"], tuple(range(len(shape) - 1)))
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


def test_optax_raises_for_six_axes():
    # When this fails, Optax has fixed it.
    params = {"w": jnp.ones((1, 2, 1, 2, 2, 2))}
    peer = optax.adaptive_grad_clip(0.01)
    with pytest.raises(ValueError, match="Expected parameter"):
        peer.update(params, peer.init(params), params)


@pytest.mark.parametrize(
    ("unit_axes", "reduced"),
    [
        ("flax", (0, 1, 2)),
        ("equinox", (1, 2, 3)),
        (1, (0, 2, 3)),
        (-2, (0, 1, 3)),
        (-4, (1, 2, 3)),
        ((0, -1), (1, 2)),
        ((), (0, 1, 2, 3)),
        (lambda path, shape: (len(shape) - 1, 1) if path[-1].key == "w" else (), (0, 2)),
    ],
    ids=["flax", "equinox", "int", "negative", "first", "tuple", "whole leaf", "function"],
)
def test_unit_axes_in_every_form(unit_axes, reduced):
    shapes = {"w": (2, 3, 4, 5)}
    grads, params = random_tree(1, shapes), random_tree(2, shapes)
    updates, _ = clip(grads, params, unit_axes=unit_axes)
    expected = unit_reference(grads["w"], params["w"], reduced)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


@pytest.mark.parametrize("unit_axes", ["flax", "equinox", 0])
def test_a_vector_is_one_unit_in_every_layout(unit_axes):
    shapes = {"bias": (4,), "conv_bias": (4, 1, 1)}
    grads, params = random_tree(1, shapes), random_tree(2, shapes)
    updates, _ = clip(grads, params, unit_axes=unit_axes)
    for name in shapes:
        expected = unit_reference(grads[name], params[name], None)
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("scope", "groups"),
    [
        ("per_param", [["a/b"], ["a/w"], ["c/w"]]),
        ("per_layer", [["a/b", "a/w"], ["c/w"]]),
        ("global", [["a/b", "a/w", "c/w"]]),
        ({"a": {"b": "x", "w": "y"}, "c": "x"}, [["a/b", "c/w"], ["a/w"]]),
    ],
    ids=["per_param", "per_layer", "global", "labels"],
)
def test_groups_of_leaves_are_clipped_to_the_ratio_of_their_norms(scope, groups):
    def tree(seed):
        flat = random_tree(seed, {"a/b": (3,), "a/w": (2, 3), "c/w": (3, 2)})
        return flat, {"a": {"b": flat["a/b"], "w": flat["a/w"]}, "c": {"w": flat["c/w"]}}

    (flat_grads, grads), (flat_params, params) = tree(1), tree(2)
    updates, state = clip(grads, params, 0.05, scope=scope)
    flat = {"a/b": updates["a"]["b"], "a/w": updates["a"]["w"], "c/w": updates["c"]["w"]}
    record = smartclip.metrics(state)
    for number, names in enumerate(groups):
        norm, weight = (
            np.sqrt(sum(np.sum(np.float64(values[name]) ** 2) for name in names))
            for values in (flat_grads, flat_params)
        )
        for name in names:
            scaled = np.float64(flat_grads[name]) * min(1, 0.05 * weight / norm)
            np.testing.assert_allclose(flat[name], scaled, rtol=1e-5)
        assert np.ravel(record["grad_norm"])[number] == pytest.approx(norm, rel=1e-5)
        assert np.ravel(record["clip_threshold"])[number] == pytest.approx(0.05 * weight, rel=1e-5)


def test_per_param_scope_equals_the_smartclip_package_over_a_thousand_steps():
    theirs = reference_agc.AGC(clipping=0.02)
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)}
    tx = smartclip.agc(0.02, scope="per_param")
    update = jax.jit(tx.update)
    state = tx.init(params)
    generator = np.random.default_rng(1)
    weight_norm = float(np.linalg.norm(params["w"]))
    for _ in range(1000):
        grads = {"w": np.float32(generator.normal(size=(3, 3)) * 0.05)}
        updates, state = update(grads, state, params)
        grad_norm = float(np.linalg.norm(grads["w"]))
        scale = theirs.scale(grad_norm, weight_norm)
        np.testing.assert_allclose(updates["w"], scale * np.asarray(grads["w"]), rtol=1e-3)


def test_metrics_of_units_are_the_smallest_scale_and_the_share_that_is_clipped():
    params = {"w": jnp.array([[3.0, 0.0, 1.0], [4.0, 2.0, 0.0]]), "b": jnp.array([10.0])}
    grads = {"w": jnp.array([[0.0, 0.9, 0.0], [1.0, 0.0, 0.1]]), "b": jnp.array([0.5])}
    _, state = clip(grads, params, 0.1)  # ratios 1 / 0.5, 0.9 / 0.2, 0.1 / 0.1 and 0.5 / 1
    record = smartclip.metrics(state)
    assert record["clip_scale"] == pytest.approx(0.2 / 0.9)
    assert record["grad_norm"] == pytest.approx(0.9 / 0.2)
    assert record["clip_threshold"] == 1
    assert record["clipped"] == 0.5
    assert record["clipped"].dtype == jnp.float32


def test_units_at_their_thresholds_are_not_reported_as_clipped():
    params = {"a": jnp.full(1, 2.0), "b": jnp.full(1, 8.0)}
    grads = {"a": jnp.full(1, 1.0), "b": jnp.full(1, 4.0)}
    updates, state = clip(grads, params, 0.5)
    record = smartclip.metrics(state)
    assert record["clipped"] == 0
    assert record["num_clipped"] == 0
    assert record["grad_norm"] == record["clip_threshold"] == 1
    assert updates == grads


def test_only_the_unit_with_a_nan_is_zeroed_and_reported():
    params = {"w": jnp.ones((2, 3))}
    grads = {"w": jnp.full((2, 3), 1e-4).at[0, 1].set(jnp.nan)}
    updates, state = clip(grads, params)
    np.testing.assert_array_equal(updates["w"], grads["w"].at[:, 1].set(0.0))
    record = smartclip.metrics(state)
    assert record["grad_norm"] == jnp.finfo(jnp.float32).max
    assert record["num_nonfinite"] == 1
    assert record["clip_scale"] == 0


def test_a_unit_whose_square_overflows_counts_as_not_finite():
    params = {"w": jnp.ones((2, 2))}
    grads = {"w": jnp.array([[1e30, 1e-4], [1e30, 1e-4]])}
    updates, state = clip(grads, params)
    np.testing.assert_array_equal(updates["w"], np.float32([[0.0, 1e-4], [0.0, 1e-4]]))
    assert smartclip.metrics(state)["num_nonfinite"] == 1


def test_units_that_are_too_small_for_a_norm_pass_as_they_are():
    """Their squares are zero in float32, so all units count as units without a gradient."""
    grads = jnp.asarray([[1e-30, -3e-25], [2e-28, 0.0]], jnp.float32)
    updates, state = clip(grads, grads)
    np.testing.assert_array_equal(updates, grads)
    record = smartclip.metrics(state)
    assert record["grad_norm"] == 0
    assert record["clip_scale"] == 1
    assert record["clipped"] == 0


def test_units_of_1e18_are_clipped():
    params = {"w": jnp.ones((2, 2))}
    grads = {"w": jnp.array([[1e18, 1.0], [1e18, 1.0]])}
    updates, _ = clip(grads, params)
    expected = unit_reference(grads["w"], params["w"], (0,))
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


@pytest.mark.parametrize(("size", "dtype"), [(300.0, jnp.float16), (1e18, jnp.float32)])
def test_units_whose_squares_are_large_are_clipped_and_not_dropped(size, dtype):
    grads = jnp.full((4, 3), size, dtype)
    updates, state = clip(grads, jnp.ones_like(grads), 0.25)
    np.testing.assert_allclose(np.float64(updates), np.full((4, 3), 0.25), rtol=1e-3)
    # In units of the threshold.
    np.testing.assert_allclose(state.last.grad_norm, 2 * size / 0.5, rtol=1e-6)


def test_optax_drops_units_in_float16():
    # If this fails, Optax has been improved.
    grads, params = jnp.full((4, 3), 300.0, jnp.float16), jnp.ones((4, 3), jnp.float16)
    theirs, _ = jax.jit(optax.adaptive_grad_clip(0.25).update)(grads, optax.EmptyState(), params)
    np.testing.assert_array_equal(theirs, np.zeros((4, 3)))


def test_parameters_without_a_gradient_are_accepted():
    grads, params = {"a": None, "b": jnp.full(4, 8.0)}, {"a": jnp.ones(2), "b": jnp.ones(4)}
    updates, _ = clip(grads, params, 0.5)
    assert updates["a"] is None
    np.testing.assert_allclose(updates["b"], [0.5] * 4, rtol=1e-6)
    with pytest.raises(ValueError, match=r"structure|Expected None"):
        optax.adaptive_grad_clip(0.5).update(grads, optax.EmptyState(), params)


@pytest.mark.parametrize(
    "mask",
    [
        {"body": {"w": True, "b": False}, "head": False},
        lambda params: {"body": {"w": True, "b": False}, "head": False},
        masks.every(masks.except_vectors, masks.except_paths("^head/")),
    ],
    ids=["prefix tree", "function", "ready-made"],
)
def test_masked_leaves_are_left_alone(mask):
    params = {"body": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "head": {"w": jnp.ones((2, 2))}}
    grads = jax.tree.map(lambda x: x * 10, params)
    updates, state = clip(grads, params, mask=mask)
    np.testing.assert_array_equal(updates["head"]["w"], grads["head"]["w"])
    np.testing.assert_array_equal(updates["body"]["b"], grads["body"]["b"])
    np.testing.assert_allclose(updates["body"]["w"], np.full((2, 2), 0.01), rtol=1e-6)
    # In units of the threshold.
    assert smartclip.metrics(state)["grad_norm"] == pytest.approx(np.sqrt(200) / 0.01 / np.sqrt(2))


def test_nothing_is_clipped_if_everything_is_masked():
    params = {"w": jnp.ones((2, 2))}
    updates, state = clip({"w": jnp.full((2, 2), 9.0)}, params, mask={"w": False})
    np.testing.assert_array_equal(updates["w"], np.full((2, 2), 9.0))
    record = smartclip.metrics(state)
    assert (record["grad_norm"], record["clip_threshold"]) == (0.0, 1.0)
    assert not record["clipped"]


def test_warmup_and_ceiling_hold_for_units():
    params = {"w": jnp.ones((1, 2))}
    tx = smartclip.agc(0.1, warmup_steps=1, max_norm=2.0, unit_axes="flax")
    grads = {"w": jnp.array([[1.0, 5.0]])}
    (first, second), _ = run(tx, params, [grads] * 2)
    # A row is a vector, hence one unit.
    np.testing.assert_allclose(first["w"], grads["w"] * 2 / np.sqrt(26), rtol=1e-6)
    np.testing.assert_allclose(second["w"], grads["w"] * 0.1 * np.sqrt(2 / 26), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clipping": 0.0}, r"`clipping` must be positive, got 0.0"),
        ({"eps": -1.0}, r"`eps` must be positive, got -1.0"),
        ({"unit_axes": "torch"}, r"`unit_axes` must be None, .* got 'torch'"),
        ({"unit_axes": (0, True)}, r"`unit_axes` must be None, .* got \(0, True\)"),
        ({"unit_axes": 0, "scope": "global"}, r"`unit_axes` must be None unless scope='unit'"),
        ({"scope": "units"}, r"`scope` must be one of 'unit', .* got 'units'"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        smartclip.agc(**arguments)


def test_an_axis_that_a_leaf_does_not_have_is_an_error():
    params = {"w": jnp.ones((2, 3))}
    tx = smartclip.agc(unit_axes=2)
    with pytest.raises(ValueError, match=r"`unit_axes` must name axes of 'w', .* \(2, 3\), got"):
        tx.update(params, tx.init(params), params)


def test_missing_params_and_an_incomplete_mask_are_errors():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    tx = smartclip.agc()
    with pytest.raises(ValueError, match="`params` must be passed to `update`"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"`mask` must be a tree .* nothing for 'b'"):
        clip(params, params, mask={"w": True})


def test_a_state_of_other_groups_is_an_error():
    tx = smartclip.agc(scope="per_param")
    state = tx.init({"w": jnp.ones(2)})
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"'num_observed' of shape \(2,\), .*, got \(1,\)"):
        tx.update(params, state, params)
