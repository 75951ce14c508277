"""States in the hands of other tools: frozen, serialized, pickled, mapped and selected from."""

import dataclasses
import pickle
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import beartype.door
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clipper_table import CLIPPERS, FUNCTIONS
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P
from trees import assert_same_bits

import optax_smartclip as smartclip
from optax_smartclip.engine.states import init_state, select_groups, state_dataclass

PARAMS = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
SCALES = np.random.default_rng(0).lognormal(size=8).astype(np.float32)

CHAINS = {
    "autoclip": lambda: smartclip.autoclip(),
    "autoclip per leaf": lambda: smartclip.autoclip(50.0, scope="per_param"),
    "geometric_quantile": lambda: smartclip.autoclip(
        90.0, history=smartclip.geometric_quantile(0.1)
    ),
    "zscore_clip": lambda: smartclip.zscore_clip(warmup_steps=2),
    "agc": lambda: smartclip.agc(),
}


@pytest.fixture(scope="module", params=CHAINS)
def run(request):
    """A chain, its state after four steps, and a function that takes four more."""
    tx = optax.chain(CHAINS[request.param](), optax.sgd(0.1, momentum=0.9))

    @jax.jit
    def advance(state, scales):
        def step(state, scale):
            grads = jax.tree.map(lambda param: scale * param, PARAMS)
            return tx.update(grads, state, PARAMS)[::-1]

        return jax.lax.scan(step, state, scales)

    return tx, advance(tx.init(PARAMS), SCALES[:4])[0], lambda state: advance(state, SCALES[4:])


def assert_continues(run, restored):
    _, state, advance = run
    restored = jax.tree.map(jnp.asarray, restored)
    assert_same_bits(restored, state)
    assert_same_bits(advance(restored), advance(state))


def test_a_run_continues_from_flax_bytes_bit_for_bit(run):
    tx, state, _ = run
    saved = flax.serialization.to_bytes(state)
    assert_continues(run, flax.serialization.from_bytes(tx.init(PARAMS), saved))


def test_a_run_continues_from_a_pickle_bit_for_bit(run):
    assert_continues(run, pickle.loads(pickle.dumps(run[1])))


def test_a_run_continues_from_a_copy_bit_for_bit(run):
    leaves, treedef = jax.tree.flatten(run[1])
    assert_continues(run, jax.tree.unflatten(treedef, [np.asarray(leaf) for leaf in leaves]))


def test_optax_finds_the_parameters_next_to_a_clipper_and_none_within(run):
    # `map_params` calls `init` with a placeholder without leaves.
    tx, state, _ = run
    mapped = optax.tree.map_params(
        tx, lambda leaf: "parameter", state, transform_non_params=lambda leaf: "other"
    )
    kinds = set(jax.tree.leaves(mapped[0]))
    assert kinds <= {"other"}
    assert set(jax.tree.leaves(mapped[1])) == {"parameter"}


def test_the_state_dict_of_flax_has_the_names_of_the_fields():
    tx = smartclip.zscore_clip()
    saved = flax.serialization.to_state_dict(tx.init(PARAMS))
    assert saved.keys() == {"rule", "num_observed", "last"}
    assert saved["rule"].keys() == {"mean", "std", "num_recorded"}
    assert "grad_norm" in saved["last"]


@pytest.mark.parametrize("change", [{"mean": None}, {"extra": np.zeros(1)}])
def test_a_saved_state_with_other_fields_is_refused(change):
    current = smartclip.zscore_clip().init(PARAMS)
    saved = flax.serialization.to_state_dict(current)
    saved["rule"] = {
        name: value for name, value in (saved["rule"] | change).items() if value is not None
    }
    with pytest.raises(ValueError, match="A saved MomentsState must have the fields") as error:
        flax.serialization.from_state_dict(current, saved)
    assert str(sorted(saved["rule"])) in str(error.value)
    assert str(["mean", "num_recorded", "std"]) in str(error.value)


def test_a_state_saved_by_another_clipper_is_refused():
    saved = flax.serialization.to_bytes(smartclip.autoclip().init(PARAMS))
    with pytest.raises(ValueError, match="A saved MomentsState must have the fields"):
        flax.serialization.from_bytes(smartclip.zscore_clip().init(PARAMS), saved)


@pytest.mark.parametrize("name", CLIPPERS)
@pytest.mark.parametrize("stand_in", [P("x"), P(), None], ids=str)
def test_stand_ins_for_arrays_in_a_state_dict_are_restored_unchanged(name, stand_in):
    # T5X replaces arrays by their axes or by None, and leaves out empty nodes.
    tx = smartclip.skip_spikes(optax.chain(CLIPPERS[name](), optax.sgd(0.1, momentum=0.9)))
    current = tx.init(PARAMS)
    flat = flax.traverse_util.flatten_dict(
        flax.serialization.to_state_dict(current), keep_empty_nodes=True
    )
    kept = {path: leaf for path, leaf in flat.items() if isinstance(leaf, jax.Array)}
    empty = {path: leaf for path, leaf in flat.items() if path not in kept}
    saved = flax.traverse_util.unflatten_dict(dict.fromkeys(kept, stand_in) | empty)
    restored = flax.serialization.from_state_dict(current, saved)
    assert restored == jax.tree.map(lambda _: stand_in, current)
    # Arrays can be restored into such a tree.
    arrays = flax.serialization.to_state_dict(current)
    assert_same_bits(flax.serialization.from_state_dict(restored, arrays), current)


