"""Grafting: the optimizer keeps its state when the clippers change, and nothing is guessed."""

import functools
import itertools

import flax.core
import flax.serialization
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from clipper_table import CLIPPERS
from trees import assert_close, assert_same_bits

import optax_smartclip as smartclip

rng = np.random.default_rng(0)
PARAMS = {
    "bias": np.float32(rng.normal(size=3)),
    "body": {"kernel": np.float32(rng.normal(size=(2, 3)))},
}
STEPS = 6


def gradients(like=PARAMS, seed=1, spike=4):
    """A stream of different leaves, with one spike."""
    draw = np.random.default_rng(seed)
    return [
        jax.tree.map(
            lambda leaf, size=50.0 if step == spike else 1.0: np.float32(
                size * draw.normal(size=np.shape(leaf))
            ),
            like,
        )
        for step in range(STEPS)
    ]


def run(tx, state=None, params=PARAMS, grads=None, compiled=False):
    """The updates of all steps, and the last state.

    Two programs give the same bits only where they are not compiled.
    """
    # Optax's Adam mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params) if state is None else state
        update = jax.jit(tx.update) if compiled else tx.update
        updates = []
        for grad in gradients(params) if grads is None else grads:
            now, state = update(grad, state, params)
            updates.append(now)
    return updates, state


def after(tx, params=PARAMS):
    """A state as after some steps: counts are `STEPS`, and other numbers differ in all leaves.

    `graft` moves numbers without looking at them, so the steps need not be taken.
    """
    draw = np.random.default_rng(3)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(draw.normal(size=leaf.shape).astype(leaf.dtype))
        return jnp.asarray(np.full(leaf.shape, STEPS, leaf.dtype))

    return jax.tree.map(fill, jax.eval_shape(tx.init, params))


def autoclip(size=4, percentile=90.0):
    return smartclip.autoclip(percentile, history=smartclip.ring_buffer(size), warmup_steps=STEPS)


def adam():
    return optax.adam(0.1)


def sgd():
    return optax.sgd(0.1, momentum=0.9)


