"""The steps that `skip_spikes` drops, against float64 NumPy. A dropped step leaves no trace."""

import functools
import inspect
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compat import enable_x64, lenient
from trees import assert_close, assert_same_bits, random_tree

import optax_smartclip as smartclip

STEPS = 2000
NAN, INF, LARGEST = float("nan"), float("inf"), float(np.finfo(np.float32).max)
OPTIONS = {"sigma": 6.0, "max_consecutive": 32, "warmup_steps": 10}


def make_run(with_losses, window=128):
    """A function of norms and losses [steps] and options: updates and records [steps]."""

    def run(norms, losses, options):
        tx = smartclip.skip_spikes(optax.identity(), window=window, **options)

        def step(state, now):
            norm, loss = now
            updates, state = tx.update(
                norm[None], state, **({"value": loss} if with_losses else {})
            )
            return state, (updates[0], smartclip.metrics(state))

        return jax.lax.scan(step, tx.init(jnp.zeros(1)), (norms, losses))[1]

    return run


# Options are traced, so that streams of all kinds share a program.
compiled = {with_losses: jax.jit(make_run(with_losses)) for with_losses in (False, True)}


def decide(norms, losses=None, run=None, **options):
    """The dropped steps and both thresholds; checks the updates and the rest of the record."""
    run = run or compiled[losses is not None]
    padding = (0, STEPS - len(norms))
    padded = [
        np.pad(np.float32(stream), padding)
        for stream in (norms, norms if losses is None else losses)
    ]
    updates, record = jax.tree.map(
        lambda leaf: np.asarray(leaf)[: len(norms)], run(*padded, OPTIONS | options)
    )
    skipped = record["skipped"]
    np.testing.assert_array_equal(updates, np.where(skipped, 0, np.float32(norms)))
    np.testing.assert_array_equal(record["num_skipped"], np.cumsum(skipped))
    np.testing.assert_array_equal(record["skip_norm"], reference.reported(np.float32(norms)))
    np.testing.assert_array_equal(
        record["skip_value"],
        0 * skipped if losses is None else reference.reported(np.float32(losses)),
    )
    thresholds = [record[f"skip_{kind}_threshold"] for kind in ("norm", "value")]
    return skipped, np.stack(thresholds, axis=1)


def dropped(*args, **options):
    return list(np.flatnonzero(decide(*args, **options)[0]))


def noise(steps=STEPS, seed=0):
    return np.exp(0.2 * np.random.default_rng(seed).normal(size=steps))


def troubled(stream, seed, spike):
    """With spikes of all sizes, a burst, growth, a constant, a level shift, NaN and Inf."""
    rng = np.random.default_rng(seed)
    stream = np.array(stream)
    stream[1400:] += 3 * spike
    stream[1700:1850] = stream[1700]
    places = rng.choice(np.arange(50, STEPS), 80, replace=False)
    stream[places] += spike * np.exp(2 * rng.normal(size=80))
    stream[900:990] += spike * rng.random(90)
    stream[1100:1200] += 1.1 ** np.arange(100)
    stream[rng.choice(STEPS, 30, replace=False)] = rng.choice([NAN, INF, -INF], 30)
    stream[600:620] = NAN
    return np.float32(stream)


NORMS = np.abs(troubled(noise(), 1, spike=5.0))
# From 2 down to -2: medians are positive, nearly zero and negative.
LOSSES = troubled(
    np.linspace(2, -2, STEPS) + 0.3 * np.random.default_rng(2).normal(size=STEPS), 3, spike=4.0
)
CHOICES = {
    "defaults": {},
    "strict": {"sigma": 2.0, "max_consecutive": 3, "warmup_steps": 0},
    "lax": {"sigma": 15.0, "max_consecutive": 1, "warmup_steps": 300},
}


