"""The adaptive clippers of other trainers, and their replacements in docs/migrating.md.

Each original is written here from its equations, in float64: it takes norms and returns the
threshold and the scale of each step. The replacements are read from the page.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import ROOT

import optax_smartclip as smartclip

PAGE = (ROOT / "docs" / "migrating.md").read_text()
SECTION = PAGE.partition("\n## From a trainer's own clipper\n")[2]

SIZES = np.random.default_rng(0).lognormal(sigma=0.2, size=1300)
DIRECTION = {"w": np.float32([[0.48, 0.0], [0.0, 0.64]]), "scale": np.float32(0.6)}  # Norm 1.
PARAMS = {"w": jnp.float32([[0.5, 0.1], [0.2, 0.3]]), "scale": jnp.float32(2.0)}


def line_of(trainer):
    """The replacement for a trainer, built with the functions of the page."""
    names = {"sc": smartclip, "jax": jax, "jnp": jnp}
    exec(re.search(r"```python\n(.*?)```", SECTION, re.DOTALL)[1], names)
    row = next(row for row in SECTION.splitlines() if row.startswith(f"| {trainer}"))
    return eval(re.fullmatch(r"`(.*)`", row.split(" | ")[1])[1], names)


def run(tx, sizes):
    """Thresholds and scales for gradients of these norms, and the norms that were measured."""

    def step(state, size):
        grads = jax.tree.map(lambda leaf: size * leaf, DIRECTION)
        _, state = tx.update(grads, state, PARAMS)
        return state, state.last

    record = jax.jit(lambda sizes: jax.lax.scan(step, tx.init(PARAMS), sizes)[1])(
        jnp.asarray(sizes, jnp.float32)
    )
    thresholds = np.where(record.clip_threshold < 3e38, record.clip_threshold, np.inf)
    return thresholds, np.asarray(record.clip_scale), np.asarray(record.grad_norm)


def scales_to(norms, thresholds, eps=0.0):
    return np.minimum(1.0, thresholds / (norms + eps))


def trellis(norms, max_norm=1.0, percentile=95.0, size=1000):
    """The threshold changes once `size` finite norms are known, after the step of each norm."""
    known, limit, thresholds = [], max_norm, []
    for norm in norms:
        thresholds.append(limit)
        if np.isfinite(norm):
            known = [*known, norm][-size:]
        if len(known) == size:
            limit = min(max_norm, np.percentile(known, percentile))
    return np.array(thresholds), scales_to(norms, np.array(thresholds), 1e-6)


def open_sora(norms, decay=0.99, first_limit=1.0):
    """Only norms within the threshold change mean and variance; the first step is not clipped."""
    mean, variance = min(3 * norms[0], first_limit), 0.0
    thresholds = [np.inf]
    for norm in norms[1:]:
        thresholds.append(mean + 3 * np.sqrt(variance))
        if norm <= thresholds[-1]:
            mean = decay * mean + (1 - decay) * norm
            variance = decay * variance + (1 - decay) * (mean - norm) ** 2
    return np.array(thresholds), scales_to(norms, np.array(thresholds))


def icefall(norms, clipping_scale=2.0, period=100):
    """Step 0 is not clipped and not recorded. The median is one of the two middle norms."""
    limit, thresholds = np.inf, [np.inf]
    for step in range(1, len(norms)):
        early = step in (10, 20, 40)
        if early or step % period == 0:
            past = np.sort(norms[max(1, step - period + 1) : step + 1])
            limit = clipping_scale * past[len(past) // 4 * 2] * (2 if early else 1)
        thresholds.append(limit)
    return np.array(thresholds), scales_to(norms, np.array(thresholds))


def icefall_norm(grads):
    """The root of the sum of (gradient times the RMS of its tensor) squared."""
    squares = np.sum(np.float64(grads["w"]) ** 2) * np.mean(np.float64(PARAMS["w"]) ** 2)
    return np.sqrt(squares + np.float64(grads["scale"]) ** 2 * 0.1**2)


def levanter(norms, size=128, sigmas=3.0):
    """The threshold needs half a window of earlier norms. A NaN stays in the window."""
    thresholds = []
    for step in range(len(norms)):
        past = norms[max(0, step - size) : step]
        known = len(past) >= size // 2
        limit = np.mean(past) + sigmas * max(np.std(past), 1e-6) if known else np.inf
        thresholds.append(np.inf if np.isnan(limit) else limit)
    return np.array(thresholds), scales_to(norms, np.array(thresholds))


def test_trellis_has_the_same_threshold_one_step_later():
    norms = 0.5 * SIZES
    norms[[400, 1100, 1200]] *= 100
    norms[[600, 1150]] = np.nan
    limits, scales = trellis(norms)
    thresholds, ours, _ = run(line_of("TRELLIS"), norms)
    finite = np.isfinite(norms)
    np.testing.assert_allclose(thresholds[:1001], 1.0)
    np.testing.assert_allclose(limits[:1001], 1.0)
    later = finite[1001:-1]
    assert later.sum() > 290
    np.testing.assert_allclose(thresholds[1001:-1][later], limits[1002:][later], rtol=1e-6)
    # The percentiles differ by one norm in a thousand.
    np.testing.assert_allclose(ours[finite], scales[finite], rtol=0.01)
    assert np.mean(ours[1001:] < 1) > 0.03
    np.testing.assert_array_equal(ours[~finite], 0.0)


def test_thresholds_equal_those_of_open_sora_until_a_spike_and_follow_a_rise():
    norms = np.random.default_rng(0).uniform(0.2, 0.4, size=3000)
    norms[2000] = 30.0
    norms[2500:] *= 5
    limits, scales = open_sora(norms)
    thresholds, ours, _ = run(line_of("Open-Sora"), norms)
    # Both have forgotten their initial values. The spike is clipped to one threshold.
    np.testing.assert_allclose(thresholds[1900:2001], limits[1900:2001], rtol=1e-5)
    np.testing.assert_allclose(ours[1900:2001], scales[1900:2001], rtol=1e-5)
    assert ours[2000] < 0.02
    # Our clipper learns the spike as a norm at the threshold: the mean rises by 3 % of a standard
    # deviation, which then grows, too.
    mean, std = np.mean(norms[1500:2000]), np.std(norms[1500:2000])
    np.testing.assert_allclose(limits[2001], limits[2000], rtol=1e-12)
    np.testing.assert_allclose(thresholds[2001] - thresholds[2000], 0.145 * std, rtol=0.15)
    assert thresholds[2001] < mean + 4 * std
    # A permanent rise.
    assert np.max(scales[2500:]) < 0.6
    np.testing.assert_array_equal(ours[2600:], 1.0)


def test_norms_and_medians_equal_those_of_icefall_where_it_updates_them():
    sizes = SIZES[:450].copy()
    sizes[[30, 150, 320, 430]] *= 50
    norms = np.array([icefall_norm(jax.tree.map(lambda x, s=s: s * x, DIRECTION)) for s in sizes])
    limits, scales = icefall(norms)
    thresholds, ours, measured = run(line_of("icefall"), sizes[1:])
    np.testing.assert_allclose(measured, norms[1:], rtol=1e-6)
    np.testing.assert_array_equal(thresholds[:10], np.inf)
    for step in (10, 20, 40, 100, 200, 300, 400):
        # One step later, because the current norm does not count.
        past = np.sort(norms[max(1, step - 99) : step + 1])
        factor = 4.0 if step < 100 else 2.0
        np.testing.assert_allclose(thresholds[step], factor * np.median(past), rtol=1e-6)
        middle = len(past) // 2
        assert limits[step] in factor * past[[middle - 1, middle]]
    # Neither clips noise, and both clip spikes.
    spikes = [30, 150, 320, 430]
    np.testing.assert_allclose(ours[np.array(spikes) - 1], scales[spikes], rtol=0.1)
    assert np.all(scales[spikes] < 0.1)
    for each in (np.delete(scales, spikes), np.delete(ours, np.array(spikes) - 1)):
        np.testing.assert_array_equal(each, 1.0)


@pytest.mark.parametrize("with_nan", [False, True])
def test_thresholds_equal_those_of_levanter_until_a_nan(with_nan):
    norms = SIZES[:400].copy()
    norms[[50, 200, 300]] *= 20
    if with_nan:
        norms[190] = np.nan
    limits, scales = levanter(norms)
    thresholds, ours, _ = run(line_of("levanter"), norms)
    same = slice(0, 190 if with_nan else 400)
    np.testing.assert_allclose(thresholds[same], limits[same], rtol=1e-5)
    np.testing.assert_allclose(ours[same], scales[same], rtol=1e-5)
    np.testing.assert_array_equal(np.isinf(thresholds[:66]), np.arange(66) < 64)
    assert ours[50] == 1
    assert ours[200] < 0.2
    if with_nan:
        assert ours[190] == 0
        np.testing.assert_array_equal(scales[191:319], 1.0)
