"""A Sphinx extension that makes pages for linked files of the repository.

The pages in docs/ link tests and programs in GitHub's form, by path, with the name of a function as
the fragment:

    [test](../tests/test_cost.py#test_an_update_does_not_sort_or_leave_the_device_and_has_no_loop_on_an_accelerator)

In the site, each linked file gets its own page, with an anchor at each function.
"""

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
SCHEME = "repository:"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def mark_links(app: Sphinx, docname: str, source: list[str]) -> None:
    """Marks links to files outside of docs/ with our own URL scheme."""
    docs = Path(app.srcdir)
    folder = docs / Path(docname).parent

    def mark(match: re.Match[str]) -> str:
        path, fragment = match.group(1), match.group(2) or ""
        file = (folder / path).resolve()
        if file.is_file() and file.is_relative_to(ROOT) and not file.is_relative_to(docs):
            return f"{SCHEME}{file.relative_to(ROOT).as_posix()}{fragment}"
        return match.group()

    source[0] = LINK.sub(mark, source[0])


def resolve_links(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Points the marked links to the pages of their files."""
    linked = app.env.__dict__.setdefault("repository_files", {})
    for node in doctree.findall(nodes.reference):
        target = node.get("refuri", "")
        if target.startswith(SCHEME):
            path, _, name = target.removeprefix(SCHEME).partition("#")
            linked.setdefault(docname, set()).add(path)
            page = app.builder.get_relative_uri(docname, page_of(path))
            node["refuri"] = f"{page}#{name}" if name else page
            node["internal"] = True


def page_of(path: str) -> str:
    """The name of the page that shows a file."""
    return f"source/{path}"


def show_files(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields the pages of all linked files."""
    linked = app.env.__dict__.get("repository_files", {})
    for path in sorted(set().union(*linked.values())):
        text = (ROOT / path).read_text()
        is_python = path.endswith(".py")
        shown = app.builder.highlighter.highlight_block(text, "python" if is_python else "text")
        if is_python:
            shown = with_anchors(shown, text)
        body = f"<h1>{html.escape(path)}</h1>\n{shown}"
        yield page_of(path), {"title": path, "body": body, "parents": []}, "page.html"


def with_anchors(shown: str, text: str) -> str:
    """The highlighted file with an anchor before each function and class."""
    start = shown.index("<pre>") + len("<pre>")
    lines = shown[start:].splitlines(keepends=True)
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)]) - 1
            lines[first] = f'<span id="{node.name}"></span>{lines[first]}'
    return shown[:start] + "".join(lines)


def forget(app: Sphinx, env: Any, docname: str) -> None:
    """Forgets the links of a page that is read again."""
    env.__dict__.get("repository_files", {}).pop(docname, None)


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the extension."""
    app.connect("source-read", mark_links)
    app.connect("env-purge-doc", forget)
    app.connect("doctree-resolved", resolve_links)
    app.connect("html-collect-pages", show_files)
    schemes = {"http": None, "https": None, "mailto": None, SCHEME.removesuffix(":"): None}
    app.config.myst_url_schemes = schemes
    return {"parallel_read_safe": True, "parallel_write_safe": False}
