"""The pages in docs/: their code runs and prints the output that they show, and links exist.

That the site is built without a warning is for `make docs`, which needs Sphinx.
"""

import ast
import functools
import json
import os
import re
import subprocess
import tomllib
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import ROOT, STRICT_PYTHON

import optax_smartclip as smartclip

README = ROOT / "README.md"
DOCS = ROOT / "docs"
MIGRATING = DOCS / "migrating.md"
INTEGRATIONS = DOCS / "integrations.md"
PROMISES = DOCS / "promises.md"
# Folders that begin with an underscore hold the built site.
PAGES = sorted(
    page for page in DOCS.rglob("*.md") if not page.relative_to(DOCS).parts[0].startswith("_")
)
# The README links these, so that they are found without the site.
FROM_THE_README = (DOCS / "choosing.md", INTEGRATIONS, MIGRATING, PROMISES)


def name_of(page):
    return str(page.relative_to(DOCS).with_suffix(""))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def fenced(page):
    """The blocks of a page: number of the first line, indentation, language, text."""
    opened = None
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = re.match(r"( *)```(.*)$", line)
        if opened is None and fence:
            opened = number + 1, *fence.groups(), []
        elif fence and fence.groups() == (opened[1], ""):
            yield opened[0], opened[2].partition(" ")[0], opened[3]
            opened = None
        elif opened is not None:
            opened[3].append(line.removeprefix(opened[1]))
    assert opened is None, page


def anchors(page):
    """The fragments by which the headings of a page are linked."""
    in_blocks = {first + number for first, _, lines in fenced(page) for number in range(len(lines))}
    headings = [
        line.lstrip("# ").lower()
        for number, line in enumerate(page.read_text().splitlines(), start=1)
        if line.startswith("#") and number not in in_blocks
    ]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@functools.cache
def functions(file):
    """The names of all functions of a Python file."""
    return {node.name for node in ast.parse(file.read_text()).body if hasattr(node, "name")}


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_files_tests_and_headings_that_are_linked_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, name = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        known = functions if file.suffix == ".py" else anchors
        assert not name or name in known(file), target


@every_page
def test_no_line_is_taken_for_a_comment(page):
    # A wrapped "18 % of all" must not begin a line with its sign: MyST would leave the line out.
    assert not re.search(r"^ *%", page.read_text(), flags=re.MULTILINE)


def test_every_page_is_in_one_table_of_contents():
    listed = Counter()
    for page in PAGES:
        for _, language, lines in fenced(page):
            if language == "{toctree}" and ":glob:" not in lines:
                listed.update((page.parent / line) for line in lines if re.match(r"\w", line))
    pages = {page.with_suffix("") for page in PAGES} - {DOCS / "index"}
    assert listed == Counter(pages)


@pytest.mark.parametrize("page", FROM_THE_README, ids=name_of)
def test_the_readme_links_what_is_read_without_the_site(page):
    assert f"](docs/{page.name})" in README.read_text()


def test_every_public_name_is_in_the_reference():
    described = Counter()
    for page in sorted((DOCS / "api").glob("*.md")):
        module = ""
        for line in page.read_text().splitlines():
            if found := re.match(r"\.\. currentmodule:: (\S+)", line):
                module = found.group(1)
            if found := re.match(r"\.\. auto(?:function|class):: (\S+)", line):
                described[
                    found.group(1) if "." in found.group(1) else f"{module}.{found.group(1)}"
                ] += 1
    of_masks = {"masks.except_paths", "masks.except_vectors", "masks.every"}
    public = {f"optax_smartclip.{name}" for name in {*smartclip.__all__, *of_masks} - {"masks"}}
    assert public <= described.keys()
    assert set(described.values()) == {1}


# JAX as users find it and not as the tests configure it, with the devices of a mesh. Each page is a
# program of its own, and its checks can read its output.
RUNNER = """
import contextlib, io, json, pathlib, sys

path = pathlib.Path(sys.argv[1])
printed = {}
for page, blocks in json.loads(path.read_text()).items():
    outputs = printed[page] = []
    program = {"__name__": "__main__", "outputs": outputs}
    for line, code in blocks:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\\n" * (line - 1) + code, page, "exec"), program)
        outputs.append(output.getvalue().rstrip("\\n"))
path.write_text(json.dumps(printed))
"""