def in_every_form(tree, folder):
    """The tree itself, and as Flax and Orbax restore it without a target."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", tree)
        checkpointer.wait_until_finished()
        untyped = checkpointer.restore(folder / "saved")
    return [
        tree,
        untyped,
        flax.serialization.to_state_dict(tree),
        flax.serialization.msgpack_restore(flax.serialization.to_bytes(tree)),
    ]


WITHOUT = {
    "adam alone": (adam, lambda state: state),
    "adam after clip_by_global_norm": (
        lambda: optax.chain(optax.clip_by_global_norm(1e3), adam()),
        lambda state: state[1],
    ),
}


@pytest.mark.parametrize(("old", "part"), WITHOUT.values(), ids=WITHOUT)
def test_adam_keeps_its_moments_and_counts_when_a_clipper_is_put_before_it(old, part, tmp_path):
    saved = after(old())
    new = optax.chain(autoclip(), adam())
    for form in in_every_form(saved, tmp_path):
        grafted = smartclip.graft(form, new.init(PARAMS))
        assert_same_bits(grafted[0], autoclip().init(PARAMS))
        assert_same_bits(jax.tree.map(jnp.asarray, grafted[1]), part(saved))
        assert optax.tree.get(grafted, "count") == STEPS


def test_a_run_goes_on_as_before_until_its_new_clipper_is_warm():
    saved = after(adam())
    new = optax.chain(autoclip(), adam())
    grads = gradients(seed=2)
    expected, _ = run(adam(), saved, grads=grads)
    updates, state = run(new, smartclip.graft(saved, new.init(PARAMS)), grads=grads)
    assert_same_bits(updates, expected)
    assert state[0].last.num_clipped == 0
    # After warm-up, it clips.
    updates, state = run(new, state, grads=grads)
    assert state[0].last.num_clipped > 0


def test_another_clipper_starts_from_its_initial_state():
    saved = after(optax.chain(smartclip.zscore_clip(), adam()))
    grafted = smartclip.graft(saved, optax.chain(autoclip(), adam()).init(PARAMS))
    assert_same_bits(grafted, (autoclip().init(PARAMS), saved[1]))


def test_a_clipper_can_be_removed(tmp_path):
    saved = after(optax.chain(autoclip(), adam()))
    assert saved[0].num_observed == STEPS
    for form in in_every_form(saved, tmp_path):
        grafted = smartclip.graft(form, adam().init(PARAMS))
        assert_same_bits(jax.tree.map(jnp.asarray, grafted), saved[1])


@pytest.mark.parametrize(
    "clipper",
    [
        autoclip,
        smartclip.zscore_clip,
        smartclip.agc,
        lambda: smartclip.autoclip(90.0, history=smartclip.geometric_quantile(), scope="per_param"),
    ],
    ids=["autoclip", "zscore_clip", "agc", "geometric_quantile per leaf"],
)
def test_the_same_clipper_goes_on_from_another_place_in_the_chain(clipper, tmp_path):
    saved = after(optax.chain(clipper(), sgd()))
    assert np.all(saved[0].num_observed == STEPS)
    new = optax.chain(optax.identity(), sgd(), clipper())
    for form in in_every_form(saved, tmp_path):
        grafted = smartclip.graft(form, new.init(PARAMS))
        assert_same_bits(jax.tree.map(jnp.asarray, grafted[1:]), (saved[1], saved[0]))


def test_clippers_of_one_kind_go_on_in_their_order(tmp_path):
    saved = after(optax.chain(autoclip(), sgd(), autoclip()))
    # Otherwise their order could not be seen.
    assert not np.array_equal(saved[0].rule.ring, saved[2].rule.ring)
    new = optax.chain(autoclip(), autoclip(), sgd())
    for form in in_every_form(saved, tmp_path):
        grafted = smartclip.graft(form, new.init(PARAMS))
        assert_same_bits(jax.tree.map(jnp.asarray, grafted), (saved[0], saved[2], saved[1]))


def test_the_eleventh_link_of_a_chain_comes_after_the_fourth(tmp_path):
    nothing = optax.identity()
    links = [nothing, nothing, sgd(), *[nothing] * 6, sgd()]
    saved = after(optax.chain(*links))
    new = optax.chain(autoclip(), *links)
    for form in in_every_form(saved, tmp_path):
        grafted = smartclip.graft(form, new.init(PARAMS))
        assert_same_bits(jax.tree.map(jnp.asarray, grafted[1:]), saved)


def test_a_clipper_with_another_window_or_other_groups_starts_from_its_initial_state(tmp_path):
    saved = after(optax.chain(autoclip(), sgd()))
    others = [
        autoclip(size=5),
        smartclip.autoclip(90.0, history=smartclip.ring_buffer(4), scope="per_param"),
    ]
    for form, other in itertools.product(in_every_form(saved, tmp_path), others):
        grafted = smartclip.graft(form, optax.chain(other, sgd()).init(PARAMS))
        assert_same_bits(grafted[0], other.init(PARAMS))
        assert_same_bits(jax.tree.map(jnp.asarray, grafted[1]), saved[1])


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 4).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(rate=0.5),
}


def is_clipper(node):
    return isinstance(node, type(smartclip.agc().init(PARAMS)))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_counts_of_a_wrapper_survive(wrap, tmp_path):
    old = wrap(optax.chain(optax.clip(1e6), sgd()))
    _, saved = run(old, compiled=True)
    new = wrap(optax.chain(autoclip(), sgd()))
    for form in in_every_form(saved, tmp_path):
        grafted = smartclip.graft(form, new.init(PARAMS))
        assert jax.tree.structure(grafted) == jax.tree.structure(new.init(PARAMS))
        nodes = jax.tree.leaves(grafted, is_leaf=is_clipper)
        assert_same_bits(list(filter(is_clipper, nodes)), [autoclip().init(PARAMS)])
        others = [jnp.asarray(node) for node in nodes if not is_clipper(node)]
        assert_same_bits(others, jax.tree.leaves(saved))
    # MultiSteps is in the middle of its accumulation.
    grads = gradients(seed=2, spike=None)
    expected, _ = run(old, saved, grads=grads, compiled=True)
    updates, _ = run(new, grafted, grads=grads, compiled=True)
    assert_close(updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_clipper_can_be_put_first_within_a_wrapper(wrap, tmp_path):
    saved, new = after(wrap(sgd())), wrap(optax.chain(autoclip(), sgd()))
    lines = []
    for form, told in itertools.product(in_every_form(saved, tmp_path), (None, lines.append)):
        grafted = smartclip.graft(form, new.init(PARAMS), on_mismatch=told)
        nodes = jax.tree.leaves(grafted, is_leaf=is_clipper)
        others = [jnp.asarray(node) for node in nodes if not is_clipper(node)]
        assert_same_bits(others, jax.tree.leaves(saved))
    assert len(lines) == 4
    assert len(set(lines)) == 1


def test_a_leaf_of_another_shape_or_dtype_is_refused_by_its_name():
    new = optax.chain(autoclip(), sgd())
    saved = after(sgd())
    longer = PARAMS | {"body": {"kernel": np.zeros((2, 4), np.float32)}}
    with pytest.raises(ValueError, match="'0/trace/body/kernel'") as error:
        smartclip.graft(saved, new.init(longer))
    assert "((2, 4), 'float32')" in str(error.value)
    assert "got ((2, 3), 'float32')" in str(error.value)
    half = PARAMS | {"bias": PARAMS["bias"].astype(np.float16)}
    with pytest.raises(ValueError, match="'0/trace/bias'") as error:
        smartclip.graft(saved, new.init(half))
    assert "((3,), 'float16')" in str(error.value)
    assert "got ((3,), 'float32')" in str(error.value)


def test_a_leaf_without_a_counterpart_is_refused_by_its_name_in_either_direction():
    with pytest.raises(ValueError, match="`saved` has nothing for '1/0/trace/bias'"):
        smartclip.graft(after(adam()), optax.chain(autoclip(), sgd()).init(PARAMS))
    with pytest.raises(ValueError, match="`opt_state` has no place for") as error:
        smartclip.graft(after(adam()), optax.chain(autoclip(), optax.sgd(0.1)).init(PARAMS))
    for name in ("0/count", "0/mu/bias", "0/nu/body/kernel"):
        assert repr(name) in str(error.value)
    more = PARAMS | {"scale": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="has nothing for '0/trace/scale'"):
        smartclip.graft(after(sgd()), sgd().init(more))
    with pytest.raises(ValueError, match=r"has no place for \['0/trace/scale'\]"):
        smartclip.graft(after(sgd(), more), sgd().init(PARAMS))


def test_neither_state_is_changed(tmp_path):
    saved = after(optax.chain(autoclip(), sgd()))
    fresh = optax.chain(sgd(), autoclip(), smartclip.zscore_clip()).init(PARAMS)
    for form in in_every_form(saved, tmp_path):
        before = [jax.tree.map(np.array, tree) for tree in (form, fresh)]
        smartclip.graft(form, fresh)
        assert_same_bits([form, fresh], before)


def test_results_are_the_same_under_jit_and_eval_shape():
    saved = after(optax.chain(autoclip(), sgd()))
    fresh = optax.chain(sgd(), autoclip(), smartclip.agc()).init(PARAMS)
    expected = smartclip.graft(saved, fresh)
    assert_same_bits(jax.jit(smartclip.graft)(saved, fresh), expected)
    shapes = jax.eval_shape(smartclip.graft, saved, fresh)
    assert jax.tree.structure(shapes) == jax.tree.structure(expected)


def test_the_new_state_may_consist_of_shapes():
    saved = after(optax.chain(autoclip(), sgd()))
    new = optax.chain(sgd(), autoclip())
    shapes = jax.eval_shape(new.init, PARAMS)
    assert_same_bits(smartclip.graft(saved, shapes), smartclip.graft(saved, new.init(PARAMS)))


def test_float64_is_not_taken_for_float32():
    saved = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), after(sgd()))
    with pytest.raises(ValueError, match=r"'float32'\), as `opt_state` has, got .*'float64'"):
        smartclip.graft(saved, sgd().init(PARAMS))


NUMBERED = {
    "two shapes": {"0": np.zeros(3, np.float32), "1": np.zeros((2, 2), np.float32)},
    "one shape": {"0": np.zeros(3, np.float32), "1": np.zeros(3, np.float32)},
    "a list": [np.zeros(3, np.float32), np.zeros(3, np.float32)],
    # Among strings, "10" comes before "2".
    "a long list": [np.zeros(2, np.float32)] * 12,
    "numbers": dict.fromkeys(range(12), np.zeros(2, np.float32)),
    "names of numbers": dict.fromkeys(map(str, range(12)), np.zeros(2, np.float32)),
    "within and beside": {
        "0": {"w": np.zeros(3, np.float32)},
        "1": {"w": np.zeros(3, np.float32)},
        "w": np.zeros(3, np.float32),
    },
}


@pytest.mark.parametrize("params", NUMBERED.values(), ids=NUMBERED)
def test_parameters_whose_names_are_numbers_keep_their_order(params, tmp_path):
    saved = after(adam(), params)
    new = optax.chain(autoclip(), adam())
    for form in in_every_form(saved, tmp_path):
        grafted = smartclip.graft(form, new.init(params))
        assert_same_bits(jax.tree.map(jnp.asarray, grafted[1]), saved)


TWICE = {
    "two in a chain": lambda: optax.chain(optax.trace(0.9), optax.trace(0.5)),
    "one for each label": lambda: optax.partition(
        {"x": optax.trace(0.9), "y": optax.trace(0.5)}, {"bias": "x", "body": "y"}
    ),
    "one for each numbered label": lambda: optax.partition(
        {"0": optax.trace(0.9), "1": optax.trace(0.5)}, {"bias": "1", "body": "0"}
    ),
}


@pytest.mark.parametrize("old", TWICE.values(), ids=TWICE)
def test_two_optimizers_of_one_kind_are_not_mixed_up(old, tmp_path):
    saved = after(old())
    new = optax.chain(autoclip(), old())
    for form in in_every_form(saved, tmp_path):
        grafted = smartclip.graft(form, new.init(PARAMS))
        assert_same_bits(jax.tree.map(jnp.asarray, grafted[1]), saved)


def partition(x, y):
    return optax.partition({"x": x, "y": y}, {"bias": "x", "body": "y"})


NAMED = {
    "one part of a partition": (
        lambda: partition(optax.chain(autoclip(), sgd()), optax.chain(autoclip(), sgd())),
        lambda: partition(sgd(), optax.chain(autoclip(), sgd())),
        lambda state: state.inner_states["y"].inner_state[0],
    ),
    "one link of a named chain": (
        lambda: optax.named_chain(("a", autoclip()), ("b", sgd()), ("c", autoclip())),
        lambda: optax.named_chain(("b", sgd()), ("c", autoclip())),
        lambda state: state["c"],
    ),
}


@pytest.mark.parametrize(("old", "new", "clipper"), NAMED.values(), ids=NAMED)
def test_a_clipper_goes_on_under_its_own_name_only(old, new, clipper, tmp_path):
    saved = after(old())
    # Flax cannot serialize the OrderedDict of a named chain.
    saved = dict(saved) if isinstance(saved, dict) else saved
    for form in in_every_form(saved, tmp_path):
        grafted = smartclip.graft(form, new().init(PARAMS))
        assert_same_bits(jax.tree.map(jnp.asarray, clipper(grafted)), clipper(saved))
    elsewhere = optax.named_chain(("b", sgd()), ("d", autoclip()))
    if isinstance(saved, dict):
        assert_same_bits(
            smartclip.graft(saved, elsewhere.init(PARAMS))["d"], autoclip().init(PARAMS)
        )


def test_a_clipper_with_scheduled_arguments_comes_and_goes_as_a_whole(tmp_path):
    scheduled = optax.inject_hyperparams(smartclip.autoclip, static_args="scope")(
        percentile=optax.constant_schedule(90.0)
    )
    new = optax.chain(scheduled, sgd())
    without = after(sgd())
    fresh = new.init(PARAMS)
    assert_same_bits(smartclip.graft(without, fresh), (fresh[0], without))
    saved = after(new)
    moved = optax.chain(sgd(), scheduled)
    for form in in_every_form(saved, tmp_path):
        assert_same_bits(
            jax.tree.map(jnp.asarray, smartclip.graft(form, sgd().init(PARAMS))), saved[1]
        )
        grafted = smartclip.graft(form, moved.init(PARAMS))
        assert_same_bits(jax.tree.map(jnp.asarray, grafted), (saved[1], saved[0]))


def skipping(clipper):
    return smartclip.skip_spikes(optax.chain(clipper(), adam()), warmup_steps=STEPS - 1)


def test_skip_spikes_can_be_added_and_removed_without_loss_of_the_inner_state(tmp_path):
    bare, wrapped = optax.chain(autoclip(), adam()), skipping(autoclip)
    saved = after(bare)
    for form in in_every_form(saved, tmp_path / "bare"):
        adopted = smartclip.graft(form, wrapped.init(PARAMS))
        assert_same_bits(jax.tree.map(jnp.asarray, adopted.inner_state), saved)
        assert_same_bits(adopted.detector, wrapped.init(PARAMS).detector)
    saved = after(wrapped)
    assert saved.detector.num_observed[0] == STEPS
    for form in in_every_form(saved, tmp_path / "wrapped"):
        assert_same_bits(
            jax.tree.map(jnp.asarray, smartclip.graft(form, bare.init(PARAMS))), saved.inner_state
        )
        # With another clipper inside, its detector and the state of Adam go on.
        other = smartclip.graft(form, skipping(lambda: autoclip(size=5)).init(PARAMS))
        assert_same_bits(jax.tree.map(jnp.asarray, other.detector), saved.detector)
        assert_same_bits(jax.tree.map(jnp.asarray, other.inner_state[1]), saved.inner_state[1])
        assert other.inner_state[0].last.num_steps == 0


# Models that change.


def of_each(scope="per_param", size=4):
    return smartclip.autoclip(90.0, history=smartclip.ring_buffer(size), scope=scope)


def labels_of(saved, params, scope="per_param"):
    """Arguments of `graft` that identify groups by their labels."""
    return {
        "saved_labels": smartclip.group_labels(scope, saved),
        "labels": smartclip.group_labels(scope, params),
    }


def zeros(*shape):
    return np.zeros(shape, np.float32)


def without(tree, *names):
    return {name: tree[name] for name in tree if name not in names}


BASE = {"dense": {"kernel": zeros(3, 2)}, "head": {"kernel": zeros(2, 2), "bias": zeros(2)}}
LAYERS = [{"w": zeros(3)}, {"w": zeros(3)}]
NUMBERS = {"0": zeros(2), "1": zeros(2), "2": zeros(2)}
CHANGES = {
    "LoRA": (BASE, BASE | {"a_lora": {"A": zeros(3, 1), "B": zeros(1, 2)}}),
    "a layer more": (LAYERS, [*LAYERS, {"w": zeros(3)}]),
    "a layer less": (LAYERS, LAYERS[:1]),
    "a new head": (BASE, BASE | {"head": {"kernel": zeros(2, 5), "bias": zeros(5)}}),
    "a parameter in place of another": (BASE, without(BASE, "head") | {"tail": BASE["head"]}),
    "a number in place of another": (NUMBERS, without(NUMBERS, "1") | {"3": zeros(2)}),
    "a list in a list less": ([zeros(2), [zeros(2)]], [zeros(2)]),
    "another shape under a longer name": (
        {"w": zeros(2), "w2": zeros(2)},
        {"w": zeros(2), "w2": zeros(3)},
    ),
    "nothing in common": ({"v": zeros(2), "w": zeros(2)}, {"x": zeros(2), "y": zeros(2)}),
}


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


# The initial state of a clipper of one group.
ALONE = jax.tree.map(np.asarray, of_each().init({"x": zeros(1)}))


def row(clipper, group, num_groups):
    """The part of a state that belongs to one group, with the shapes of a state of one group."""
    return jax.tree.map(
        lambda leaf, like: np.reshape(np.reshape(leaf, (num_groups, -1))[group], like.shape),
        clipper,
        ALONE,
    )


@pytest.mark.parametrize(("before", "now"), CHANGES.values(), ids=CHANGES)
def test_common_parameters_go_on_and_the_others_start(before, now, tmp_path):
    tx = optax.chain(of_each(), adam())
    saved, new = after(tx, before), tx.init(now)
    old_shapes, shapes = ({n: x.shape for n, x in by_name(t).items()} for t in (before, now))
    moments = {name: by_name(getattr(saved[1][0], name)) for name in ("mu", "nu")}
    told = [
        *[f"started {f'1/0/{m}/{n}'!r}" for m in moments for n in shapes.keys() - old_shapes],
        *[
            f"started {f'1/0/{m}/{n}'!r}: its shape is {shapes[n]} and was {old_shapes[n]}"
            for m in moments
            for n in shapes.keys() & old_shapes
            if shapes[n] != old_shapes[n]
        ],
        *[f"left out {f'1/0/{m}/{n}'!r}" for m in moments for n in old_shapes.keys() - shapes],
        *[f"started '0', group {n!r}" for n in shapes if shapes[n] != old_shapes.get(n)],
        *[f"left out '0', group {n!r}" for n in old_shapes.keys() - shapes],
    ]
    # Groups are in the order of the leaves.
    kept_names = [name for name in shapes if shapes[name] == old_shapes.get(name)]
    groups = dict.fromkeys(shapes, ALONE) | {
        name: row(saved[0], group, len(old_shapes))
        for group, name in enumerate(old_shapes)
        if name in kept_names
    }
    for form in in_every_form(saved, tmp_path):
        lines = []
        state = smartclip.graft(form, new, on_mismatch=lines.append, **labels_of(before, now))
        assert sorted(lines) == sorted(told)
        assert jax.tree.structure(state) == jax.tree.structure(new)
        assert state[1][0].count == STEPS
        for moment, of_name in moments.items():
            for name, leaf in by_name(getattr(state[1][0], moment)).items():
                np.testing.assert_array_equal(leaf, of_name[name] if name in kept_names else 0)
        for group, name in enumerate(shapes):
            assert_same_bits(row(state[0], group, len(shapes)), groups[name])


NAMES = st.lists(st.sampled_from("abcde"), min_size=2, max_size=4, unique=True)


@functools.cache
def initial_state(num_groups):
    tx = smartclip.zscore_clip(scope="per_param")
    return jax.tree.map(np.asarray, tx.init([zeros(1)] * num_groups))


@hypothesis.given(before=NAMES, now=NAMES)
def test_each_label_keeps_its_history_or_starts(before, now):
    fresh = initial_state(len(now))
    marks = np.asarray([ord(name) for name in before])
    saved = jax.tree.map(lambda leaf: marks.astype(leaf.dtype), initial_state(len(before)))
    state = smartclip.graft(saved, fresh, on_mismatch=[].append, saved_labels=before, labels=now)
    for leaf, initial in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
        assert (leaf.shape, leaf.dtype) == (initial.shape, initial.dtype)
        for group, name in enumerate(now):
            expected = np.asarray(ord(name), leaf.dtype) if name in before else initial[group]
            assert leaf[group] == expected


def test_by_default_a_changed_model_is_an_error_that_names_on_mismatch():
    saved, (before, now) = after(optax.chain(of_each(), sgd()), BASE), CHANGES["LoRA"]
    for old, new in (before, now), (now, before), CHANGES["a new head"]:
        for tx in sgd(), optax.chain(of_each(), sgd()):
            with pytest.raises(ValueError, match="`on_mismatch=print`"):
                smartclip.graft(tx.init(old), tx.init(new))
    # It is one with labels, too, even if the optimizer has no state for parameters.
    clipper = optax.chain(of_each(), optax.sgd(0.1))
    for old, new, message in (
        (before, now, "`saved_labels` has nothing for 'a_lora/A' of `labels`"),
        (now, before, "`labels` has no place for 'a_lora/A' of `saved_labels`"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            smartclip.graft(clipper.init(old), clipper.init(new), **labels_of(old, new))
        assert "`on_mismatch=print`" in str(error.value)
    assert_same_bits(
        smartclip.graft(saved, optax.chain(of_each(), sgd()).init(BASE), **labels_of(BASE, BASE)),
        saved,
    )


def test_without_labels_a_clipper_goes_on_only_if_it_has_one_group():
    lines = []
    tx = optax.chain(autoclip(), of_each(), sgd())
    now = CHANGES["a parameter in place of another"][1]
    saved, fresh = after(tx, BASE), tx.init(now)
    state = smartclip.graft(saved, fresh, on_mismatch=lines.append)
    assert_same_bits(state[:2], (saved[0], fresh[1]))
    # The number of groups is the same, the groups are not.
    assert "started '1': `saved_labels` and `labels` do not tell its groups" in lines
    assert "left out '1'" in lines
    state = smartclip.graft(saved, fresh, on_mismatch=[].append, **labels_of(BASE, now))
    assert_same_bits(state[0], saved[0])
    assert list(state[1].num_observed) == [STEPS, 0, 0]


@pytest.mark.parametrize(
    ("scope", "known"),
    [
        ("per_layer", [STEPS, 0]),
        # Labels of the user do not name parameters.
        ({"dense": "x", "head": "y"}, [STEPS, STEPS]),
    ],
    ids=["per_layer", "labels of the user"],
)
def test_the_group_of_a_layer_starts_if_one_of_its_parameters_has_another_shape(scope, known):
    before, now = CHANGES["a new head"]
    tx = optax.chain(of_each(scope), sgd())
    saved, labels = after(tx, before), labels_of(before, now, scope)
    state = smartclip.graft(saved, tx.init(now), on_mismatch=[].append, **labels)
    assert list(state[0].num_observed) == known


def test_added_and_removed_clippers_are_reported():
    lines = []
    saved = after(optax.chain(autoclip(), sgd()))
    new = optax.chain(sgd(), smartclip.zscore_clip())
    smartclip.graft(saved, new.init(PARAMS), on_mismatch=lines.append)
    assert lines == ["started '1'", "left out '0'"]


def test_a_clipper_without_groups_goes_on_and_nothing_is_reported():
    lines = []
    state = smartclip.autoclip(scope="per_param").init({})
    assert_same_bits(smartclip.graft(state, state, on_mismatch=lines.append), state)
    assert lines == []


def test_states_that_only_their_order_identifies_go_on_only_if_all_are_there():
    lines = []
    saved = after(optax.chain(optax.trace(0.9), optax.trace(0.5)))
    same = smartclip.graft(
        saved, optax.chain(optax.trace(0.9), optax.trace(0.5)).init(PARAMS), on_mismatch=print
    )
    assert_same_bits(same, saved)
    one = smartclip.graft(saved, optax.trace(0.5).init(PARAMS), on_mismatch=lines.append)
    assert_same_bits(one, optax.trace(0.5).init(PARAMS))
    assert len(lines) == 6


FREEZERS = {
    "masked": (
        lambda tx, mask: optax.masked(tx, mask),
        lambda state: state.inner_state,
    ),
    "partition": (
        lambda tx, mask: optax.partition({True: tx, False: optax.set_to_zero()}, mask),
        lambda state: state.inner_states[True].inner_state,
    ),
}


@pytest.mark.parametrize(("freeze", "inside"), FREEZERS.values(), ids=FREEZERS)
@pytest.mark.parametrize(("frozen", "thawed"), [("base", "lora"), ("lora", "base")])
def test_parameters_that_stay_trained_go_on_when_others_are_frozen(freeze, inside, frozen, thawed):
    params = {name: {"w": zeros(2)} for name in ("base", "head", "lora")}
    before, now = (
        freeze(optax.chain(of_each(), adam()), {name: name != out for name in params})
        for out in (thawed, frozen)
    )
    saved = after(before, params)
    labels = labels_of(without(params, thawed), without(params, frozen))
    lines = []
    state = smartclip.graft(saved, now.init(params), on_mismatch=lines.append, **labels)
    # Two moments and a group of each parameter that thaws or freezes.
    assert len(lines) == 6
    (old_clipper, (old_adam, _)), (clipper, (new_adam, _)) = inside(saved), inside(state)
    assert new_adam.count == STEPS
    for moment in "mu", "nu":
        assert_same_bits(getattr(new_adam, moment)["head"], getattr(old_adam, moment)["head"])
        assert_same_bits(getattr(new_adam, moment)[thawed], {"w": jnp.zeros(2)})
    row_of = {each: names.index for each, names in labels.items()}
    assert_same_bits(
        row(clipper, row_of["labels"]("head/w"), 2),
        row(old_clipper, row_of["saved_labels"]("head/w"), 2),
    )
    assert_same_bits(row(clipper, row_of["labels"](f"{thawed}/w"), 2), ALONE)


WITHIN = {
    "skip_spikes": lambda tx: smartclip.skip_spikes(tx, warmup_steps=2),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "inject_hyperparams": WRAPPERS["inject_hyperparams"],
}


@pytest.mark.parametrize("wrap", WITHIN.values(), ids=WITHIN)
def test_groups_follow_their_labels_inside_a_wrapper(wrap, tmp_path):
    before, now = {"b": zeros(2), "c": zeros(2)}, {name: zeros(2) for name in "abc"}
    tx = wrap(optax.chain(of_each(), sgd()))
    saved = after(tx, before)
    for form in in_every_form(saved, tmp_path):
        state = smartclip.graft(form, tx.init(now), on_mismatch=[].append, **labels_of(before, now))
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(now))
        for name, leaf in by_name(state).items():
            old = by_name(saved).get(name)
            if old is None:
                assert name.split("/")[-1] == "a"
            elif leaf.shape == old.shape:
                np.testing.assert_array_equal(leaf, old, err_msg=name)
            else:
                assert leaf.shape[0] == 3
                np.testing.assert_array_equal(leaf[1:], old, err_msg=name)


def test_a_clipper_with_scheduled_arguments_keeps_its_count_and_its_groups():
    scheduled = optax.inject_hyperparams(smartclip.autoclip, static_args="scope")(
        percentile=optax.constant_schedule(90.0), scope="per_param"
    )
    tx = optax.apply_if_finite(scheduled, 3)
    before, now = {"b": zeros(2)}, {"a": zeros(2), "b": zeros(2)}
    saved, labels = after(tx, before), labels_of(before, now)
    state = smartclip.graft(saved, tx.init(now), on_mismatch=[].append, **labels)
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, tx.init(now))
    assert state.inner_state.count == STEPS
    assert list(state.inner_state.inner_state.last.num_steps) == [0, STEPS]
    assert list(state.inner_state.inner_state.rule.length) == [0, STEPS]


def narrow(tree):
    """The tree with floats in bfloat16, as some programs save an optimizer's state."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, tree
    )


