"""StableAdamW against its equations in float64, and against optax.adamw where it clips nothing."""

from functools import partial

import flax.serialization
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from compat import lenient
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from steps import run, runner
from trees import assert_close, assert_same_bits, random_tree

import optax_smartclip as smartclip
from optax_smartclip import masks

SHAPES = {"body": {"kernel": (4, 3), "bias": (3,)}, "scale": ()}
PARAMS = random_tree(0, 1.0, SHAPES)
FLOAT32 = 1e-5


def gradients(steps=12, shapes=SHAPES, spike=7):
    """A stream in which one tensor has a spike and the others have none."""
    stream = [random_tree(1 + step, 0.1, shapes) for step in range(steps)]
    first = jax.tree.leaves(stream[spike])[0]
    first *= 1000
    return stream


def decreasing(steps=12):
    return [jax.tree.map(lambda x, n=n: x * np.float32(0.9**n), PARAMS) for n in range(steps)]


def reference(grads, params, rates, *, b1=0.9, b2=0.99, eps=1e-6, decay=0.01):
    """The updates and the RMS of one tensor in the form of the paper, with debiased betas."""
    m, v, found = 0.0, 0.0, []
    grads = np.asarray(grads).astype(np.result_type(np.asarray(grads), np.float64))
    for number, (grad, rate) in enumerate(zip(grads, rates, strict=True), 1):
        b1_hat = b1 * (1 - b1 ** (number - 1)) / (1 - b1**number)
        b2_hat = b2 * (1 - b2 ** (number - 1)) / (1 - b2**number)
        m = b1_hat * m + (1 - b1_hat) * grad
        v = b2_hat * v + (1 - b2_hat) * np.abs(grad) ** 2
        rms = np.sqrt(np.mean(np.abs(grad) ** 2 / np.maximum(v, eps**2)))
        reduced = rate / max(1.0, rms)
        after = params * (1 - reduced * decay) - reduced * m / (np.sqrt(v) + eps)
        found.append((after - params, rms))
    return found


@pytest.mark.parametrize(
    ("numbers", "decay"),
    [
        ({}, 0.01),
        ({"b1": 0.5, "b2": 0.9}, 0.0),
        ({"b1": 0.95, "b2": 0.999, "eps": 0.05}, 2.0),
        ({"b1": 0.0, "b2": 0.0}, 0.1),
    ],
)
def test_equals_the_papers_equations_step_by_step(numbers, decay):
    grads, schedule = gradients(), optax.linear_schedule(0.1, 0.01, 10)
    tx = smartclip.stable_adamw(schedule, **numbers, weight_decay=decay)
    updates, state = run(tx, PARAMS, grads)
    rates = [float(schedule(step)) for step in range(len(grads))]

    def compare(weight, *streams):
        found, given = streams[: len(grads)], streams[len(grads) :]
        expected = reference(np.stack(given), np.float64(weight), rates, decay=decay, **numbers)
        np.testing.assert_allclose(found, [update for update, _ in expected], 1e-4, 1e-7)
        return expected[-1][1]

    rms = jax.tree.map(compare, PARAMS, *updates, *grads)
    record = smartclip.metrics(state)
    np.testing.assert_allclose(record["grad_norm"], jax.tree.leaves(rms), 1e-4)
    np.testing.assert_allclose(record["clip_scale"], 1 / np.maximum(1, jax.tree.leaves(rms)), 1e-4)
    np.testing.assert_array_equal(record["num_steps"], len(grads))


@pytest.mark.parametrize("stream", [[PARAMS] * 8, decreasing(8)], ids=["constant", "decreasing"])
@pytest.mark.parametrize("b2", [0.9, 0.999])
def test_gradients_that_do_not_grow_have_the_steps_of_adamw(stream, b2):
    numbers = {"b2": b2, "eps": 1e-6, "weight_decay": 0.1, "mask": masks.except_vectors}
    schedule = optax.linear_schedule(0.1, 0.01, 5)
    updates, state = run(smartclip.stable_adamw(schedule, **numbers), PARAMS, stream)
    expected, adam = run(lenient(optax.adamw(schedule, **numbers)), PARAMS, stream)
    # A fused multiply-add in one of the two programs rounds differently.
    assert_close(updates, expected, rtol=1e-6, atol=1e-8)
    assert_close((state[0].mu, state[0].nu), (adam[0].mu, adam[0].nu), rtol=1e-6)