@state_dataclass
class Counter:
    """A rule's state as a user would write it."""

    seen: jax.Array


def counting():
    return smartclip.clip_by_rule(
        smartclip.ThresholdRule(
            init=lambda groups: Counter(seen=jnp.zeros(groups, jnp.int32)),
            threshold=lambda state, norms: norms,
            record=lambda state, norms, _: Counter(seen=state.seen + 1),
        )
    )


def test_flax_is_needed_only_once_it_is_loaded(monkeypatch):
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "flax.serialization")
        counting().init(PARAMS)
    current = counting().init(PARAMS)
    assert flax.serialization.to_state_dict(current)["rule"].keys() == {"seen"}
    assert_same_bits(
        flax.serialization.from_bytes(current, flax.serialization.to_bytes(current)), current
    )


def test_states_are_frozen():
    for instance in (Counter(seen=jnp.zeros(1)), smartclip.autoclip().init(PARAMS)):
        (name, *_) = [field.name for field in dataclasses.fields(instance)]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(instance, name, None)


def test_states_are_made_by_keyword_and_are_trees_of_named_leaves():
    with pytest.raises(TypeError):
        Counter(jnp.zeros(1))
    ((path, leaf),) = jax.tree_util.tree_leaves_with_path(Counter(seen=7))
    assert (jax.tree_util.keystr(path), leaf) == (".seen", 7)
    # Otherwise code that searches mappings would search states.
    assert not isinstance(Counter(seen=7), Mapping)


def test_states_iterate_over_their_values_as_those_of_optax():
    # This is `optax.OptState` without the recursion, which most type checkers do not support.
    opt_state = jax.Array | np.ndarray | Iterable[Any] | Mapping[Any, Any]
    assert list(Counter(seen=7)) == [7]
    for instance in (smartclip.agc().init(PARAMS), smartclip.skip_spikes(optax.sgd(0.1)).init({})):
        assert beartype.door.is_bearable(instance, opt_state)
        names = [field.name for field in dataclasses.fields(instance)]
        assert dict(zip(names, instance, strict=True)) == {
            name: getattr(instance, name) for name in names
        }


def test_before_the_first_step_no_norm_has_been_observed():
    np.testing.assert_array_equal(init_state({}, 3).num_observed, [0, 0, 0])


def test_groups_are_selected_along_the_first_axis_of_every_leaf():
    new = Counter(
        seen={"scalar": jnp.arange(3), "window": jnp.ones((3, 2)), "cube": jnp.ones((3, 1, 2))}
    )
    old = jax.tree.map(lambda leaf: -jnp.ones_like(leaf), new)
    selected = select_groups(jnp.array([True, False, True]), new, old).seen
    np.testing.assert_array_equal(selected["scalar"], [0, -1, 2])
    np.testing.assert_array_equal(selected["window"], [[1, 1], [-1, -1], [1, 1]])
    np.testing.assert_array_equal(selected["cube"][:, 0, 0], [1, -1, 1])
    assert selected["scalar"].dtype == new.seen["scalar"].dtype


def test_a_nan_in_a_group_that_is_not_selected_does_not_matter():
    new, old = jnp.array([jnp.nan, 1.0]), jnp.array([2.0, 3.0])
    np.testing.assert_array_equal(select_groups(jnp.array([False, True]), new, old), [2.0, 1.0])


NO_STATES = {
    "None": None,
    "a train state": TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1)),
    "a tuple": (),
    "of the chain": optax.chain(smartclip.autoclip(), optax.sgd(0.1)).init(PARAMS),
    "of an optimizer": optax.adam(0.1).init(PARAMS),
    "with one field of the same name": smartclip.clip_micro_batches(smartclip.autoclip()).init(
        PARAMS
    ),
    "restored without a target": flax.serialization.to_state_dict(
        smartclip.autoclip().init(PARAMS)
    ),
}


@pytest.mark.parametrize("given", NO_STATES)
@pytest.mark.parametrize(
    ("tx", "name"),
    [
        *((make(), "ClipState") for make in FUNCTIONS.values()),
        (smartclip.skip_spikes(optax.sgd(0.1)), "SkipState"),
    ],
    ids=[*FUNCTIONS, "skip_spikes"],
)
def test_a_value_that_is_not_a_state_is_refused_with_a_hint(tx, name, given):
    message = rf"`state` must be the {name} .* got an object of type \w+\. `smartclip.graft`"
    with pytest.raises(ValueError, match=message):
        tx.update(PARAMS, NO_STATES[given], PARAMS)


@pytest.mark.parametrize("make", CLIPPERS.values(), ids=CLIPPERS)
def test_a_state_of_another_clipper_is_refused_with_the_fields_of_both(make):
    def fields(tx):
        leaves = jax.tree_util.tree_leaves_with_path(tx.init(PARAMS).rule)
        return sorted(jax.tree_util.keystr(path)[1:] for path, _ in leaves)

    ours = make(scope="global")
    for other in CLIPPERS.values():
        theirs = other(scope="global")
        if fields(ours) != fields(theirs):
            with pytest.raises(ValueError, match=r"must have the fields \[.*graft") as error:
                ours.update(PARAMS, theirs.init(PARAMS), PARAMS)
            for field in {*fields(ours), *fields(theirs)}:
                assert repr(field.replace(".", "/")) in str(error.value)
