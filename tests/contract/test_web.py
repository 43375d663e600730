"""The dashboard over HTTP: who gets which page, what is sent with it, and the stream."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from cotenant.domain.port import Held, JobStatus
from cotenant.serving.intake import Intake
from cotenant.serving.web.app import HEADERS, Web
from cotenant.serving.web.look import MOST_ENDED, look
from cotenant.serving.web.session import Door
from cotenant.serving.web.stream import MOST_VIEWERS, Stream
from cotenant.serving.web.studied import Studied
from cotenant.serving.web.studies import Comparison, Figures, StudyFailed, Told
from cotenant.serving.web.visitors import NodeKey
from cotenant.telemetry.explain import Explanation, Incident, PlanChange, RefusalGroup, SlowRequest
from tests.contract.fake_node import FakeNode, eventually, serving
from tests.markup import Document, check

TOKEN = "a-token-of-twenty-characters"
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
PAGES = (
    "/",
    "/dashboard/services",
    "/dashboard/services/double",
    "/dashboard/jobs",
    "/dashboard/jobs/j1",
    "/dashboard/decisions",
    "/dashboard/what-if",
)
FORM = "application/x-www-form-urlencoded"


class TellingNode(FakeNode):
    """Tells of two services and a job whose names, reasons and reports are markup."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def status(self) -> dict[str, Any]:
        self.looks += 1
        service = {
            "state": "READY",
            "reason": HOSTILE,
            "objective_ms": 50.0,
            "percentile": 99.0,
            "p95_ms": 3.0 + self.looks,
            "rate": 12.0,
            "refused": {HOSTILE: 3},
            "variants": {"serving": {HOSTILE: HOSTILE}, "failed": {"cpu": {"b": HOSTILE}}},
            "notes": [HOSTILE],
            "accuracy": {HOSTILE: HOSTILE, "agreement": 0.99},
        }
        return {
            "ready": True,
            "version": "0",
            "uptime_s": float(self.looks),
            "plan": {"version": 1, "reasons": [HOSTILE], "age_s": 2.0},
            "devices": [
                {"id": HOSTILE, "kind": "cpu", "units": [0, 1], "compute": 2, "level": "PRIORITY",
                 "trouble": HOSTILE, "tenants": {HOSTILE: {"memory": 1000}}},
            ],
            "partitions": [
                {"id": HOSTILE, "device": HOSTILE, "holder": f"batch:{HOSTILE}",
                 "busy": {f"service:{HOSTILE}": 0.5, "job:j1": 0.5}},
            ],
            "services": [{"name": "double", **service}, {"name": HOSTILE, **service}],
            "jobs": [
                {"id": "j1", "name": HOSTILE, "state": HOSTILE, "reason": HOSTILE,
                 "progress": 12.0, "progress_unit": HOSTILE, "metrics": {HOSTILE: 1.0}},
            ],
            "journal": {"error": HOSTILE},
        }  # fmt: skip

    def timeline(self) -> list[Held]:
        now = time.time()
        held = {HOSTILE: {f"service:{HOSTILE}": 0.5, "job:j1": 1.0}}
        return [Held(now - n, 1.0, held) for n in (2, 1)]

    def jobs(self) -> list[JobStatus]:
        return []


class TellingStudies:
    policies = {"static": HOSTILE, "slow": "takes for ever", "broken": "fails"}

    async def explain(self, last: int) -> Explanation:
        return Explanation(
            asked=2.0,
            since=1.0,
            until=2.0,
            plans=[PlanChange(1.0, 1, (HOSTILE,), HOSTILE, HOSTILE)],
            refusals=[RefusalGroup(HOSTILE, HOSTILE, HOSTILE, 1, example=HOSTILE)],
            jobs=[Incident(1.0, "j1", HOSTILE)],
            slowest=[SlowRequest(1.0, 1, HOSTILE, 1.0, HOSTILE)],
            gaps=[HOSTILE],
        )

    async def compare(self, policy: str, seconds: int) -> Comparison:
        if policy == "broken":
            raise OSError("there are too many processes")
        if policy == "slow":
            await asyncio.sleep(3600)
        figures = {HOSTILE: Figures(3, 1.0, 2.0)}
        told = [Told(f"{policy} {seconds} {HOSTILE}", figures, {"j1": 1.0}), Told("b", {}, {})]
        return Comparison(policy, float(seconds), told, [HOSTILE])


