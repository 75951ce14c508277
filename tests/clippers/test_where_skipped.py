"""`where_skipped` selects the old tree or the new one, bit for bit, as `skip_spikes` decided."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from trees import assert_same_bits

import optax_smartclip as smartclip

NAN = float("nan")
TX = smartclip.skip_spikes(optax.identity())


def after(size, tx=TX):
    """The state after a step with a gradient of this size."""
    return tx.update(jnp.full(2, size), tx.init(jnp.zeros(2)))[1]


PASSED, DROPPED = after(1.0), after(NAN)
both_decisions = pytest.mark.parametrize(
    ("opt_state", "dropped"), [(PASSED, False), (DROPPED, True)], ids=["passed", "dropped"]
)
FLOATS = ["float8_e4m3fn", "float16", "bfloat16", "float32", "complex64"]
# A NaN with a payload and a zero with a sign, which arithmetic would not keep.
ODD_BITS = np.array([0x7FC12345, 0x80000000], np.uint32).view(np.float32)


def tree(value, seed):
    return {
        "floats": {name: jnp.full((2, 1), value, name) for name in FLOATS},
        "odd": jnp.array(ODD_BITS[:: 1 if seed else -1]),
        "integers": [jnp.full(3, seed + 1, name) for name in ("int8", "int32", "uint32")],
        "flag": jnp.asarray(seed == 0),
        "keys": jax.random.split(jax.random.key(seed), 3),
        "numpy": np.full(2, value, np.float32),
        "empty": jnp.zeros((0, 2)),
        "none": None,
    }


def raw(tree):
    """The tree with random keys as their data."""

    def data(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(data, tree)


@both_decisions
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_every_leaf_is_the_old_or_the_new_one_bit_for_bit(opt_state, dropped, compiled):
    old, new = tree(2.0, seed=0), tree(NAN, seed=1)
    select = jax.jit(smartclip.where_skipped) if compiled else smartclip.where_skipped
    assert_same_bits(raw(select(opt_state, old, new)), raw(old if dropped else new))


@both_decisions
def test_numbers_become_arrays_and_other_objects_come_from_the_new_tree(opt_state, dropped):
    no_values = {"none": np.zeros(2, jax.dtypes.float0), "text": "new", "function": jnp.tanh}
    others = {"none": np.zeros(2, jax.dtypes.float0), "text": "old", "function": jnp.sin}
    old, new = {"step": 0, "rate": 0.5, "flag": False}, {"step": 1, "rate": 2.5, "flag": True}
    actual = smartclip.where_skipped(opt_state, old | others, new | no_values)
    assert {name: actual[name] for name in no_values} == no_values
    expected = {name: jnp.asarray(value) for name, value in (old if dropped else new).items()}
    assert_same_bits({name: actual[name] for name in expected}, expected)


def test_each_scanned_run_of_a_batch_undoes_its_own_dropped_steps():
    sizes = np.float32([[1, NAN, 3, 4, NAN], [NAN, NAN, 5, 1, 2], [1, 2, 3, 4, 5]])

    def run(sizes, key):
        def step(carry, size):
            state, rest = carry
            _, state = TX.update(jnp.full(2, size), state)
            mean, count, key = rest
            new = 0.5 * mean + 0.5 * size, count + 1, jax.random.split(key)[0]
            return (state, smartclip.where_skipped(state, rest, new)), None

        start = TX.init(jnp.zeros(2)), (jnp.zeros(()), jnp.uint32(0), key)
        return jax.lax.scan(step, start, sizes)[0][1]

    keys = jax.random.split(jax.random.key(0), 3)
    means, counts, keys_after = jax.jit(jax.vmap(run))(sizes, keys)
    for row, mean, count, key, key_after in zip(
        sizes, means, counts, keys, keys_after, strict=True
    ):
        expected = 0.0
        for size in row[np.isfinite(row)]:
            expected = 0.5 * expected + 0.5 * size
            key = jax.random.split(key)[0]
        np.testing.assert_allclose(mean, expected, rtol=1e-6)
        assert int(count) == np.sum(np.isfinite(row))
        assert key_after == key


class Module(nnx.Module):
    """A layer with statistics, and a random stream."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs):
        return self.dropout(self.norm(inputs))


@both_decisions
@pytest.mark.parametrize("as_state", [True, False], ids=["state", "module"])
def test_a_module_of_nnx_and_its_state_are_selected_with_their_random_streams(
    opt_state, dropped, as_state
):
    model = Module()
    old, expected = nnx.clone(model), nnx.clone(model)
    model(jnp.full((3, 2), NAN))
    if not dropped:
        expected = nnx.clone(model)
    if as_state:
        old, new = nnx.state(old), nnx.state(model)
        nnx.update(model, smartclip.where_skipped(opt_state, old, new))
    else:
        model = smartclip.where_skipped(opt_state, old, model)
    assert isinstance(model, Module)
    assert_same_bits(*(raw(nnx.to_pure_dict(nnx.state(of))) for of in (model, expected)))


@both_decisions
def test_a_module_of_equinox_is_selected_with_its_functions(opt_state, dropped):
    model = eqx.nn.MLP(2, 2, 2, 1, activation=jax.nn.relu, key=jax.random.key(0))
    new = jax.tree.map(lambda leaf: leaf * NAN if eqx.is_array(leaf) else leaf, model)
    selected = eqx.filter_jit(smartclip.where_skipped)(opt_state, model, new)
    assert selected.activation is model.activation
    expected = model if dropped else new
    assert_same_bits(*(eqx.filter(of, eqx.is_array) for of in (selected, expected)))


