"""Training runs with any sequence of events: hypothesis looks for one that breaks a promise.

Ordinary steps, spikes, NaN and Inf, zeros, the smallest and largest numbers, other dtypes of the
gradient, jitted, donated and eager steps, checkpoints and crashes come in any order. After each
step the clipper is compared with a float64 record of the run that is kept in plain Python.
"""

import collections
import copy
import dataclasses
import functools
import itertools
import pickle
from typing import Any

import flax.serialization
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import running_reference
from clipper_table import MACHINE, TABLE, Row, default_scope, rows_of
from hypothesis import Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from trees import assert_same_bits, random_tree

import optax_smartclip as smartclip
from optax_smartclip.clippers.zscore_clip import zscore_rule

SHAPES = {"body": {"bias": (3,), "kernel": (2, 3)}, "head": {"kernel": (2,)}}
PARAMS = random_tree(0, 1.0, SHAPES)
SIZE = 0.1
GROUPS = {
    "global": [(0, 1, 2)],
    "per_layer": [(0, 1), (2,)],
    "per_param": [(0,), (1,), (2,)],
}
FLOAT32, FLOAT16, BFLOAT16 = map(jnp.dtype, ("float32", "float16", "bfloat16"))
LARGEST = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)
MOMENTUM = 0.9

# Some examples start after that many steps, which are enough for every warm-up.
WARMED_UP = 110


# Hypothesis does not look for the shortest failing run, which would take minutes.
SETTINGS = settings(max_examples=6, stateful_step_count=25, phases=[Phase.generate])
UNTIL_FOUND = settings(SETTINGS, max_examples=200)


@dataclasses.dataclass(frozen=True)
class Case:
    """A clipper and its reference.

    Attributes:
        tx: The transformation.
        row: Its row of the table: thresholds and counters.
        half: The second dtype of its gradients, after float32. It is compiled for these two.
        scope: Its scope.
        max_norm: Its ceiling.
        skips: Whether `skip_spikes` is around it, and momentum after it.
        eager: Whether some runs have a step that is not jitted.
    """

    tx: Any
    row: Row
    half: Any
    scope: str = "global"
    max_norm: float = np.inf
    skips: bool = False
    eager: bool = True


def to_float32(updates, params=None):
    """Momentum is in float32, and types are not mixed."""
    del params
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates)


# Arguments that the table does not have.
OPTIONS = {
    "autoclip_p90_per_layer": {"scope": "per_layer"},
    "zclip": {"max_norm": 1.0},
}
# An eager step takes seconds in these.
SLOW = {"autoclip", "autoclip_p90_per_layer", "adagc"}


def case_of(name, half):
    row = TABLE[name]
    options = {"scope": default_scope(row.factory), **OPTIONS.get(name, {})}
    return Case(row.factory(**options), row, half, **options, eager=name not in SLOW)


CASES = {
    name: case_of(name, half)
    for name, half in zip(rows_of(MACHINE), itertools.cycle([BFLOAT16, FLOAT16]), strict=False)
}
CASES["skip_spikes"] = Case(
    smartclip.skip_spikes(
        optax.chain(smartclip.autoclip(), optax.stateless(to_float32), optax.trace(MOMENTUM))
    ),
    TABLE["autoclip"],
    FLOAT16,
    skips=True,
    eager=False,
)
OUTLIERS = running_reference.outliers()


class Steps:
    """The compiled steps of a clipper, and how often each was traced."""

    def __init__(self, case):
        self.case = case
        self.traces = collections.Counter()
        self._kept = jax.jit(self._update)
        self._donated = jax.jit(self._update, donate_argnums=1)

    def _update(self, grads, state):
        self.traces[dtype_of(grads)] += 1
        return self.case.tx.update(grads, state)

    def jitted(self, grads, state):
        # Each dtype has one of the two, which halves the time of compilation.
        step = self._donated if dtype_of(grads) == FLOAT32 else self._kept
        return step(grads, state)

    def eager(self, grads, state):
        # A restored state has NumPy's arrays, which the annotations that tests enforce refuse.
        return self.case.tx.update(grads, jax.tree.map(jnp.asarray, state))

    @functools.cached_property
    def warmed_up(self):
        """The state after some steps, and the record of them."""
        state, book = self.case.tx.init(PARAMS), Book()
        for seed in range(WARMED_UP):
            grads = gradient(seed, np.exp(0.2 * np.sin(seed**2)))
            _, state = self.jitted(grads, state)
            book.add(self.case, grads, numpy_copy(state))
        return numpy_copy(state), book


