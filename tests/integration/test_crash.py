"""A run that is killed without warning, also in the middle of a save, goes on bit for bit."""

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
from trees import assert_same_bits

PROGRAM = Path(crashing_run.__file__)
# For each process; about 6 if nothing else runs.
SECONDS = 120
# Whether a process has to be killed within a save, or wherever it happens to be.
WITHIN_A_SAVE = [True, False, True]


def start(stack, folder, name):
    """A process that trains with the checkpoints in `folder`; what it says goes to a file."""
    environment = {
        **{key: os.environ[key] for key in ("HOME", "PATH", "TMPDIR") if key in os.environ},
        # The step is compiled by whoever needs it first.
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
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
    """The steps that are saved completely, and those of which a part has been written."""
    names = os.listdir(folder) if folder.exists() else []
    complete = [int(name) for name in names if name.isdigit()]
    # Orbax writes to such a directory and renames it when all is there.
    partial = [int(name.partition(".")[0]) for name in names if ".orbax-checkpoint-tmp" in name]
    return complete, partial


def resumed_after(log):
    said = log.read_text()
    lines = [line for line in said.splitlines() if line.startswith("resumed after")]
    assert len(lines) == 1, said
    return lines[0].removeprefix("resumed after ")


def finish(process, result, log):
    """What a process that is left alone has trained."""
    assert process.wait(timeout=SECONDS) == 0, log.read_text()
    return pickle.loads(result.read_bytes())


def kill(process, log, folder, after, delay, within_a_save):
    """Kills a process some time after step `after` was saved; the newest step that is complete."""

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
        # What the last kill left behind is not newer.
        return max(partial, default=0) > max(complete, default=0)

    wait_until(has_come_far_enough)
    while True:
        if within_a_save:
            wait_until(is_saving)
        time.sleep(delay)
        # What holds of a process that has stopped still holds when it is killed.
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


def test_a_run_that_is_killed_even_within_a_save_ends_as_one_that_never_was(tmp_path):
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

    # There was something to remember.
    metrics = expected["metrics"]
    assert metrics["num_clipped"] > 0
    assert metrics["num_skipped"] > 0
    assert metrics["num_steps"] + metrics["num_skipped"] == crashing_run.STEPS
    assert np.isfinite(metrics["skip_norm_threshold"])
