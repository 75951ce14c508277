"""The batches of `benchmarks/micro_batches.py`, and the intervals that it prints."""

import jax
import micro_batches
import numpy as np


def test_damage_changes_four_examples_anywhere_in_a_batch_and_no_others():
    keys = jax.random.split(jax.random.key(0), 300)
    with jax.numpy_rank_promotion("allow"):
        damaged, undamaged = (
            jax.jit(jax.vmap(micro_batches.load_task(has_damage=has_damage).batch))(keys)
            for has_damage in (True, False)
        )
    assert np.array_equal(damaged[0], undamaged[0])
    assert np.all(np.asarray(undamaged[1]) == 1)
    is_bad = np.asarray(damaged[1])[:, :, 0] == 255
    assert set(is_bad.sum(1).tolist()) == {0, 4}
    assert len(set(np.nonzero(is_bad)[1].tolist())) > 8


def test_an_interval_is_that_of_students_distribution():
    # The 0.975 quantile for three degrees of freedom is 3.1824, the error 0.6455.
    assert micro_batches.interval(np.array([1.0, 2.0, 3.0, 4.0])) == "+2.5000 +- 2.0543"
