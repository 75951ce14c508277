"""Training runs with any sequence of events: hypothesis looks for one that breaks a promise.

Ordinary steps, spikes, NaN and Inf, zeros, the smallest and largest numbers, other dtypes of the
gradient, jitted, donated and eager steps, checkpoints and crashes come in any order. After each
step the clipper is compared with a float64 record of the run that is kept in plain Python.
"""

import collections
import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import flax.serialization
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
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

# Steps of the run that some examples start after: enough for the warm-up of every clipper.
WARMED_UP = 110


# No search for the shortest failing run: it would take minutes.
SETTINGS = settings(max_examples=6, stateful_step_count=25, phases=[Phase.generate])
UNTIL_FOUND = settings(SETTINGS, max_examples=200)


def percentile(norms, percent, size):
    return np.percentile(reference.window(norms, len(norms), size), percent)


def percentile_of_levels(norms, percent):
    """That of all norms, those beyond the levels of a histogram moved to the last of them."""
    norms = reference.window(norms, len(norms), len(norms))
    levels = np.where(norms > 1e12, LARGEST, np.maximum(norms, float(np.float32(1e-12))))
    return np.percentile(np.where(norms == 0, 0, levels), percent)


def outlier(norms):
    past = reference.window(norms, len(norms) - 1, 128)
    if len(past) < 10:
        return np.inf
    q25, median, q75 = np.percentile(past, [25, 50, 75])
    spread = max((q75 - q25) / 1.349, 0.003 * median)
    return median + 6 * spread if spread > 0 else np.inf


def last_of(thresholds, **options):
    """From a function of reference.py that goes through a whole stream, the last threshold."""
    return lambda norms: thresholds(norms, **options)[-1]


def each(threshold):
    """For all groups [steps, groups], from a function of one; of no use where a norm is not."""
    return lambda norms: np.array(
        [threshold(group) if 0 < group[-1] < np.inf else np.nan for group in norms.T]
    )


def ring_counts(size):
    return lambda count: {"length": min(count, size), "cursor": count % size}


@dataclasses.dataclass(frozen=True)
class Case:
    """A clipper and what it is held to.

    Attributes:
        tx: The transformation.
        thresholds: From the norms [steps, groups] so far, the current one last, to thresholds.
        counts: What is in the rule's counters after so many positive, finite norms.
        scope: Its scope.
        max_norm: Its ceiling.
        above: By how much of itself a threshold may be larger than expected.
        skips: Whether `skip_spikes` is around it, and momentum behind it.
        half: What its gradients may be next to float32: one of the two, as each is compiled for.
        eager: Whether it takes a step that is not jitted, now and then. Some need seconds for it.
    """

    tx: Any
    thresholds: Callable
    counts: Callable
    scope: str = "global"
    max_norm: float = np.inf
    above: float = 1e-5
    skips: bool = False
    half: Any = BFLOAT16
    eager: bool = True


def to_float32(updates, params=None):
    """Momentum is in float32, and types are not mixed."""
    del params
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates)


CASES = {
    "autoclip": Case(
        smartclip.autoclip(),
        each(last_of(reference.lower_fence_thresholds)),
        lambda count: {"num_recorded": count, **ring_counts(48)(count)},
        eager=False,
    ),
    "autoclip_p90_per_layer": Case(
        smartclip.autoclip(90.0, history=smartclip.ring_buffer(7), scope="per_layer"),
        each(functools.partial(percentile, percent=90.0, size=7)),
        ring_counts(7),
        scope="per_layer",
        half=FLOAT16,
        eager=False,
    ),
    "autoclip_p95_geometric": Case(
        smartclip.autoclip(95.0, history=smartclip.geometric_quantile()),
        each(last_of(reference.geometric_estimates, percentile=95.0, rate=0.02)),
        lambda count: {"length": min(count, 8), "cursor": min(count, 8) % 8},
    ),
    "autoclip_p10_log_histogram": Case(
        smartclip.autoclip(10.0, history=smartclip.log_histogram(0.05)),
        each(functools.partial(percentile_of_levels, percent=10.0)),
        lambda count: {"num_at_most": count},
        above=0.05 + 1e-5,
        half=FLOAT16,
    ),
    "zscore_clip": Case(
        smartclip.zscore_clip(),
        each(last_of(reference.zscore_thresholds)),
        lambda count: {"num_recorded": count},
    ),
    "zclip": Case(
        smartclip.zclip(),
        each(lambda norms: reference.zclip_thresholds(norms)[0][-1]),
        lambda count: {"num_recorded": count},
        max_norm=1.0,
        half=FLOAT16,
    ),
    "adagc": Case(
        smartclip.adagc(),
        last_of(reference.adagc_thresholds),
        lambda count: {"num_recorded": count},
        scope="per_param",
        eager=False,
    ),
    "skip_spikes": Case(
        smartclip.skip_spikes(
            optax.chain(smartclip.autoclip(), optax.stateless(to_float32), optax.trace(MOMENTUM))
        ),
        each(last_of(reference.lower_fence_thresholds)),
        lambda count: {"num_recorded": count, **ring_counts(48)(count)},
        skips=True,
        half=FLOAT16,
        eager=False,
    ),
}


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
        # Half of what there would be to compile if each dtype had both.
        step = self._donated if dtype_of(grads) == FLOAT32 else self._kept
        return step(grads, state)

    def eager(self, grads, state):
        # Annotations, which tests enforce, know none of NumPy's arrays, as of a checkpoint.
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
    """A random gradient; what is beyond its dtype becomes infinite."""
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
    """What `jit` would have to recompile for, if it changed."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


def clip_state(case, state):
    return state.inner_state[0] if case.skips else state


def split(case, tree):
    """The leaves of each group."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [[leaves[place] for place in places] for places in GROUPS[case.scope]]


