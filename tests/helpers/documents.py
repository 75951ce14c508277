"""Shared by the tests of the README and of the pages in docs/."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Python with the warnings as errors that are errors in the tests; conftest.py adds them.
STRICT_PYTHON = [sys.executable]


def blocks(page, language):
    """The code blocks of a page."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in found} <= {"python", "console", "text"}
    return [code for kind, code in found if kind == language]


def run_python_blocks(page, script, *checks):
    """The output of the blocks, run from top to bottom and followed by `checks`.

    In a process of their own, with JAX as a user finds it and not as the tests configure it.
    """
    script.write_text("\n".join([*blocks(page, "python"), *checks]))
    return subprocess.run(
        [*STRICT_PYTHON, script], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