def test_a_state_in_bfloat16_goes_on_with_cast(tmp_path):
    tx = optax.chain(
        smartclip.autoclip(history=smartclip.ring_buffer(8), scope="per_param"), adam()
    )
    # Norms that bfloat16 represents exactly, fewer than the window has.
    grads = [jax.tree.map(lambda leaf: np.full_like(leaf, 0), PARAMS) for _ in range(STEPS)]
    for step, grad in enumerate(grads):
        grad["bias"][0] = grad["body"]["kernel"][0, 0] = 1 + step
    _, saved = run(tx, grads=grads, compiled=True)
    for form in in_every_form(narrow(saved), tmp_path):
        with pytest.raises(ValueError, match="With `cast=True`, it is cast"):
            smartclip.graft(form, tx.init(PARAMS))
        state = smartclip.graft(form, tx.init(PARAMS), cast=True)
        assert_same_bits(state[0].rule, saved[0].rule)
        assert_same_bits(state[0].num_observed, saved[0].num_observed)
        rounded = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), narrow(saved[1][0].mu))
        assert_same_bits(jax.tree.map(jnp.asarray, state[1][0].mu), rounded)
        assert state[1][0].count.dtype == np.int32


@pytest.mark.parametrize("name", CLIPPERS)
def test_an_initial_state_survives_bfloat16(name):
    state = CLIPPERS[name]().init(PARAMS)
    assert_same_bits(smartclip.graft(narrow(state), state, cast=True), state)