def learnt(state):
    """The leaves of a state by path, but for the reported record."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if ".last" not in jax.tree_util.keystr(path)
    }


def agrees(actual, expected, above=1e-5):
    """Whether a threshold is what it should be, or up to `above` more."""
    with np.errstate(over="ignore", invalid="ignore"):
        # Whether something at the very end of float32 is still finite depends on rounding.
        if expected > LARGEST * (1 - 1e-5):
            return actual > LARGEST * (1 - 1e-4)
        return expected * (1 - 1e-5) - 8 * TINY <= actual <= expected * (1 + above) + 8 * TINY


@dataclasses.dataclass
class Book:
    """What has happened, in plain Python: norms as they arrived, and counts.

    Attributes:
        norms: Those that the clipper was given, a row for each step.
        clipped: How often each group was clipped.
        seen: With `skip_spikes`, the norm of every step, dropped ones included.
        skipped: How many steps were dropped.
        in_a_row: How many spikes since the last step that was not.
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

        expected = np.minimum(case.thresholds(norms), case.max_norm)
        clipped = finite[-1] & (now > expected)
        for group in np.flatnonzero(finite[-1] & (now > 0)):
            threshold = last.clip_threshold[group]
            assert agrees(threshold, expected[group], case.above), (threshold, expected[group])
            if agrees(now[group], expected[group], case.above):
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
        counters = [case.counts(int(count)) for count in positive]
        found = learnt(clip.rule)
        for name in counters[0]:
            (leaf,) = (leaf for path, leaf in found.items() if path.endswith(name))
            # The last entry of a histogram is how many norms there were.
            leaf = leaf[:, -1] if leaf.ndim == 2 else leaf
            np.testing.assert_array_equal(leaf, [count[name] for count in counters])
        return False

    def _add_to_detector(self, case, grads, detector):
        last = detector.last
        check_norm(last.skip_norm, reference.norm(grads))
        self.seen.append(float(reference.unreported(last.skip_norm)))
        seen = np.array(self.seen)
        finite = np.isfinite(seen)
        expected = outlier(seen)
        assert agrees(last.skip_norm_threshold, expected), (last.skip_norm_threshold, expected)
        spike = seen[-1] > expected
        if agrees(seen[-1], expected):
            spike = seen[-1] > last.skip_norm_threshold
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
    """That a norm is what it is, but for elements below the normal numbers."""
    if expected > LARGEST * (1 - 1e-6) or not np.isfinite(expected):
        assert actual > LARGEST * (1 - 1e-5)
    else:
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=8 * TINY)


def smallest(array):
    """What may be lost of an element: a number below the normal ones may be flushed to zero."""
    return max(TINY, float(jnp.finfo(array.dtype).smallest_subnormal))


def check_updates(case, grads, updates, record, before):
    """That each group is its gradient times its scale, and no longer than its threshold."""
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
            # What is not clipped is what it was, to the bit.
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
        """A step, of the restored run as well if there is one, and all that holds after it."""
        step = step or self.steps.jitted
        updates, self.state = step(grads, self.state)
        if self.restored is not None:
            theirs, self.restored = step(grads, self.restored)
            assert_same_bits((theirs, self.restored), (updates, self.state))
        self.grads = grads

        assert kinds(self.state) == self.kinds
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        after = numpy_copy(self.state)
        assert all(np.isfinite(leaf).all() for leaf in learnt(after).values())
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
    """zscore_clip(), but for functions of its rule or what `change` does to a step."""
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
def test_a_broken_clipper_is_found_out(defect):
    runs = machine(BROKEN[defect]())
    # JAX itself warns that a state of another shape cannot be donated.
    with pytest.raises((AssertionError, UserWarning)):
        run_state_machine_as_test(runs, settings=UNTIL_FOUND)


def test_a_run_that_is_restored_without_its_history_is_found_out():
    class Forgetful(machine(CASES["zscore_clip"])):
        def restore(self):
            restored = jax.tree.map(jnp.asarray, super().restore())
            fresh = self.case.tx.init(PARAMS)
            return restored.replace(rule=fresh.rule)

    with pytest.raises(AssertionError):
        run_state_machine_as_test(Forgetful, settings=UNTIL_FOUND)