def assert_equal_to_reference(norms, losses, size=128, run=None, **options):
    skipped, thresholds = decide(norms, losses, run, **options)
    expected, expected_thresholds = reference.skipped_steps(norms, losses, size=size, **options)
    np.testing.assert_array_equal(skipped, expected)
    expected_thresholds = reference.reported(expected_thresholds)
    np.testing.assert_allclose(thresholds, expected_thresholds, rtol=1e-5, atol=1e-5)
    finite = np.isfinite(norms) & (True if losses is None else np.isfinite(losses))
    assert np.sum(expected & finite) > 20
    return finite & (norms > thresholds[:, 0]) & ~skipped


@pytest.mark.parametrize("losses", [None, LOSSES], ids=["norms", "norms and losses"])
@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
def test_decisions_equal_the_float64_reference(losses, options):
    let_through = assert_equal_to_reference(NORMS, losses, **options)
    assert np.any(let_through)


def test_decisions_equal_the_reference_in_another_window():
    options = {"sigma": 8.0, "max_consecutive": 2, "warmup_steps": 5}
    # Here, options are Python numbers and not arrays.
    run = jax.jit(lambda norms, losses, _: make_run(True, 5)(norms, losses, options))
    assert_equal_to_reference(NORMS, LOSSES, 5, run, **options)


def distance_to_the_mean():
    """Threshold: the mean of all values so far, plus three times their mean distance to it."""
    return smartclip.ThresholdRule(
        init=lambda groups: {"number": jnp.zeros(groups), "sums": jnp.zeros((groups, 2))},
        threshold=lambda state, values: (
            state["sums"] / jnp.maximum(state["number"], 1.0)[:, None] @ jnp.array([1.0, 3.0])
        ),
        record=lambda state, values, thresholds: {
            "number": state["number"] + 1,
            "sums": state["sums"]
            + jnp.stack(
                [
                    values,
                    jnp.abs(values - state["sums"][:, 0] / jnp.maximum(state["number"], 1.0)),
                ],
                axis=1,
            ),
        },
    )


def test_another_rule_judges_norm_and_loss_and_learns_from_finite_values():
    norms, losses = NORMS[:400], LOSSES[:400]
    options = {"rule": distance_to_the_mean(), "warmup_steps": 5, "max_consecutive": 1000}
    run = jax.jit(lambda norms, losses, _: make_run(True)(norms, losses, options))
    skipped, thresholds = decide(norms, losses, run)
    seen = [[], []]
    distances = [[], []]
    for step, pair in enumerate(np.float64([norms, losses]).T):
        limits = [
            np.mean(values) + 3 * np.mean(away) if len(values) >= 5 else np.inf
            for values, away in zip(seen, distances, strict=True)
        ]
        np.testing.assert_allclose(thresholds[step], reference.reported(limits), rtol=1e-4)
        bad = not np.all(np.isfinite(pair)) or np.any(pair > limits)
        assert skipped[step] == bad, step
        for value, values, away in zip(pair, seen, distances, strict=True):
            if np.isfinite(value):
                away.append(abs(value - (np.mean(values) if values else 0.0)))
                values.append(value)
    assert 20 < skipped.sum() < 200


def test_the_state_of_another_rule_is_refused():
    tx = smartclip.skip_spikes(optax.identity(), rule=distance_to_the_mean())
    state = smartclip.skip_spikes(optax.identity()).init(jnp.ones(1))
    with pytest.raises(ValueError, match=r"must have the fields \['number', 'sums'\], as the rule"):
        tx.update(jnp.ones(1), state)


@pytest.mark.parametrize("spike", [10.0, 1000.0, 1e30])
def test_all_twenty_spikes_of_a_burst_are_dropped_and_mean_and_std_let_sixteen_pass(spike):
    for start in (70, 300, 1000):
        stream = noise()
        burst = range(start, start + 20)
        stream[burst] = spike
        assert dropped(stream) == dropped(noise(), stream - 5) == list(burst)
        if start > 128 and spike > 100:
            theirs = reference.olmo_skipped_steps(np.float32(stream))
            assert list(np.flatnonzero(theirs[burst])) == [0, 1, 2, 3]


