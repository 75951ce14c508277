"""The installed package: its declared dependencies, its wheel and its public names."""

import ast
import importlib.metadata
import re
import sys
import zipfile
from pathlib import Path

import hatchling.build
import pytest

import optax_smartclip

ROOT = Path(__file__).parent.parent
DISTRIBUTION = "optax-smartclip"


def requirements(distribution):
    """The normalized names that a distribution needs without extras."""
    return {
        re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower()
        for line in importlib.metadata.requires(distribution) or []
        if "extra ==" not in line
    }


def test_depends_on_seven_distributions_each_with_a_floor():
    lines = [line for line in importlib.metadata.requires(DISTRIBUTION) if "extra ==" not in line]
    names = {"absl-py", "chex", "jax", "jaxlib", "jaxtyping", "numpy", "optax"}
    assert requirements(DISTRIBUTION) == names
    assert all(">=" in line for line in lines)


def third_party(nodes):
    """The imported modules that are neither Python's nor ours."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"optax_smartclip"}


def test_imports_nothing_but_its_dependencies():
    for path in (ROOT / "optax_smartclip").rglob("*.py"):
        module = ast.parse(path.read_text())
        of_the_extra = {"matplotlib"}
        if path.name != "plotting.py":
            assert third_party(module.body) <= requirements(DISTRIBUTION), path
        assert third_party(ast.walk(module)) <= requirements(DISTRIBUTION) | of_the_extra, path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return zipfile.ZipFile(folder / hatchling.build.build_wheel(str(folder)))


def test_wheel_contains_only_the_package(wheel):
    names = set(wheel.namelist())
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "optax_smartclip").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    package = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    assert package == expected
    assert "optax_smartclip/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_version_is_written_in_one_place(wheel):
    (metadata,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    assert f"\nVersion: {optax_smartclip.__version__}\n" in wheel.read(metadata).decode()
    assert optax_smartclip.__version__ not in (ROOT / "pyproject.toml").read_text()


def test_public_names_are_listed_documented_and_sorted():
    names = optax_smartclip.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(optax_smartclip, name).__doc__, name