PARTS = {"a": smartclip.skip_spikes(optax.sgd(0.1)), "b": smartclip.skip_spikes(optax.sgd(0.1))}
WITHIN = {
    "chain": optax.chain(smartclip.skip_spikes(smartclip.autoclip()), optax.scale(0.1)),
    "masked": optax.masked(TX, {"a": True, "b": True}),
    "partition": optax.partition(PARTS, {"a": "a", "b": "b"}),
    "skip_spikes": smartclip.skip_spikes(TX),
    "inject_hyperparams": optax.inject_hyperparams(smartclip.skip_spikes, static_args="window")(
        optax.identity()
    ),
}


@pytest.mark.parametrize("tx", WITHIN.values(), ids=WITHIN)
def test_a_step_is_undone_if_any_part_of_any_wrapper_dropped_it(tx):
    params = {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}
    update, initial = jax.jit(tx.update), tx.init(params)
    for sizes in itertools.product([1.0, NAN], repeat=2):
        grads = {
            name: np.full_like(params[name], size) for name, size in zip("ab", sizes, strict=True)
        }
        _, state = update(grads, initial, params)
        assert int(smartclip.where_skipped(state, 0, 1)) == np.all(np.isfinite(sizes))


def inside_multisteps():
    return optax.MultiSteps(TX, 2, should_skip_update_fn=optax.skip_not_finite)


def around_multisteps():
    return smartclip.skip_spikes(optax.MultiSteps(optax.identity(), 2).gradient_transformation())


@pytest.mark.parametrize(
    ("build", "place", "dropped"),
    [
        # The second, fourth and sixth calls are real steps.
        (inside_multisteps, 3, {3, 4}),
        (inside_multisteps, 2, set()),
        (around_multisteps, 3, {3}),
        (around_multisteps, 2, {2}),
    ],
)
def test_inside_multisteps_the_last_real_step_decides_and_around_it_each_small_batch(
    build, place, dropped
):
    tx, undone, zeros = build(), set(), np.zeros(2, np.float32)
    update = jax.jit(tx.update)
    state = tx.init(zeros)
    for step in range(6):
        # A real step is dropped for its loss, which MultiSteps ignores.
        bad = step == place
        grads = np.full(2, NAN if bad and step % 2 == 0 else 1.0, np.float32)
        with jax.numpy_dtype_promotion("standard"):
            _, state = update(grads, state, zeros, value=np.float32(NAN if bad else 1))
        if not smartclip.where_skipped(state, False, True):
            undone.add(step)
    assert undone == dropped


# Arguments.


@pytest.mark.parametrize(
    "opt_state", [optax.sgd(0.1).init(jnp.zeros(2)), smartclip.autoclip().init(jnp.zeros(2)), None]
)
def test_a_state_without_skip_spikes_is_refused(opt_state):
    with pytest.raises(ValueError, match="must be") as error:
        smartclip.where_skipped(opt_state, 0, 1)
    assert str(error.value) == (
        "`opt_state` must be the state of an optimizer within `skip_spikes`, as `update` returned "
        f"it, got an object of type {type(opt_state).__name__} without one."
    )


def test_a_batch_of_states_is_for_vmap():
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), PASSED, DROPPED)
    with pytest.raises(ValueError, match=r"got a batch of them, of shape \(2,\)\. .* `jax.vmap`"):
        smartclip.where_skipped(batch, jnp.zeros(2), jnp.ones(2))
    selected = jax.vmap(smartclip.where_skipped)(batch, jnp.zeros(2), jnp.ones(2))
    np.testing.assert_array_equal(selected, [1, 0])


@pytest.mark.parametrize(
    ("old", "new", "got"),
    [
        ({"a": 1, "b": {"c": 2}}, {"a": 1}, "[] alone in `new` and ['b/c'] alone in `old`"),
        ({"a": None}, {"a": 1}, "['a'] alone in `new` and [] alone in `old`"),
        ([1], (1,), "PyTreeDef((*,)) in `new` and PyTreeDef([*]) in `old`"),
    ],
)
def test_trees_of_different_structures_are_refused_with_their_difference(old, new, got):
    with pytest.raises(ValueError, match="structure") as error:
        smartclip.where_skipped(PASSED, old, new)
    assert str(error.value) == f"`new` must have the structure of `old`, got {got}."


@pytest.mark.parametrize(
    ("old", "new", "kinds"),
    [
        (jnp.zeros(2), jnp.zeros((1, 2)), "((2,), 'float32'), got ((1, 2), 'float32')"),
        (jnp.zeros(2), jnp.zeros(2, jnp.bfloat16), "((2,), 'float32'), got ((2,), 'bfloat16')"),
        (0, 0.0, "((), 'int32'), got ((), 'float32')"),
        (jnp.sin, 1, "None, got ((), 'int32')"),
    ],
)
def test_a_leaf_of_another_shape_or_dtype_is_refused_by_its_name(old, new, kinds):
    with pytest.raises(ValueError, match="shape and dtype") as error:
        smartclip.where_skipped(PASSED, {"a": [old]}, {"a": [new]})
    assert str(error.value) == f"`new` must have the shape and dtype of `old` at 'a/0', {kinds}."