def test_a_cast_state_goes_on_by_group():
    before, now = {"b": zeros(2)}, {"a": zeros(2), "b": zeros(2)}
    tx = optax.chain(of_each(size=8), sgd())
    saved = after(tx, before)
    labels, told = labels_of(before, now), [].append
    state = smartclip.graft(narrow(saved), tx.init(now), on_mismatch=told, cast=True, **labels)
    in_full = smartclip.graft(saved, tx.init(now), on_mismatch=told, **labels)
    assert_close(state, in_full, rtol=2**-8)
    with pytest.raises(ValueError, match="With `cast=True`, it is cast"):
        smartclip.graft(narrow(saved), tx.init(now), on_mismatch=told, **labels)


@pytest.mark.parametrize(
    "wrap", [smartclip.skip_spikes, functools.partial(smartclip.keep_last_good, every=3)]
)
def test_a_clipper_goes_on_when_what_is_around_it_alone_comes_or_goes(wrap):
    within, alone = after(wrap(autoclip())), after(autoclip())
    assert_same_bits(smartclip.graft(within, autoclip().init(PARAMS)), within.inner_state)
    assert_same_bits(smartclip.graft(alone, wrap(autoclip()).init(PARAMS)).inner_state, alone)


def test_a_clipper_in_bfloat16_starts_without_cast():
    tx = optax.chain(autoclip(), sgd())
    saved, fresh = after(tx), tx.init(PARAMS)
    state = smartclip.graft((narrow(saved[0]), saved[1]), fresh)
    assert_same_bits(state, (fresh[0], saved[1]))


