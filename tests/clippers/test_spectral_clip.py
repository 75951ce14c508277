"""Spectral clipping against singular value decompositions in float64."""

import functools
from functools import partial

import flax.serialization
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from breadth import each_value
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from steps import run, runner
from trees import assert_same_bits, random_tree

import optax_smartclip as smartclip
from optax_smartclip.clippers.spectral_clip import soft_scale
from optax_smartclip.engine.singular_values import REACH, bound_largest

SHAPES = {"bias": (3,), "tall": (5, 3), "wide": (3, 6)}
PARAMS = random_tree(0, 1.0, SHAPES)
FLOAT32 = 1e-5


def gradients(steps=12, shapes=SHAPES):
    """A stream in which all tensors have a spike."""
    stream = [random_tree(1 + step, 0.1, shapes) for step in range(steps)]
    stream[steps // 2] = jax.tree.map(lambda leaf: 30 * leaf, stream[steps // 2])
    return stream


@functools.cache
def trained():
    """Compiled once for all tests: a function from a stream to the updates and the last state."""
    return runner(smartclip.spectral_clip(0.5, window=5), PARAMS)


def cut_in_float64(matrix, limit):
    left, sizes, right = np.linalg.svd(np.float64(matrix), full_matrices=False)
    return (left * (sizes / np.hypot(1, sizes / limit))) @ right


def largest(matrix):
    return np.linalg.svd(np.float64(matrix), compute_uv=False)[0]


def reference(matrices, factor, window):
    """The cut matrix, the estimate and the limit of each step."""
    vector, sizes, found = 0.0, [], []
    for matrix in np.float64(matrices):
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        row = wide[np.linalg.norm(wide, axis=1).argmax()]
        starts = [wide @ row, wide @ (wide.T @ (vector * np.ones(len(wide))))]
        starts = [start / max(np.linalg.norm(start), 1e-300) for start in starts]
        vector = max(starts, key=lambda start: np.linalg.norm(start @ wide))
        limit = factor * np.median(sizes[-window:]) if sizes else np.inf
        sizes.append(np.linalg.norm(vector @ wide))
        cut = cut_in_float64(matrix, limit) if np.isfinite(limit) else matrix
        found.append((cut, sizes[-1], limit))
    return found


def test_a_stream_is_cut_at_a_multiple_of_the_median_as_in_float64():
    grads = gradients()
    updates, state = trained()(grads)
    record = smartclip.metrics(state)
    for group, name in enumerate(SHAPES):
        stream = [grad[name] for grad in grads]
        if name == "bias":
            expected, sizes, limits = stream, [0.0], [np.finfo(np.float32).max]
        else:
            expected, sizes, limits = zip(*reference(stream, 0.5, 5), strict=True)
        for update, cut in zip(updates, expected, strict=True):
            np.testing.assert_allclose(update[name], cut, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(record["grad_norm"][group], sizes[-1], rtol=FLOAT32)
        np.testing.assert_allclose(record["clip_threshold"][group], limits[-1], rtol=FLOAT32)
        scale = 1 / np.hypot(1, sizes[-1] / limits[-1])
        np.testing.assert_allclose(record["clip_scale"][group], scale, rtol=FLOAT32)
    assert_same_bits(updates[0], grads[0])
    np.testing.assert_array_equal(record["num_clipped"], [0, 11, 11])
    np.testing.assert_array_equal(state.num_observed, [0, 12, 12])


def test_the_estimate_converges_to_the_largest_singular_value_of_a_constant_matrix():
    found = smartclip.metrics(trained()([PARAMS] * 40)[1])["grad_norm"]
    np.testing.assert_allclose(
        found[1:], [largest(PARAMS[name]) for name in ("tall", "wide")], 1e-5
    )


def test_the_estimate_leaves_a_vector_that_is_orthogonal_to_all_rows():
    grads = [{**PARAMS, "wide": np.zeros((3, 6), np.float32)} for _ in range(3)]
    for grad, row, size in zip(grads, (0, 0, 2), (1, 2, 5), strict=True):
        grad["wide"][row, row] = size
    _, state = trained()(grads)
    np.testing.assert_allclose(smartclip.metrics(state)["grad_norm"][2], 5.0)


@partial(jax.jit, static_argnums=2)
def cut(matrix, limit, num_iterations=12):
    tx = smartclip.spectral_clip(limit=limit, num_iterations=num_iterations)
    updates, state = tx.update(matrix, tx.init(matrix))
    return updates, smartclip.metrics(state)


def with_spikes(size, shape=(6, 9)):
    """A matrix of norm 1 plus two directions of norms `size` and `size / 2`."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=shape)
    left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    return np.float32(matrix / largest(matrix) + size * (left[:, :2] * [1, 0.5]) @ right[:2])


@pytest.mark.parametrize(
    ("size", "unit"), each_value([0.0, 1.0, 10.0, 100.0, 1000.0], [1.0, 1e-30, 1e30])
)
def test_a_spike_is_cut_and_the_rest_is_kept(size, unit):
    """The limit is the learned one for a usual norm of 1."""
    matrix = np.float32(unit) * with_spikes(size)
    found, record = cut(matrix, np.float32(0.3 * unit))
    expected = cut_in_float64(matrix, 0.3 * unit)
    assert largest(found - expected) < 5e-4 * 0.3 * unit
    scale = 1 / np.hypot(1, record["grad_norm"] / (0.3 * unit))
    np.testing.assert_allclose(record["clip_scale"], scale, rtol=FLOAT32)


@pytest.mark.parametrize("shape", [(9, 6), (6, 6), (1, 6)])
def test_a_matrix_of_any_shape_is_cut_as_it_lies(shape):
    matrix = np.float32(np.random.default_rng(0).normal(size=shape))
    limit = largest(matrix) / 3
    found, _ = cut(matrix, np.float32(limit))
    assert largest(found - cut_in_float64(matrix, limit)) < 5e-4 * limit


@pytest.mark.parametrize("num_iterations", [6, 12])
def test_the_cut_is_exact_up_to_the_reach(num_iterations):
    matrix = with_spikes(1e6)
    for excess in (0.1, 1.0, 0.99 * REACH[num_iterations]):
        limit = largest(matrix) / excess / (1.03 if excess > 1 else 1)
        found, _ = cut(matrix, np.float32(limit), num_iterations)
        assert largest(found - cut_in_float64(matrix, limit)) < 5e-4 * limit


@pytest.mark.parametrize("num_iterations", range(6, 13))
def test_at_the_reach_singular_values_of_any_size_are_exact(num_iterations):
    """In float64, where rounding does not hide an error."""
    limit = 1.001 / REACH[num_iterations]
    sizes = np.array([1.0, 1.0, 0.1, 1e-3]) * [1, limit, limit, limit]
    with jax.enable_x64(True):
        found = np.diagonal(cut(np.diag(sizes), limit, num_iterations)[0])
    np.testing.assert_allclose(found, sizes / np.hypot(1, sizes / limit), rtol=1.1e-6)


def test_the_bound_of_the_singular_values_allows_for_rounding():
    """Without it, the bound of a matrix of rank 1 would be its singular value."""
    sides = np.float32(np.random.default_rng(0).normal(size=(2, 100, 8)))
    matrices = sides[0, :, :, None] * sides[1, :, None, :]
    bounds = np.asarray(jax.vmap(bound_largest)(matrices @ matrices.transpose(0, 2, 1)))
    assert (bounds >= [largest(matrix) for matrix in matrices]).all()


def test_the_reported_scale_is_right_when_the_compiler_knows_a_large_or_small_limit():
    for limit in (1e-20, 1e20):
        scale = jax.jit(partial(soft_scale, limits=jnp.full(1, limit)))(jnp.full(1, 3 * limit))
        np.testing.assert_allclose(scale, 1 / np.sqrt(10), rtol=FLOAT32)


def test_the_reach_is_as_quoted():
    found = [REACH[number] for number in (6, 10, 12)]
    np.testing.assert_allclose(found, [18, 820, 5500], rtol=0.03)


def test_beyond_the_reach_small_singular_values_shrink_with_the_largest():
    matrix, limit = with_spikes(100.0), 0.3
    found = np.linalg.svd(cut(matrix, np.float32(limit), 6)[0], compute_uv=False)
    sizes = np.linalg.svd(matrix, compute_uv=False)
    assert sizes[0] / limit > 10 * REACH[6]
    shrunk = sizes * REACH[6] * limit / sizes[0]
    np.testing.assert_allclose(found, shrunk / np.hypot(1, shrunk / limit), rtol=0.05)


numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@hypothesis.given(
    elements=st.lists(numbers, min_size=12, max_size=12),
    limit=st.floats(2.0**-100, 2.0**100, width=32),
)
@hypothesis.example([2.0**100] * 12, 2.0**-100)
@hypothesis.example([2.0**-100] * 12, 2.0**100)
@hypothesis.example([1.0] + [0.0] * 11, 2.0**-30)
def test_no_singular_value_exceeds_the_limit_or_its_former_value(elements, limit):
    matrix = np.pad(np.float32(elements).reshape(3, 4), ((0, 3), (0, 5)))
    found, record = cut(matrix, np.float32(limit))
    assert largest(found) <= (1 + FLOAT32) * min(limit, largest(matrix))
    assert all(np.isfinite(values).all() for values in record.values())
    assert record["grad_norm"] <= (1 + FLOAT32) * largest(matrix)
    longest_row = np.linalg.norm(np.float64(matrix), axis=1).max()
    assert record["grad_norm"] >= (1 - FLOAT32) * longest_row


@jax.jit
def slope(matrix, weights):
    return jax.grad(lambda x: jnp.sum(weights * cut(x, np.float32(0.3))[0]))(matrix)


def test_derivatives_are_those_of_the_cut():
    matrix, weights, direction = map(with_spikes, (10.0, 0.0, 1.0))
    step = 1e-5 * direction.astype(np.float64)
    difference = cut_in_float64(matrix + step, 0.3) - cut_in_float64(matrix - step, 0.3)
    found = np.sum(direction * slope(matrix, weights))
    np.testing.assert_allclose(found, np.sum(weights * difference) / 2e-5, rtol=1e-2)
    assert np.isfinite(slope(0 * matrix, weights)).all()
    np.testing.assert_allclose(slope(1e-30 * matrix, weights), weights, rtol=1e-4)


def test_a_matrix_of_zeros_stays_zero_and_is_not_recorded():
    grads, zeros = gradients(4), jax.tree.map(np.zeros_like, PARAMS)
    expected, before = trained()(grads)
    updates, after = trained()([zeros, *grads[:2], zeros, *grads[2:]])
    assert_same_bits((updates[0], updates[3]), (zeros, zeros))
    assert_same_bits(updates[4:], expected[2:])
    assert_same_bits(after.rule, before.rule)


def test_nan_and_inf_are_dropped_and_not_recorded():
    grads, zeros = gradients(4), np.zeros((3, 6), np.float32)
    expected, of_zeros = trained()([*grads[:2], {**grads[2], "wide": zeros}, grads[3]])
    for bad in (np.nan, np.inf, -np.inf):
        broken = {**grads[2], "wide": grads[2]["wide"].copy()}
        broken["wide"][1, 2] = bad
        updates, state = trained()([*grads[:2], broken, grads[3]])
        assert_same_bits(updates[2]["tall"], expected[2]["tall"])
        assert_same_bits(updates[2]["wide"], zeros)
        assert_same_bits((updates[3], state.rule), (expected[3], of_zeros.rule))
        np.testing.assert_array_equal(smartclip.metrics(state)["num_nonfinite"], [0, 0, 1])


def test_float64_is_cut_in_float64():
    with jax.enable_x64(True):
        matrix, limit = np.float64(with_spikes(10.0)) * 1e100, 0.3e100
        found, record = jax.tree.map(np.asarray, cut(matrix, limit))
        tx = smartclip.spectral_clip()
        state = tx.init(matrix)
        _, after = jax.eval_shape(tx.update, matrix, state)
    assert found.dtype == np.float64
    assert largest(found - cut_in_float64(matrix, limit)) < 1e-5 * limit
    scale = 1 / np.hypot(1, largest(matrix) / limit)
    np.testing.assert_allclose(record["clip_scale"], scale, rtol=0.04)
    types = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), (state, after))
    assert types[0] == types[1]


def test_each_slice_of_a_stack_is_a_matrix_of_its_own():
    """Gradients are in bfloat16, and the computation is in float32."""
    shapes, stacked = {"b": (4, 5), "w": (2, 5, 3, 4)}, {"w": (2, 0), "b": 1}
    grads = [jax.tree.map(jnp.bfloat16, random_tree(seed, 0.1, shapes)) for seed in range(4)]
    updates, state = run(
        smartclip.spectral_clip(0.5, stacked=stacked, warmup_steps=0), grads[0], grads
    )
    labels = smartclip.group_labels("per_param", grads[0], stacked=stacked)
    record = smartclip.metrics(state)
    for j, i in np.ndindex(3, 2):
        stream, found = ([np.float64(x["w"][i, :, j]) for x in each] for each in (grads, updates))
        expected, sizes, limits = zip(*reference(stream, 0.5, 9), strict=True)
        np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-6)
        group = labels.index(f"w[{j},{i}]")
        found = [record[name][group] for name in ("grad_norm", "clip_threshold")]
        np.testing.assert_allclose(found, [sizes[-1], limits[-1]], rtol=FLOAT32)
    assert_same_bits([tree["b"] for tree in updates], [tree["b"] for tree in grads])
    assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(state)} == {1, 4}


def test_only_matrices_that_take_part_are_cut():
    shapes = {"a": (3, 4), "b": (3, 4), "conv": (3, 3, 2, 2), "empty": (0, 3), "scalar": ()}
    params = {**random_tree(0, 1.0, shapes), "c": np.ones((2, 2), np.int32), "none": None}
    params |= {"complex": np.complex64(params["a"]), "frozen": params["a"]}
    params["nan"] = params["a"] * np.nan
    mask = {**dict.fromkeys(params, True), "b": False}
    tx = smartclip.spectral_clip(limit=0.1, mask=mask, nonfinite="propagate")
    grads = {**params, "frozen": None}
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert largest(updates.pop("a")) < 0.1
    assert_same_bits(updates, {name: leaf for name, leaf in grads.items() if name != "a"})
    assert smartclip.metrics(state)["num_clipped"].sum() == 1
    assert smartclip.spectral_clip().init({}).num_observed.shape == (0,)


def test_it_runs_in_scan_and_vmap_with_a_warm_up_and_its_state_can_be_saved():
    make = optax.inject_hyperparams(
        smartclip.spectral_clip, static_args=("window", "num_iterations", "warmup_steps")
    )
    tx = make(0.5, window=5, num_iterations=12, warmup_steps=3)

    def train(grads):
        def step(state, grad):
            updates, state = tx.update(grad, state)
            return state, updates

        return jax.lax.scan(step, tx.init(PARAMS), grads)

    stream = jax.tree.map(lambda *leaves: np.stack(leaves), *gradients())
    both = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), stream)
    state, updates = jax.jit(jax.vmap(train))(both)
    expected, last = trained()(gradients())
    for place, size in enumerate((1, 2)):
        found = jax.tree.map(lambda leaf, place=place: leaf[place], updates)
        for step, tree in enumerate([*gradients()[:3], *expected[3:]]):
            for name, leaf in tree.items():
                np.testing.assert_allclose(found[name][step], size * leaf, rtol=1e-4, atol=1e-6)
        norms = smartclip.metrics(state)["grad_norm"][place]
        np.testing.assert_allclose(norms, size * smartclip.metrics(last)["grad_norm"], rtol=FLOAT32)

    fresh = smartclip.spectral_clip(window=5).init(PARAMS)
    assert_same_bits(flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(last)), last)
    assert_same_bits(smartclip.graft({"c": last}, {"c": fresh})["c"], last)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_it_is_what_it_is_on_one_device(mode):
    grads = [random_tree(seed, 0.1, (2, 4, 8)) for seed in range(3)]
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(mode,) * 2)
    split = NamedSharding(mesh, P(None, "x", "y"))
    tx = smartclip.spectral_clip(0.5, stacked=lambda path, shape: 0)
    with jax.set_mesh(mesh):
        updates, state = run(tx, grads[0], grads, lambda tree: jax.device_put(tree, split))
    record = smartclip.metrics(state)
    for layer in range(2):
        expected, sizes, _ = zip(*reference([x[layer] for x in grads], 0.5, 9), strict=True)
        np.testing.assert_allclose([x[layer] for x in updates], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(record["grad_norm"][layer], sizes[-1], rtol=FLOAT32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert leaf.sharding.is_fully_replicated, path
    assert mode is AxisType.Auto or updates[-1].sharding.is_equivalent_to(split, 3)


def test_inside_shard_map_each_device_has_its_own_matrices():
    grads = np.stack([grad["wide"] for grad in gradients(4)])
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    tx = smartclip.spectral_clip(0.5, stacked=lambda path, shape: 0)

    @partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    def train(grads):
        def step(state, size):
            cut, state = tx.update(size * grads, state)
            return state, cut

        return jax.lax.scan(step, tx.init(grads), jnp.arange(1.0, 4.0))[1][-1]

    for found, grad in zip(jax.jit(train)(grads), grads, strict=True):
        expected = reference([grad, 2 * grad, 3 * grad], 0.5, 9)[-1][0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "rows"),
    [({"bias": (4,), "tall": (50, 3), "wide": (2, 20)}, 3), ({"bias": (4,)}, 0)],
)
def test_the_state_has_a_vector_on_the_shorter_side_of_each_matrix(shapes, rows):
    state = smartclip.spectral_clip().init(random_tree(0, 1.0, shapes))
    assert state.rule.vectors.shape == (len(shapes), rows)


def test_nothing_is_known_before_the_first_norm():
    tx = smartclip.spectral_clip(0.5, warmup_steps=0)
    updates, state = tx.update(PARAMS, tx.init(PARAMS))
    assert_same_bits(updates, PARAMS)
    largest = np.finfo(np.float32).max
    np.testing.assert_array_equal(smartclip.metrics(state)["clip_threshold"], largest)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("factor", 0.0),
        ("factor", np.nan),
        ("limit", 0.0),
        ("window", 0),
        ("num_iterations", 5),
        ("num_iterations", 10.0),
        ("num_iterations", 13),
        ("warmup_steps", -1),
        ("nonfinite", "clip"),
        ("stacked", 0),
    ],
)
def test_arguments_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must "):
        smartclip.spectral_clip(**{name: value})


def test_states_of_other_parameters_are_refused():
    tx = smartclip.spectral_clip()
    state = tx.init({"w": np.ones((3, 4), np.float32)})
    with pytest.raises(ValueError, match="must have 'vectors' of shape"):
        tx.update({"w": np.ones((5, 5), np.float32)}, state)
    with pytest.raises(ValueError, match="must have 'num_observed' of shape"):
        tx.update(PARAMS, state)
    with pytest.raises(ValueError, match="must have the fields"):
        tx.update(
            {"w": np.ones((3, 4), np.float32)}, smartclip.zscore_clip().init({"w": np.ones(3)})
        )
