"""The dashboard in a browser, on a node with load. Pictures of all pages stay in
``bench-out/screens`` (``COTENANT_SCREENS``: elsewhere)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cotenant.cli.main import main
from tests.certificates import made
from tests.markup import check

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

ROOT = Path(__file__).parents[2]
SCREENS = Path(os.environ.get("COTENANT_SCREENS", ROOT / "bench-out/screens"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 30_000
TOKEN = "a-token-of-twenty-characters"
TRAIN = """
import cotenant, itertools
for n in itertools.count():
    cotenant.report(n, loss=1 / (n + 1))
    print("epoch", n, "<b>", flush=True)
    sum(i * i for i in range(200_000))
"""
PAGES = {
    "now": "/",
    "services": "/dashboard/services",
    "service": "/dashboard/services/digits",
    "jobs": "/dashboard/jobs",
    "job": "/dashboard/jobs/{job}",
    "decisions": "/dashboard/decisions",
    "what-if": "/dashboard/what-if",
}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (.ci/run installs it)"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="Playwright is not installed"
    ),
]

CONTRAST = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (el) => {
    for (; el; el = el.parentElement) {
      const found = rgb(getComputedStyle(el).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const el of document.body.querySelectorAll("*")) {
    const own = [...el.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !el.checkVisibility()) continue;
    const [a, b] = [light(rgb(getComputedStyle(el).color)), light(behind(el))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${el.tagName} ${el.textContent.slice(0, 40)}: ${ratio}`);
  }
  return poor;
}"""


def configured(box: Box, **node: Any) -> Box:
    box.model("work", "digits", layers=8)
    box.model("scale", "house")
    job = {"name": "retrain", "command": [sys.executable, "-c", TRAIN]}
    services = [{"name": "digits"}, {"name": "house"}]
    return box.configure(services, jobs=[job], node=node)


@pytest.fixture(scope="module")
def box(module_boxes: Boxes) -> Iterator[Box]:
    """Serves two models under load, and trains."""
    box = configured(module_boxes()).start()
    digits, house = np.ones((1, 256), np.float32), np.ones((1, 4), np.float32)
    with box.under_load("digits", 20, x=digits), box.under_load("house", 20, x=house):
        yield box


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@contextmanager
def opened(chromium: Any, box: Box, base: str = "", **context: Any) -> Iterator[Any]:
    """A page of a fresh profile, of the node's own port or of ``base``. Complaints on its console
    fail the test, and so does a request to anybody but the node."""
    base = base or f"http://127.0.0.1:{box.port}"
    complaints: list[str] = []
    asked: list[str] = []
    profile = chromium.new_context(
        base_url=base, viewport={"width": 1200, "height": 800}, **context
    )
    page = profile.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    profile.close()
    assert not complaints
    assert asked and all(url.startswith((f"{base}/", "data:")) for url in asked), asked


