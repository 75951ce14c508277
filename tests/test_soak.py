"""`make soak` in 3000 steps: every clipper passes, broken ones fail, the references are right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import running_reference
import soak

import optax_smartclip as smartclip
from optax_smartclip.clippers.zscore_clip import zscore_rule

STEPS = 3000


@pytest.mark.parametrize("label", soak.CLIPPERS)
def test_every_clipper_passes_a_short_run(label):
    assert soak.soak(soak.CLIPPERS[label], STEPS)[2] == []


def test_the_norms_contain_every_kind_of_trouble():
    norms = soak.make_norms(STEPS, 2)
    assert norms.dtype == np.float32
    assert all(np.count_nonzero(bad) > 5 for bad in (np.isnan(norms), np.isinf(norms)))
    assert np.all(norms[1210:1490][np.median(norms[1200:1500]) == norms[1210:1490]] == 2)
    assert np.mean(norms[1200:1500] == 2) > 0.95
    assert np.mean(norms[2000:2200] == 0) > 0.95
    assert 5 < np.count_nonzero(np.delete(norms, np.s_[2000:2200], axis=0) == 0) < 50
    many = soak.make_norms(60_000, 1)[:, 0]
    medians = np.nanmedian(many.reshape(-1, 1000), axis=1)
    assert medians.max() > 1000 * medians[medians > 0].min()
    finite = many[np.isfinite(many) & (many > 0)]
    assert finite.min() == np.float32(1e-30)
    assert finite.max() == np.float32(1e30)
    # The first norms are not damaged.
    assert soak.make_norms(30, 1).max() < 5


ONE = soak.make_norms(1000, 1, seed=1)[:, 0]
FINITE = np.isfinite(ONE) & (ONE > 0)


REFERENCES = {
    "the lower fence of a window": (
        running_reference.lower_fence(),
        lambda: reference.lower_fence_thresholds(ONE),
    ),
    "the upper fence of a window": (
        running_reference.upper_fence(),
        lambda: reference.upper_fence_thresholds(ONE),
    ),
    "a percentile of a window": (
        running_reference.percentile(33.3, 50),
        lambda: reference.percentile_thresholds(ONE, 33.3, 50),
    ),
    "the outliers of a window": (
        running_reference.outliers(),
        lambda: reference.skipped_steps(ONE)[1][:, 0],
    ),
    "the lower bound of a percentile of all": (
        lambda norms: running_reference.percentile_of_all(33.3, 0.01)(norms)[0],
        lambda: reference.percentile_thresholds(running_reference.levels(ONE), 33.3, len(ONE)),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_references_that_keep_norms_in_order_equal_those_that_sort_at_every_step(name):
    quick, plain = REFERENCES[name]
    np.testing.assert_allclose(quick(ONE[:, None])[FINITE, 0], plain()[FINITE], rtol=1e-9)


def test_the_bounds_of_a_percentile_differ_by_the_error_of_a_histogram():
    low, high = running_reference.percentile_of_all(33.3, 0.25)(ONE[:, None])
    np.testing.assert_allclose(high, 1.25 * low, rtol=1e-12)


def test_the_bounds_of_a_fading_percentile_enclose_that_of_the_whole_stream():
    norms = np.where(np.arange(len(ONE)) < 500, 100 * ONE, ONE)
    # Older norms weigh so little that the reference reads the last 300 only.
    bounds = running_reference.fading_percentile(33.3, 0.01, decay=0.95)(norms[:, None])
    low, high = bounds[..., 0]
    compared = np.flatnonzero(FINITE & (high < np.inf))
    assert len(compared) > 150
    assert compared[-1] > 990
    seen = running_reference.levels(norms)
    expected = [
        reference.fading_percentile(seen[: step + 1][FINITE[: step + 1]], 33.3, 0.95)
        for step in compared
    ]
    assert np.all((low[compared] <= expected) & (expected <= high[compared]))
    assert np.median(high[compared] / np.maximum(low[compared], 1e-30)) == pytest.approx(1.01)


def zscore_with(tx=None, **options):
    """A transformation, or zscore_clip with options, that is held to zscore_clip()."""
    return soak.CLIPPERS["zscore_clip()"]._replace(tx=tx or smartclip.zscore_clip(**options))


def with_rule(**functions):
    """zscore_clip() with some functions of its rule replaced."""
    return smartclip.clip_by_rule(zscore_rule(3.0, 0.99)._replace(**functions), warmup_steps=1)


def changed(change):
    """zscore_clip() with something done to the updates and state of each step."""
    tx = smartclip.zscore_clip()

    def update(grads, state, params=None):
        return change(grads, *tx.update(grads, state, params))

    return optax.GradientTransformation(tx.init, update)


def changed_record(**fields):
    """zscore_clip() with something done to fields of its record."""

    def change(grads, updates, state):
        record = {name: f(state) for name, f in fields.items()}
        return updates, state.replace(last=state.last._replace(**record))

    return changed(change)


def leak(state, norms, thresholds):
    state = zscore_rule(3.0, 0.99).record(state, norms, thresholds)
    return state.replace(mean=state.mean * (1 - 1e-5))


def break_at_large_norms(state, norms, thresholds):
    after = zscore_rule(3.0, 0.99).record(state, norms, thresholds)
    return after.replace(std=jnp.where(norms > 5e3, jnp.nan, after.std))


def loosen_with_time(state, norms):
    loosened = 1 + 1e-12 * state.num_recorded.astype(jnp.float32)
    return loosened * zscore_rule(3.0, 0.99).threshold(state, norms)


def wrap_around(state):
    return jnp.where(state.last.num_steps == 2**31 - 1, -(2**31), state.last.num_steps)


def miss_infinities(state):
    return state.last.num_nonfinite - (state.last.grad_norm == soak.LARGEST).astype(jnp.int32)


def scale_all(grads, updates, state):
    return [(1 - 2**-23) * update for update in updates], state


def let_nan_through(grads, updates, state):
    return [jnp.where(jnp.isnan(g), g, u) for g, u in zip(grads, updates, strict=True)], state


BROKEN = {
    "a slow leak": (lambda: with_rule(record=leak), ["threshold wrong"]),
    "another memory": (lambda: smartclip.zscore_clip(decay=0.9901), ["threshold wrong"]),
    "a NaN in the state": (
        lambda: with_rule(record=break_at_large_norms),
        ["state wrong", "threshold wrong"],
    ),
    "a threshold that looks at its counter": (
        lambda: with_rule(threshold=loosen_with_time),
        ["full counters change"],
    ),
    "a counter that wraps around": (
        lambda: changed_record(num_steps=wrap_around),
        [".last.num_steps does not stop"],
    ),
    "a counter that misses some": (
        lambda: changed_record(num_nonfinite=miss_infinities),
        [".last.num_nonfinite wrong"],
    ),
    "another decision than the threshold": (
        lambda: changed_record(clipped=lambda state: state.last.clip_scale < 0.5),
        ["scale wrong", "decision wrong"],
    ),
    "updates that differ from the gradient in one bit": (
        lambda: changed(scale_all),
        ["update wrong"],
    ),
    "a NaN in an update": (lambda: changed(let_nan_through), ["update wrong"]),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_clipper_does_not_pass(defect):
    build, expected = BROKEN[defect]
    _, _, problems = soak.soak(zscore_with(build()), STEPS)
    found = [any(problem.startswith(start) for problem in problems) for start in expected]
    assert all(found), problems


def test_a_window_that_is_one_norm_too_long_does_not_pass():
    should_be = running_reference.percentile(90.0, 6)
    clipper = soak.CLIPPERS["autoclip(90, ring_buffer(7), per_param)"]
    _, _, (problem,) = soak.soak(clipper._replace(reference=should_be), STEPS)
    assert problem == "threshold wrong from step 6 on"


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["soak.py", *arguments])
    code = soak.main()
    return code, capsys.readouterr().out.splitlines()


def test_the_table_has_a_row_for_each_selected_clipper(monkeypatch, capsys):
    code, lines = run_main(monkeypatch, capsys, f"--steps={STEPS}", "--clippers", "zscore", "agc(p")
    assert code == 0
    assert lines[0].startswith("Python 3")
    assert jax.__version__ in lines[0]
    rows = [line.split() for line in lines[2:-1]]
    assert [row[0] for row in rows] == ["zscore_clip()", "agc(per_param)"]
    assert all(row[1] == f"{STEPS:,}" and row[-2] == "exact" for row in rows)
    assert lines[-1].startswith("All is well")


def test_the_exit_code_is_one_if_anything_is_wrong(monkeypatch, capsys):
    tx = changed_record(num_nonfinite=miss_infinities)
    monkeypatch.setattr(soak, "CLIPPERS", {"broken": zscore_with(tx)})
    code, lines = run_main(monkeypatch, capsys, f"--steps={STEPS}")
    assert code == 1
    assert lines[2].split()[0] == "broken"
    assert lines[2].split()[-2] == "wrong"
    assert lines[3].startswith("    .last.num_nonfinite wrong from step ")
    assert lines[-1].startswith("1 of 1 are wrong")
