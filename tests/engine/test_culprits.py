"""The groups that held the norm and were over a threshold, ranked by hand in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_smartclip as smartclip
from optax_smartclip import culprits

LARGEST = float(np.finfo(np.float32).max)
NAN, INF = float("nan"), float("inf")
LABELS = ("body", "head", "neck", "tail")


def of_observer(norms, thresholds=None):
    """The record of `observe_norms` and, with thresholds, of a clipper."""
    tx = smartclip.observe_norms("per_param")
    grads = {label: np.float32([norm]) for label, norm in zip(LABELS, norms, strict=True)}
    record = smartclip.metrics(tx.update(grads, tx.init(grads))[1])
    return record if thresholds is None else record | {"clip_threshold": np.float32(thresholds)}


def of_clipper(norms, thresholds):
    """The record of a clipper with several groups."""
    reported = [np.where(np.isfinite(x), x, LARGEST) for x in (norms, thresholds)]
    return dict(zip(("grad_norm", "clip_threshold"), map(np.float32, reported), strict=True))


NORMS = [3.0, 12.0, 4.0, 0.0]
SHARES = np.square(NORMS) / 169


@pytest.mark.parametrize("top", [1, 3, 4, 7])
@pytest.mark.parametrize("source", [of_observer, of_clipper])
def test_groups_are_ranked_by_their_share_and_by_their_excess(source, top):
    thresholds = [1.0, 8.0, 20.0, 1.0]
    found = jax.jit(lambda metrics: culprits(metrics, top=top))(source(NORMS, thresholds))
    for groups, values in (found[:2], found[2:]):
        assert groups.shape == values.shape == (min(top, 4),)
        assert (groups.dtype, values.dtype) == (jnp.int32, jnp.float32)
    assert found.by_share.tolist() == [1, 2, 0, 3][:top]
    np.testing.assert_allclose(found.share, SHARES[[1, 2, 0, 3]][:top], rtol=1e-6)
    assert found.by_excess.tolist() == [0, 1, 2, 3][:top]
    np.testing.assert_allclose(found.excess, [3.0, 1.5, 0.2, 0.0][:top], rtol=1e-6)


def test_one_threshold_of_the_whole_gradient_holds_for_each_observed_group():
    found = culprits(of_observer(NORMS, 2.0), top=2)
    assert found.by_excess.tolist() == [1, 2]
    np.testing.assert_allclose(found.excess, [6.0, 2.0], rtol=1e-6)


def test_without_a_threshold_there_is_no_excess():
    for metrics in (of_observer(NORMS), of_clipper(NORMS, [INF] * 4)):
        found = culprits(metrics)
        assert found.by_share.tolist() == [1, 2, 0, 3]
        np.testing.assert_array_equal(found.excess, 0.0)


def test_everything_is_finite_when_a_norm_is_not_or_a_threshold_is_zero():
    for metrics in (of_observer([1.0, NAN, 0.0, INF], 1e-3), of_clipper([1, NAN, 0, INF], [0] * 4)):
        with jax.debug_nans(True):
            found = culprits(metrics)
        assert found.by_share[:2].tolist() == found.by_excess[:2].tolist() == [1, 3]
        np.testing.assert_allclose(found.share, [0.5, 0.5, 0.0, 0.0])
        np.testing.assert_array_equal(found.excess[:2], LARGEST)
        assert found.by_excess[2] == 0
        assert 100 < found.excess[2] < LARGEST
        assert found.excess[3] == 0
    # The largest possible ratio is still finite.
    assert 1e38 < culprits(of_clipper([3e38, 1, 1, 1], [1e-30, 1, 1, 1])).excess[0] < LARGEST


def test_a_spike_is_found_at_its_step_inside_a_scan_of_runs_under_vmap():
    tx = optax.chain(smartclip.observe_norms(), smartclip.autoclip(), optax.sgd(0.1))
    params = {label: {"w": jnp.ones(3)} for label in LABELS}
    sizes = np.random.default_rng(0).lognormal(sigma=0.1, size=(2, 30, 4)).astype(np.float32)
    sizes[0, 20, 2], sizes[1, 25, 1] = 50.0, 50.0

    def step(state, sizes):
        grads = {
            label: {"w": size * jnp.ones(3)} for label, size in zip(params, sizes, strict=True)
        }
        _, state = tx.update(grads, state, params)
        record = smartclip.metrics(state)
        return state, (culprits(record, top=2), record)

    run = jax.vmap(lambda sizes: jax.lax.scan(step, tx.init(params), sizes)[1])
    found, records = jax.jit(run)(sizes)
    np.testing.assert_array_equal(found.by_share[..., 0], np.argmax(sizes, axis=2))
    # The first step is warm-up.
    np.testing.assert_array_equal(found.by_excess[:, 1:], found.by_share[:, 1:])
    np.testing.assert_array_equal(found.excess[:, 0], 0.0)
    assert found.share[0, 20, 0] == np.max(found.share[0, :, 0]) > 0.99
    expected = 50 * 3**0.5 / records["clip_threshold"][0, 20]
    np.testing.assert_allclose(found.excess[0, 20, 0], expected, rtol=1e-5)
    # On the records of all steps at once, it finds the same, also without a clipper.
    jax.tree.map(np.testing.assert_array_equal, culprits(records, top=2), found)
    observed = {name: records[name] for name in smartclip.NormMetrics._fields}
    np.testing.assert_array_equal(culprits(observed, top=2).by_share, found.by_share)


def test_the_records_of_several_steps_of_a_clipper_are_judged_one_by_one():
    thresholds = [1.0, 8.0, 20.0, 1.0]
    steps = [of_clipper(norms, thresholds) for norms in (NORMS, [5, 0, 0, 0], [1, NAN, 2, INF])]
    together = culprits(jax.tree.map(lambda *values: np.stack(values), *steps))
    apart = jax.tree.map(lambda *values: np.stack(values), *map(culprits, steps))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), together, apart)


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        (
            of_clipper(NORMS, [1, 8, 20, 1]),
            "head 85.2 % of the squared norm, 1.5 x the threshold; "
            "neck 9.47 % of the squared norm; body 3 x the threshold",
        ),
        (
            of_observer(NORMS),
            "head 85.2 % of the squared norm; neck 9.47 % of the squared norm",
        ),
        (
            of_observer(NORMS, 8.0),
            "head 85.2 % of the squared norm, 1.5 x the threshold; neck 9.47 % of the squared norm",
        ),
        (
            of_clipper(NORMS, [3, 8, 20, 1]),
            "head 85.2 % of the squared norm, 1.5 x the threshold; neck 9.47 % of the squared norm",
        ),
        (of_observer([1, 1, INF, 1]), "neck 100 % of the squared norm, NaN or Inf"),
        (of_observer([0, 0, 0, 0], 1.0), "a gradient of zero"),
    ],
    ids=["clipper", "observer", "observer and clipper", "at it", "not finite", "zero"],
)
def test_one_line_names_them(metrics, line):
    assert culprits(metrics, top=2).describe(LABELS) == line


def test_five_groups_are_returned_by_default_or_as_many_as_there_are():
    for groups, returned in ((7, 5), (5, 5), (0, 0)):
        found = culprits(of_clipper(np.arange(groups), np.ones(groups)))
        assert found.by_share.shape == (returned,)
    assert found.describe([]) == "a gradient of zero"


def test_what_does_not_fit_is_an_error():
    metrics = of_observer(NORMS)
    for top in (0, True):
        with pytest.raises(ValueError, match="`top` must be a Python int >= 1, got"):
            culprits(metrics, top=top)
    one, two = ({f"{place}/clip_threshold": jnp.ones(4)} for place in range(2))
    for bad in ({}, {"grad_norm": jnp.ones(4)}, {"norm_share": jnp.ones(4)}, metrics | one | two):
        with pytest.raises(ValueError, match=r"`metrics` must have 'observed_norm' and 'norm_shar"):
            culprits(bad)
    with pytest.raises(ValueError, match=r"same groups in 'clip_threshold'.*\(3,\) and \(4,\)"):
        culprits(metrics | {"clip_threshold": jnp.ones(3)})
    found = culprits(metrics)
    for labels in (LABELS[:3], "body"):
        with pytest.raises(ValueError, match="`labels` must have one entry for each group, got"):
            found.describe(labels)
    several = jax.tree.map(lambda values: jnp.stack([values] * 2), found)
    with pytest.raises(ValueError, match=r"needs the culprits of one step.*\(2, 4\)"):
        several.describe(LABELS)
