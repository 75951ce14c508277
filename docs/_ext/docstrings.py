"""A Sphinx extension that converts our docstrings, which are written to be read in a terminal.

- Text in single backticks becomes code, and a link if it is a public name.
- An indented block after a paragraph becomes a code block.
- Each argument gets its type from the annotations, in words, unless the type is `Any`.
"""

import collections.abc
import inspect
import re
import types
import typing
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import optax_smartclip

PUBLIC = {*optax_smartclip.__all__} - {"masks"}
NAME = re.compile(r"^(?:optax_smartclip\.|smartclip\.|sc\.)?((?:masks\.)?\w+)(\(.*\))?$", re.DOTALL)
PLURAL = re.compile(r"(`[^`\n]+`)(?=[a-z])")
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):$")


def public_name(code: str) -> str | None:
    """The full name of the public object that a piece of code calls or names, or None."""
    match = NAME.match(code)
    if match is None:
        return None
    name = match.group(1)
    if name in PUBLIC:
        return f"optax_smartclip.{name}"
    mask = name.removeprefix("masks.")
    if name.startswith("masks.") and hasattr(optax_smartclip.masks, mask):
        return f"optax_smartclip.masks.{mask}"
    return None


def reference(name: str, content: nodes.Node, docname: str) -> addnodes.pending_xref:
    """A link to the documentation of a name."""
    return addnodes.pending_xref(
        "",
        content,
        refdomain="py",
        reftype="obj",
        reftarget=name,
        refexplicit=True,
        refwarn=True,
        refdoc=docname,
    )


def name_role(
    role: str, rawtext: str, text: str, lineno: int, inliner: Any, *_: Any, **__: Any
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """Renders text in single backticks as code."""
    return [nodes.literal(rawtext, text, classes=["code"])], []


class LinkNames(SphinxTransform):
    """Links code that calls or names a public object to its documentation."""

    default_priority = 200
    SKIPPED = nodes.title, nodes.reference, addnodes.pending_xref, addnodes.desc_signature

    def apply(self, **_: Any) -> None:
        """Wraps each such literal, except in headings, links and the name's own description."""
        for node in list(self.document.findall(nodes.literal)):
            name = public_name(node.astext())
            within = ancestors(node)
            if name is None or any(isinstance(parent, self.SKIPPED) for parent in within):
                continue
            described = {
                name
                for parent in within
                if isinstance(parent, addnodes.desc)
                for name in parent[0].get("ids", ())
            }
            if name not in described:
                node.replace_self(reference(name, node.deepcopy(), self.env.docname))


def ancestors(node: nodes.Node) -> list[nodes.Node]:
    """The ancestors of a node, from its parent upwards."""
    found = []
    while node.parent is not None:
        node = node.parent
        found.append(node)
    return found


def prepare(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Marks indented blocks as code, and adds the types of arguments."""
    del app, what, name, options
    # A plural after a backtick (`jax.Ref`s) needs an escaped space before it.
    lines[:] = [PLURAL.sub(r"\1\\ ", line) for line in with_types(marked(lines), hints_of(obj))]


def marked(lines: list[str]) -> list[str]:
    """The lines with a `::` before each indented block after a paragraph."""
    result: list[str] = []
    last = ""
    for line in lines:
        starts_block = line.startswith("    ") and result and not result[-1]
        if starts_block and last and not last.startswith((" ", "- ")) and not SECTION.match(last):
            result += ["::", ""]
        result.append(line)
        if line:
            last = line
    return result


def hints_of(obj: Any) -> dict[str, Any]:
    """The annotations of a function's parameters, or of a class's fields and constructor."""
    if inspect.isclass(obj):
        hints = dict(getattr(obj, "__annotations__", {}))
        constructor = obj.__dict__.get("__init__")
        if inspect.isfunction(constructor):
            hints |= constructor.__annotations__
        return hints
    return dict(getattr(inspect.unwrap(obj), "__annotations__", {})) if callable(obj) else {}


def with_types(lines: list[str], hints: dict[str, Any]) -> list[str]:
    """The lines in which each argument and attribute is followed by its type in brackets."""
    section, result = "", []
    for line in lines:
        heading = SECTION.match(line)
        if heading or (line and not line.startswith(" ")):
            section = heading.group(1) if heading else ""
        entry = re.match(r"^    (\*?\w+): ", line)
        if section in ("Args", "Attributes") and entry:
            words = in_words(hints.get(entry.group(1).lstrip("*"), Any))
            if words:
                line = f"    {entry.group(1)} ({words}): {line[entry.end() :]}"
        result.append(line)
    return result


def in_words(hint: Any) -> str:
    """A type in words, formatted as code; empty for an uninformative type such as `Any`."""
    options = alternatives(hint)
    return " or ".join(f"``{option}``" for option in options) if all(options) else ""


def alternatives(hint: Any) -> list[str]:
    """The names of the types that a hint allows, with an empty name for `Any`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        names = [name for option in typing.get_args(hint) for name in alternatives(option)]
        return list(dict.fromkeys(names))
    if hint is Any:
        return [""]
    return ["None" if hint in (None, type(None)) else type_name(hint)]


def type_name(hint: Any) -> str:
    """The name of one type."""
    if isinstance(hint, str):
        return hint
    if hint is Ellipsis:
        return "..."
    origin = typing.get_origin(hint)
    if origin is collections.abc.Callable:
        return "function"
    if origin is not None:
        arguments = ", ".join(type_name(argument) for argument in typing.get_args(hint))
        return f"{origin.__name__}[{arguments}]"
    if hasattr(hint, "dim_str"):  # jaxtyping
        dtype = hint.__name__.partition("[")[0].lower()
        return f"{dtype}[{', '.join(hint.dim_str.replace('*', '...').split())}]"
    return str(getattr(hint, "__name__", hint))


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the extension."""
    app.add_role("name", name_role)
    app.add_transform(LinkNames)
    # This must run before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", prepare, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
