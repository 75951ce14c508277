"""What the tests of the README and of the pages in docs/ share."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(page, language):
    """The code blocks of a page."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in found} <= {"python", "console", "text"}
    return [code for kind, code in found if kind == language]


def run_python_blocks(page, script, *checks):
    """What the blocks print, run from top to bottom and followed by `checks`.

    In a process of their own, with JAX as a user finds it and not as the tests configure it.
    """
    script.write_text("\n".join([*blocks(page, "python"), *checks]))
    return subprocess.run(
        [sys.executable, "-W", "error", script], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def check_links(page):
    """Files that are linked exist, and the tests in them that are named."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, test = target.partition("#")
        file = (page.parent / path).resolve()
        assert file.exists(), target
        assert not test or test in functions(file), target


@functools.cache
def functions(file):
    """The names of all functions of a Python file."""
    return {node.name for node in ast.parse(file.read_text()).body if hasattr(node, "name")}
