"""The table of `benchmarks/placements.py`: against float64, and the signs that its page names.

Runs are short. If updates are still disturbed at the end, all steps count.
"""

import jax
import numpy as np
import placements
import pytest
from breadth import long_but
from placements import OPTIMIZERS, RATE, STEPS_BEFORE, make_stream

NUM_STEPS = 150


def sgd(gradients):
    return RATE * gradients


def momentum(gradients):
    trace, updates = 0.0, []
    for gradient in gradients:
        trace = gradient + 0.9 * trace
        updates.append(RATE * trace)
    return np.array(updates)


def adam(gradients):
    mean = square = 0.0
    updates = []
    for number, gradient in enumerate(gradients, 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        scale = np.sqrt(square / (1 - 0.999**number)) + 1e-8
        updates.append(RATE * mean / (1 - 0.9**number) / scale)
    return np.array(updates)


def lengths(updates):
    return np.linalg.norm(updates, axis=(1, 2))


BY_HAND = {"sgd": sgd, "sgd, momentum 0.9": momentum, "adam": adam}


@pytest.fixture(autouse=True)
def _as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def effect(name, place, seed=0):
    """The length of the spike's update, and the number of steps that are disturbed."""
    stream = make_stream(seed, STEPS_BEFORE + NUM_STEPS)
    tx = placements.PLACES[place](OPTIMIZERS[name])
    return jax.jit(lambda: placements.effect_of_spike(tx, stream))()


@pytest.mark.parametrize("name", long_but({"adam"}, BY_HAND))
def test_an_unclipped_spike_has_the_effect_that_it_has_in_float64(name):
    gradients = np.float64(make_stream(0, STEPS_BEFORE + NUM_STEPS).gradients)
    spiked = gradients.copy()
    spiked[STEPS_BEFORE] *= 100
    usual, spiked = (BY_HAND[name](stream)[STEPS_BEFORE:] for stream in (gradients, spiked))
    differs = lengths(spiked - usual) >= 0.1 * lengths(usual)
    spike, num_steps = effect(name, "no clipping")
    np.testing.assert_allclose(spike, lengths(spiked)[0] / lengths(usual)[0], rtol=1e-3)
    assert num_steps == np.flatnonzero(differs)[-1] + 1


# The optimizers whose update an unclipped spike of 100 makes longer, and the least and the largest
# number of steps that it disturbs.
LONGER = {"sgd", "sgd, momentum 0.9", "adam", "adamw"}
DISTURBED = {
    "sgd": (1, 1),
    "sgd, momentum 0.9": (40, 60),
    "adam": (NUM_STEPS, NUM_STEPS),
    "adamw": (NUM_STEPS, NUM_STEPS),
    "lion": (10, 60),
    "contrib.muon": (80, 140),
    "adafactor": (NUM_STEPS, NUM_STEPS),
    "lbfgs": (11, 11),
}


@pytest.mark.parametrize("name", long_but({"contrib.muon"}, OPTIMIZERS))
def test_a_clipper_before_the_optimizer_bounds_the_moments_and_one_after_it_the_step(name):
    before, forgotten = effect(name, "before")
    after, remembered = effect(name, "after")
    assert 0.7 < before < 1.25
    assert 0.7 < after < 1.25
    # L-BFGS stores the last ten pairs, and estimates the curvature from the clipped gradient.
    assert forgotten <= (11 if name == "lbfgs" else 1)
    low, high = DISTURBED[name]
    # Without a memory, the spike disturbs its own step only.
    assert (0 if name == "sgd" else low) <= remembered <= high


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_row_of_an_optimizer(name):
    row = placements.measure(OPTIMIZERS[name], NUM_STEPS, seeds=1)
    low, high = DISTURBED[name]
    assert low <= row.steps["no clipping"] <= high
    assert (row.spike["no clipping"] > 2) == (name in LONGER)
    is_proportional = name.startswith("sgd")
    assert row.scaled == pytest.approx(0.1 if is_proportional else 1.0, rel=0.01)
    assert (row.starves == 0) == (name in {"lion", "lbfgs"})
    line = placements.format_row(name, row)
    assert len(line) == len(placements.format_head().splitlines()[1])