def wait(page: Any, expression: str, unlike: object = None) -> None:
    """Until an expression is true, and other than ``unlike``. (Playwright's own way evaluates
    strings in the page, which its policy forbids.)"""
    for _ in range(PATIENCE_MS // 50):
        found = page.evaluate(expression)
        if found and found != unlike:
            return
        page.wait_for_timeout(50)
    pytest.fail(f"waited in vain for {expression}")


def show(page: Any, box: Box, name: str) -> None:
    """Go to a page and wait until all that it draws is there."""
    page.goto(PAGES[name].format(job=box.job("retrain").id))
    live = page.locator("#live")
    if live.count():
        wait(page, "document.getElementById('live').textContent.startsWith('Live')")
        drawn = "[...document.querySelectorAll('.plot')].every((p) => p.querySelector('canvas'))"
        wait(page, drawn)
    if name == "decisions":
        page.wait_for_selector("table")


def test_a_node_with_a_token_lets_in_who_has_it(chromium: Any, boxes: Boxes) -> None:
    box = boxes()
    (box.directory / "token").write_text(TOKEN)
    configured(box, token_file="./token").start()
    with opened(chromium, box) as page:
        page.goto("/dashboard/jobs")
        assert page.url.endswith("/dashboard/login")
        page.get_by_label("token").fill(TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("text=Device cpu")
        show(page, box, "now")
        assert TOKEN not in page.url and TOKEN not in page.content()
        assert page.evaluate("document.cookie") == ""
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_selector("#token")
        page.goto("/")
        assert page.url.endswith("/dashboard/login")


def with_jobs_api(box: Box, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Start a box with a jobs API over TLS; the tokens ``chief`` and ``reader``."""
    made(box.directory)
    tokens = {}
    for name, scopes in (("chief", "read,control"), ("reader", "read")):
        file = str(box.directory / "tokens.json")
        assert main(["token", "add", name, "--scope", scopes, "--file", file]) == 0
        tokens[name] = capsys.readouterr().out.strip()
    files = {"tokens": "tokens.json", "certificate": "certificate.pem", "key": "key.pem"}
    configured(box, jobs_api={"address": "127.0.0.1:0", **files}).start()
    return tokens


def sign_in(page: Any, token: str) -> None:
    page.goto("/dashboard/jobs")
    page.get_by_label("token").fill(token)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Device cpu")


@pytest.mark.parametrize("scripts", [True, False], ids=["with scripts", "without"])
def test_jobs_are_held_resumed_and_cancelled_by_who_may(
    chromium: Any, boxes: Boxes, capsys: pytest.CaptureFixture[str], scripts: bool
) -> None:
    box = boxes()
    tokens = with_jobs_api(box, capsys)
    job = box.submit("sleep", "1000", name="<b>sleeper</b>")
    box.until(lambda: box.job(job).state == "running")
    profile = {"ignore_https_errors": True, "java_script_enabled": scripts}
    with opened(chromium, box, box.status()["jobs_api"], **profile) as page:
        sign_in(page, tokens["chief"])
        page.goto("/dashboard/jobs")
        SCREENS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENS / "jobs-buttons.png", full_page=True)
        page.get_by_role("button", name="Hold <b>sleeper</b>").click()
        page.wait_for_url(f"**/dashboard/jobs/{job}")
        box.until(lambda: box.job(job).state == "held")
        page.get_by_role("button", name="Resume").click()
        box.until(lambda: box.job(job).state == "running")
        page.get_by_role("link", name="Cancel").click()
        page.wait_for_selector("text=ends for good")
        page.get_by_role("link", name="Leave it").click()
        assert box.job(job).state == "running"
        page.get_by_role("link", name="Cancel").click()
        page.get_by_role("button", name="Cancel <b>sleeper</b>").click()
        box.until(lambda: box.job(job).state == "cancelled")
        page.goto(f"/dashboard/jobs/{job}")
        assert page.get_by_role("button", name="Hold").count() == 0
        if scripts:
            assert page.evaluate("document.cookie") == ""
            assert page.evaluate(CONTRAST) == []
        assert all(tokens["chief"] not in text for text in (page.url, page.content()))


def test_who_may_only_look_has_no_buttons_here_nor_at_the_own_port(
    chromium: Any, boxes: Boxes, capsys: pytest.CaptureFixture[str]
) -> None:
    box = boxes()
    tokens = with_jobs_api(box, capsys)
    with opened(chromium, box, box.status()["jobs_api"], ignore_https_errors=True) as page:
        sign_in(page, tokens["reader"])
        for name in ("jobs", "job"):
            show(page, box, name)
            assert page.get_by_role("button", name="Hold").count() == 0
            assert page.get_by_role("link", name="Cancel").count() == 0
    with opened(chromium, box) as page:
        show(page, box, "jobs")
        assert page.get_by_role("button", name="Hold").count() == 0


def test_a_node_can_do_without(boxes: Boxes) -> None:
    box = configured(boxes(), dashboard=False).start()
    for path in ("/", "/dashboard/services", "/dashboard/events"):
        assert box.ask("GET", path).status == 404


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_live_legible_and_asks_nobody_else(chromium: Any, box: Box, name: str) -> None:
    with opened(chromium, box) as page:
        show(page, box, name)
        assert page.locator("nav [aria-current=page]").count() == 1
        SCREENS.mkdir(parents=True, exist_ok=True)
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(100)
            page.screenshot(path=SCREENS / f"{name}-{scheme}.png", full_page=True)
            assert page.evaluate(CONTRAST) == []


def test_figures_change_by_themselves_until_they_are_paused(chromium: Any, box: Box) -> None:
    with opened(chromium, box) as page:
        show(page, box, "service")
        answered = page.locator("[data-k='service/digits/answered']")
        before = answered.text_content()
        wait(
            page,
            "document.querySelector(\"[data-k='service/digits/answered']\").textContent",
            before,
        )
        page.get_by_role("button", name="Pause").click()
        assert page.get_by_role("button", name="Pause").get_attribute("aria-pressed") == "true"
        page.wait_for_timeout(100)
        still = answered.text_content()
        page.wait_for_timeout(1500)
        assert answered.text_content() == still


def test_what_comes_and_goes_is_shown(chromium: Any, box: Box) -> None:
    with opened(chromium, box) as page:
        show(page, box, "jobs")
        box.submit("sleep", "1000", name="<i>newcomer</i>")
        page.wait_for_selector("text=<i>newcomer</i>")
        box.control.cancel("<i>newcomer</i>")
        page.wait_for_selector("text=cancelled")


def test_a_log_goes_on(chromium: Any, box: Box) -> None:
    with opened(chromium, box) as page:
        show(page, box, "job")
        log = "document.querySelector('pre.log').textContent"
        wait(page, f"{log}.includes('<b>')")
        wait(page, log, unlike=page.evaluate(log))


def test_a_model_is_tried_with_the_keyboard_alone(chromium: Any, box: Box) -> None:
    with opened(chromium, box) as page:
        show(page, box, "services")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent") == "house":
                break
        page.keyboard.press("Enter")
        page.wait_for_selector("h1:has-text('house')")
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent") == "Send":
                break
        shown = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(shown) != "none"
        page.keyboard.press("Enter")
        wait(page, "document.getElementById('answer').textContent.includes('status 200')")
        assert page.url.endswith("/dashboard/services/house")


def test_every_page_is_complete_without_scripts(chromium: Any, box: Box) -> None:
    with opened(chromium, box, java_script_enabled=False) as page:
        for name, path in PAGES.items():
            answer = page.goto(path.format(job=box.job("retrain").id))
            check(answer.text())
            if name not in ("what-if", "decisions", "job"):
                assert page.locator("tbody tr").count() > 0
        page.goto(PAGES["service"])
        page.get_by_role("button", name="Send").click()
        assert "status 200" in page.locator("#answer").text_content()


def test_pages_fit_a_narrow_screen(chromium: Any, box: Box) -> None:
    with opened(chromium, box) as page:
        page.set_viewport_size({"width": 360, "height": 700})
        for name in PAGES:
            show(page, box, name)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, name


def test_another_policy_is_told_from_the_journal(chromium: Any, box: Box) -> None:
    with opened(chromium, box, color_scheme="light") as page:
        show(page, box, "what-if")
        page.select_option("#policy", "temporal")
        page.select_option("#span", "60")
        page.get_by_role("button", name="Tell it again").click()
        page.wait_for_selector("main h2")
        page.screenshot(path=SCREENS / "what-if-told.png", full_page=True)
        told = page.locator("main").text_content()
        assert all(name in told for name in ("digits", "house", "retrain", "temporal"))
        assert box.status()["ready"]
