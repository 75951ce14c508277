"""A run that is killed without warning, even in the middle of a save, goes on bit for bit."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import crashing_run
import numpy as np
from compilation import QUICKLY
from trees import assert_same_bits

PROGRAM = Path(crashing_run.__file__)
# The limit for each process, which needs about 6 on an idle machine.
SECONDS = 120
# Whether each kill has to happen during a save.
WITHIN_A_SAVE = [True, False, True]


def start(stack, folder, name):
    """A process that trains with the checkpoints in `folder`; its output goes to a file."""
    environment = {
        **{key: os.environ[key] for key in ("HOME", "PATH", "TMPDIR") if key in os.environ},
        # Only the first process compiles the step.
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICKLY,
        "PYTHONPATH": str(PROGRAM.parents[2]),
    }
    result, log = (folder.parent / f"{name}.{end}" for end in ("pickle", "log"))
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder), str(result)],
            env=environment,
            stdout=stack.enter_context(log.open("w")),
            stderr=subprocess.STDOUT,
        )
    )
    stack.callback(process.kill)
    return process, result, log


def saves(folder):
    """The steps that are saved completely, and those that are saved in part."""
    names = os.listdir(folder) if folder.exists() else []
    complete = [int(name) for name in names if name.isdigit()]
    # Orbax writes to such a directory and renames it at the end of a save.
    partial = [int(name.partition(".")[0]) for name in names if ".orbax-checkpoint-tmp" in name]
    return complete, partial


def resumed_after(log):
    said = log.read_text()
    lines = [line for line in said.splitlines() if line.startswith("resumed after")]
    assert len(lines) == 1, said
    return lines[0].removeprefix("resumed after ")


def finish(process, result, log):
    """The result of a process that is not killed."""
    assert process.wait(timeout=SECONDS) == 0, log.read_text()
    return pickle.loads(result.read_bytes())


def kill(process, log, folder, after, delay, within_a_save):
    """Kills a process some time after it saved step `after`. Returns the newest complete step."""

    def wait_until(condition):
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert process.poll() is None, f"It ended before it was killed:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"Not in {SECONDS} s:\n{log.read_text()}"
            time.sleep(0.001)

    def has_come_far_enough():
        return max(saves(folder)[0], default=0) >= after

    def is_saving():
        complete, partial = saves(folder)
        # A partial save that the last kill left is not newer.
        return max(partial, default=0) > max(complete, default=0)

    wait_until(has_come_far_enough)
    while True:
        if within_a_save:
            wait_until(is_saving)
        time.sleep(delay)
        # A stopped process does not change before it is killed.
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"It ended before it was killed:\n{log.read_text()}"
        if is_saving() or not within_a_save:
            break
        process.send_signal(signal.SIGCONT)
        delay /= 2
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return max(saves(folder)[0])


def test_a_run_that_is_killed_during_a_save_ends_like_an_undisturbed_run(tmp_path):
    rng = np.random.default_rng(0)
    steps = np.array([15, 45, 75]) + rng.integers(15, size=3)
    delays = rng.uniform(0.0, 0.02, size=3)
    folder = tmp_path / "killed"
    newest = ["None"]
    with contextlib.ExitStack() as stack:
        undisturbed = start(stack, tmp_path / "undisturbed", "undisturbed")
        for i, moment in enumerate(zip(steps, delays, WITHIN_A_SAVE, strict=True)):
            process, _, log = start(stack, folder, f"killed{i}")
            newest.append(str(kill(process, log, folder, *moment)))
            assert resumed_after(log) == newest[i]
        last = start(stack, folder, "last")
        resumed, expected = finish(*last), finish(*undisturbed)
    assert resumed_after(last[2]) == newest[-1]
    assert resumed_after(undisturbed[2]) == "None"
    assert_same_bits(resumed, expected)

    # The run had a state to save.
    metrics = expected["metrics"]
    assert metrics["num_clipped"] > 0
    assert metrics["num_skipped"] > 0
    assert metrics["num_steps"] + metrics["num_skipped"] == crashing_run.STEPS
    assert np.isfinite(metrics["skip_norm_threshold"])
