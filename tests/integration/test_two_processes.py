"""Two processes that share a mesh train like one process with one device."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
import two_processes
from compilation import QUICKLY

WORKER = Path(two_processes.__file__)
# The limit for both processes, which need about 7 on an idle machine.
SECONDS = 120


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(stack, address, process_id, folder):
    """A process with four devices; its output goes to a file."""
    environment = {
        **{key: os.environ[key] for key in ("HOME", "PATH", "TMPDIR") if key in os.environ},
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(WORKER.parents[2]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {QUICKLY}",
    }
    result, log = (folder / f"process{process_id}.{end}" for end in ("json", "log"))
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, str(WORKER), address, str(process_id), str(result)],
            env=environment,
            stdout=stack.enter_context(log.open("w")),
            stderr=subprocess.STDOUT,
        )
    )
    stack.callback(process.kill)
    return process


def run_both(folder):
    """The results of both processes."""
    address = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        processes = [start(stack, address, process_id, folder) for process_id in range(2)]
        deadline = time.monotonic() + SECONDS
        codes = [None, None]
        # When one process fails, the other one would wait for it.
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
    if codes != [0, 0]:
        said = "\n".join(log.read_text() for log in sorted(folder.glob("*.log")))
        pytest.fail(f"Exit codes {codes}; None: not in {SECONDS} s. The processes said:\n{said}")
    return [json.loads(result.read_text()) for result in sorted(folder.glob("*.json"))]


def test_two_processes_train_like_one_device(tmp_path):
    ours, theirs = run_both(tmp_path)
    assert ours == theirs
    alone = two_processes.train()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, alone)
    for name in two_processes.CLIPPERS:
        assert np.all(np.array(ours[name]["metrics"][-1]["num_clipped"]) > 0)

    # The norms are those of whole gradients, and the thresholds are those by hand.
    norms, thresholds = (
        np.array([record[key] for record in ours["autoclip"]["metrics"]])
        for key in ("grad_norm", "clip_threshold")
    )
    first = jax.jit(jax.grad(two_processes.loss))(
        two_processes.PARAMS, two_processes.INPUTS[0], two_processes.TARGETS[0]
    )
    np.testing.assert_allclose(norms[0], reference.norm(first), rtol=1e-6)
    expected = reference.reported(reference.lower_fence_thresholds(norms, warmup_steps=4))
    np.testing.assert_allclose(thresholds, expected, rtol=1e-5)