@jax.jit
def train(b2, grads):
    """The updates and records of a stream."""
    tx = smartclip.scale_by_stable_adam(b2=b2)

    def step(state, grad):
        updates, state = tx.update(grad, state)
        return state, (updates, smartclip.metrics(state))

    return jax.lax.scan(step, tx.init(grads[0]), grads)[1]


@pytest.mark.parametrize("b2", [0.0, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("constant", [PARAMS["body"]["bias"], PARAMS["scale"]])
def test_constant_gradients_are_never_clipped(b2, constant):
    record = train(np.float32(b2), np.broadcast_to(constant, (3000, *constant.shape)))[1]
    assert not np.any(record["clipped"])
    assert np.all(record["clip_scale"] == 1)
    assert np.all(record["grad_norm"] <= 1)


@hypothesis.given(
    b2=st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999]),
    sizes=st.lists(st.floats(-(2.0**50), 2.0**50, width=32), min_size=8, max_size=8),
)
def test_the_rms_is_at_most_the_root_of_one_over_one_less_b2(b2, sizes):
    updates, record = train(np.float32(b2), np.float32(sizes).reshape(4, 2))
    assert np.all(record["grad_norm"] <= (1 + FLOAT32) / np.sqrt(1 - b2))
    assert all(np.isfinite(values).all() for values in (updates, *record.values()))


def test_a_spike_shortens_its_own_step_and_steers_the_next_ones():
    """One of 200 gradients is 1,000 times larger. Steps are in units of the learning rate."""
    sizes = np.ones(200, np.float32)
    sizes[180] = 1000.0
    grads = [np.full(3, size) for size in sizes]
    tx = smartclip.stable_adamw(1.0, weight_decay=0.0)
    lengths = np.abs([update[0] for update in run(tx, np.zeros(3, np.float32), grads)[0]])
    assert lengths[179] == pytest.approx(1.0, rel=1e-4)
    assert lengths[180] < 0.12
    # The spike dominates both moments, and the next gradients are small against it.
    assert np.all(lengths[181:184] > 0.6)


@pytest.mark.parametrize(
    ("mask", "of_bias", "of_scale"),
    [(None, 1, 1), ({"body": True, "scale": False}, 1, 0), (masks.except_vectors, 0, 0)],
)
def test_the_weight_decay_of_selected_leaves_is_divided_with_the_step(mask, of_bias, of_scale):
    grads, decay = gradients(8), 0.5
    plain, state = run(smartclip.stable_adamw(1.0, weight_decay=0.0), PARAMS, grads)
    tx = smartclip.stable_adamw(1.0, weight_decay=decay, mask=mask)
    found, _ = run(tx, PARAMS, grads)
    scales = jax.tree.unflatten(
        jax.tree.structure(PARAMS), list(smartclip.metrics(state)["clip_scale"])
    )
    assert min(jax.tree.leaves(scales)) < 0.5
    decays = {"body": {"kernel": 1, "bias": of_bias}, "scale": of_scale}
    expected = jax.tree.map(
        lambda update, weight, scale, flag: update - np.float32(decay * flag) * scale * weight,
        plain[-1],
        PARAMS,
        scales,
        decays,
    )
    assert_close(found[-1], expected, rtol=FLOAT32, atol=1e-6)


