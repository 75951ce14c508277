"""Everything that the README shows is run: code blocks, table entries, commands, links."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_smartclip as smartclip

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
ENTRIES = sorted(set(re.findall(r"`(smartclip\.[a-z_.]+\(.*?\)|optax\.[a-z_]+\(.*?\))`", README)))


def test_every_code_block_is_of_a_kind_that_is_tested_here():
    assert {language for language, _ in BLOCKS} == {"python", "console", "text"}


def test_python_blocks_run_from_top_to_bottom(tmp_path):
    # In a process of their own, with JAX as a user finds it and not as the tests configure it.
    script = tmp_path / "readme.py"
    code = [code for language, code in BLOCKS if language == "python"]
    code.append("assert logs['num_steps'] == 20")
    code.append("assert set(thresholds) == {'b', 'w'}")
    code.append("assert 0 <= clip_rate <= 1")
    script.write_text("\n".join(code))
    output = subprocess.run(
        [sys.executable, "-W", "error", script], check=True, capture_output=True, text=True
    ).stdout
    assert len(output.split()) == 3


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_of_the_tables_are_transformations(entry):
    tx = eval(entry, {"smartclip": smartclip, "optax": optax, "mask": True})
    params = {"head": {"w": jnp.ones((1, 2, 2))}}
    step = jax.vmap(lambda params: tx.update(params, tx.init(params), params)[0], axis_name="fsdp")
    assert jax.tree.structure(step(params)) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "command",
    [line for language, code in BLOCKS if language == "console" for line in code.splitlines()],
)
def test_commands_exist(command):
    program, *arguments = command.split()
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    else:
        assert command == "pip install ."
        assert (ROOT / "pyproject.toml").exists()


def test_files_that_are_linked_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for program in re.findall(r"`python (\S+\.py)`", README):
        assert (ROOT / program).exists(), program
