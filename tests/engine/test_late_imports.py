"""Code that runs when a library is imported, whichever finder the library is found by."""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder

import pytest

from optax_smartclip.engine.late_imports import on_import


@pytest.fixture
def library(tmp_path):
    """The name of a library, which only a finder before all others can find."""
    name = "found_by_an_import_hook"
    file = tmp_path / "library.py"
    file.write_text("ANSWER = 42\n")

    class Hook(MetaPathFinder):
        def find_spec(self, fullname, path, target=None):
            found = fullname == name
            return importlib.util.spec_from_file_location(name, file) if found else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", [Hook(), *sys.meta_path])
        yield name
        sys.modules.pop(name, None)


def test_the_code_runs_with_the_module_after_each_time_that_it_is_loaded(library):
    answers = []
    on_import(library, lambda module: answers.append(module.ANSWER))
    importlib.import_module("string")
    assert answers == []
    module = importlib.import_module(library)
    assert answers == [42]
    importlib.reload(module)
    assert answers == [42, 42]


def test_a_module_that_is_not_there_is_missing_as_ever():
    name = "not_there_at_all"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", list(sys.meta_path))
        on_import(name, lambda module: None)
        with pytest.raises(ModuleNotFoundError, match=name):
            importlib.import_module(name)