def test_an_early_burst_is_dropped_until_it_is_a_quarter_of_all_norms():
    for start in (10, 11, 12, 20, 40):
        stream = noise()
        stream[start : start + 20] = 1000.0
        assert dropped(stream) == list(range(start, start + (start + 2) // 3))


@pytest.mark.parametrize("place", [10, 11, 500, STEPS - 1])
def test_a_single_spike_is_dropped_and_hardly_moves_the_threshold(place):
    stream = noise()
    _, before = decide(stream)
    stream[place] = 1e6
    skipped, after = decide(stream)
    assert list(np.flatnonzero(skipped)) == [place]
    # One norm is a large part of eleven, and a small one of 128.
    limit = 1.6 if place < 20 else 1.1
    assert np.max(after[11:, 0] / before[11:, 0]) < limit
    np.testing.assert_array_equal(after[place + 129 :], before[place + 129 :])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_and_inf_are_dropped_and_nothing_else(bad):
    stream = noise()
    stream[[3, 500]] = bad
    # A norm cannot be -Inf, but a loss can.
    norms = np.abs(stream)
    assert dropped(norms) == dropped(noise(), stream) == [3, 500]


def test_a_nan_costs_one_step_and_stalls_mean_and_std_for_128_more():
    stream = noise()
    stream[500] = NAN
    assert dropped(stream) == [500]
    theirs = reference.olmo_skipped_steps(np.float32(stream))
    assert list(np.flatnonzero(theirs)) == list(range(500, 629))


@pytest.mark.parametrize("level", [1.0, -3.0, 0.0, 1e-30, 1e30])
def test_constants_and_their_rounding_noise_are_never_dropped(level):
    rng = np.random.default_rng(0)
    # In the last stream, a tenth of the values are larger, but both quartiles are constant.
    for noise in (0, rng.normal(size=500), rng.random(500) < 0.1):
        constant = np.full(500, level) + 1e-6 * abs(level) * noise
        assert dropped(np.abs(constant)) == dropped(np.ones(500), constant) == []
    stream = np.r_[np.full(500, level), np.zeros(10), np.full(500, 0.1 * level)]
    assert dropped(np.abs(stream)) == []


def test_a_loss_in_bfloat16_may_be_rounded_up():
    # These two are neighbors in bfloat16.
    losses = np.where(np.random.default_rng(0).random(500) < 0.1, 2.015625, 2.0)
    assert dropped(np.ones(500), losses) == []


def test_when_all_losses_were_zero_the_first_other_one_is_not_dropped():
    losses = np.zeros(30)
    losses[20] = 1.0
    assert dropped(noise(30), losses) == []


def test_when_most_norms_are_zero_the_others_are_not_dropped():
    norms = np.where(np.random.default_rng(0).random(500) < 0.2, 1.0, 0.0)
    assert dropped(norms) == []


@pytest.mark.parametrize("factor", [10.0, 1e6])
@pytest.mark.parametrize("max_consecutive", [1, 5, 32, 100])
def test_a_level_shift_is_dropped_until_a_quarter_of_the_window_has_seen_it(
    factor, max_consecutive
):
    norms = noise()
    norms[1000:] *= factor
    losses = 0.1 * np.log(noise(seed=1))
    losses[1000:] += factor
    for streams in ([norms], [noise(), losses]):
        steps = dropped(*streams, max_consecutive=max_consecutive)
        # After 32 of 128 norms, the upper quartile is at the new level.
        cycle = max_consecutive + 1
        expected = [1000 + step for step in range(33) if step % cycle != max_consecutive]
        assert steps[: len(expected) - 1] == expected[:-1]
        assert set(steps) <= set(expected)


def test_one_in_max_consecutive_plus_one_of_ever_growing_norms_passes():
    norms = 1.1 ** np.arange(700)
    for max_consecutive in (1, 4, 32):
        skipped, _ = decide(norms, max_consecutive=max_consecutive)
        passed = np.flatnonzero(~skipped)
        assert set(np.diff(passed[passed > 200])) == {max_consecutive + 1}


def test_endless_nans_never_pass_and_leave_the_history_as_it_is():
    stream = noise()
    stream[200:1900] = NAN
    stream[1900] = 50.0
    assert dropped(stream) == dropped(noise(), stream) == list(range(200, 1901))


def test_nans_between_spikes_neither_count_as_spikes_nor_end_the_row():
    stream = noise(600)
    stream[500:516] = [100.0, NAN] * 8
    passed = {506, 514}
    expected = [step for step in range(500, 516) if step not in passed]
    assert dropped(stream, max_consecutive=3) == expected
    # The fourth spike passes although a NaN came before it; a NaN in its place is dropped.
    stream[506] = NAN
    assert dropped(stream, max_consecutive=3)[:9] == [*range(500, 508), 509]


# Giving up.


def bad_in_a_row(norms, losses, skipped, thresholds):
    """The number of bad steps in a row after each step; zero norms neither count nor end a row."""
    count, counts = 0, []
    for norm, loss, dropped, limits in zip(norms, losses, skipped, thresholds, strict=True):
        spike = norm > limits[0] or loss > limits[1]
        count = count + 1 if dropped or spike else 0 if norm else count
        counts.append(count)
    return np.array(counts)


@pytest.mark.parametrize("limit", [np.float32(1), np.float32(3), np.float32(20)])
def test_exhausted_from_the_given_number_of_bad_steps_in_a_row_until_a_good_step(limit):
    norms, losses = np.where(np.random.default_rng(4).random(STEPS) < 0.2, 0, NORMS), LOSSES
    # A step without a gradient or a loss is neither good nor bad.
    for streams in ([norms], [NORMS, losses]):
        run = compiled[len(streams) == 2]
        padded = np.float32(streams[0]), np.float32(streams[-1])
        options = OPTIONS | {"max_consecutive": 4}
        updates, record = run(*padded, options | {"give_up_after": limit})
        plain_updates, plain = run(*padded, options)
        # The limit does not change which steps are dropped.
        assert_same_bits((updates, {name: record[name] for name in plain}), (plain_updates, plain))
        assert record.keys() - plain.keys() == set(smartclip.GiveUpMetrics._fields)
        with_losses = losses if len(streams) == 2 else np.zeros(STEPS)
        thresholds = [record[f"skip_{kind}_threshold"] for kind in ("norm", "value")]
        counts = bad_in_a_row(streams[0], with_losses, record["skipped"], np.stack(thresholds, 1))
        np.testing.assert_array_equal(record["num_bad_in_a_row"], counts)
        np.testing.assert_array_equal(record["exhausted"], counts >= limit)
        assert {True, False} == set(np.asarray(record["exhausted"]).tolist())


def test_a_spike_that_is_let_through_does_not_end_the_row():
    norms = np.float32(np.r_[noise(100), 1.1 ** np.arange(300), np.ones(STEPS - 400)])
    options = OPTIONS | {"max_consecutive": 4}
    _, record = compiled[False](norms, norms, options | {"give_up_after": np.float32(30)})
    exhausted = np.flatnonzero(record["exhausted"])
    assert not np.all(record["skipped"][exhausted])
    assert exhausted[0] < 200
    assert exhausted[-1] == 399


def test_without_it_states_are_those_of_version_0_1_0_and_graft_converts_both_ways():
    plain = smartclip.skip_spikes(optax.trace(0.9))
    giving_up = smartclip.skip_spikes(optax.trace(0.9), give_up_after=5)
    saved = plain.init(jnp.zeros(1))
    assert type(saved) is smartclip.SkipState
    for size in (1.0, 2.0, NAN):
        _, saved = jax.jit(plain.update)(np.full(1, size, np.float32), saved)
    with pytest.raises(ValueError, match="`state` must be the GiveUpState that `init`"):
        giving_up.update(jnp.zeros(1), saved)
    state = smartclip.graft(saved, giving_up.init(jnp.zeros(1)))
    assert_same_bits((state.inner_state, state.detector), (saved.inner_state, saved.detector))
    for count in (1, 2):
        _, state = jax.jit(giving_up.update)(np.full(1, NAN, np.float32), state)
        assert smartclip.metrics(state)["num_bad_in_a_row"] == count
    back = smartclip.graft(state, plain.init(jnp.zeros(1)))
    assert_same_bits((back.inner_state, back.detector), (state.inner_state, state.detector))


# Training.

SHAPES = {"b": (2,), "w": (3, 2)}
PARAMS = random_tree(0, 1.0, SHAPES)
SPIKES = {14: 1e3, 15: NAN, 20: 50.0, 21: 1e30, 22: INF, 23: 70.0, 39: 1e5}
SIZES = [SPIKES.get(step, 0.1 + 0.01 * (step % 7)) for step in range(40)]
GRADS = [
    jax.tree.map(lambda leaf, size=size: np.float32(size) * leaf, random_tree(step, 1.0, SHAPES))
    for step, size in enumerate(SIZES, 1)
]
KEPT = [grads for step, grads in enumerate(GRADS) if step not in SPIKES]


def decayed(optimizer, **options):
    return optimizer(optax.linear_schedule(0.1, 0, 40), **options)


OPTIMIZERS = {
    "adam": decayed(optax.adam),
    "adamw": decayed(optax.adamw, weight_decay=0.1),
    "sgd": decayed(optax.sgd, momentum=0.9),
    "clippers": optax.chain(
        smartclip.autoclip(50.0, history=smartclip.ring_buffer(8)),
        smartclip.agc(0.1, scope="per_param"),
        decayed(optax.sgd, momentum=0.9),
    ),
    # Its state has a random key.
    "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), decayed(optax.sgd)),
}


@functools.cache
def build(name, wrap=smartclip.skip_spikes):
    """A transformation and its compiled step."""
    tx = wrap(lenient(OPTIMIZERS[name]))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, jax.jit(step)


def train(name, stream, **wrap):
    """The parameters and the state before the first step and after each."""
    tx, step = build(name, **wrap)
    history = [(PARAMS, tx.init(PARAMS))]
    for grads in stream:
        history.append(step(*history[-1], grads))
    return history


def learned(params, state):
    """All arrays that a dropped step must not change; random keys as their data."""

    def raw(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(raw, (params, state.inner_state))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_equals_bit_for_bit_a_run_without_the_dropped_steps(name):
    history = train(name, GRADS)
    for step, (before, after) in enumerate(itertools.pairwise(history)):
        assert bool(smartclip.metrics(after[1])["skipped"]) == (step in SPIKES)
        if step in SPIKES:
            assert_same_bits(learned(*after), learned(*before))
    shorter = train(name, KEPT)
    assert int(smartclip.metrics(shorter[-1][1])["num_skipped"]) == 0
    assert_same_bits(learned(*history[-1]), learned(*shorter[-1]))
    # The program without the wrapper may round differently.
    params, state = train(name, KEPT, wrap=lambda tx: tx)[-1]
    assert_close(history[-1][0], params, rtol=1e-5, atol=1e-6)
    counts, expected = (
        {int(count) for _, count in optax.tree.get_all_with_path(of, "count")}
        for of in (history[-1][1], state)
    )
    assert counts == expected == {len(KEPT)}


def test_eager_steps_equal_bit_for_bit_those_of_the_bare_optimizer_and_make_no_nan():
    params = np.float32([[3.0, -4.0]])
    # Turns an Inf into a NaN.
    inner = optax.chain(optax.centralize(), optax.sgd(0.1, momentum=0.9))
    tx = smartclip.skip_spikes(inner, window=4, warmup_steps=2)
    run, expected = (params, tx.init(params)), (params, inner.init(params))
    for size in (1.0, 0.0, 1.0, 1e4, INF, 1.1):
        grads = size * jnp.float32([[1.0, 2.0]])
        with jax.debug_nans(True):
            updates, state = tx.update(grads, run[1], run[0])
        run = run[0] + updates, state
        if size < 2:
            updates, state = inner.update(grads, expected[1], expected[0])
            expected = expected[0] + updates, state
        assert_same_bits((run[0], run[1].inner_state), expected)
    assert int(smartclip.metrics(run[1])["num_skipped"]) == 2


def test_donated_steps_equal_others_and_compile_once():
    tx, step = build("adamw")
    traces = []

    def traced_step(*arguments):
        traces.append(arguments)
        return step.__wrapped__(*arguments)

    donated = jax.jit(traced_step, donate_argnums=(0, 1))
    run = jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS)
    for grads, expected in zip(GRADS, train("adamw", GRADS)[1:], strict=True):
        read = run[0], run[1].inner_state, smartclip.metrics(run[1])["num_skipped"]
        run = donated(*run, grads)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(read))
        assert_same_bits(run, expected)
    assert len(traces) == 1


def test_a_batch_of_scanned_runs_that_drop_different_steps_equals_the_runs_one_by_one():
    tx, step = build("adamw")

    def scan(stream):
        def one(carry, grads):
            carry = step.__wrapped__(*carry, grads)
            return carry, smartclip.metrics(carry[1])["skipped"]

        return jax.lax.scan(one, (PARAMS, tx.init(PARAMS)), stream)

    streams = [GRADS[shift:] + GRADS[:shift] for shift in (0, 1, 16)]
    streams.append([jax.tree.map(lambda leaf: 1e3 * leaf, grads) for grads in KEPT] + GRADS[:7])
    batch = jax.tree.map(
        lambda *leaves: np.stack(leaves).reshape(len(streams), len(GRADS), *leaves[0].shape),
        *itertools.chain(*streams),
    )
    actual, skipped = jax.jit(jax.vmap(scan))(batch)
    histories = [train("adamw", stream) for stream in streams]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *[runs[-1] for runs in histories])
    assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    for row, stream, history in zip(skipped, streams, histories, strict=True):
        one_by_one = [smartclip.metrics(state)["skipped"] for _, state in history[1:]]
        by_hand, _ = reference.skipped_steps([reference.norm(grads) for grads in stream])
        np.testing.assert_array_equal(row, one_by_one)
        np.testing.assert_array_equal(row, by_hand)
    assert len({row.tobytes() for row in np.asarray(skipped)}) == len(streams)


