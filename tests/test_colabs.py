"""The notebooks install their requirements and show their output.

`make colabs` shows that they run.
"""

import ast
import json
import re

import pytest
from documents import ROOT

COLABS = ROOT / "docs" / "colabs"
NOTEBOOKS = sorted(COLABS.glob("*.ipynb"))

# Calls that show something.
SHOWS = ("print(", "plotting.plot_", "plt.subplots(", "visualize_array_sharding(")

# Paths of one machine, and addresses of objects.
OF_ONE_MACHINE = re.compile(r"(?<![\w:/<.*)])/\w[\w.-]*/\w|/tmp/|site-packages| at 0x[0-9a-f]{6}")


def load(path):
    return json.loads(path.read_text())


def sources(notebook, kind):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def text_of(output):
    """The text of an output, without pictures."""
    data = [
        value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")
    ]
    return "".join("".join(value) for value in [*data, output.get("text", "")])


def python(source):
    """A cell without IPython's magics."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_there_are_six_in_order():
    assert [path.name[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_", "6_"]


def test_has_the_current_format_and_no_trace_of_the_machine_that_ran_it(path):
    notebook = load(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert {cell["cell_type"] for cell in notebook["cells"]} == {"markdown", "code"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    for cell in notebook["cells"]:
        shown = [text_of(output) for output in cell.get("outputs", [])]
        assert not OF_ONE_MACHINE.search("\n".join(["".join(cell["source"]), *shown]))


def test_installs_the_package_from_the_clone_only_where_it_is_missing(path):
    notebook = load(path)
    title, first = sources(notebook, "markdown")[0], sources(notebook, "code")[0]
    assert title.startswith(f"# {path.name[0]}. ")
    check, install = re.search(r"^(if .*:)\n(.*)$", first, flags=re.MULTILINE).groups()
    assert check == 'if importlib.util.find_spec("optax_smartclip") is None:'
    pattern = r'    %pip install --quiet "(.*)\[colabs\]"  # From a clone\.'
    source = re.fullmatch(pattern, install)[1]
    assert (path.parent / source / "pyproject.toml").resolve() == ROOT / "pyproject.toml"


def test_each_cell_was_run_in_order_and_shows_what_it_prints_and_plots(path):
    cells = [cell for cell in load(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        source = "".join(cell["source"])
        outputs = cell["outputs"]
        kinds = {output["output_type"] for output in outputs}
        assert "error" not in kinds, source
        assert all(output.get("name") != "stderr" for output in outputs), source
        # A function that is only defined shows nothing.
        body = ast.parse(python(source)).body
        run = [node for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
        called = "\n".join(map(ast.unparse, run))
        if "%%" in source:
            continue
        if any(call in called for call in SHOWS):
            assert outputs, source
        if "plotting.plot_" in called or "plt.subplots(" in called:
            assert any("image/png" in output.get("data", {}) for output in outputs), source
            # The cell shows a plot, and not the name of its object.
            assert not any("text/plain" in output.get("data", {}) for output in outputs), source


def test_shows_a_picture(path):
    outputs = [output for cell in load(path)["cells"] for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    # Small enough for a code host to show it.
    assert path.stat().st_size < 1_000_000


def test_files_that_are_linked_exist(path):
    text = "\n".join(sources(load(path), "markdown"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            assert (COLABS / target).is_file(), target


def test_needs_no_network(path):
    code = "\n".join(sources(load(path), "code")[1:])
    assert not re.search(r"https?://|urllib|requests|fetch_|wget|curl|%pip|!pip", code)