def gradient(seed, size, dtype=FLOAT32):
    """A random gradient. Elements beyond its dtype become infinite."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(SIZE * size * rng.normal(size=shape)).astype(dtype)

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def dtype_of(tree):
    return jax.tree.leaves(tree)[0].dtype


def numpy_copy(tree):
    return jax.tree.map(np.array, tree)


def kinds(tree):
    """The properties for which `jit` compiles again when they change."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


def clip_state(case, state):
    return state.inner_state[0] if case.skips else state


def split(case, tree):
    """The leaves of each group."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [[leaves[place] for place in places] for places in GROUPS[case.scope]]


def learned(state):
    """The leaves of a state by path, without the reported record."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if ".last" not in jax.tree_util.keystr(path)
    }


def agrees(actual, low, high):
    """Whether a threshold is between two bounds, which may be equal."""
    with np.errstate(over="ignore", invalid="ignore"):
        # Whether a number next to the largest float32 is still finite depends on rounding.
        if low > LARGEST * (1 - 1e-5):
            return actual > LARGEST * (1 - 1e-4)
        return low * (1 - 1e-5) - 8 * TINY <= actual <= high * (1 + 1e-5) + 8 * TINY


@dataclasses.dataclass
class Book:
    """A record of the run in plain Python: norms as they arrived, and counts.

    Attributes:
        norms: The norms that the clipper was given, a row for each step.
        clipped: How often each group was clipped.
        seen: With `skip_spikes`, the norm of every step, dropped ones included.
        skipped: How many steps were dropped.
        in_a_row: The number of spikes since the last step that was not one.
    """

    norms: list = dataclasses.field(default_factory=list)
    clipped: Any = 0
    seen: list = dataclasses.field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0

    def add(self, case, grads, state):
        """Checks norms, decisions and counters of a step; returns whether it was dropped."""
        if case.skips and self._add_to_detector(case, grads, state.detector):
            return True
        clip = clip_state(case, state)
        last = jax.tree.map(np.atleast_1d, clip.last)
        for group, norm in zip(split(case, grads), last.grad_norm, strict=True):
            check_norm(norm, reference.norm(group))
        self.norms.append(reference.unreported(last.grad_norm))
        norms = np.array(self.norms, np.float64)
        now, finite = norms[-1], np.isfinite(norms)

        expected = np.minimum(case.row.thresholds(norms)[..., -1, :], case.max_norm)
        low, high = expected if expected.ndim == 2 else (expected, expected)
        clipped = finite[-1] & (now > low)
        for group in np.flatnonzero(finite[-1] & (now > 0)):
            threshold, bounds = last.clip_threshold[group], (low[group], high[group])
            assert agrees(threshold, *bounds), (threshold, bounds)
            if agrees(now[group], *bounds):
                clipped[group] = now[group] > threshold
        assert np.isfinite(jax.tree.leaves(last)).all()
        np.testing.assert_array_equal(last.clipped, clipped)
        self.clipped = self.clipped + clipped.astype(int)

        steps = len(self.norms)
        np.testing.assert_array_equal(last.num_steps, steps)
        np.testing.assert_array_equal(last.num_clipped, self.clipped)
        np.testing.assert_array_equal(last.num_nonfinite, steps - finite.sum(axis=0))
        positive = (finite & (norms > 0)).sum(axis=0)
        np.testing.assert_array_equal(clip.num_observed, positive)
        counters = [case.row.counters(int(count)) for count in positive]
        found = learned(clip.rule)
        for name in counters[0]:
            (leaf,) = (leaf for path, leaf in found.items() if path.endswith(name))
            # The last entry of a histogram is the number of all norms.
            leaf = leaf[:, -1] if leaf.ndim == 2 else leaf
            np.testing.assert_array_equal(leaf, [count[name] for count in counters])
        return False

    def _add_to_detector(self, case, grads, detector):
        last = detector.last
        check_norm(last.skip_norm, reference.norm(grads))
        self.seen.append(float(reference.unreported(last.skip_norm)))
        seen = np.array(self.seen)
        finite = np.isfinite(seen)
        expected = OUTLIERS(seen[:, None])[-1, 0]
        threshold = last.skip_norm_threshold
        assert agrees(threshold, expected, expected), (threshold, expected)
        spike = seen[-1] > expected
        if agrees(seen[-1], expected, expected):
            spike = seen[-1] > threshold
        dropped = not finite[-1] or bool(spike and self.in_a_row < 32)
        if finite[-1] and seen[-1] > 0:
            self.in_a_row = self.in_a_row + 1 if dropped else 0
        self.skipped += dropped
        assert last.skipped == dropped
        assert (last.num_skipped, detector.num_in_a_row) == (self.skipped, self.in_a_row)
        positive = np.sum(finite & (seen > 0))
        np.testing.assert_array_equal(detector.num_observed, [positive, 0])
        np.testing.assert_array_equal(detector.history.length, [min(positive, 128), 0])
        return dropped


