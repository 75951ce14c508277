"""The strict world that all tests run in.

What raises here (an implicit dtype promotion, a rank promotion, a warning) would be a surprise in
somebody's training run. Eight CPU devices stand for a mesh.
"""

import os
import tempfile

# Before the first import of JAX; shared by all workers of pytest-xdist.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax

# A program, `make mutation`.
collect_ignore = ["mutation"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests compile the same programs. Each worker keeps the ones that it has compiled.
COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Compilation makes the first example slow, and the tests' time depends on the machine's load.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


def pytest_configure(config):
    """Compiles quickly, and runs the code of pages with the tests' warnings as errors."""
    from compilation import QUICKLY
    from documents import STRICT_PYTHON

    # XLA reads it when it compiles for the first time.
    if config.getoption("markexpr"):
        os.environ["XLA_FLAGS"] += f" {QUICKLY}"
    filters = [*config.getini("filterwarnings"), *(config.getoption("pythonwarnings") or ())]
    # The last one decides, and Python ignores an option that it has had before.
    for each in reversed(dict.fromkeys(reversed(filters))):
        STRICT_PYTHON.extend(["-W", each])