def test_a_stack_equals_a_list_of_layers():
    shapes = {"layers": [{"kernel": (3, 2), "bias": (2,)} for _ in range(3)], "head": (2,)}
    params, grads = random_tree(0, 1.0, shapes), gradients(shapes=shapes)

    def stack(tree):
        return {**tree, "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *tree["layers"])}

    make = partial(smartclip.stable_adamw, 0.1, weight_decay=0.1, mask=masks.except_vectors)
    listed, _ = run(make(), params, grads)
    stacked, state = run(make(stacked={"layers": 0}), stack(params), list(map(stack, grads)))
    for found, expected in zip(stacked, listed, strict=True):
        assert_close(found, stack(expected), rtol=FLOAT32, atol=1e-7)
    assert smartclip.metrics(state)["grad_norm"].shape == (1 + 3 + 3,)


def test_zero_gradients_have_zero_updates_and_finite_derivatives():
    tx = smartclip.scale_by_stable_adam()

    def total(grad):
        state = tx.init(grad)
        for _ in range(2):
            updates, state = tx.update(grad, state)
        return jnp.sum(updates), smartclip.metrics(state)

    slope_of_total = jax.jit(jax.value_and_grad(total, has_aux=True))
    (value, record), slope = slope_of_total(np.zeros(3, np.float32))
    assert value == 0
    assert np.isfinite(slope).all()
    assert record["grad_norm"] == 0
    assert record["clip_scale"] == 1


def test_leaves_without_a_gradient_keep_their_moments():
    params = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32), "c": optax.MaskedNode()}
    tx = smartclip.stable_adamw(0.1)
    update = jax.jit(tx.update)
    _, before = update(params, tx.init(params), params)
    updates, after = update({**params, "b": None}, before, params)
    assert updates["b"] is None
    assert isinstance(updates["c"], optax.MaskedNode)
    assert_same_bits((after[0].mu["b"], after[0].nu["b"]), (before[0].mu["b"], before[0].nu["b"]))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    np.testing.assert_array_equal(smartclip.metrics(after)["grad_norm"][1], 0.0)
    # The update of one tensor does not depend on the others.
    alone = {"a": params["a"]}
    expected, _ = run(tx, alone, [alone] * 2)
    assert_close(updates["a"], expected[-1]["a"], rtol=1e-6)


def test_nan_passes_as_in_adam_and_the_record_stays_finite():
    grads = {"a": np.float32([np.nan, 1.0]), "b": np.ones(2, np.float32)}
    tx = smartclip.stable_adamw(0.1, weight_decay=0.0)
    updates, state = run(tx, grads, [grads] * 2)
    assert np.isnan(updates[-1]["a"][0])
    np.testing.assert_allclose([updates[-1]["a"][1], updates[-1]["b"][0]], -0.1, rtol=FLOAT32)
    record = smartclip.metrics(state)
    assert all(np.isfinite(values).all() for values in record.values())
    np.testing.assert_array_equal(record["num_nonfinite"], [2, 0])


@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
def test_moments_of_bfloat16_are_float32_and_equal_those_of_a_float32_copy(mu_dtype):
    def narrow(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), tree)

    def wide(tree):
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)

    grads = list(map(narrow, gradients()))
    tx = smartclip.stable_adamw(0.1, mu_dtype=mu_dtype)
    updates, state = run(tx, narrow(PARAMS), grads)
    expected, of_wide = run(tx, wide(narrow(PARAMS)), list(map(wide, grads)))
    for name in ("mu", "nu"):
        moment, of_copy = optax.tree.get(state, name), optax.tree.get(of_wide, name)
        assert_close(moment, of_copy, rtol=2**-7 if name == "mu" and mu_dtype else 1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(state[0].nu)} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state[0].mu)} == {
        np.dtype(mu_dtype or np.float32)
    }
    assert_close(updates, list(map(narrow, expected)), rtol=2**-7)


def test_a_second_moment_that_bfloat16_rounds_to_one_still_forgets():
    params = jnp.ones(2, jnp.bfloat16)
    tx = optax.inject_hyperparams(smartclip.stable_adamw)(0.1, b2=0.999)

    @jax.jit
    def train():
        _, state = tx.update(100 * params, tx.init(params), params)

        def step(_, carry):
            return tx.update(params, carry[1], params)

        return jax.lax.fori_loop(0, 5000, step, (params, state))

    updates, state = train()
    assert state.hyperparams["b2"] == 1
    assert np.isfinite(np.float32(updates)).all()
    # The exact decay would have left 1 + 10,000 * 0.001 * 0.999 ** 5,000 = 1.07.
    np.testing.assert_allclose(optax.tree.get(state, "nu"), 1.07, rtol=0.1)