class NoStudies(TellingStudies):
    async def explain(self, last: int) -> Explanation:
        raise StudyFailed(HOSTILE)


def web(node: FakeNode, intake: Intake, token: str | None, studies: TellingStudies) -> Web:
    door = Door(NodeKey(token) if token else None, "127.0.0.1")
    return Web(node, intake, door, Stream(node), Studied(studies))


def pages(node: FakeNode, intake: Intake, token: str | None) -> Web:
    return web(node, intake, token, TellingStudies())


def bare(node: FakeNode, intake: Intake, token: str | None) -> Web:
    return web(node, intake, token, NoStudies())


class Client:
    """A browser's way of asking, with its cookie."""

    def __init__(self, box: Any) -> None:
        self.node = box.node
        self.at = box.http
        self.cookie = ""

    def ask(
        self, method: str, path: str, body: str = "", **headers: str
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.at, timeout=30)
        given = {k.replace("_", "-"): v for k, v in headers.items()}
        if self.cookie:
            given["cookie"] = self.cookie
        connection.request(method, path, body or None, given)
        response = connection.getresponse()
        if "event-stream" not in response.headers.get("content-type", ""):
            response.text = response.read().decode()  # type: ignore[attr-defined]
        return response

    def get(self, path: str, **headers: str) -> Any:
        return self.ask("GET", path, **headers)

    def post(self, path: str, fields: dict[str, str], **headers: str) -> Any:
        given = {"origin": f"http://{self.at}", "content_type": FORM, **headers}
        return self.ask("POST", path, urlencode(fields), **given)

    def page(self, path: str) -> Document:
        answer = self.get(path)
        assert answer.status == 200, answer.text
        return check(answer.text)

    def sign_in(self, token: str = TOKEN) -> Any:
        answer = self.post("/dashboard/login", {"token": token})
        self.cookie = answer.headers.get("set-cookie", "").partition(";")[0]
        return answer


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(make=TellingNode, web=pages) as box:
        yield Client(box)


@pytest.fixture
def locked() -> Iterator[Client]:
    with serving(make=TellingNode, web=bare, token=TOKEN) as box:
        yield Client(box)


# --- pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_well_formed_and_escapes_whatever_names_say(client: Client, path: str) -> None:
    page = client.page(path)
    assert [e.attributes["src"] for e in page.all("script")] and not page.all("img")
    assert "alert(1)" in page.text or path == "/dashboard/what-if"
    current = [e.attributes["href"] for e in page.all("a") if "aria-current" in e.attributes]
    assert len(current) == 1 and path.startswith(current[0] or "?")
    assert page.all("a")[0].attributes["href"] == "#content"


@pytest.mark.parametrize("path", [*PAGES, "/dashboard/login", "/dashboard/nothing"])
def test_every_page_says_what_a_browser_may_do_with_it(client: Client, path: str) -> None:
    headers = client.get(path).headers
    assert {name: headers[name] for name in HEADERS} == HEADERS
    assert headers["cache-control"] == "no-store"


def test_the_first_page_with_all_its_files_is_small(client: Client) -> None:
    first = client.get("/")
    page, size = check(first.text), len(first.text)
    for name in (*page.values("src"), *(u for u in page.values("href") if "/static/" in u)):
        answer = client.get(name)
        assert answer.status == 200 and "immutable" in answer.headers["cache-control"]
        size += len(answer.text)
    assert size < 200_000


def test_a_page_without_scripts_can_load_itself_again(client: Client) -> None:
    link = next(u for u in client.page("/").values("href") if u.startswith("?"))
    page = client.page("/" + link)
    assert "refresh" in page.values("http-equiv")
    assert "refresh" not in client.page("/?refresh=<script>").values("http-equiv")


@pytest.mark.parametrize("path", ["services/none", "jobs/none", "x", "static/app.py"])
def test_what_is_not_there_is_said_as_a_page(client: Client, path: str) -> None:
    answer = client.get(f"/dashboard/{path}")
    assert answer.status == 404
    check(answer.text)


