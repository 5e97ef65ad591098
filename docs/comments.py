"""A griffe extension: comments ``#: text`` are docstrings of fields, and examples are shown as code."""

import linecache
import re
from typing import Any

import griffe

ABOVE = re.compile(r"^\s*#: ?(.*)")
BEHIND = re.compile(r"\S.*#: ?(.*)$")
EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*\n)(?!\s*$).*)*", re.M)


class Shown(griffe.Extension):
    """Read what the sources of this package say in their own way."""

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """The comment behind or above a field that has no docstring."""
        if attr.docstring or attr.lineno is None:
            return
        behind = BEHIND.match(linecache.getline(str(attr.filepath), attr.endlineno or attr.lineno))
        said = [behind[1]] if behind else _above(str(attr.filepath), attr.lineno - 1)
        if said:
            attr.docstring = griffe.Docstring(" ".join(said), lineno=attr.lineno, parent=attr)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Doctests between fences: without them a page would read brackets as links."""
        if obj.docstring and ">>> " in obj.docstring.value:
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)


def _above(path: str, number: int) -> list[str]:
    said: list[str] = []
    while found := ABOVE.match(linecache.getline(path, number)):
        said.insert(0, found[1].strip())
        number -= 1
    return said
