"""The strict world that all tests run in.

What raises here (an implicit dtype promotion, a rank promotion, a warning) would be a surprise in
somebody's training run. Eight CPU devices stand for a mesh.
"""

import os
import sys
from pathlib import Path

# Before the first import of JAX; shared by all workers of pytest-xdist.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks")]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes the first example slow, and the tests' time depends on the machine's load.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")