# Leaves.


def kinds(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def cast_to_float32(updates, params=None):
    del params
    return 2 * updates.astype(jnp.float32)


def test_updates_have_the_dtype_that_the_inner_optimizer_gives_them():
    dtypes = [jnp.bfloat16, jnp.float16, jnp.float32]
    inners = [optax.scale(2.0), optax.stateless(cast_to_float32)]
    for inner, grad_dtype, param_dtype in itertools.product(inners, dtypes, dtypes):
        tx = smartclip.skip_spikes(inner)
        grads, params = (jnp.ones(3, dtype) for dtype in (grad_dtype, param_dtype))
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, grads, state, params)
        assert kinds(updates) == kinds(jax.eval_shape(inner.update, grads, inner.init(params))[0])
        assert kinds(after) == kinds(state)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_gradients_of_low_precision_are_judged_by_their_true_norm(dtype):
    tx = smartclip.skip_spikes(optax.stateless(cast_to_float32), warmup_steps=1)
    update, state = jax.jit(tx.update), tx.init(np.ones(300, dtype))
    # The sum of 300 squares of 1000 overflows in float16, and bfloat16 cannot add up 300 squares.
    for size, expected in ((1.0, 2), (1.0, 2), (1000.0, 0), (NAN, 0), (1.0, 2)):
        updates, state = update(np.full(300, size, dtype), state)
        assert_same_bits(updates, np.full(300, expected, np.float32))
        norm = smartclip.metrics(state)["skip_norm"]
        np.testing.assert_allclose(norm, reference.reported(size * np.sqrt(300)), rtol=1e-6)


