"""The docs hold together: links, generated pages, tables beside the code, commands that parse."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from tests import pages
from tests.pages import DOCS, PAGES, ROOT

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- links ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert not pages.broken(page)
    assert not pages.undefined(page)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_pages_that_are_named_are_there(page: Path) -> None:
    named = re.findall(r"`((?:docs|examples|deploy)/[\w./-]*\w)`", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`\n\n[a](#one-two) [b](#two) [c](gone.md) [d](http://plain.example)\n"
    )
    assert pages.broken(page) == ["#two", "gone.md", "http://plain.example"]


def test_commands_are_found_however_they_are_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "1. An item\n\n    that goes on.\n\nText:\n\n    make one  # why\n\nMore:\n\n"
        "```bash\n$ make two \\\n  --more\n```\n\n```yaml\nmake: none\n```\n"
    )
    assert sorted(pages.commands(page)) == [["make one"], ["make two --more"]]


def test_every_page_is_in_the_menu() -> None:
    def listed(entries: object) -> list[str]:
        if isinstance(entries, str):
            return [entries]
        below = entries.values() if isinstance(entries, dict) else entries
        return [page for entry in below for page in listed(entry)]  # type: ignore[attr-defined]

    menu = listed(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    there = [page.relative_to(DOCS) for page in PAGES if DOCS in page.parents]
    assert sorted(menu) == sorted(str(page) for page in there if page.parts[0] != "adr")


# --- the site ---------------------------------------------------------------------------------


class Fetched(HTMLParser):
    """What a browser fetches for a page, as it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        source = found.get("src", "") or (found.get("href", "") if tag == "link" else "")
        if source.startswith(("http:", "https:", "//")):
            self.elsewhere.append(source)


def test_the_site_is_built_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("zensical is not installed (extra docs, make docs)")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = Fetched()
        fetched.feed(page.read_text())
        assert not fetched.elsewhere, page


# --- beside the code --------------------------------------------------------------------------


def test_generated_pages_are_those_of_the_code(generate: ModuleType) -> None:
    for name in generate.PAGES:
        assert (DOCS / name).read_text() == generate.page(name), "run: python docs/generate.py"


def rows(page: Path, heading: str) -> list[list[str]]:
    """Cells of the tables under a heading, up to the next one."""
    text = page.read_text().split(f"\n{heading}\n", 1)[1]
    text = re.split(r"^#", text, maxsplit=1, flags=re.M)[0]
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("| ")]
    return [re.split(r" +\| +", line) for line in lines]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def spelled(cell: str) -> list[str]:
    """Keys of a cell: ``.segment`` after ``journal.enabled`` is ``journal.segment``."""
    found: list[str] = []
    for name in quoted(cell):
        found.append(found[-1].rpartition(".")[0] + name if name.startswith(".") else name)
    return found


HEADINGS = {
    "node": "## `node`",
    "policy": "## `policy`",
    "services[]": "## `services[]`",
    "devices[], kind cpu": "### `kind: cpu`",
    "devices[], kind npu": "### `kind: npu`",
    "devices[], kind cuda": "### `kind: cuda`",
    'devices[], kind "null"': '### `kind: "null"`',
}
"""Sections that have a table of keys written by hand."""


@pytest.mark.parametrize("section", HEADINGS)
def test_tables_of_keys_are_complete_and_right(generate: ModuleType, section: str) -> None:
    keys = {key.name: key for key in generate.known_keys() if key.section == section}
    told: dict[str, str] = {}
    for cell, default, *_ in rows(DOCS / "configuration.md", HEADINGS[section]):
        names = spelled(cell)
        defaults = quoted(default)
        plain = not re.sub(r"[`, ]", "", re.sub(r"`[^`]*`", "", default))
        fits = plain and len(defaults) == len(names)
        told |= dict(zip(names, defaults if fits else [""] * len(names), strict=True))
    told.pop("batch", None)  # may be a word in place of a mapping
    assert set(told) == set(keys) - {"kind"}
    for name, default in told.items():
        if default:
            assert keys[name].default == f"`{default}`", name


@pytest.mark.parametrize("section", ["jobs[]", "model.yaml"])
def test_keys_of_lists_in_prose_are_all_there(generate: ModuleType, section: str) -> None:
    heading = {"jobs[]": "## `jobs[]`", "model.yaml": "## `model.yaml`,"}[section]
    text = (DOCS / "configuration.md").read_text().split(f"\n{heading}", 1)[1]
    text = re.split(r"^#", text, maxsplit=1, flags=re.M)[0]
    keys = [key.name.partition(".")[0] for key in generate.known_keys() if key.section == section]
    assert not [key for key in keys if f"`{key}`" not in text]


def test_tables_of_metrics_are_complete_and_right(generate: ModuleType) -> None:
    told = {
        quoted(name)[0]: (kind, tuple(quoted(labels)))
        for heading in ("## Ours", "## By Triton's names", "## By vLLM's names")
        for name, kind, labels, *_ in rows(DOCS / "metrics.md", heading)
        if quoted(name)
    }
    assert told == {f.name: (f.type, f.labels) for f in generate.families()}


# --- commands ---------------------------------------------------------------------------------

WRITTEN = [
    pytest.param(page, command, id=f"{page.name}: {command}")
    for page in pages.TYPED
    for command in dict.fromkeys(c for block in pages.commands(page) for c in block)
]


@pytest.mark.parametrize(("page", "command"), WRITTEN)
def test_commands_are_ones_that_there_are(generate: ModuleType, page: Path, command: str) -> None:
    """Those of ours parse; files of the repository that they name are there."""
    words = shlex.split(command)
    roots = {"cotenant": generate.cli._parser, "cotenant-dra": generate.dra._parser}
    if words[0] in roots:
        roots[words[0]]().parse_args(words[1:])
    for word in words[1:]:
        path = word.rpartition("=")[2]
        if path.startswith(("deploy/", "docs/", "examples/")):
            assert (ROOT / path).exists(), path
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
