"""`observe_norms` records norms and shares of groups, against float64 NumPy; updates pass."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compat import enable_x64
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from steps import run
from trees import assert_close, assert_same_bits, random_tree

import optax_smartclip as smartclip
from optax_smartclip import observe_norms

SHAPES = {"body": {"kernel": (8, 4), "bias": (4,)}, "head": {"kernel": (4, 8)}, "norm": (8,)}
PARAMS = random_tree(0, 1.0, SHAPES)
LARGEST = float(np.finfo(np.float32).max)


def gradient(*sizes, seed=1):
    """A gradient with these sizes of body, head and norm."""
    tree = random_tree(seed, 1.0, SHAPES)
    return {
        name: jax.tree.map(lambda leaf, by=size: np.float32(leaf * np.float64(by)), tree[name])
        for name, size in zip(tree, sizes, strict=True)
    }


def shares(norms):
    """The shares of the squared norm. Norms that are not finite share it equally."""
    norms = np.array(norms, np.longdouble)
    if not np.all(np.isfinite(norms)):
        norms = np.where(np.isfinite(norms), 0, 1).astype(np.longdouble)
    total = np.sum(norms**2)
    return np.float64(norms**2 / total if total > 0 else norms)


def expected(groups):
    """The record of a gradient with these groups."""
    norms = [reference.norm(group) for group in groups]
    return {"observed_norm": reference.reported(norms), "norm_share": shares(norms)}


def assert_record(record, groups, rtol=1e-6):
    for name, values in expected(groups).items():
        np.testing.assert_allclose(record[name], values, rtol=rtol, atol=1e-37, err_msg=name)
        assert np.all(np.isfinite(record[name]))


def observe(tx, grads, params=PARAMS):
    updates, state = jax.jit(tx.update)(grads, tx.init(params))
    assert_same_bits(updates, jax.tree.map(jnp.asarray, grads))
    return smartclip.metrics(state)


def of_layers(grads):
    # The leaf "norm" is a layer of its own.
    return [grads["body"], grads["head"], grads["norm"]]


@pytest.mark.parametrize(
    "sizes",
    [(1, 2, 3), (1, 0, 0), (0, 0, 0), (1e30, 3e29, 1.0), (1e-30, 3e-31, 0), (1e-30, 1e30, 1.0)],
)
def test_norms_and_shares_of_layers_are_recorded_and_the_updates_pass(sizes):
    grads = gradient(*sizes)
    record = observe(observe_norms(), grads)
    assert list(record) == ["observed_norm", "norm_share"]
    assert_record(record, of_layers(grads))


@pytest.mark.parametrize("sizes", [(np.nan, 1, 2), (1, np.inf, np.nan), (0, 0, np.nan)])
def test_groups_that_are_not_finite_share_the_norm_and_the_record_is_finite(sizes):
    record = observe(observe_norms(), gradient(*sizes))
    bad = ~np.isfinite(sizes)
    np.testing.assert_allclose(record["norm_share"], bad / bad.sum())
    np.testing.assert_array_equal(np.array(record["observed_norm"]) == LARGEST, bad)


@given(
    st.lists(
        st.one_of(
            st.just(0.0),
            st.floats(2.0**-120, 2.0**120, width=32),
            st.sampled_from([np.nan, np.inf, -np.inf]),
        ),
        min_size=4,
        max_size=4,
    )
)
def test_shares_are_within_0_and_1_and_add_up_to_1_unless_all_are_zero(values):
    grads = {str(number): np.float32([value]) for number, value in enumerate(values)}
    share = np.array(observe_each(grads).norm_share, np.float64)
    np.testing.assert_allclose(share, shares(np.abs(values)), rtol=1e-6, atol=1e-37)
    assert np.all((share >= 0) & (share <= 1))
    np.testing.assert_allclose(share.sum(), float(any(v != 0 for v in values)), rtol=1e-6)


@jax.jit
def observe_each(grads):
    tx = observe_norms("per_param")
    return tx.update(grads, tx.init(grads))[1]


def test_groups_are_those_of_the_scope_the_mask_and_the_stacks():
    grads = {"layers": {"w": np.float32([[3, 4], [0, 2], [1, 0]])}, "head": np.float32([5, 0])}
    layers = [*grads["layers"]["w"]]
    stacked = {"layers": 0}
    labels = smartclip.group_labels("per_param", grads, stacked=stacked)
    assert labels == ("head", "layers/w[0]", "layers/w[1]", "layers/w[2]")
    tx = observe_norms("per_param", stacked=stacked)
    assert_record(observe(tx, grads, grads), [grads["head"], *layers])
    # A leaf outside the mask has a group, and a share of zero.
    tx = observe_norms("per_param", stacked=stacked, mask={"layers": True, "head": False})
    assert_record(observe(tx, grads, grads), [np.zeros(1), *layers])
    tx = observe_norms(lambda path: "all")
    record = observe(tx, grads, grads)
    assert record["observed_norm"].shape == record["norm_share"].shape == ()
    assert_record(record, [grads])


def test_in_float64_norms_and_shares_are_right_beyond_float32():
    with enable_x64(True):
        grads = {"a": jnp.float64([3e200]), "b": jnp.float64([4e200]), "c": jnp.float64([1.0])}
        record = observe(observe_norms("per_param"), grads, grads)
        assert all(value.dtype == jnp.float32 for value in record.values())
    np.testing.assert_allclose(record["norm_share"], [0.36, 0.64, 0.0], rtol=1e-6)
    assert np.all(np.array(record["observed_norm"]) < LARGEST)


def chain():
    return optax.chain(observe_norms(), smartclip.autoclip(), optax.sgd(0.1, momentum=0.9))


def test_the_record_before_the_first_step_is_zero():
    record = smartclip.metrics(observe_norms(scope="per_param").init(PARAMS))
    num_groups = len(jax.tree.leaves(PARAMS))
    zeros = np.zeros(num_groups, np.float32)
    assert_same_bits(record, {"observed_norm": zeros, "norm_share": zeros})


def test_its_record_is_found_next_to_a_clipper_and_by_optax():
    tx = chain()
    grads = gradient(1, 2, 3)
    _, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    record = smartclip.metrics(state)
    assert set(record) == {*smartclip.ClipMetrics._fields, *smartclip.NormMetrics._fields}
    assert_record(record, of_layers(grads))
    for name in smartclip.NormMetrics._fields:
        np.testing.assert_array_equal(optax.tree.get(state, name), record[name])
    mapping = flax.serialization.to_state_dict(state)
    assert smartclip.metrics(mapping).keys() == record.keys()
    assert_same_bits(flax.serialization.from_state_dict(tx.init(PARAMS), mapping), state)
    exported = jax.export.export(jax.jit(lambda state: state))(state[0])
    assert jax.export.deserialize(exported.serialize()).in_tree == exported.in_tree


def test_a_scan_of_runs_under_vmap_records_each_step_of_each_run():
    sizes = np.random.default_rng(0).lognormal(size=(2, 5, 3))
    runs = [[gradient(*step, seed=n) for n, step in enumerate(steps)] for steps in sizes]
    stacked = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(step for steps in runs for step in steps)
    )
    stacked = jax.tree.map(lambda leaf: leaf.reshape(2, 5, *leaf.shape[1:]), stacked)
    tx = chain()

    def step(state, grads):
        _, state = tx.update(grads, state, PARAMS)
        return state, smartclip.metrics(state)

    logs = jax.jit(jax.vmap(lambda grads: jax.lax.scan(step, tx.init(PARAMS), grads)[1]))(stacked)
    assert logs["norm_share"].shape == (2, 5, 3)
    for place in np.ndindex(2, 5):
        record = {name: logs[name][place] for name in smartclip.NormMetrics._fields}
        assert_record(record, of_layers(runs[place[0]][place[1]]))


SPECS = {
    "body": {"kernel": P("x", None), "bias": P(None)},
    "head": {"kernel": P(None, "x")},
    "norm": P("x"),
}


def test_a_gradient_on_explicit_axes_is_observed_as_on_one_device():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    grads = gradient(1, 2, 3)
    tx = observe_norms()
    alone = observe(tx, grads)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), grads, SPECS
        )
        updates, state = jax.jit(tx.update)(placed, tx.init(placed))
        found = jax.jit(smartclip.culprits)(smartclip.metrics(state))
    assert found.by_share.tolist() == smartclip.culprits(alone).by_share.tolist()
    assert_close(smartclip.metrics(state), alone, rtol=1e-6)
    assert all(leaf.sharding.is_fully_replicated for leaf in state)
    assert updates["head"]["kernel"].sharding == placed["head"]["kernel"].sharding


def two_steps_under_shard_map(tx, to_grads, out_specs):
    """The record after two steps of a scan. Each device has a part of the gradient."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))

    def two_steps(part):
        def step(state, _):
            return tx.update(to_grads(part), state)[1], None

        state = jax.lax.scan(step, tx.init(part), length=2)[0]
        return jax.tree.map(lambda values: values[None], smartclip.metrics(state))

    mapped = jax.shard_map(two_steps, mesh=mesh, in_specs=(SPECS,), out_specs=out_specs)
    return jax.jit(mapped)(gradient(1, 2, 3))


