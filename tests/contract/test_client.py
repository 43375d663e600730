"""``cotenant.Client`` against a jobs API, and against a control socket."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cotenant
from cotenant.domain.errors import (
    Conflict,
    EnvironmentProblem,
    Forbidden,
    InvalidRequest,
    NotFound,
    NotReady,
    TooLarge,
)
from cotenant.domain.workload import RestartPolicy
from cotenant.serving import jobs_client
from cotenant.serving.control import ControlServer
from cotenant.serving.jobs_api import following
from tests.certificates import made
from tests.contract.fake_jobs import UPLOAD, Api, JobsNode, serving


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("api"), made(tmp_path_factory.mktemp("pair"))) as api:
        yield api


@pytest.fixture
def api(shared: Api) -> Iterator[Api]:
    yield shared
    shared.node.specs.clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_client, "FIRST_DELAY_S", 0.001)


@pytest.fixture
def client(api: Api) -> Iterator[cotenant.Client]:
    with named(api, "chief") as client:
        yield client


def named(api: Api, name: str) -> cotenant.Client:
    assert api.tls is not None
    return cotenant.Client(api.url, token=f"token-{name}", ca=api.tls.certificate)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Any]:
    """A node on this machine, in a thread: its node, and a client by its state directory."""
    loop, node = asyncio.new_event_loop(), JobsNode(tmp_path)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    server = ControlServer(node, tmp_path / "control.sock", lambda: None)
    run(server.start())
    try:
        yield node, cotenant.Client(state_dir=tmp_path)
    finally:
        run(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_importing_the_package_imports_no_client() -> None:
    seen = "import sys, cotenant; print('cotenant.client' in sys.modules, 'msgspec' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "False"]


def test_a_client_needs_the_standard_library_and_msgspec_alone() -> None:
    seen = (
        "import sys; before = set(sys.modules); import cotenant; cotenant.Client;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(*new - set(sys.stdlib_module_names))"
    )
    told = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True)
    assert set(told.stdout.split()) <= {"cotenant", "msgspec", "_msgspec", "typing_extensions"}


def test_what_is_submitted_is_what_the_node_gets(api: Api, client: cotenant.Client) -> None:
    id = client.submit(
        ["sh", "-c", "x"],
        name="t",
        env={"A": "1"},
        weight=2.0,
        guaranteed={"cpu": 0.25},
        limit={"cpu": 0.5},
        kinds=["cpu"],
        memory="1GiB",
        time_limit="2h",
        restart="never",
        max_restarts=1,
    )
    spec = api.node.specs[id]
    assert spec.command == ("sh", "-c", "x") and spec.name == "t" and spec.env["A"] == "1"
    assert spec.weight == 2 and spec.guaranteed == {"cpu": 0.25} and spec.limit == {"cpu": 0.5}
    assert spec.kinds == ("cpu",) and spec.memory == 2**30 and spec.time_limit == 7200 * 10**9
    assert spec.restart is RestartPolicy.NEVER and spec.max_restarts == 1
    assert client.job("t").id == id == client.jobs()[0].id
    assert client.status()["node"] == "fake"


def test_orders_reach_the_node(api: Api, client: cotenant.Client) -> None:
    id = client.submit(["a"], name="t")
    assert client.hold("t") == id and api.node.states[id] == "held"
    assert client.resume(id) == id and api.node.states[id] == "running"
    assert client.checkpoint(id, within=3) == "/checkpoints/3"
    assert client.cancel(id[:6]) == id and client.wait(id).state == "cancelled"


def test_a_directory_is_brought_along(api: Api, client: cotenant.Client, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_text("secret")
    (tmp_path / "data/x").write_text("7")
    (tmp_path / "run.sh").write_text("true")
    (tmp_path / "run.sh").chmod(0o755)
    (tmp_path / "link").symlink_to("data/x")
    place = Path(api.node.specs[client.submit(["./run.sh"], files=tmp_path)].cwd)
    assert sorted(path.name for path in place.rglob("*")) == ["data", "link", "run.sh", "x"]
    assert (place / "run.sh").stat().st_mode & 0o100 and (place / "link").read_text() == "7"
    uploads = sorted((api.directory / "uploads").iterdir())
    client.submit(["./run.sh"], files=str(tmp_path))
    assert sorted((api.directory / "uploads").iterdir()) == uploads


def test_what_is_too_large_is_said(client: cotenant.Client, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(os.urandom(UPLOAD * 20))
    with pytest.raises(TooLarge):
        client.submit(["a"], files=tmp_path)
    with pytest.raises(TooLarge):
        client.submit(["a" * 3 * 2**20])


def test_what_cannot_be_packed_is_said(client: cotenant.Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        client.submit(["a"], files=tmp_path / "none")
    below = tmp_path.joinpath("far", *["d" * 200] * 6)
    below.mkdir(parents=True)
    with pytest.raises(InvalidRequest):
        client.submit(["a"], files=tmp_path / "far")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidRequest):
        client.submit(["a"], files=tmp_path)


def test_an_answer_that_is_too_large_is_said_to_be(
    client: cotenant.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.submit(["a" * 1000])
    monkeypatch.setattr(jobs_client, "ANSWER_BYTES", 1000)
    with pytest.raises(TooLarge):
        client.jobs()


@pytest.mark.parametrize(
    "wrong",
    [
        {"command": "python train.py"},
        {"command": []},
        {"command": [1]},
        {"memory": "much"},
        {"memory": -1},
        {"time_limit": "soon"},
        {"restart": "perhaps"},
        {"weight": 0},
        {"guaranteed": 2},
        {"id": "a b"},
        {"cwd": "here"},
        {"env": {"A": 1}},
        {"command": ["\udc80"]},
    ],
    ids=str,
)
def test_what_is_no_job_is_refused(
    api: Api, client: cotenant.Client, here: Any, wrong: dict[str, Any]
) -> None:
    for one in (client, here[1]):
        with pytest.raises(InvalidRequest):
            one.submit(**{"command": ["a"], **wrong})
    assert not api.node.specs and not here[0].specs


def test_errors_are_those_of_the_node(api: Api, client: cotenant.Client) -> None:
    for wrong in (
        client.job,
        client.hold,
        client.log,
        client.wait,
        lambda r: next(client.follow(r)),
    ):
        with pytest.raises(NotFound):
            wrong("none")
    id = client.submit(["a"], id="mine")
    with pytest.raises(Conflict):
        client.submit(["b"], id="mine")
    assert client.submit(["a"], id="mine") == id
    api.node.become(id, "succeeded")
    with pytest.raises(InvalidRequest):
        client.hold(id)
    with pytest.raises(Forbidden):
        named(api, "reader").cancel(id)
    with pytest.raises(Forbidden):
        named(api, "stranger").jobs()


def test_a_log_is_followed_to_its_end(api: Api, client: cotenant.Client) -> None:
    id = client.submit(["a"])
    log = api.node.log(id)
    log.write_bytes(b"one\n")
    found: list[bytes] = []

    def follow() -> None:
        found.extend(client.follow(id))

    thread = threading.Thread(target=follow)
    thread.start()
    for line in (b"two\n", b"three\n"):
        time.sleep(0.2)
        log.rename(f"{log}.1")
        log.write_bytes(line)
    time.sleep(0.4)
    api.node.become(id, "failed")
    thread.join(30)
    assert not thread.is_alive()
    assert b"".join(found) in (b"one\ntwo\nthree\n", b"one\nthree\n")
    assert client.log(id) == b"two\nthree\n"


def test_who_may_not_wait_for_a_log_does_not_ask_all_the_time(
    api: Api, client: cotenant.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    id, slept = client.submit(["a"]), []
    monkeypatch.setattr(following, "MOST_WAITING", 0)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=slept.append)
    monkeypatch.setattr(jobs_client, "time", clock)
    client._node.log(id, "0", 20.0)
    assert slept and slept[0] > 0
    slept.clear()
    api.node.become(id, "failed")
    assert list(client.follow(id)) == [] and not slept


def test_a_name_that_no_job_can_have_is_refused(client: cotenant.Client) -> None:
    for ref in ("", "a/b", "\udcff"):
        with pytest.raises(InvalidRequest):
            client.job(ref)


@pytest.mark.parametrize("within", [0.0, -1.0, float("nan"), float("inf")])
def test_a_checkpoint_takes_some_time(client: cotenant.Client, within: float) -> None:
    with pytest.raises(InvalidRequest):
        client.checkpoint(client.submit(["a"]), within)


def test_waiting_ends(api: Api, client: cotenant.Client) -> None:
    id = client.submit(["a"])
    with pytest.raises(NotReady):
        client.wait(id, timeout=0.05)
    threading.Timer(0.3, api.node.become, (id, "failed")).start()
    assert client.wait(id, timeout=30).state == "failed"


# --- what may fail on the way -----------------------------------------------------------------


def test_a_lost_answer_starts_no_second_job(
    api: Api, client: cotenant.Client, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    once, lost = jobs_client.JobsClient._once, []

    def loses(self: Any, *asked: Any) -> Any:
        answer = once(self, *asked)
        if not lost:
            lost.append(asked)
            raise ConnectionResetError("the answer is lost")
        return answer

    monkeypatch.setattr(jobs_client.JobsClient, "_once", loses)
    id = client.submit(["a"])
    assert lost and list(api.node.specs) == [id]


def test_where_nobody_answers_it_is_tried_again_and_then_said(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    tried = []

    def refuses(*asked: Any) -> Any:
        tried.append(asked)
        raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr(jobs_client.JobsClient, "_once", refuses)
    client = cotenant.Client("http://127.0.0.1:1", token="t")
    with pytest.raises(EnvironmentProblem):
        client.jobs()
    assert len(tried) == jobs_client.TRIES
    with pytest.raises(EnvironmentProblem):
        client.checkpoint("j")
    assert len(tried) == jobs_client.TRIES + 1


def test_a_certificate_that_nobody_vouches_for_is_not_trusted(api: Api, tmp_path: Path) -> None:
    for ca in (None, made(tmp_path).certificate):
        with pytest.raises(EnvironmentProblem):
            cotenant.Client(api.url, token="token-chief", ca=ca).jobs()


@pytest.mark.parametrize(
    "url",
    [
        "box", "box:8443", "ftp://box", "https://", "https://box:x", "https://box:99999",
        "https://box/path", "https://box?x=1", "https://user@box", "http://box.example",
        "http://127.evil.example:1", "https://.box", "https://a b:1", "https://box..example",
    ],
)  # fmt: skip
def test_what_is_no_safe_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        cotenant.Client(url, token="t")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost:1/", "http://[::1]:1"])
def test_loopback_needs_no_tls(url: str) -> None:
    cotenant.Client(url, token="t")


@pytest.mark.parametrize("token", ["", "a\nb", "tökén"])
def test_what_is_no_token_is_refused(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COTENANT_TOKEN", raising=False)
    with pytest.raises(InvalidRequest):
        cotenant.Client("https://box", token=token)


def test_a_token_may_come_from_a_file_with_its_line_end(api: Api) -> None:
    assert api.tls is not None
    ca = api.tls.certificate
    assert cotenant.Client(api.url, token="token-reader\n", ca=ca).jobs() == []


@pytest.mark.parametrize(
    ("status", "said"),
    [(200, b"<html>"), (404, b'{"error":"no such route"}'), (401, b'{"error":"token?"}')],
    ids=["of pages", "of models", "of models, with a token"],
)
def test_another_server_is_told_from_a_node(status: int, said: bytes, quick: None) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        client = cotenant.Client(f"http://127.0.0.1:{server.server_port}", token="t")
        for ask in (client.jobs, client.status, lambda: client.log("x")):
            with pytest.raises(EnvironmentProblem):
                ask()
        server.shutdown()
        thread.join()


def test_address_token_and_authority_come_from_the_environment(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert api.tls is not None
    monkeypatch.setenv("COTENANT_URL", api.url)
    monkeypatch.setenv("COTENANT_TOKEN", "token-reader")
    monkeypatch.setenv("COTENANT_CA", str(api.tls.certificate))
    assert cotenant.Client().jobs() == []


# --- on this machine --------------------------------------------------------------------------


def test_the_node_on_this_machine_is_asked_the_same(here: Any, tmp_path: Path) -> None:
    node, client = here
    files = tmp_path / "files"
    files.mkdir()
    id = client.submit(["a"], files=files, env={"A": "1"}, time_limit=1)
    spec = node.specs[id]
    assert spec.cwd == str(files) and spec.env["A"] == "1" and "PATH" in spec.env
    assert spec.time_limit == 10**9
    node.log(id).parent.mkdir(parents=True)
    node.log(id).write_bytes(b"one\n")
    assert client.log(id) == b"one\n" and client.job(id[:4]).id == id
    assert client.hold(id) == client.resume(id) == client.cancel(id) == id
    assert b"".join(client.follow(id)) == b"one\n"
    assert client.wait(id).state == "cancelled"
    assert client.checkpoint(id, 2) == "/checkpoints/2"
    with pytest.raises(NotFound):
        client.job("none")
    with pytest.raises(InvalidRequest):
        client.submit(["a"], files=tmp_path / "none")


def test_without_a_node_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem):
        cotenant.Client(state_dir=tmp_path).jobs()
