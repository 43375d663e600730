"""What all pages have in common: head, navigation, tables, charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import quote

import msgspec

from cotenant.serving.web.files import Files
from cotenant.serving.web.html import Content, Html, constant, join, tag
from cotenant.serving.web.look import Look

PAGES: Final = (
    ("Now", "/"),
    ("Services", "/dashboard/services"),
    ("Jobs", "/dashboard/jobs"),
    ("Decisions", "/dashboard/decisions"),
    ("What if", "/dashboard/what-if"),
)
REFRESH_S: Final = 5
"""Seconds between two loads of a page that was asked to reload itself."""


class Page(msgspec.Struct):
    """One page. ``current``: the name in the navigation. ``refresh``: seconds after which it loads
    itself again where there is no script; 0: never, None: it offers to. ``live``: whether the
    stream is of use."""

    title: str
    current: str
    content: Html
    refresh: int | None = None
    live: bool = True
    shape: str = ""


def rendered(page: Page, files: Files, signs_out: bool) -> bytes:
    """The whole document."""
    script = [
        tag("script", src=files.url(name), defer=True) for name in ("uplot.min.js", "dashboard.js")
    ]
    again = tag("meta", http_equiv="refresh", content=str(page.refresh)) if page.refresh else None
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("title", f"{page.title} – Cotenant"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("noscript", again) if again else None,
        tag("link", rel="icon", href=files.url("icon.svg"), type="image/svg+xml"),
        tag("link", rel="stylesheet", href=files.url("uplot.min.css")),
        tag("link", rel="stylesheet", href=files.url("dashboard.css")),
        *(script if page.live or page.current else ()),
    )
    body = tag(
        "body",
        tag("a", "Skip to the content", class_="skip", href="#content"),
        _header(page, signs_out) if page.current else None,
        tag("main", tag("h1", page.title), _offer(page), page.content, id="content", tabindex="-1"),
        data_shape=page.shape,
        data_live="yes" if page.live else None,
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n".encode()


def _header(page: Page, signs_out: bool) -> Html:
    links = [
        tag("li", tag("a", n, href=url, aria_current="page" if n == page.current else None))
        for n, url in PAGES
    ]
    leave = tag("form", tag("button", "Sign out"), method="post", action="/dashboard/logout")
    return tag(
        "header",
        tag("p", "Cotenant", class_="brand"),
        tag("nav", tag("ul", *links), aria_label="Pages"),
        tag("p", id="live", role="status") if page.live else None,
        leave if signs_out else None,
    )


def _offer(page: Page) -> Html | None:
    """Without scripts: a link to have the page load itself again."""
    if page.refresh is not None or not page.live:
        return None
    return tag(
        "noscript",
        tag(
            "p",
            constant("Without JavaScript this page stands still. "),
            tag("a", f"Load it again every {REFRESH_S} s", href=f"?refresh={REFRESH_S}"),
        ),
    )


def cell(found: Look, key: str, **attributes: str) -> Html:
    """A text that the stream keeps fresh."""
    return tag("td", found.cell(key), data_k=key, **attributes)


def kept(found: Look, key: str) -> Html:
    """The same within a text."""
    return tag("span", found.cell(key), data_k=key)


def meter(found: Look, key: str, label: str) -> Html:
    """A bar for a share; the number stands beside it."""
    value = found.meters.get(key, 0.0)
    bar = tag("meter", min="0", max="1", value=str(value), data_m=key, aria_label=label)
    return tag("td", bar)


def row(head: Content, *cells: Content) -> Html:
    """A row whose first cell names it; what is no ``td`` becomes one."""
    made = [c if isinstance(c, Html) and str(c).startswith("<td") else tag("td", c) for c in cells]
    return tag("tr", tag("th", head, scope="row"), *made)


def table(caption: str, heads: Sequence[str], rows: Iterable[Html], empty: str = "") -> Html:
    """A table that can be scrolled with the keyboard; if there are no rows, ``empty`` instead."""
    body = list(rows)
    if not body:
        return tag("p", empty or f"{caption}: none.")
    columns = [tag("th", head, scope="col") for head in heads]
    inner = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *columns)),
        tag("tbody", *body),
    )
    return tag("div", inner, class_="wide", role="region", aria_label=caption, tabindex="0")


def part(name: str, *content: Content, every_s: int = 0) -> Html:
    """What is fetched again when other cells are there; and each ``every_s`` seconds, unless 0."""
    return tag("div", *content, data_part=name, data_every=every_s or None)


def chart(kind: str, of: str, caption: str, **more: str | int | float) -> Html:
    """A place for a picture that the script draws; what it shows stands in a table too."""
    return tag(
        "figure",
        tag("div", class_="plot", role="img", aria_label=caption),
        tag("figcaption", caption),
        class_="chart",
        data_chart=kind,
        data_of=of,
        **more,
    )


def link(kind: str, name: str, shown: str = "") -> Html:
    """To the page of a service or a job."""
    return tag("a", shown or name, href=f"/dashboard/{kind}/{quote(name, safe='')}")


def facts(*pairs: tuple[str, Content]) -> Html:
    """Terms and what is said of them."""
    return tag("dl", join(tag("div", tag("dt", k), tag("dd", v)) for k, v in pairs), class_="facts")
