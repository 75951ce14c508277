"""The study of learning rates: its measures, its table, and its runs against a plain loop."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from documents import ROOT
from steps import run
from study import __main__ as study
from study import rules, updates
from study.arms import ARMS, AUTO, NONE, SKIP_SPIKES, Arm, fixed, last_scale
from study.measures import best_at_budget, best_of, diverged, interval, lost_progress, sensitivity
from study.pictures import of_arms
from study.promise import judge
from study.results import ARM, CONTROL, Outcome, append, load, spike_score, summarize
from study.tasks import TASKS, cartpole, digits, layers
from study.training import train

import optax_smartclip as smartclip

FLOAT32 = 1e-5


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def small_task():
    """Regression in 150 steps at two rates."""
    return TASKS["regression"]()._replace(steps=150, rates=(1e-3, 1e-2))


def outcome(start, final):
    """The outcome of runs whose other figures do not matter."""
    start, final = np.broadcast_arrays(np.asarray(start, float), np.asarray(final, float))
    return Outcome(start, final, *[np.zeros_like(final)] * 3)


@pytest.mark.parametrize("trials", [1, 2, 3, 5])
def test_best_of_some_settings_is_the_mean_over_all_choices(trials):
    losses = np.array([3.0, 1.0, 4.0, 1.5, 9.0])
    choices = [min(choice) for choice in itertools.combinations(losses, trials)]
    assert best_of(losses, trials) == pytest.approx(np.mean(choices), rel=1e-12)


def test_more_trials_than_settings_are_an_error():
    with pytest.raises(ValueError, match="`trials` must be at most the number of settings, 2"):
        best_of(np.ones(2), 3)


def test_a_run_that_ends_no_better_than_it_began_diverges_and_counts_with_its_start():
    runs = outcome(2.0, [[1.0, np.nan], [0.5, 3.0]])
    np.testing.assert_array_equal(diverged(runs), [[False, True], [False, True]])
    # First seed: mean of 1 and 0.5, less 0.5; second: 2 at both rates.
    np.testing.assert_allclose(sensitivity(runs), [0.25, 0.0])


def test_a_run_that_a_high_rate_returns_to_chance_diverges():
    # A rate that is too low gains little as well, and has not diverged.
    runs = outcome(3.0, [[2.9, 2.9], [1.0, 1.0], [1.9, 2.1]])
    np.testing.assert_array_equal(diverged(runs), [[False] * 2, [False] * 2, [False, True]])


def test_a_budget_covers_rates_and_norms():
    one = outcome(9.0, [[4.0, 4.0], [2.0, 8.0]])
    other = outcome(9.0, [[3.0, 5.0], [np.nan, 1.0]])
    np.testing.assert_allclose(best_at_budget([one], 1), [3.0, 6.0])
    # All pairs of 4, 2, 3, 9 and of 4, 8, 5, 1.
    np.testing.assert_allclose(best_at_budget([one, other], 2), [16 / 6, 16 / 6])


def test_a_control_is_a_run_with_a_smaller_step():
    runs = {(NONE, ARM): outcome(5.0, [[4.0] * 3, [1.0] * 3])}
    runs[AUTO, ARM] = outcome(5.0, [[3.0] * 3, [1.0] * 3])
    runs[AUTO, CONTROL] = outcome(5.0, [[3.8] * 3, [1.0] * 3])
    table = study.Table((0.1, 1.0), (0, 1, 2), runs)
    # 0.8 less at one of two rates, in units of 4.
    assert study.over_control(table, AUTO) == "-10 +- 0"
    assert study.over_control(table, NONE) == "-"


def test_lost_progress_is_in_units_of_the_way_from_the_start_to_the_best():
    runs = {"a": outcome(3.0, [[1.0], [2.0]]), "b": outcome(3.0, [[1.5], [np.inf]])}
    lost = lost_progress(runs)
    np.testing.assert_allclose(lost["a"], [[0.0], [0.0]])
    np.testing.assert_allclose(lost["b"], [[0.25], [0.5]])


def test_the_interval_is_that_of_students_distribution():
    # scipy.stats.ttest_1samp([1, 2, 3, 4]).confidence_interval() is 0.4457 to 4.5543.
    found = interval(np.array([1.0, 2.0, 3.0, 4.0]))
    assert found.mean == 2.5
    assert found.half == pytest.approx(2.0543, rel=1e-4)


def test_spikes_stand_out_from_the_window_before():
    losses = np.random.default_rng(0).normal(size=400)
    losses[[200, 300]] = 50.0, np.inf
    found = []
    for step in range(64, 400):
        before = losses[step - 64 : step]
        with np.errstate(invalid="ignore"):
            found.append(not abs(losses[step] - np.mean(before)) <= 7 * np.std(before))
    assert 0 < np.mean(found) < 0.5
    np.testing.assert_allclose(spike_score(losses[None]), [np.mean(found)])


def test_a_run_is_the_plain_loop():
    task, seed, rate = small_task(), 3, 1e-2
    key = jax.random.key(seed)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 15, 150)
    tx = optax.chain(smartclip.autoclip(), optax.sgd(schedule))

    @jax.jit
    def step(params, state, number):
        batch_key, _ = jax.random.split(jax.random.fold_in(key, number))
        grads = jax.grad(task.loss)(params, task.batch(batch_key))
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    params = task.init(jax.random.fold_in(key, 150))
    state, clipped = tx.init(params), []
    for number in range(150):
        params, state = step(params, state, number)
        clipped.append(float(smartclip.metrics(state)["clip_scale"]))
    runs = train(task, ARMS[AUTO], [1, seed], np.ones((2, 2)))
    assert runs.final[1, 1] == pytest.approx(float(task.held_out(params)), rel=1e-3)
    np.testing.assert_allclose(runs.scales[1, 1], clipped, rtol=1e-3)
    assert np.min(clipped) < 1


def test_a_factor_multiplies_the_rate():
    task = small_task()
    doubled = train(task, ARMS[NONE], [0], np.array([[2.0], [2.0]]))
    faster = train(task._replace(rates=(2e-3, 2e-2)), ARMS[NONE], [0], np.ones((2, 1)))
    np.testing.assert_allclose(doubled.final, faster.final, rtol=FLOAT32)


def test_arms_report_how_much_they_scale():
    task = small_task()
    halved = train(task, Arm(optax.scale(0.5)), [0], np.ones((2, 1)))
    np.testing.assert_allclose(halved.scales, 0.5, rtol=FLOAT32)
    dropped = train(task, ARMS[SKIP_SPIKES], [0], np.ones((2, 1)))
    assert np.any(dropped.scales == 0)


# The last gradient is ten times the ones before it, whose second moment is 1.
GROWING = (1.0, 1.0, 10.0)
RATES = np.array([0.1, 0.4, 0.7])
SECOND_MOMENT = (0.1 * 10.0**2 + 0.9 * (1 - 0.9**2)) / (1 - 0.9**3)
# Adam's steps with b1 = 0.
STEPS = -np.array([1.0, 1.0, 10.0 / np.sqrt(SECOND_MOMENT)])


def updates_of(arm, optimizer, decay=0.0):
    """The updates of weights of 1 by the growing gradients, and the scale of the last one."""

    def make(schedule):
        return optimizer(schedule, b1=0.0, b2=0.9, eps=1e-8, weight_decay=decay)

    tx = arm.around(make, lambda count: jnp.asarray(RATES, jnp.float32)[count])
    params = {"w": jnp.ones(4)}

    def step(state, grad):
        updates, state = tx.update({"w": jnp.full(4, grad)}, state, params)
        return state, (updates["w"][0], last_scale(state))

    grads = jnp.asarray(GROWING)
    updates, scales = jax.lax.scan(step, tx.init(params), grads)[1]
    return updates, scales[-1]


def test_an_arm_clips_the_step_before_the_rate_or_the_update_after_it():
    none = optax.identity()
    # The norm of four equal elements is twice their size.
    limited = optax.clip_by_global_norm(2 * 0.5)
    found, scale = updates_of(Arm(none, after_step=limited), optax.adamw)
    np.testing.assert_allclose(found, -0.5 * RATES, rtol=FLOAT32)
    assert scale == pytest.approx(0.5 / -STEPS[-1], rel=FLOAT32)
    found, scale = updates_of(Arm(none, after_rate=limited), optax.adamw)
    np.testing.assert_allclose(found, np.maximum(STEPS * RATES, -0.5), rtol=FLOAT32)
    assert scale == pytest.approx(0.5 / -(STEPS * RATES)[-1], rel=FLOAT32)


def test_a_stable_arm_divides_the_step_and_its_decay_by_the_rms():
    arm = updates.UPDATE_ARMS[updates.STABLE]
    found, scale = updates_of(arm, smartclip.stable_adamw, decay=0.1)
    np.testing.assert_allclose(found, RATES * (STEPS - 0.1) / -STEPS, rtol=FLOAT32)
    assert scale == pytest.approx(-1 / STEPS[-1], rel=FLOAT32)


def test_the_optimizers_of_the_transformers_have_the_same_numbers():
    task = TASKS["lm-b2-0.999"]()
    params = {"w": jnp.array([3.0, -2.0])}

    def steps(optimizer):
        tx = optimizer(optax.constant_schedule(1.0))

        def step(state, grad):
            updates, state = tx.update({"w": jnp.full(2, grad)}, state, params)
            return state, updates["w"]

        # StableAdamW divides only the steps of growing gradients.
        return jax.lax.scan(step, tx.init(params), jnp.array([1.0, 0.5, 0.1]))[1]

    np.testing.assert_allclose(steps(task.stable), steps(task.optimizer), rtol=FLOAT32)


def test_gains_are_paired_over_seeds_in_units_of_the_best_progress():
    seeds = 0.1 * np.arange(3)
    runs = {(NONE, ARM): outcome(5.0, [2.0 + seeds, 1.4 + seeds])}
    runs[AUTO, ARM] = outcome(5.0, [2.0 + seeds, 1.2 + seeds])
    runs["arm", ARM] = outcome(5.0, [1.0 + seeds - 0.1, 2.2 + seeds - 0.1])
    table = study.Table((0.1, 1.0), (0, 1, 2), runs)
    # Best progress: 5 - 1. None less the arm: 1.1 and -0.7; autoclip() less the arm: 1.1, -0.9.
    found = updates.gain(table, "arm")
    expected = 100 * np.array([0.2, 0.1, 0.5]) / 4.0
    np.testing.assert_allclose([each.mean for each in found[:3]], expected, rtol=1e-9)
    np.testing.assert_allclose([each.half for each in found[:3]], 0.0, atol=1e-9)
    assert found.over_control is None
    runs["arm", CONTROL] = outcome(5.0, [1.3 + seeds, 2.1 + seeds])
    found = updates.gain(table, "arm")
    assert found.over_control.mean == pytest.approx(100 * 0.2 / 4)
    assert found.at_best.mean == pytest.approx(100 * 0.4 / 4)


def test_a_run_that_is_not_finite_ends_with_nan():
    task = small_task()._replace(rates=(1e30,))
    runs = train(task, ARMS[NONE], [0], np.ones((1, 1)))
    assert np.isnan(runs.final).all()
    assert diverged(summarize(runs)).all()


def test_the_table_comes_back(tmp_path):
    runs = Outcome(*np.random.default_rng(0).random((5, 2, 3)))
    path = tmp_path / "new" / "task.csv"
    append(path, "a machine", ("autoclip(scope='unit')", ARM), (0.1, 1.0), (0, 1, 2), runs)
    append(path, "a machine", (NONE, CONTROL), (0.1, 1.0), (0, 1, 2), runs)
    table = load(path)
    assert path.read_text().count("# a machine") == 1
    assert table.rates == (0.1, 1.0)
    assert list(table.outcomes) == [("autoclip(scope='unit')", ARM), (NONE, CONTROL)]
    np.testing.assert_allclose(table.outcomes[NONE, CONTROL], runs, rtol=1e-5)


def test_an_arm_without_all_of_its_runs_is_an_error(tmp_path):
    path = tmp_path / "task.csv"
    append(path, "", (NONE, ARM), (0.1, 1.0), (0,), outcome(1.0, np.ones((2, 1))))
    append(path, "", (AUTO, ARM), (0.1,), (0,), outcome(1.0, np.ones((1, 1))))
    with pytest.raises(ValueError, match="lacks runs of"):
        load(path)


def test_a_study_continues_where_it_stopped(tmp_path, capsys):
    path = tmp_path / "task.csv"
    arms = {arm: ARMS[arm] for arm in (NONE, fixed(1.0))}
    study.run_task("task", small_task(), {NONE: ARMS[NONE]}, range(2), path)
    first = path.read_text()
    table = study.run_task("task", small_task(), arms, range(2), path)
    assert path.read_text().startswith(first)
    assert capsys.readouterr().out.count(NONE) == 1
    assert list(table.outcomes) == [(NONE, ARM), (fixed(1.0), ARM), (fixed(1.0), CONTROL)]
    # A smaller step is another run than a clipped gradient.
    clipped, slower = table.outcomes[fixed(1.0), ARM], table.outcomes[fixed(1.0), CONTROL]
    assert clipped.scale.max() < 1
    assert np.all(slower.scale == 1)
    assert not np.allclose(clipped.final, slower.final, rtol=1e-3)


def test_signs_that_differ_are_named():
    steady = 0.01 * np.arange(4)

    def table(difference):
        none, other = outcome(9.0, [1.0 + steady]), outcome(9.0, [1.0 + difference + steady])
        return study.Table((0.1,), (0, 1, 2, 3), {(NONE, ARM): none, (AUTO, ARM): other})

    assert study.compare_signs(table(0.1), table(0.5)) == []
    (line,) = study.compare_signs(table(-0.1), table(0.5))
    assert line.startswith("autoclip() less no clipping at 0.1: -0.1")


@pytest.mark.long
def test_a_slice_has_the_signs_of_the_stored_results(tmp_path, capsys):
    assert study.main(["--task", "regression", "--quick", "--out", str(tmp_path)]) == 0
    assert "Signs that differ" not in capsys.readouterr().out
    stored = load(study.STORED / "regression.csv")
    assert stored.outcomes[fixed(1.0), ARM].final.shape == (7, 12)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_a_scalar_loss_and_seven_rates_over_three_decades(name):
    task = TASKS[name]()
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = jax.eval_shape(task.batch, jax.random.key(0))
    assert jax.eval_shape(task.loss, params, batch).shape == ()
    assert jax.eval_shape(task.held_out, params).shape == ()
    assert jax.eval_shape(task.damage, jax.random.key(0), params) == params
    assert len(task.rates) >= 7
    assert task.rates[-1] / task.rates[0] >= 999


def test_a_pole_falls_by_the_equations_of_motion():
    """Barto, Sutton and Anderson, 1983, without friction."""
    states = np.random.default_rng(0).normal(size=(5, 4))
    actions = np.array([0, 1, 1, 0, 1])
    expected = []
    for (x, v, angle, turning), action in zip(states, actions, strict=True):
        force = 10.0 if action else -10.0
        inertia = (force + 0.05 * turning**2 * np.sin(angle)) / 1.1
        turn = 9.8 * np.sin(angle) - np.cos(angle) * inertia
        turn /= 0.5 * (4 / 3 - 0.1 * np.cos(angle) ** 2 / 1.1)
        speed = inertia - 0.05 * turn * np.cos(angle) / 1.1
        expected.append(
            [x + 0.02 * v, v + 0.02 * speed, angle + 0.02 * turning, turning + 0.02 * turn]
        )
    found = cartpole.push(jnp.float32(states), jnp.asarray(actions))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_products_of_patches_are_a_convolution():
    rng = np.random.default_rng(0)
    images = jnp.float32(rng.normal(size=(2, 8, 8, 3)))
    kernel = jnp.float32(rng.normal(size=(3, 3, 3, 4)))
    found = layers.dense({"kernel": kernel.reshape(27, 4), "bias": 0.0}, digits.patches(images))
    expected = jax.lax.conv_general_dilated(
        images, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_damage_leaves_the_other_examples_and_layers_alone():
    batch = TASKS["damaged-examples"]().batch
    factors = jax.vmap(lambda key: batch(key)[1])(jax.random.split(jax.random.key(0), 500))
    num_bad = np.sum(np.asarray(factors) > 1, axis=(1, 2))
    assert set(num_bad) == {0, 4}
    # 2 % of 500, give or take four standard deviations.
    assert 0 < np.sum(num_bad > 0) < 23

    damage = TASKS["damaged-layer"]().damage
    grads = {"first": jnp.ones(2), "second": {"kernel": jnp.ones(2)}}
    damaged = jax.vmap(damage, (0, None))(jax.random.split(jax.random.key(0), 500), grads)
    np.testing.assert_array_equal(damaged["first"], 1.0)
    assert set(np.unique(damaged["second"]["kernel"])) == {1.0, 1000.0}


def test_a_promise_is_kept_within_one_percent_or_noise():
    rows = [[1.0] * 4, [1.0] * 4, [1.0] * 4]
    best = outcome(5.0, rows)
    # Worse by 0.5 %; by 25 % in every seed; by 5 %, all in one seed of four.
    worse = outcome(5.0, [[1.02] * 4, [2.0] * 4, [1.8, 1.0, 1.0, 1.0]])
    found = judge(worse, {"best": best, "worse": worse}, slice(0, 4))
    np.testing.assert_allclose(found, (2 / 3, (0.5 + 25 + 5) / 3, 25.0, 0.0, 0.5), rtol=1e-9)


def test_the_page_quotes_the_stored_results():
    page = (ROOT / "docs" / "choosing.md").read_text()
    rows = re.findall(r"^\| `(.+)` \|" + r" ([\d.]+) % \|" * 4 + "$", page, re.MULTILINE)
    tables = {name: of_arms(load(study.STORED / f"{name}.csv")) for name in TASKS}
    figures = {
        arm: [judge(arms[arm], arms, slice(None)) for arms in tables.values()]
        for arm in next(iter(tables.values()))
    }
    expected = {}
    for arm, of_tasks in figures.items():
        kept, lost, _, share, at_best = np.mean(of_tasks, axis=0)
        found = f"{100 * kept:.0f}", f"{lost:.1f}", f"{100 * share:.1f}", f"{at_best:.1f}"
        expected[arm] = found
    assert {arm: tuple(quoted) for arm, *quoted in rows} == expected


@pytest.mark.parametrize("name", updates.UPDATE_TASKS)
def test_the_page_quotes_the_gains_of_the_stored_results(name):
    page = (ROOT / "docs" / "choosing.md").read_text()
    section = page.partition("## Clipping the update")[2].partition("\n## ")[0]
    of_task = section.partition(f"{name}`, % |")[2].partition("\n\n")[0]
    quoted = dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", of_task, re.MULTILINE))
    table = load(study.STORED / "updates" / f"{name}.csv")
    expected = {}
    for arm in set(of_arms(table)) - {NONE}:
        found = updates.gain(table, arm)
        cells = [f"{each.mean:+.2f} +- {each.half:.2f}" if each else "-" for each in found]
        expected[arm] = " | ".join(cells)
    assert quoted == expected


def test_the_page_of_stable_adamw_quotes_the_stored_results():
    page = (ROOT / "docs" / "algorithms" / "stable_adamw.md").read_text()
    found = updates.gain(load(study.STORED / "updates" / "lm-b2-0.999.csv"), updates.STABLE)
    for each in (found.over_none, found.at_best):
        assert f"{each.mean:+.2f} +- {each.half:.2f} %" in page


def test_the_page_of_spectral_clip_and_the_readme_quote_the_stored_results():
    table = load(study.STORED / "updates" / "lm-b2-0.999.csv")
    found = updates.gain(table, "chain(step, spectral_clip(), rate)")
    page = (ROOT / "docs" / "algorithms" / "spectral_clip.md").read_text()
    for each in (found.over_none, found.at_best, found.over_control):
        assert f"{each.mean:+.2f} +- {each.half:.2f} %" in page
    over_rates, at_best = f"{found.over_none.mean:.1f}", f"{found.at_best.mean:.1f}"
    row = f"{over_rates} % of the progress over rates and {at_best} % at the best rate"
    assert row in (ROOT / "README.md").read_text()


def test_only_the_named_seeds_are_judged():
    both = {"a": outcome(5.0, [[1.0, 1.0, 4.0, 4.0]]), "b": outcome(5.0, [[2.0, 2.0, 1.0, 1.0]])}
    assert judge(both["a"], both, slice(0, 2)).lost == 0.0
    assert judge(both["a"], both, slice(2, 4)).lost == pytest.approx(75.0)


@pytest.mark.parametrize("name", rules.CANDIDATES)
def test_a_candidate_is_its_equation(name):
    """From sorted norms, in float64."""
    norms = np.random.default_rng(0).lognormal(sigma=0.5, size=60)
    norms[-1] = 6.0
    grads = [{"w": np.full(1, norm, np.float32)} for norm in norms]
    _, state = run(rules.CANDIDATES[name].clipper, grads[0], grads)
    threshold = float(smartclip.metrics(state)["clip_threshold"])
    window = int(name.split(" of ")[1].split(",")[0]) if " of " in name else 112
    q10, q25, q50, q75 = np.percentile(norms[:-1][-window:], [10, 25, 50, 75])
    fence, norm = q75 + 1.5 * (q75 - q25), norms[-1]
    limits = {
        "upper fence": fence,
        "q75": q75,
        "median": q50,
        "q25": q25,
        "q10": q10,
        "above upper fence, to median": q50 if norm > fence else norm,
        "above upper fence, reciprocal": max(q50, fence**2 / norm) if norm > fence else norm,
        "root from median": min(fence, np.sqrt(q50 * max(norm, q50))),
        "root from q25": min(fence, np.sqrt(q25 * max(norm, q25))),
    }
    if name.startswith("lower half"):
        expected = q50 + float(name.split(", ")[1]) * (q50 - q25)
    else:
        expected = limits[re.split(", falls|, 1 median| of ", name)[0]]
    if "falls" in name:
        assert threshold <= expected
    else:
        assert threshold == pytest.approx(expected, rel=1e-5)