def check_norm(actual, expected):
    """Compares two norms, which may differ by elements below the normal numbers."""
    if expected > LARGEST * (1 - 1e-6) or not np.isfinite(expected):
        assert actual > LARGEST * (1 - 1e-5)
    else:
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=8 * TINY)


def smallest(array):
    """The largest element that may be lost, as numbers below the normal ones may become zero."""
    return max(TINY, float(jnp.finfo(array.dtype).smallest_subnormal))


def check_updates(case, grads, updates, record, before):
    """Checks that each group is its gradient times its scale, and within its threshold."""
    record = jax.tree.map(np.atleast_1d, record)
    norms, limits, scales = (
        x.astype(np.float64) for x in (record.grad_norm, record.clip_threshold, record.clip_scale)
    )
    finite = norms < LARGEST
    assert np.all((scales >= 0) & (scales <= 1))
    np.testing.assert_array_equal(scales == 1, finite & (norms <= limits))
    over = finite & (norms > limits)
    np.testing.assert_allclose(scales[over], limits[over] / norms[over], rtol=1e-6, atol=2 * TINY)
    np.testing.assert_array_equal(scales[~finite], 0)

    carried = split(case, before.inner_state[2].trace) if case.skips else None
    groups = zip(split(case, grads), split(case, updates), strict=True)
    for number, (grad, update) in enumerate(groups):
        for place, (g, u) in enumerate(zip(grad, update, strict=True)):
            assert u.dtype == (np.float32 if case.skips else g.dtype)
            clipped = scales[number] * g.astype(np.float64) if finite[number] else np.zeros(g.shape)
            # A group within its threshold keeps every bit.
            rounding = float(jnp.finfo(g.dtype).eps) + 1e-6 if over[number] else 0.0
            unsure = rounding * abs(clipped) + 4 * smallest(g)
            if case.skips:
                carry = MOMENTUM * carried[number][place].astype(np.float64)
                clipped, unsure = clipped + carry, unsure + 1e-6 * (abs(clipped) + abs(carry))
            assert np.all(abs(u.astype(np.float64) - clipped) <= unsure)
        if finite[number] and not case.skips:
            rounding = max(float(jnp.finfo(g.dtype).eps) for g in grad) + 2e-6
            lost = 8 * max(smallest(g) for g in grad)
            assert reference.norm(update) <= limits[number] * (1 + rounding) + lost


