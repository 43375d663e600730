"""The pages beside the jobs API: signed in by one of its tokens, with buttons for some."""

from __future__ import annotations

import http.client
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from cotenant.serving.failures import MOST_FAILURES
from cotenant.serving.web.app import HEADERS
from tests.certificates import Pair, made
from tests.contract.fake_jobs import TOKENS, Api, serving, write_tokens
from tests.contract.fake_node import eventually
from tests.markup import Document, check

FORM = "application/x-www-form-urlencoded"


class Browser:
    """A browser's way of asking, with its cookie."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.cookie = ""

    def ask(self, method: str, path: str, fields: dict[str, str] | None = None, **more: str) -> Any:
        given = {"origin": self.api.url, "content_type": FORM} if method == "POST" else {}
        if self.cookie:
            given["cookie"] = self.cookie
        body = None if fields is None else urlencode(fields)
        return self.api.ask(method, path, body, token=None, **{**given, **more})

    def get(self, path: str, **more: str) -> Any:
        return self.ask("GET", path, **more)

    def post(self, path: str, **more: str) -> Any:
        return self.ask("POST", path, {}, **more)

    def page(self, path: str) -> Document:
        answer = self.get(path)
        assert answer.status == 200, answer.text
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        return check(answer.text)

    def sign_in(self, name: str) -> Any:
        answer = self.ask("POST", "/dashboard/login", {"token": f"token-{name}"})
        self.cookie = answer.headers.get("set-cookie", "").partition(";")[0]
        return answer


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("api")) as api:
        yield api


@pytest.fixture
def api(shared: Api) -> Iterator[Api]:
    yield shared
    shared.node.specs.clear()
    write_tokens(shared.tokens, TOKENS)


@pytest.fixture
def chief(api: Api) -> Browser:
    browser = Browser(api)
    assert browser.sign_in("chief").status == 303
    return browser


@pytest.fixture
def reader(api: Api) -> Browser:
    browser = Browser(api)
    assert browser.sign_in("reader").status == 303
    return browser


def test_who_guesses_tokens_keeps_nobody_out(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        statuses = [Browser(api).sign_in("nobody").status for _ in range(MOST_FAILURES + 1)]
        assert statuses[0] == 403 and statuses[-1] == 429
        assert Browser(api).sign_in("chief").status == 303


def test_nothing_is_told_before_signing_in(api: Api) -> None:
    browser = Browser(api)
    for path in ("/", "/dashboard/jobs", "/dashboard/jobs/x/cancel"):
        assert browser.get(path).status == 303
    assert browser.get("/dashboard/events").status == 401
    assert browser.post("/dashboard/jobs/x/cancel").status == 401
    check(browser.get("/dashboard/login").text)


def test_who_may_not_read_cannot_sign_in(api: Api) -> None:
    for name in ("sender", "nobody"):
        assert Browser(api).sign_in(name).status == 403


def test_a_session_is_for_pages_alone(api: Api, chief: Browser) -> None:
    chief.page("/dashboard/jobs")
    for path in ("status", "jobs"):
        assert chief.get(f"/api/v1/{path}").status == 401
    assert chief.post("/api/v1/jobs").status == 401


def test_who_has_the_scope_holds_resumes_and_cancels(api: Api, chief: Browser) -> None:
    id = api.submit(name="<b>train</b>")
    job = f"/dashboard/jobs/{id}"
    for path in ("/dashboard/jobs", job):
        assert f"{job}/hold" in chief.page(path).values("action")
    assert chief.post(f"{job}/hold").headers["location"] == job
    assert api.node.states[id] == "held"
    assert f"{job}/resume" in chief.page(job).values("action")
    chief.post(f"{job}/resume")
    assert api.node.states[id] == "running"
    assert f"{job}/cancel" in chief.page(job).values("href")
    assert f"{job}/cancel" in chief.page(f"{job}/cancel").values("action")
    assert api.node.states[id] == "running", "asking whether to cancel cancels nothing"
    chief.post(f"{job}/cancel")
    assert api.node.states[id] == "cancelled"
    page = chief.page(job)
    assert not [url for url in page.values("action") if url.startswith(job)]


def test_who_has_not_gets_no_buttons_and_no_way_around(api: Api, reader: Browser) -> None:
    id = api.submit()
    job = f"/dashboard/jobs/{id}"
    for path in ("/dashboard/jobs", job):
        page = reader.page(path)
        assert not [url for url in page.values("action") if "/jobs/" in url]
        assert f"{job}/cancel" not in page.values("href")
    assert reader.get(f"{job}/cancel").status == 403
    for order in ("hold", "resume", "cancel"):
        assert reader.post(f"{job}/{order}").status == 403
    assert api.node.states[id] == "queued"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://127.0.0.1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"host": "evil.example"},
        {"host": "evil.example", "origin": "http://evil.example"},
        {"host": "localhost:1", "origin": "http://localhost:1"},
    ],
)
def test_other_sites_press_no_buttons(api: Api, chief: Browser, headers: dict[str, str]) -> None:
    id = api.submit()
    for order in ("hold", "cancel"):
        assert chief.post(f"/dashboard/jobs/{id}/{order}", **headers).status in (401, 403)
    assert api.node.states[id] == "queued"


def test_a_form_without_an_origin_presses_none(api: Api, chief: Browser) -> None:
    id = api.submit()
    path = f"/dashboard/jobs/{id}/cancel"
    given = {"cookie": chief.cookie, "content_type": FORM}
    assert api.ask("POST", path, "", token=None, **given).status == 403
    assert api.node.states[id] == "queued"


def test_models_are_not_asked_here(chief: Browser) -> None:
    assert chief.post("/dashboard/services/double/try").status in (400, 404)


def test_a_revoked_token_ends_its_sessions_and_streams(api: Api, chief: Browser) -> None:
    stream = http.client.HTTPConnection(api.at, timeout=30)
    stream.request("GET", "/dashboard/events", headers={"cookie": chief.cookie})
    events = stream.getresponse()
    assert events.status == 200 and events.readline().startswith(b"data: ")
    write_tokens(api.tokens, {"reader": ("read",)})
    assert eventually(lambda: chief.get("/").status == 303)
    while events.readline():
        pass
    stream.close()
    write_tokens(api.tokens, TOKENS)
    assert eventually(lambda: api.get("jobs").status == 200)
    assert chief.get("/").status == 303, "a session that ended does not come back"


def test_a_token_that_lost_a_scope_loses_its_buttons(api: Api, chief: Browser) -> None:
    id = api.submit()
    write_tokens(api.tokens, {"chief": ("read",)})
    path = f"/dashboard/jobs/{id}/hold"
    assert eventually(lambda: path not in chief.page("/dashboard/jobs").values("action"))
    assert chief.post(path).status == 403


def test_over_tls_the_cookie_and_the_origin_are_of_tls(tmp_path: Path) -> None:
    pair = made(tmp_path / "made")
    copies = Pair(tmp_path / "c.pem", tmp_path / "k.pem")
    for source, copy in zip(pair, copies, strict=True):
        shutil.copy(source, copy)
    with serving(tmp_path, copies) as api:
        browser = Browser(api)
        cookie = browser.sign_in("chief").headers["set-cookie"].lower()
        assert all(word in cookie for word in ("secure", "httponly", "samesite=strict"))
        id = api.submit()
        path = f"/dashboard/jobs/{id}/hold"
        assert browser.post(path, origin=f"http://{api.at}").status == 403
        assert browser.post(path).status == 303 and api.node.states[id] == "held"
