"""What stands in the pages: links, anchors, commands. No site generator is needed for that."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("examples/*/README.md")])
TYPED = [ROOT / "README.md", *sorted(DOCS.glob("howto-*.md"))]
"""Pages whose commands a reader types."""
SHELL = ("", "bash", "console", "sh", "shell")
"""What a fence says of a block for a shell; most say nothing."""

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<says>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```", re.M | re.S
)
_HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)? *$", re.M)
_INLINE = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_REFERRED = re.compile(r"\[[^\[\]]+\]\[([^\[\]]+)\]")
_DEFINED = re.compile(r"^\[([^\]]+)\]: +(\S+)$", re.M)


class Block(NamedTuple):
    """A block of code: what its fence says, its lines."""

    page: Path
    says: str
    body: str


def blocks(page: Path) -> Iterator[Block]:
    """Fenced and indented blocks."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        yield Block(page, found["says"], found["body"])
    for body in _indented(_FENCE.sub("", text)):
        yield Block(page, "", body)


def _indented(text: str) -> Iterator[str]:
    """Paragraphs indented by four, but for those that belong to an item of a list."""
    listed = False
    for paragraph in re.split(r"\n{2,}", text):
        if not paragraph.startswith(" "):
            listed = bool(re.search(r"^([-*]|\d+\.) ", paragraph, re.M))
        elif paragraph.startswith("    ") and not listed:
            yield f"{paragraph}\n"


def commands(page: Path) -> list[list[str]]:
    """By block, each command that a reader is told to type, without comments, on one line."""
    found = []
    for block in blocks(page):
        if block.says in SHELL:
            joined = re.sub(r" *\\\n *", " ", block.body)
            lines = [re.sub(r"(^|\s)#.*", "", line) for line in joined.splitlines()]
            found.append([line.strip().removeprefix("$ ") for line in lines if line.strip()])
    return found


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Of its headings, as code hosts name them."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", page.read_text())):
        text = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(next(n for n in (text, *(f"{text}-{i}" for i in range(1, 99))) if n not in found))
    return found


def links(page: Path) -> list[str]:
    """Where it points, also by definitions of references."""
    text = prose(page)
    return [*_INLINE.findall(text), *(target for _, target in _DEFINED.findall(text))]


def undefined(page: Path) -> set[str]:
    """References without a definition, and definitions that nothing refers to."""
    text = prose(page)
    defined = {name for name, _ in _DEFINED.findall(text)}
    return defined ^ set(_REFERRED.findall(text)) if defined else set()


def broken(page: Path) -> list[str]:
    """Links to what is not there: files, headings; out of the site; not encrypted."""
    found = []
    for link in links(page):
        if "://" in link:
            if not link.startswith("https://"):
                found.append(link)
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        outside = DOCS in page.parents and DOCS not in target.parents
        if outside or not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found