def parts(grads):
    """The parts of a gradient on four devices."""
    for n in range(4):
        rows, columns = slice(2 * n, 2 * n + 2), (slice(None), slice(2 * n, 2 * n + 2))
        body = {"kernel": grads["body"]["kernel"][rows], "bias": grads["body"]["bias"]}
        yield {"body": body, "head": {"kernel": grads["head"]["kernel"][columns]},
               "norm": grads["norm"][rows]}  # fmt: skip


def test_under_shard_map_norms_are_summed_over_the_named_axis():
    record = two_steps_under_shard_map(observe_norms(axis_name="x"), lambda part: part, P())
    assert_record(jax.tree.map(lambda values: values[0], record), of_layers(gradient(1, 2, 3)))


def test_under_shard_map_each_device_observes_its_own_gradient_or_the_mean_of_all():
    grads = list(parts(gradient(1, 2, 3)))
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *grads)
    for to_grads, expected in (
        (lambda part: part, grads),
        (lambda part: jax.lax.pmean(part, "x"), [mean] * 4),
    ):
        record = two_steps_under_shard_map(observe_norms(), to_grads, P("x"))
        for device, of_device in enumerate(expected):
            one = jax.tree.map(lambda values, n=device: values[n], record)
            assert_record(one, of_layers(of_device))