def test_leaves_of_every_kind_pass_or_are_zeroed_together():
    params = {
        "complex": np.ones(2, np.complex64),
        "empty": np.zeros((0, 2), np.float32),
        "integer": np.ones(2, np.int32),
        "masked": optax.MaskedNode(),
        "none": None,
        "scalar": np.float32(1.0),
    }
    # A compiled function cannot have it as an argument.
    untouched = {"float0": np.zeros(3, jax.dtypes.float0)}
    tx = smartclip.skip_spikes(optax.identity(), warmup_steps=1)
    update = jax.jit(lambda grads, state: tx.update(grads | untouched, state))
    state = tx.init(params | untouched)
    for size, kept in ((1.0, 1), (1.0, 1), (100.0, 0), (NAN, 0)):
        with_norm = {
            name: params[name] * params[name].dtype.type(size) for name in ("complex", "scalar")
        }
        updates, state = update(params | with_norm, state)
        expected = jax.tree.map(lambda leaf, kept=kept: leaf * leaf.dtype.type(kept), params)
        assert_same_bits(updates, expected | untouched)
        norm = smartclip.metrics(state)["skip_norm"]
        np.testing.assert_allclose(norm, reference.reported(size * np.sqrt(3)), rtol=1e-6)


@pytest.mark.parametrize("tree", [{"none": None}, jnp.zeros((0, 2)), jnp.arange(2)])
def test_a_tree_without_a_norm_passes(tree):
    tx = smartclip.skip_spikes(optax.identity())
    state = tx.init(tree)
    updates, after = jax.eval_shape(tx.update, tree, state)
    assert kinds((updates, after)) == kinds((tree, state))