class TrainingRun(RuleBasedStateMachine):
    """A training run. Subclasses name the steps that it takes."""

    steps: Steps

    @initialize(
        warm=st.booleans(),
        eager=st.sampled_from([0, 0, 0, 0, 0, 1]),
        half=st.booleans(),
    )
    def start(self, warm, eager, half):
        self.case = self.steps.case
        self.state, self.book = self.case.tx.init(PARAMS), Book()
        self.kinds = kinds(self.state)
        if warm:
            self.state, self.book = copy.deepcopy(self.steps.warmed_up)
        self.before = numpy_copy(self.state)
        self.grads = gradient(0, 1.0)
        self.dtype = self.case.half if half else FLOAT32
        self.eager_steps_left = eager if self.case.eager else 0
        self.saved = self.restored = None

    def take(self, grads, step=None):
        """Takes a step, also of the restored run if there is one, and checks everything."""
        step = step or self.steps.jitted
        updates, self.state = step(grads, self.state)
        if self.restored is not None:
            theirs, self.restored = step(grads, self.restored)
            assert_same_bits((theirs, self.restored), (updates, self.state))
        self.grads = grads

        assert kinds(self.state) == self.kinds
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        after = numpy_copy(self.state)
        assert all(np.isfinite(leaf).all() for leaf in learned(after).values())
        if self.book.add(self.case, grads, after):
            assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(updates))
            assert_same_bits(after.inner_state, self.before.inner_state)
        else:
            record = clip_state(self.case, after).last
            check_updates(self.case, grads, updates, record, self.before)
        self.before = after

    def gradient(self, seed, size):
        return gradient(seed, size, self.dtype)

    @rule(seed=st.integers(0, 99), size=st.floats(0.5, 2))
    def ordinary_step(self, seed, size):
        self.take(self.gradient(seed, size))

    @rule()
    def same_gradient_again(self):
        self.take(self.grads)

    @rule(seed=st.integers(0, 99), size=st.sampled_from([10.0, 1e3, 1e6]))
    def spike(self, seed, size):
        self.take(self.gradient(seed, size))

    @rule(
        seed=st.integers(0, 99),
        leaf=st.integers(0, 2),
        value=st.sampled_from([np.nan, np.inf, -np.inf]),
    )
    def not_finite(self, seed, leaf, value):
        grads = self.gradient(seed, 1.0)
        jax.tree.leaves(grads)[leaf].flat[-1] = value
        self.take(grads)

    @rule(seed=st.integers(0, 99), leaves=st.sampled_from([(0,), (2,), (0, 1), (0, 1, 2)]))
    def zeros(self, seed, leaves):
        grads = self.gradient(seed, 1.0)
        for leaf in leaves:
            jax.tree.leaves(grads)[leaf][...] = 0
        self.take(grads)

    @rule(seed=st.integers(0, 99), size=st.sampled_from([1e-44, 1e-38, 1e-36, 1e-30, 1e-5]))
    def tiny(self, seed, size):
        self.take(self.gradient(seed, size))

    @rule(seed=st.integers(0, 99), size=st.sampled_from([1e20, 1e37, 1e38, 1e39]))
    def huge(self, seed, size):
        # Momentum adds up ten of them.
        self.take(self.gradient(seed, size / 30 if self.case.skips and size < 1e39 else size))

    @rule()
    def other_dtype(self):
        self.dtype = self.case.half if self.dtype == FLOAT32 else FLOAT32

    @precondition(lambda self: self.eager_steps_left)
    @rule(seed=st.integers(0, 99), size=st.sampled_from([1.0, 1e3, np.nan]))
    def eager_step(self, seed, size):
        self.eager_steps_left -= 1
        self.take(self.gradient(seed, size), self.steps.eager)

    @rule(way=st.sampled_from(["pickle", "flax"]))
    def checkpoint(self, way):
        """From here on, the restored run is taken along with the one that never stopped."""
        if way == "pickle":
            saved = pickle.dumps(jax.device_get(self.state))
        else:
            saved = flax.serialization.to_bytes(self.state)
        self.saved = way, saved, copy.deepcopy(self.book)
        self.restored = self.restore()
        assert_same_bits(self.restored, self.state)

    @precondition(lambda self: self.saved)
    @rule()
    def crash(self):
        """The run goes on from the last checkpoint."""
        self.state, self.book = self.restore(), copy.deepcopy(self.saved[2])
        self.before = numpy_copy(self.state)
        self.restored = None

    def restore(self):
        way, saved, _ = self.saved
        if way == "pickle":
            return pickle.loads(saved)
        return flax.serialization.from_bytes(self.case.tx.init(PARAMS), saved)