def test_the_name_of_the_dashboard_leads_to_its_first_page(client: Client) -> None:
    answer = client.get("/dashboard")
    assert answer.status == 303 and answer.headers["location"] == "/"


def test_routes_of_the_protocol_are_what_they_were(client: Client) -> None:
    assert json.loads(client.get("/v2").text)["name"]
    assert client.get("/health").status == 200
    assert client.get("/nothing").headers["content-type"] == "application/json"


def test_why_nothing_can_be_told_is_said(locked: Client) -> None:
    locked.sign_in()
    assert "alert(1)" in locked.page("/dashboard/decisions").text
    assert locked.post("/dashboard/what-if", {"policy": "broken", "span": "60"}).status == 303
    assert eventually(lambda: "Nothing can be told" in locked.page("/dashboard/what-if").text)


def test_jobs_that_ended_long_ago_do_not_make_a_page_long() -> None:
    class OldNode(TellingNode):
        def status(self) -> dict[str, Any]:
            ended = [{"id": f"e{n}", "state": "failed"} for n in range(1000)]
            return {"jobs": [{"id": "first", "state": "queued"}, *ended]}

    found = look(OldNode())
    kept = [job["id"] for job in found.rows("jobs")]
    assert kept == ["first", *(f"e{n}" for n in range(1000 - MOST_ENDED, 1000))]
    assert found.left_out == 1000 - MOST_ENDED


# --- trying a model, and another policy -------------------------------------------------------


INPUT = '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}'


def test_a_model_is_tried_with_and_without_scripts(client: Client) -> None:
    page = check(client.post("/dashboard/services/double/try", {"input": INPUT}).text)
    assert "status 200" in page.text and "8.0" in page.text
    fields = {"input": INPUT}
    said = client.post("/dashboard/services/double/try", fields, accept="application/json")
    assert "8.0" in json.loads(said.text)["text"]
    assert client.node.unreleased == 0


@pytest.mark.parametrize(
    "given", ["", "{", HOSTILE, '{"inputs": []}', '{"inputs": [{"name": "' + "x" * 9 + '"}]}']
)
def test_a_wrong_input_is_answered_and_shown_again(client: Client, given: str) -> None:
    answer = client.post("/dashboard/services/double/try", {"input": given})
    page = check(answer.text)
    assert "status 4" in page.text and given in page.text


def test_a_model_that_is_not_served_cannot_be_tried(client: Client) -> None:
    assert client.post("/dashboard/services/none/try", {"input": INPUT}).status == 404


def test_another_policy_is_asked_for_and_told(client: Client) -> None:
    answer = client.post("/dashboard/what-if", {"policy": "static", "span": "60"})
    assert answer.status == 303
    assert eventually(lambda: "static 60" in client.get("/dashboard/what-if").text)
    check(client.get("/dashboard/what-if").text)


def test_one_comparison_runs_at_a_time(locked: Client) -> None:
    locked.sign_in()
    assert locked.post("/dashboard/what-if", {"policy": "slow", "span": "60"}).status == 303
    page = locked.page("/dashboard/what-if")
    assert "refresh" in page.values("http-equiv")
    assert locked.post("/dashboard/what-if", {"policy": "static", "span": "60"}).status == 400


@pytest.mark.parametrize(
    "fields", [{}, {"policy": "none", "span": "60"}, {"policy": "static", "span": "7"}]
)
def test_only_what_is_offered_can_be_asked_for(client: Client, fields: dict[str, str]) -> None:
    answer = client.post("/dashboard/what-if", fields)
    assert answer.status == 400
    check(answer.text)


# --- who may see it ------------------------------------------------------------------------------


def test_nothing_is_told_before_signing_in(locked: Client) -> None:
    for path in (*PAGES, "/dashboard/nothing"):
        answer = locked.get(path)
        assert answer.status == 303 and answer.headers["location"] == "/dashboard/login"
    assert locked.get("/dashboard/events").status == 401
    assert locked.post("/dashboard/services/double/try", {"input": INPUT}).status == 401
    assert locked.node.looks == 0 and not locked.node.calls