def test_integers_are_not_cast():
    state = after(sgd(), {"w": zeros(2)})
    for leaf in jnp.zeros(2, jnp.int32), np.zeros(2, np.int64), np.zeros(2, bool):
        for old, new in ((leaf, zeros(2)), (zeros(2), leaf)):
            with pytest.raises(ValueError, match="must have '0/trace/w' with shape and dtype"):
                smartclip.graft(
                    optax.tree.set(state, trace={"w": old}),
                    optax.tree.set(state, trace={"w": new}),
                    on_mismatch=print,
                    cast=True,
                )


def test_groups_that_move_need_values_and_other_leaves_only_shapes():
    before, now = {"b": zeros(2)}, {"a": zeros(2), "b": zeros(2)}
    tx = optax.chain(of_each(), sgd())
    saved = after(tx, before)
    shapes, told = jax.eval_shape(tx.init, now), [].append
    state = smartclip.graft(saved, shapes, on_mismatch=told)
    assert state[1][0].trace == {"a": shapes[1][0].trace["a"], "b": saved[1][0].trace["b"]}
    for form, arguments in ((saved, labels_of(before, now)), (narrow(saved), {"cast": True})):
        like = shapes if "labels" in arguments else jax.eval_shape(tx.init, before)
        with pytest.raises(ValueError, match="`opt_state` must have arrays"):
            smartclip.graft(form, like, on_mismatch=told, **arguments)