def test_complex_numbers_have_the_rms_of_their_magnitudes():
    rng = np.random.default_rng(0)
    grads = [np.complex64(rng.normal(size=3) + 1j * rng.normal(size=3)) for _ in range(6)]
    grads[4] *= 100
    params = np.complex64(rng.normal(size=3))
    updates, state = run(smartclip.stable_adamw(0.1), params, grads)
    expected = reference(grads, np.complex128(params), [0.1] * 6)
    np.testing.assert_allclose(updates, [update for update, _ in expected], 1e-4)
    np.testing.assert_allclose(smartclip.metrics(state)["grad_norm"], expected[-1][1], 1e-4)
    adam = optax.scale_by_adam().init(params)
    assert jax.tree.map(jnp.result_type, (state[0].mu, state[0].nu)) == jax.tree.map(
        jnp.result_type, (adam.mu, adam.nu)
    )


def test_the_state_is_found_mapped_and_serialized_as_adams(tmp_path):
    tx = optax.chain(smartclip.autoclip(), smartclip.stable_adamw(0.1))
    _, state = run(tx, PARAMS, gradients())
    for name in ("mu", "nu"):
        assert jax.tree.structure(optax.tree.get(state, name)) == jax.tree.structure(PARAMS)
    assert optax.tree.get(state, "count") == 12
    mapped = optax.tree.map_params(
        tx, lambda _: "parameter", state, transform_non_params=lambda _: "other"
    )
    adam = mapped[1][0]
    assert set(jax.tree.leaves((adam.mu, adam.nu))) == {"parameter"}
    assert set(jax.tree.leaves((mapped[0], adam.count, adam.clipper))) == {"other"}

    saved = flax.serialization.to_bytes(state)
    assert_same_bits(flax.serialization.from_bytes(tx.init(PARAMS), saved), state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        assert_same_bits(checkpointer.restore(tmp_path / "state", tx.init(PARAMS)), state)


@pytest.mark.parametrize("rate", [0.1, optax.constant_schedule(0.1)], ids=["number", "schedule"])
def test_a_run_moves_from_adamw_and_back(rate):
    adamw = lenient(optax.adamw(rate, b2=0.99, eps=1e-6, weight_decay=0.01))
    stable = smartclip.stable_adamw(rate)
    grads = decreasing()
    run_adamw = runner(adamw, PARAMS)
    _, saved = run_adamw(grads[:6])
    _, expected = run_adamw(grads)

    state = smartclip.graft(saved, stable.init(PARAMS))
    for grad in grads[6:9]:
        _, state = jax.jit(stable.update)(grad, state, PARAMS)
    state = smartclip.graft(state, adamw.init(PARAMS))
    for grad in grads[9:]:
        _, state = jax.jit(adamw.update)(grad, state, PARAMS)
    assert_same_bits(state, expected)


def test_the_state_of_adamw_alone_is_refused_with_a_hint_at_graft():
    tx = smartclip.scale_by_stable_adam()
    with pytest.raises(ValueError, match=r"must be the StableAdamState .*(\n.*)*smartclip.graft"):
        tx.update(PARAMS, optax.scale_by_adam().init(PARAMS))


STACK = {"layers": (4, 8, 4), "head": (8, 4)}
LAYOUTS = [{"layers": P(None, "x"), "head": P("x")}, {"layers": P("x", "y"), "head": P(None, "y")}]


@pytest.mark.parametrize(
    ("specs", "mode"), [*zip(LAYOUTS, [AxisType.Auto, AxisType.Explicit], strict=True)]
)
def test_on_a_mesh_it_is_what_it_is_on_one_device(specs, mode):
    params, grads = random_tree(0, 1.0, STACK), gradients(shapes=STACK)
    tx = smartclip.stable_adamw(0.1, stacked={"layers": 0})
    expected = run(tx, params, grads)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(mode,) * 2)

    def place(tree):
        return jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
        )

    with jax.set_mesh(mesh):
        updates, state = run(tx, params, grads, place)
    assert_close((updates, state), expected, rtol=1e-4, atol=1e-7)
    for moment in (state[0].mu, state[0].nu):
        for leaf, spec in zip(jax.tree.leaves(moment), jax.tree.leaves(specs), strict=True):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_a_tensor_has_one_rms_over_all_of_its_parts(check_vma):
    params, grads = random_tree(0, 1.0, STACK), gradients(shapes=STACK)
    expected, state = run(smartclip.stable_adamw(0.1), params, grads)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    tx = smartclip.stable_adamw(0.1, axis_name="x")

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=P("x"),
        out_specs=(P("x"), P()),
        check_vma=check_vma,
    )
    def train(params, grads):
        state = tx.init(params)
        for grad in grads:
            updates, state = tx.update(grad, state, params)
        return updates, smartclip.metrics(state)

    updates, record = jax.jit(train)(params, grads)
    assert_close(updates, expected[-1], rtol=1e-4, atol=1e-7)
    assert_close(record, smartclip.metrics(state), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("b1", 1.0),
        ("b1", -0.1),
        ("b2", 1.0),
        ("b2", np.nan),
        ("eps", 0.0),
        ("eps", -1e-6),
        ("weight_decay", -0.1),
        ("weight_decay", optax.constant_schedule(0.1)),
        ("stacked", 0),
    ],
)
def test_numbers_out_of_range_are_refused(name, value):
    for make in (smartclip.scale_by_stable_adam, partial(smartclip.stable_adamw, 0.1)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            make(**{name: value})


def test_a_mask_that_does_not_fit_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match="`mask` must be a tree with"):
        smartclip.stable_adamw(0.1, mask={"body": True}).init(PARAMS)