def test_signing_in_and_out(locked: Client) -> None:
    check(locked.get("/dashboard/login").text)
    assert locked.sign_in("not the token at all").status == 403
    assert locked.get("/").status == 303
    answer = locked.sign_in()
    assert answer.status == 303 and TOKEN not in str(answer.headers)
    assert "httponly" in answer.headers["set-cookie"].lower()
    page = locked.page("/")
    assert TOKEN not in page.text and "/dashboard/logout" in page.values("action")
    assert locked.post("/dashboard/logout", {}).status == 303
    assert locked.get("/").status == 303


def test_a_session_is_for_pages_alone(locked: Client) -> None:
    locked.sign_in()
    assert locked.get("/v2").status == 401
    assert locked.get("/metrics").status == 401


def test_the_bearer_token_opens_pages_too(locked: Client) -> None:
    assert locked.get("/", authorization=f"Bearer {TOKEN}").status == 200


def test_pages_of_other_sites_get_nothing(client: Client) -> None:
    looks = client.node.looks
    assert client.get("/", host="evil.example").status == 403
    assert client.get("/dashboard/events", host="evil.example").status == 403
    assert client.get("/dashboard/events", origin="http://evil.example").status == 403
    for origin in ("http://evil.example", "null"):
        assert client.post("/dashboard/what-if", {}, origin=origin).status == 403
    assert client.ask("POST", "/dashboard/what-if", "", content_type=FORM).status == 403
    assert client.node.looks == looks


def test_a_form_is_bounded_and_is_one(client: Client) -> None:
    path = "/dashboard/services/double/try"
    assert client.post(path, {"input": "x" * 2**20}).status == 413
    assert client.post(path, {str(n): "x" for n in range(100)}).status == 400
    assert client.post(path, {"input": "x"}, content_type="application/json").status == 400


# --- the stream ---------------------------------------------------------------------------------


def event(response: Any) -> dict[str, Any]:
    line = response.readline()
    assert line.startswith(b"data: ") and response.readline() == b"\n"
    found: dict[str, Any] = json.loads(line[6:])
    return found


def test_the_stream_tells_everything_and_then_what_changed(client: Client) -> None:
    response = client.get("/dashboard/events")
    assert response.headers["content-type"].startswith("text/event-stream")
    first, second = event(response), event(response)
    response.close()
    keys = set(client.page("/dashboard/services").values("data-k"))
    assert keys and keys <= first["cells"].keys()
    assert first["past"] and first["points"] and first["shape"] == second["shape"]
    assert "service/double/p95" in second["cells"]
    assert "service/double/rate" not in second["cells"]


def test_nothing_is_computed_when_nobody_looks(client: Client) -> None:
    response = client.get("/dashboard/events")
    event(response)
    response.close()

    def still() -> bool:
        looks = client.node.looks
        time.sleep(1.5)
        return bool(client.node.looks == looks)

    assert eventually(still)


def test_viewers_are_bounded_and_leave_their_place(client: Client) -> None:
    def all_there() -> bool:
        found = [client.get("/dashboard/events") for _ in range(MOST_VIEWERS)]
        try:
            return [r.status for r in found] == [200] * MOST_VIEWERS and (
                client.get("/dashboard/events").status == 503
            )
        finally:
            for response in found:
                response.close()

    assert eventually(all_there)
    assert eventually(all_there)


def test_who_does_not_take_up_what_is_sent_is_dropped() -> None:
    async def scenario() -> int:
        stream = Stream(TellingNode(), every_s=0.01, send_s=0.1)
        sent = 0

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(3600)
            return {}

        async def send(_: Any) -> None:
            nonlocal sent
            sent += 1
            if sent > 2:
                await asyncio.sleep(3600)

        await asyncio.wait_for(stream.serve(receive, send, lambda: True), 20)
        await stream.close()
        return sent

    assert asyncio.run(scenario()) == 3


def test_streams_end_with_the_node() -> None:
    with serving(make=TellingNode, web=pages) as box:
        response = Client(box).get("/dashboard/events")
        event(response)
        box.run(box.web.close())
        assert not response.read().endswith(b"data: ")
        assert Client(box).get("/dashboard/events").status == 503
