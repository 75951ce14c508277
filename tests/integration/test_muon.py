"""A clipper next to Muon: a fixed limit stops training, and other clippers do not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from optax import contrib

import optax_smartclip as smartclip

EPS = 1e-8  # Optax's default.
MATRIX = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
MATRIX /= np.linalg.norm(MATRIX)
# One leaf has nearly all of the norm, 5e7; `bias` and `gain` are AdamW's.
GRADS = {
    "bias": np.full(8, 1e-3, np.float32),
    "gain": np.float32(5e7),
    "matrix": 1e-6 * MATRIX,
}
ZEROS = jax.tree.map(np.zeros_like, GRADS)
MUON = contrib.muon(1.0, eps=EPS)
CEILING = 1.0


@pytest.fixture(scope="module")
def muon():
    """Muon with an update that is compiled once."""

    @jax.jit
    def update(updates, state, params):
        with jax.numpy_dtype_promotion("standard"):  # Optax promotes int32 and float32.
            return MUON.update(updates, state, params)

    return optax.GradientTransformation(MUON.init, update)


def compiled(clipper):
    return optax.GradientTransformation(clipper.init, jax.jit(clipper.update))


def last_lengths(stream, *links):
    """The norm of each leaf's update in the last step."""
    tx = optax.chain(*links)
    state = tx.init(ZEROS)
    for grads in stream:
        updates, state = tx.update(grads, state, ZEROS)
    return {name: reference.norm(leaf) for name, leaf in updates.items()}


def newton_schulz(matrix):
    """Muon's orthogonalization in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = np.float64(matrix) / (np.linalg.norm(matrix) + EPS)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def test_an_update_has_the_length_that_newton_schulz_in_float64_gives():
    tx = contrib.muon(1.0, nesterov=False)

    @jax.jit
    @jax.vmap
    def update(norm):
        with jax.numpy_dtype_promotion("standard"):
            grads = {"w": norm * MATRIX}
            return tx.update(grads, tx.init(grads), grads)[0]["w"]

    norms = np.float32([1.0, 1e-8, 1e-10, 1e-11, 1e-12])
    lengths = np.linalg.norm(update(norms), axis=(1, 2))
    expected = [np.linalg.norm(newton_schulz(norm * MATRIX)) for norm in norms]
    np.testing.assert_allclose(lengths, expected, rtol=1e-3)
    # As documented: as usual down to 1e-10, a fifth at 1e-11, and proportional below.
    np.testing.assert_allclose(lengths / lengths[0], [1, 1, 1, 0.2, 0.02], rtol=0.2)


def is_not_matrix(params):
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) != 2, params)


def ceiling(**arguments):
    return smartclip.autoclip(max_norm=CEILING, **arguments)


# The links before and after Muon, and the leaves whose updates are shortened.
ARMS = {
    "fixed limit": ([ceiling()], [], {"bias", "matrix"}),
    "Optax's fixed limit": ([optax.clip_by_global_norm(CEILING)], [], {"bias", "matrix"}),
    "learned": ([smartclip.autoclip()], [], set()),
    "per_param": ([ceiling(scope="per_param")], [], set()),
    "min_scale": ([ceiling(min_scale=1e-3)], [], set()),
    "AdamW's part": ([ceiling(mask=is_not_matrix)], [], {"bias"}),
    "AdamW's part, per_param": ([ceiling(mask=is_not_matrix, scope="per_param")], [], set()),
    "after": ([], [smartclip.autoclip()], set()),
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_fixed_limit_shortens_updates_and_the_documented_alternatives_do_not(arm, muon):
    before, after, shortened = ARMS[arm]
    stream = [GRADS] * 3
    usual = last_lengths(stream, muon)
    lengths = last_lengths(stream, *map(compiled, before), muon, *map(compiled, after))
    for name, length in lengths.items():
        ratio = length / usual[name]
        assert ratio < 0.03 if name in shortened else 0.9 < ratio < 1.1, (name, ratio)


def test_one_step_that_is_scaled_down_does_not_shorten_the_update(muon):
    starved = jax.tree.map(lambda leaf: np.float32(1e-14) * leaf, GRADS)
    usual = last_lengths([GRADS] * 4, muon)
    lengths = last_lengths([GRADS] * 3 + [starved], muon)
    assert 0.9 < lengths["matrix"] / usual["matrix"] < 1.1
    assert lengths["bias"] / usual["bias"] > 0.5  # Adam's first moment has just begun.


def test_after_muon_a_fixed_limit_sets_the_length_and_a_learned_one_keeps_it(muon):
    fixed, learned = compiled(ceiling()), compiled(smartclip.autoclip())
    tx = optax.chain(muon, learned)
    state = tx.init(ZEROS)
    for seed, size in enumerate([1.0, 3.0, 0.1, 1e4, 1.0]):
        matrix = size * np.random.default_rng(seed).normal(size=(8, 8))
        updates, state = tx.update({**GRADS, "matrix": np.float32(matrix)}, state, ZEROS)
        assert smartclip.metrics(state)["clip_scale"] > 0.9
        limited, _ = fixed.update(updates, fixed.init(ZEROS))
        np.testing.assert_allclose(reference.norm(limited), CEILING, rtol=1e-5)
