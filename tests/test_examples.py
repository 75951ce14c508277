"""The examples run as their users run them."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from documents import ROOT


def train_on_mesh(num_devices):
    """The numbers of each printed step."""
    # The program chooses its own devices, not those of the tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    program = ROOT / "examples" / "train_on_mesh.py"
    printed = subprocess.run(
        [sys.executable, program, f"--devices={num_devices}", "--steps=40"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ).stdout
    mesh = f"'data': {max(1, num_devices // 2)}, 'model': {min(2, num_devices)}"
    assert mesh in printed
    assert "resumed" in printed
    lines = [line for line in printed.splitlines() if line.startswith("step")]
    return np.array([re.findall(r"[\d.]+|inf", line) for line in lines], float)


@pytest.mark.long
def test_training_on_a_mesh_is_that_on_one_device_and_learns():
    on_mesh, alone = train_on_mesh(4), train_on_mesh(1)
    np.testing.assert_allclose(on_mesh, alone, rtol=1e-3)
    steps, losses = on_mesh[:, 0], on_mesh[:, 1]
    np.testing.assert_array_equal(steps, np.arange(10, 41, 10))
    assert losses[-1] < losses[0] - 0.5
    # The clipper also counts the steps before the stop.
    np.testing.assert_array_equal(on_mesh[:, -1], steps)
    assert np.all(np.isfinite(on_mesh[1:]))


# Runs in a process of its own, because the flags of a program are global.
COVERAGE = """
import sys

import numpy as np

sys.path.insert(0, sys.argv[1])
from train_text import margin

pairs = np.random.default_rng(0).normal(size=(4000, 2, 12))
print(np.mean([abs(old.mean() - new.mean()) <= margin(old) for old, new in pairs]))
"""


def test_19_of_20_means_of_new_runs_fall_into_the_interval_that_the_demo_prints():
    command = [sys.executable, "-c", COVERAGE, ROOT / "examples"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    np.testing.assert_allclose(float(printed), 0.95, atol=0.01)
