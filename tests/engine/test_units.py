"""Units of leaves: the axes that count them, and their summary in a state."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from optax_smartclip.engine.metrics import init_metrics
from optax_smartclip.engine.units import reduced_axes, report_units


@pytest.mark.parametrize(("shape", "reduced"), [((4,), None), ((), None), ((4, 1), (0,))])
def test_only_rank_one_is_a_vector_in_arrays_split_over_devices(shape, reduced):
    # An axis of size 1 on a device may be longer in the whole array.
    assert reduced_axes((), shape, None, True) == reduced


SCALES = st.sampled_from([-1.0, 0.0, 1e-30, 0.25, 0.5, 1.0])


@hypothesis.given(st.lists(st.lists(SCALES, min_size=1, max_size=4), min_size=1, max_size=3))
@hypothesis.example([[0.5, 1.0], [0.25]])
@hypothesis.example([[-1.0, 1.0], [1.0]])
def test_the_summary_covers_the_units_of_all_leaves(leaves):
    scales = [jnp.float32(leaf) for leaf in leaves]
    norms = [jnp.ones_like(scale) for scale in scales]
    record = report_units(init_metrics(1), norms, norms, scales, "zero")
    units = np.float32([scale for leaf in leaves for scale in leaf])
    np.testing.assert_array_equal(record.clip_scale, max(np.min(units), 0.0))
    largest = np.finfo(np.float32).max
    np.testing.assert_array_equal(record.grad_norm < largest, np.min(units) >= 0)
    np.testing.assert_allclose(record.clipped, np.mean((units >= 0) & (units < 1)), rtol=1e-6)