# For the pages that do not show their output.
CHECKS = {
    INTEGRATIONS: "",
    MIGRATING: """
lines = list(filter(None, outputs))
assert len(lines) == 4
assert lines[0].startswith("True ")
assert len(records) == 2 * 12
assert set(records[-1]) == {
    "algo", "key", "scope", "grad_norm", "threshold", "scale", "clipped"
}
assert {record["key"] for record in records} == {
    ("layer", "params/layers_0"), ("layer", "params/layers_2")
}
assert resumed.state_dict() == json.loads(text)
""",
}


def test_the_code_of_all_pages_runs_and_prints_what_they_show(tmp_path):
    programs, shown = {}, {}
    for page in PAGES:
        blocks = list(fenced(page))
        for _, language, _ in blocks:
            assert language in {"python", "console", "text", "{toctree}", "{include}", "{eval-rst}"}
        texts = {first: "\n".join(lines) for first, language, lines in blocks if language == "text"}
        codes = {
            first: "\n".join(lines) + "\n"
            for first, language, lines in blocks
            if language == "python"
        }
        # Two fences and an empty line separate the code and its output.
        shown[page] = [texts.get(first + code.count("\n") + 3, "") for first, code in codes.items()]
        programs[str(page)] = [*codes.items(), (1, CHECKS.get(page, ""))]
    file = tmp_path / "programs.json"
    file.write_text(json.dumps(programs))
    # Pages share programs with each other and with other tests.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [*STRICT_PYTHON, "-c", RUNNER, file]
    subprocess.run(command, check=True, env={**os.environ, **cache})
    printed = json.loads(file.read_text())
    for page in PAGES:
        assert page in CHECKS or printed[str(page)][:-1] == shown[page], page


def test_versions_that_are_written_down_twice_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {smartclip.__version__}\n" in citation
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    (ruff,) = [name for name in groups["lint"] if "ruff" in name]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"ruff-pre-commit\n    rev: v{ruff.removeprefix('ruff==')}\n" in hooks


@pytest.mark.parametrize("page", [INTEGRATIONS, PROMISES], ids=lambda page: page.stem)
def test_every_row_of_what_it_runs_with_and_of_what_we_promise_has_its_test(page):
    tables = re.findall(r"^\|---.*\n((?:\|.*\n)+)", page.read_text(), flags=re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 40
    for row in rows:
        assert re.search(r"\]\(\.\./tests/\S+\.py\S*\)", row), row


def rows_of_links():
    """The pairs of the table of links on the page on migrating, apart from the record."""
    head = "| stateful | link of an `optax.chain` |\n|---|---|\n"
    table = MIGRATING.read_text().partition(head)[2].partition("\n\n")[0]
    rows = [re.findall(r"`(.*?)`", row)[:2] for row in table.splitlines()]
    return [(stateful, link) for stateful, link in rows if "apply_grads" not in stateful]


@pytest.mark.parametrize(("stateful", "link"), rows_of_links())
def test_the_links_of_a_chain_clip_as_their_stateful_counterparts(stateful, link):
    clipper, tx = eval(stateful, {"sc": smartclip}), eval(link, {"sc": smartclip})
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(sigma=0.2, size=300)
    sizes[[50, 150, 250]] *= 1000
    directions = {"layer": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=3)}}
    params = jax.tree.map(jnp.float32, directions)
    grads = jax.tree.map(
        lambda leaf: jnp.float32(np.multiply.outer(0.01 * sizes, leaf)), directions
    )

    def step(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, (updates, smartclip.apply_grads(grads, params, clipper))

    _, (of_link, of_clipper) = jax.jit(lambda: jax.lax.scan(step, tx.init(params), grads))()
    for name, leaf in of_link["layer"].items():
        np.testing.assert_allclose(of_clipper["layer"][name], leaf, rtol=1e-6)
    clipped = np.abs(of_link["layer"]["kernel"][250]) < 0.1 * np.abs(grads["layer"]["kernel"][250])
    assert np.all(clipped)
