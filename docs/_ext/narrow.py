"""Makes pages fit narrow windows.

A long piece of code in a table may break after a dot, a slash, an underscore, a comma, an equals
sign or an opening bracket. A number stays with its percent sign and its error, before which "±"
stands in place of "+-": a browser may break that after the hyphen. A formula stays with the stop
after it. Each picture leads to its file, where a reader can enlarge it.
"""

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.images import get_image_size

# Sphinx puts each word of inline code into such an element.
WORD = re.compile(r'(?<=<span class="pre">)[^<]{16,}(?=</span>)')
BREAK = re.compile(r"(?<=\w)(?:[_/,(\[]|[.=](?!\d))(?=[\w&])")
# The length of a word that may also break in a wide window.
LONG = 32
UNBROKEN = re.compile(r"(?<=\d) (?=%)")
ERROR = re.compile(r"(?<=\w) (?:\+-|±) (?=\w)")
PUNCTUATION = ".,;:)"
SPACE = "\N{NO-BREAK SPACE}"
CODE = nodes.literal, nodes.FixedTextElement, nodes.math, nodes.math_block
# The width, in pixels, of a picture that has many panels or cells.
LARGE = 1100


def break_words(app: Sphinx, page: str, template: str, context: dict[str, Any], _: Any) -> None:
    """Adds places to break to the long words of inline code."""
    del app, page, template
    if "body" in context:
        context["body"] = WORD.sub(with_breaks, context["body"])


def with_breaks(word: re.Match[str]) -> str:
    """The word with its places to break. site.css ignores those of the class in a wide window."""
    place = "<wbr/>" if len(word.group()) >= LONG else '<wbr class="narrow"/>'
    return BREAK.sub(rf"\g<0>{place}", word.group())


def keep_numbers_whole(app: Sphinx, doctree: nodes.document) -> None:
    """Puts spaces that do not break before each percent sign and around each "±"."""
    del app
    for text in list(doctree.findall(nodes.Text)):
        whole = ERROR.sub(f"{SPACE}±{SPACE}", UNBROKEN.sub(SPACE, text))
        if whole != text and not isinstance(text.parent, CODE):
            text.parent.replace(text, nodes.Text(whole))


def keep_stops(app: Sphinx, doctree: nodes.document) -> None:
    """Keeps a formula and the stop after it in one line, by a class of site.css."""
    del app
    for math in list(doctree.findall(nodes.math)):
        following = math.next_node(descend=False, siblings=True)
        if isinstance(following, nodes.Text) and following[0] in PUNCTUATION:
            math.parent.replace(following, nodes.Text(following[1:]))
            whole = nodes.inline("", "", classes=["whole"])
            math.parent.replace(math, whole)
            whole += [math, nodes.Text(following[0])]


def link_pictures(app: Sphinx, doctree: nodes.document) -> None:
    """Sets a scale, because Sphinx links each picture that has one to its file."""
    for image in doctree.findall(nodes.image):
        image["scale"] = 100
        size = get_image_size(Path(app.srcdir) / image["uri"])
        if size is not None and size[0] > LARGE:
            image["classes"].append("large")


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the extension."""
    app.connect("html-page-context", break_words)
    app.connect("doctree-read", keep_numbers_whole)
    app.connect("doctree-read", keep_stops)
    app.connect("doctree-read", link_pictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