def test_a_grown_state_is_the_same_under_jit():
    before, now = CHANGES["LoRA"]
    tx = optax.chain(of_each(), sgd())
    saved = after(tx, before)

    def grow(saved, fresh):
        labels = labels_of(before, now)
        return smartclip.graft(saved, fresh, on_mismatch=[].append, cast=True, **labels)

    for form in saved, narrow(saved):
        assert_same_bits(jax.jit(grow)(form, tx.init(now)), grow(form, tx.init(now)))


WRONG = {
    "on_mismatch": {"on_mismatch": "init"},
    "cast": {"cast": 1},
    "given together": {"labels": ("bias", "body/kernel")},
    "`saved_labels` must be different labels": {
        "saved_labels": ("bias",),
        "labels": ("bias", "body/kernel"),
    },
    "`labels` must be different labels": {
        "saved_labels": ("bias", "body/kernel"),
        "labels": ("bias", "bias"),
    },
}


@pytest.mark.parametrize(("message", "arguments"), WRONG.items(), ids=WRONG)
def test_wrong_arguments_are_refused(message, arguments):
    state = of_each().init(PARAMS)
    with pytest.raises(ValueError, match=message):
        smartclip.graft(state, state, **arguments)


def test_adam_moves_a_new_parameter_by_up_to_six_and_a_half_rates():
    """With a large count, Adam does not correct moments that start at zero."""
    tx = optax.adam(1.0)
    saved = optax.tree.set(tx.init({"w": zeros(1)}), count=jnp.asarray(100_000, jnp.int32))
    now = {"v": zeros(1), "w": zeros(1)}
    state = smartclip.graft(saved, tx.init(now), on_mismatch=[].append)
    grads = [jax.tree.map(np.ones_like, now) for _ in range(20)]
    updates, _ = run(tx, state, now, grads, compiled=True)
    steps = np.arange(1, 21)
    expected = (1 - 0.9**steps) / np.sqrt(1 - 0.999**steps)
    np.testing.assert_allclose([-update["v"][0] for update in updates], expected, rtol=1e-3)
    assert round(max(expected), 1) == 6.6


def test_by_default_numbers_are_not_names_even_below_a_wrapper():
    """The state of the optimizer is not a named tuple, and it moves within a chain."""

    def init(params):
        return flax.core.FrozenDict(momentum=params)

    custom = optax.GradientTransformation(
        init, lambda updates, state, params=None: (updates, state)
    )
    old, new = (optax.apply_if_finite(tx, 3) for tx in (custom, optax.chain(autoclip(), custom)))
    state = smartclip.graft(old.init(PARAMS), new.init(jax.tree.map(np.zeros_like, PARAMS)))
    assert_same_bits(state.inner_state[1], init(PARAMS))