def test_weight_decay_needs_the_parameters():
    tx = smartclip.stable_adamw(0.1)
    with pytest.raises(ValueError, match="`params` must be passed"):
        tx.update(PARAMS, tx.init(PARAMS))


def adam(make=optax.adamw, b2=0.999):
    return lenient(make(0.1, b2=b2, eps=1e-8, weight_decay=0.0))


# The figures of the page's table, at b2 of 0.999 and 0.99.
ARMS = {
    "none": (lambda b2: adam(b2=b2), 6.0, 4e-4),
    "fixed": (lambda b2: optax.chain(optax.clip_by_global_norm(1.0), adam(b2=b2)), 6.0, 4e-4),
    "autoclip": (lambda b2: optax.chain(smartclip.autoclip(), adam(b2=b2)), 6.0, 2e-3),
    "zclip": (lambda b2: optax.chain(smartclip.zclip(max_norm=None), adam(b2=b2)), 1.4, 5e-5),
    "after": (lambda b2: optax.chain(adam(b2=b2), smartclip.autoclip()), 6.1, 2e-4),
    "stable": (lambda b2: adam(smartclip.stable_adamw, b2), 1.3, 6e-3),
}


@pytest.mark.parametrize("arm", ARMS)
def test_with_slowly_growing_gradients_the_longest_step_is_that_of_the_page(arm):
    """By 2 % a step from 0.01, after 1,000 steps; in units of the median step before."""
    make, expected, _ = ARMS[arm]
    sizes = 0.01 * np.r_[np.ones(1000), 1.02 ** np.arange(227)]
    grads = np.random.default_rng(0).normal(size=(1227, 16))
    grads *= (sizes / np.linalg.norm(grads, axis=1))[:, None]
    tx, params = make(0.999), jnp.zeros(16)

    def step(state, grad):
        updates, state = tx.update(grad, state, params)
        return state, jnp.linalg.norm(updates)

    lengths = jax.lax.scan(step, tx.init(params), jnp.float32(grads))[1]
    longest = np.max(lengths[1000:]) / np.median(lengths[500:1000])
    assert longest == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("arm", ARMS)
def test_on_a_parabola_the_bursts_are_those_of_the_page(arm):
    """The median over 32 starts of the largest loss after step 300."""
    make, _, expected = ARMS[arm]
    tx = make(0.99)

    def train(weight):
        def step(carry, _):
            weight, state = carry
            updates, state = tx.update(weight, state, weight)
            return (weight + updates, state), weight**2 / 2

        return jax.lax.scan(step, (weight, tx.init(weight)), length=2000)[1]

    starts = jnp.float32(np.random.default_rng(0).normal(size=32))
    worst = np.max(jax.jit(jax.vmap(train))(starts)[:, 300:], axis=1)
    assert expected / 2 < np.median(worst) < expected * 2