def machine(case):
    """The class of the runs with a clipper."""
    return type("TrainingRun", (TrainingRun,), {"steps": Steps(case)})


@pytest.mark.parametrize("name", CASES)
def test_no_sequence_of_events_breaks_a_promise(name):
    runs = machine(CASES[name])
    run_state_machine_as_test(runs, settings=SETTINGS)
    # Both dtypes were met, and neither was compiled for twice.
    assert runs.steps.traces == {FLOAT32: 1, CASES[name].half: 1}


def wrong(change=None, **functions):
    """zscore_clip() with functions of its rule replaced, or each step changed by `change`."""
    clipper = smartclip.clip_by_rule(zscore_rule(3.0, 0.99)._replace(**functions), warmup_steps=1)

    def update(grads, state, params=None):
        updates, after = clipper.update(grads, state, params)
        return change(updates, state, after) if change else (updates, after)

    tx = optax.GradientTransformation(clipper.init, update)
    return dataclasses.replace(CASES["zscore_clip"], tx=tx)


def leaky(state, norms, thresholds):
    after = zscore_rule(3.0, 0.99).record(state, norms, thresholds)
    return after.replace(mean=after.mean * (1 - 1e-4))


def learns_from_nonfinite(updates, before, after):
    mean = jnp.where(after.last.grad_norm < LARGEST, after.rule.mean, after.last.grad_norm)
    return updates, after.replace(rule=after.rule.replace(mean=mean))


def counts_every_step(updates, before, after):
    count = before.last.num_clipped + (after.last.clip_scale < 2).astype(jnp.int32)
    return updates, after.replace(last=after.last._replace(num_clipped=count))


def scales_too_little(updates, before, after):
    return jax.tree.map(lambda leaf: (leaf * 1.01).astype(leaf.dtype), updates), after


def turns_a_leaf(updates, before, after):
    head = {"kernel": updates["head"]["kernel"][::-1]}
    return {**updates, "head": head}, after


def reshapes_a_count(updates, before, after):
    steps = after.last.num_steps.reshape(1)
    return updates, after.replace(last=after.last._replace(num_steps=steps))


def promotes(updates, before, after):
    return to_float32(updates), after


BROKEN = {
    "a leak": lambda: wrong(record=leaky),
    "NaN in the state": lambda: wrong(learns_from_nonfinite),
    "a count of all steps": lambda: wrong(counts_every_step),
    "norms above the threshold": lambda: wrong(scales_too_little),
    "another direction": lambda: wrong(turns_a_leaf),
    "another shape of state": lambda: wrong(reshapes_a_count),
    "another type of update": lambda: wrong(promotes),
    "another threshold": lambda: dataclasses.replace(
        CASES["zscore_clip"], tx=smartclip.zscore_clip(decay=0.98)
    ),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_clipper_is_found(defect):
    runs = machine(BROKEN[defect]())
    # JAX itself warns that a state of another shape cannot be donated.
    with pytest.raises((AssertionError, UserWarning)):
        run_state_machine_as_test(runs, settings=UNTIL_FOUND)


def test_a_run_that_is_restored_without_its_history_is_found():
    class Forgetful(machine(CASES["zscore_clip"])):
        def restore(self):
            restored = jax.tree.map(jnp.asarray, super().restore())
            fresh = self.case.tx.init(PARAMS)
            return restored.replace(rule=fresh.rule)

    with pytest.raises(AssertionError):
        run_state_machine_as_test(Forgetful, settings=UNTIL_FOUND)
