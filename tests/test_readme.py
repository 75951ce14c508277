"""All code of the README runs: code blocks, table entries, commands."""

import re
import subprocess

import jax
import numpy as np
import optax
import pytest
from documents import ROOT, blocks, run_python_blocks

import optax_smartclip as smartclip

PAGE = ROOT / "README.md"
README = PAGE.read_text()
ENTRIES = sorted(set(re.findall(r"`(smartclip\.[a-z_.]+\(.*?\)|optax\.[a-z_]+\(.*?\))`", README)))


def test_python_blocks_run_from_top_to_bottom(tmp_path):
    printed = run_python_blocks(
        PAGE,
        tmp_path / "readme.py",
        "assert logs['num_steps'] == 20",
        "assert set(thresholds) == {'b', 'w'}",
        "assert 0 <= clip_rate <= 1",
    )
    assert len(printed.split()) == 3


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_of_the_tables_are_transformations(entry):
    tx = eval(entry, {"smartclip": smartclip, "optax": optax, "mask": True})
    params = {"head": {"w": np.ones((1, 2, 2), np.float32)}}
    update = jax.vmap(
        lambda params: tx.update(params, tx.init(params), params)[0], axis_name="fsdp"
    )
    assert jax.tree.structure(jax.jit(update)(params)) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "command",
    [line for code in blocks(PAGE, "console") for line in code.splitlines()],
)
def test_commands_exist(command):
    program, *arguments = command.split()
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    else:
        assert command == "pip install ."
        assert (ROOT / "pyproject.toml").exists()


def test_named_programs_exist():
    for program in re.findall(r"`python (\S+\.py)`", README):
        assert (ROOT / program).exists(), program
