"""The pages in docs/: their code runs, and what they link exists."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import ROOT, check_links, run_python_blocks

import optax_smartclip as smartclip

MIGRATING = ROOT / "docs" / "migrating.md"
INTEGRATIONS = ROOT / "docs" / "integrations.md"
PROMISES = ROOT / "docs" / "promises.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_tests_that_are_linked_exist(page):
    check_links(page)


def test_every_page_is_linked_by_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in PAGES:
        assert f"](docs/{page.name})" in readme


@pytest.mark.parametrize("page", [INTEGRATIONS, PROMISES], ids=lambda page: page.stem)
def test_every_row_of_what_it_runs_with_and_of_what_we_promise_has_its_test(page):
    tables = re.findall(r"^\|---.*\n((?:\|.*\n)+)", page.read_text(), flags=re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 40
    for row in rows:
        assert re.search(r"\]\(\.\./tests/\S+\.py\S*\)", row), row


def test_the_code_of_what_it_runs_with_runs(tmp_path):
    run_python_blocks(INTEGRATIONS, tmp_path / "integrations.py")


def test_the_calls_of_smartclips_guide_do_what_the_page_says(tmp_path):
    checks = """
assert len(records) == 2 * 12
assert set(records[-1]) == {
    "algo", "key", "scope", "grad_norm", "threshold", "scale", "clipped"
}
assert {record["key"] for record in records} == {
    ("layer", "params/layers_0"), ("layer", "params/layers_2")
}
assert resumed.state_dict() == json.loads(text)
"""
    printed = run_python_blocks(MIGRATING, tmp_path / "migrating.py", checks).splitlines()
    assert len(printed) == 4
    assert printed[0].startswith("True ")


def rows_of_links():
    """The pairs of the last table of the page on migrating, apart from the record."""
    last_table = MIGRATING.read_text().rpartition("|---|---|\n")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(.*?)`", row)[:2] for row in last_table.splitlines()]
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
