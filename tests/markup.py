"""HTML read strictly: what pages have to be for people who do not see them, and for browsers."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import NamedTuple

VOID = frozenset({"br", "hr", "input", "link", "meta"})


class Element(NamedTuple):
    """A start tag with the elements that it stands in."""

    tag: str
    attributes: dict[str, str | None]
    inside: tuple[str, ...]


class Document(HTMLParser):
    """A parsed document; an AssertionError if its tags are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append(Element(tag, dict(attrs), tuple(self._open)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID and self._open and self._open.pop() == tag, (tag, self._open)

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[Element]:
        return [e for e in self.elements if e.tag == tag]

    def values(self, name: str) -> list[str]:
        """Of an attribute, wherever it stands."""
        return [e.attributes[name] or "" for e in self.elements if name in e.attributes]


def check(text: str) -> Document:
    """A page that keeps the rules, as a document."""
    assert text.startswith("<!doctype html>\n<html lang=")
    document = Document(text)
    assert len(document.all("h1")) == len(document.all("title")) == len(document.all("main")) == 1
    ids = document.values("id")
    assert len(ids) == len(set(ids))
    for name in ("for", "aria-labelledby"):
        assert set(document.values(name)) <= set(ids)
    assert len(document.all("caption")) == len(document.all("table"))
    assert all(e.attributes.get("scope") in ("row", "col") for e in document.all("th"))
    labelled = set(document.values("for"))
    for tag in ("input", "select", "textarea"):
        seen = [e for e in document.all(tag) if "hidden" not in e.attributes]
        assert all(e.attributes["id"] in labelled for e in seen)
    assert all(e.attributes.get("aria-label") for e in document.all("meter"))
    for element in document.elements:
        assert not any(n == "style" or n.startswith("on") for n in element.attributes), element
        for name in ("href", "src", "action"):
            target = element.attributes.get(name)
            assert target is None or (target[:1] in "/?#" and target[:2] != "//"), element
    assert all(e.attributes.get("src") for e in document.all("script"))
    assert not document.all("style")
    return document
