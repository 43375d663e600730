"""HTML that cannot be written unescaped.

A page is built of ``tag`` calls. What is not ``Html`` already is text and is escaped. There is no
way to make ``Html`` of a string but ``constant``, which takes what stands in the source alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Final, LiteralString

_VOID: Final = frozenset({"br", "hr", "input", "link", "meta", "rect"})
_NAME: Final = re.compile(r"[a-z][a-z0-9-]*\Z")
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


class Html:
    """Markup that is safe to send."""

    __slots__ = ("_text",)

    def __init__(self, text: str, key: object) -> None:
        assert key is _KEY, "build Html with tag, join or constant"
        self._text = text

    def __str__(self) -> str:
        return self._text


_KEY: Final = object()

Content = Html | str | int | None
"""What may stand in an element; None is nothing."""


def text(value: str) -> str:
    """Visible text: what cannot be printed (and what would turn the direction of writing) is
    replaced, line ends and tabs are kept."""
    if value.isprintable():
        return value
    return "\n".join(
        line
        if line.isprintable()
        else "".join(c if c.isprintable() or c == "\t" else _REPLACEMENT for c in line)
        for line in value.split("\n")
    )


def constant(markup: LiteralString) -> Html:
    """Markup from the source."""
    return Html(markup, _KEY)


def join(parts: Iterable[Content]) -> Html:
    """Several, one behind another."""
    return Html("".join(map(_rendered, parts)), _KEY)


def tag(name: str, /, *content: Content, **attributes: str | int | float | bool | None) -> Html:
    """One element. Attributes are written as Python has them: ``class_``, ``aria_label``; True is
    one without a value, None and False are left out."""
    assert _NAME.match(name), name
    written = []
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        assert _NAME.match(attribute), attribute
        assert not attribute.startswith("on") and attribute != "style", attribute
        if value is True:
            written.append(f" {attribute}")
        elif value is not None and value is not False:
            written.append(f' {attribute}="{escape(text(str(value)))}"')
    start = f"<{name}{''.join(written)}>"
    if name in _VOID:
        assert not content, name
        return Html(start, _KEY)
    return Html(f"{start}{join(content)}</{name}>", _KEY)


def _rendered(part: Content) -> str:
    if part is None:
        return ""
    if isinstance(part, Html):
        return str(part)
    return escape(text(str(part)))