def test_the_record_stays_in_float32_where_float64_is_enabled():
    with enable_x64(True):
        tx = smartclip.skip_spikes(optax.trace(0.9))
        grads, value = jnp.ones(2, jnp.float64), jnp.ones((), jnp.float64)
        state = tx.init(grads)
        updates, after = jax.eval_shape(
            lambda state: tx.update(grads, state, grads, value=value), state
        )
    assert kinds(after) == kinds(state)
    assert kinds(updates) == kinds(grads)
    assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(state.detector)} == {1, 4}


def test_counts_stop_at_the_largest_integer():
    largest = 2**31 - 1
    tx = smartclip.skip_spikes(optax.identity(), window=4, give_up_after=largest)
    grads = np.ones(1, np.float32)

    def nearly(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        counts = ("num_observed", "num_skipped", "num_bad_in_a_row")
        return np.asarray(leaf) + np.int32(largest - 1) if name in counts else leaf

    state = jax.tree_util.tree_map_with_path(nearly, tx.init(grads))
    update = jax.jit(tx.update)
    for size in (NAN, NAN, 1.0, NAN, 1.0):
        _, state = update(np.float32(size) * grads, state)
        if size == 1:
            assert optax.tree.get(state, "num_bad_in_a_row") == 0
        else:
            assert optax.tree.get(state, "num_bad_in_a_row") in (1, largest)
    assert optax.tree.get(state, "num_skipped") == largest
    np.testing.assert_array_equal(state.detector.num_observed, [largest, largest - 1])


# Arguments.


@pytest.mark.parametrize("value", [1.0, 1, np.float64(1), jnp.bfloat16(1), jnp.int32(1), True])
def test_a_loss_may_be_a_number_of_any_kind(value):
    tx = smartclip.skip_spikes(optax.identity(), window=4)
    state = tx.init(jnp.ones(1))
    _, after = jax.eval_shape(lambda grads: tx.update(grads, state, value=value), jnp.ones(1))
    assert kinds(after) == kinds(state)


def test_a_clipper_inside_measures_again_what_a_link_before_it_has_changed_in_part():
    doubled = optax.masked(optax.scale(2.0), {"a": True, "b": False})
    tx = smartclip.skip_spikes(optax.chain(doubled, smartclip.autoclip()))
    grads = {"a": np.float32([3.0]), "b": np.float32([8.0])}
    _, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(smartclip.metrics(state)["grad_norm"], 10.0, rtol=1e-6)


def test_a_loss_may_be_given_in_some_steps_only():
    tx = smartclip.skip_spikes(optax.identity(), window=4, warmup_steps=2)
    update = jax.jit(tx.update)
    state, skipped = tx.init(jnp.ones(1)), []
    for value in (1.0, None, 1.0, None, 5.0, None, NAN, 1.0):
        loss = {} if value is None else {"value": value}
        _, state = update(np.ones(1, np.float32), state, **loss)
        skipped.append(int(smartclip.metrics(state)["skipped"]))
    assert skipped == [0, 0, 0, 0, 1, 0, 1, 0]


INIT_ALONE = types.SimpleNamespace(init=jnp.zeros_like)
NUMBERS = {
    "sigma": ("positive and finite", (0, 0.0, -1.0, NAN, INF, None, "6", True)),
    "window": (
        "a Python int from 4 to 16777216 (it sets the shape of the state)",
        (3, 2**24 + 1, 128.0, True, None),
    ),
    "max_consecutive": (
        "a number of steps from 1 to 2147483647",
        (0, -1, 0.5, NAN, INF, 2**31, None, True),
    ),
    "give_up_after": (
        "a number of steps from 1 to 2147483647, or None",
        (0, -1, 0.5, NAN, INF, 2**31, "3", True),
    ),
    "warmup_steps": ("a number of steps from 0 to 2147483647", (-1, NAN, INF, 2**31, None, False)),
    "rule": ("a ThresholdRule or None", ("median", 6.0, max)),
    "inner": (
        "a gradient transformation, as optax.adamw(3e-4) is",
        (None, "adam", 3, (), INIT_ALONE),
    ),
}


@pytest.mark.parametrize(
    ("name", "allowed", "value"),
    [(name, allowed, value) for name, (allowed, values) in NUMBERS.items() for value in values],
)
def test_a_bad_argument_is_named_with_its_value(name, allowed, value):
    # Users run the function without type checks.
    factory = inspect.unwrap(smartclip.skip_spikes)
    with pytest.raises(ValueError, match="must be") as error:
        factory(**({"inner": optax.identity()} | {name: value}))
    assert str(error.value) == f"`{name}` must be {allowed}, got {value!r}."


@pytest.mark.parametrize("name", ["value", "grad_norm"])
@pytest.mark.parametrize("shape", [(1,), (2, 3)])
def test_a_loss_or_norm_that_is_not_a_scalar_is_refused(name, shape):
    tx = smartclip.skip_spikes(optax.identity())
    with pytest.raises(ValueError, match="must be a scalar") as error:
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)), **{name: jnp.ones(shape)})
    assert str(error.value) == f"`{name}` must be a scalar, got the shape {shape}."


def test_a_norm_at_the_threshold_itself_is_not_dropped():
    tx = smartclip.skip_spikes(optax.identity())
    update = jax.jit(tx.update)

    def after(state, norm):
        return smartclip.metrics(update(np.asarray([norm], np.float32), state)[1])

    state = tx.init(jnp.zeros(1))
    for norm in noise(20):
        _, state = update(np.asarray([norm], np.float32), state)
    threshold = after(state, 1.0)["skip_norm_threshold"]
    assert not after(state, threshold)["skipped"]
    assert after(state, np.nextafter(threshold, np.float32(np.inf)))["skipped"]


@pytest.mark.parametrize("limit", [None, 1])
def test_the_record_before_the_first_step_is_empty(limit):
    tx = smartclip.skip_spikes(optax.identity(), give_up_after=limit)
    record = smartclip.metrics(tx.init(jnp.zeros(1)))
    unknown = {"skip_norm_threshold", "skip_value_threshold"}
    assert {name: value.item() for name, value in record.items()} == {
        name: LARGEST if name in unknown else 0 for name in record
    }