def test_a_dropped_step_is_recorded_before_skip_spikes_and_not_within_it():
    skipping = functools.partial(smartclip.skip_spikes, warmup_steps=1)
    before = optax.chain(observe_norms(), skipping(optax.sgd(0.1)))
    within = skipping(optax.chain(observe_norms(), optax.sgd(0.1)))
    usual, spike = gradient(1, 1, 1), gradient(1, 1000, 1)
    for tx, recorded in ((before, spike), (within, usual)):
        _, state = run(tx, PARAMS, [usual, usual, spike])
        record = smartclip.metrics(state)
        assert record["num_skipped"] == 1
        assert_record(record, of_layers(recorded))


@functools.cache
def jacobians_of_shares():
    """The compiled Jacobians of the shares, in forward and in reverse mode."""
    tx = observe_norms("per_param")

    def share(sizes):
        grads = {str(number): size[None] for number, size in enumerate(sizes)}
        return tx.update(grads, tx.init(grads))[1].norm_share

    return jax.jit(jax.jacfwd(share)), jax.jit(jax.jacrev(share))


@pytest.mark.parametrize("sizes", [[3.0, 4.0, 0.0], [3e-30, 0.0, 1e-30], [0.0, 2e25, 0.0]])
def test_shares_have_their_derivatives_at_any_size_of_the_gradient(sizes):
    x = np.float64(sizes)
    of_each = np.diag(x) - np.outer(shares(x), x)
    expected = 2 * of_each / np.sum(x**2)
    for jacobian in jacobians_of_shares():
        scaled = np.max(x) * np.float64(jacobian(np.float32(sizes)))
        np.testing.assert_allclose(scaled, np.max(x) * expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(jacobian(np.zeros(3, np.float32)), 0.0)


def test_graft_adds_observe_norms_to_a_run_and_removes_it():
    without = optax.chain(smartclip.autoclip(), optax.sgd(0.1, momentum=0.9))
    saved = [run(tx, PARAMS, [PARAMS])[1] for tx in (without, chain())]
    fresh = [tx.init(PARAMS) for tx in (without, chain())]
    assert_same_bits(smartclip.graft(saved[0], fresh[1])[1:], saved[0])
    assert_same_bits(smartclip.graft(saved[1], fresh[0]), saved[1][1:])
    assert_same_bits(smartclip.graft(saved[1], fresh[1]), saved[1])


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="`scope` must be one of"):
        observe_norms("layer")
    with pytest.raises(ValueError, match="`stacked` must be None with scope='global'"):
        observe_norms("global", stacked={"layers": 0})
    with pytest.raises(ValueError, match="`stacked` must have patterns that"):
        observe_norms(stacked={"no such": 0}).init(PARAMS)
    state = observe_norms().init(PARAMS)
    with pytest.raises(ValueError, match=r"'observed_norm' of shape \(4,\).*got \(3,\)"):
        observe_norms("per_param").update(PARAMS, state)
    with pytest.raises(ValueError, match="`state` must be the NormMetrics that `init`"):
        observe_norms().update(PARAMS, optax.EmptyState())
