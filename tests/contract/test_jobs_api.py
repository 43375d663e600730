"""The jobs API over HTTP: who may do what, what is sent, and what is answered to it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cotenant.domain.errors import EnvironmentProblem, InvalidRequest, NotReady
from cotenant.serving.failures import MOST_FAILURES
from cotenant.serving.jobs_api import unpack
from cotenant.serving.jobs_api import uploads as uploading
from tests.contract.fake_jobs import TOKENS, UPLOAD, Api, serving, write_tokens
from tests.contract.fake_node import eventually

ROUTES = {
    ("GET", "status"): "read",
    ("GET", "jobs"): "read",
    ("POST", "jobs"): "submit",
    ("GET", "jobs/j"): "read",
    ("GET", "jobs/j/log"): "read",
    ("POST", "jobs/j/hold"): "control",
    ("POST", "jobs/j/resume"): "control",
    ("POST", "jobs/j/cancel"): "control",
    ("POST", "jobs/j/checkpoint"): "control",
    ("GET", "files/" + "0" * 64): "submit",
    ("PUT", "files/" + "0" * 64): "submit",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("api")) as api:
        yield api


@pytest.fixture
def api(shared: Api) -> Iterator[Api]:
    yield shared
    shared.node.specs.clear()
    shared.node.problem = None
    write_tokens(shared.tokens, TOKENS)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Api]:
    """One that no other test uses."""
    with serving(tmp_path) as api:
        yield api


# --- who may do what --------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
@pytest.mark.parametrize("name", TOKENS)
def test_a_token_does_what_its_scopes_say(api: Api, route: tuple[str, str], name: str) -> None:
    answer = api.ask(*route, token=name)
    needed = ROUTES[route]
    if needed in TOKENS[name]:
        assert answer.status not in (401, 403)
    else:
        assert answer.status == 403 and answer.error["kind"] == "Forbidden"
        assert needed in answer.error["message"]


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_without_a_token_nothing_is_answered(own: Api, route: tuple[str, str]) -> None:
    for token in (None, "nobody"):
        answer = own.ask(*route, token=token)
        assert answer.status == 401 and "www-authenticate" in answer.headers
    assert own.ask(*route, token=None, authorization="Basic token-chief").status == 401
    assert own.ask(*route, token=None, cookie="token=token-chief").status == 401
    assert own.ask(*route, token=None, authorization="Bearer").status == 401
    assert own.ask(*route, token=None, authorization="Bearer tökén").status == 401


def test_pages_of_other_sites_are_not_invited(api: Api) -> None:
    before = api.ask("OPTIONS", "jobs", origin="https://evil.example")
    assert before.status == 405
    for answer in (before, api.get("jobs", origin="https://evil.example")):
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_who_sends_many_wrong_tokens_is_slowed_and_others_are_not(own: Api) -> None:
    statuses = [own.get("jobs", token="guess").status for _ in range(MOST_FAILURES + 1)]
    assert statuses[0] == 401 and statuses[-1] == 429
    assert own.get("jobs").status == 200


def test_a_revoked_token_is_worth_nothing_and_a_new_one_counts(api: Api) -> None:
    assert api.get("jobs").status == 200
    write_tokens(api.tokens, {"reader": ("read",), "newcomer": ("read",)})
    assert eventually(lambda: api.get("jobs").status == 401)
    assert api.get("jobs", token="reader").status == 200
    assert api.get("jobs", token="newcomer").status == 200


def test_an_expired_token_is_worth_nothing(api: Api) -> None:
    write_tokens(api.tokens, TOKENS, expires=time.time() - 1)
    assert eventually(lambda: api.get("jobs").status == 401)


@pytest.mark.parametrize("spoil", ["writable", "damaged", "gone"])
def test_where_the_token_file_cannot_be_used_nobody_is_let_in(own: Api, spoil: str) -> None:
    assert own.get("jobs").status == 200
    if spoil == "writable":
        own.tokens.chmod(0o666)
    elif spoil == "damaged":
        own.tokens.write_text('{"tokens": [')
    else:
        own.tokens.unlink()
    assert eventually(lambda: own.get("jobs").status == 503)
    write_tokens(own.tokens, TOKENS)
    assert eventually(lambda: own.get("jobs").status == 200)


# --- jobs -------------------------------------------------------------------------------------


def test_a_job_is_what_was_sent(api: Api) -> None:
    id = api.submit("sh", "-c", "true", name="t", env={"A": "ž"}, time_limit_s=1.5, memory=1024)
    spec = api.node.specs[id]
    assert spec.command == ("sh", "-c", "true") and spec.name == "t"
    assert spec.env["A"] == "ž" and spec.env["PATH"] and len(spec.env) == 2
    assert spec.time_limit == 1_500_000_000 and spec.memory == 1024
    assert Path(spec.cwd).is_dir() and not list(Path(spec.cwd).iterdir())
    assert Path(spec.cwd).stat().st_mode & 0o77 == 0
    assert [job["id"] for job in api.get("jobs").json] == [id]
    assert api.get(f"jobs/{id}").json["name"] == "t" == api.get("jobs/t").json["name"]


def test_a_job_in_a_directory_of_the_box_gets_none_of_its_own(api: Api) -> None:
    id = api.submit(cwd="/tmp")
    assert api.node.specs[id].cwd == "/tmp" and not api.node.log(id).parent.exists()


def test_the_same_under_one_id_is_one_job(api: Api) -> None:
    assert api.submit("a", id="mine") == "mine" == api.submit("a", id="mine")
    assert len(api.node.specs) == 1
    answer = api.post("jobs", {"command": ["b"], "id": "mine"})
    assert answer.status == 409 and answer.error["kind"] == "Conflict"
    assert api.node.specs["mine"].command == ("a",)


def test_two_that_send_the_same_at_a_time_start_one_job(api: Api) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: api.submit("a", id="mine"), range(16)))
    assert set(ids) == {"mine"} and len(api.node.specs) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"command": []}', b'{"command": "ls"}',
        b'{"command": ["\\ud800"]}', b'{"command": [1]}', b"[" * 100_000,
        b'{"command": ["a"], "x": ' + b"[" * 100_000,
        b'{"command": ["a"], "reservation": {"id": "r"}}', b'{"command": ["a"], "priority": 1}',
        b'{"command": ["a"], "cwd": "somewhere"}', b'{"command": ["a"], "id": "../x"}',
        b'{"command": ["a"], "id": "a\\n"}', b'{"command": ["a"], "files": "../x"}',
        b'{"command": ["a"], "weight": 0}', b'{"command": ["a"], "weight": 1e999}',
        b'{"command": ["a"], "guaranteed": 2}', b'{"command": ["a"], "limit": {"cpu": -1}}',
        b'{"command": ["a"], "memory": -1}', b'{"command": ["a"], "memory": 1e30}',
        b'{"command": ["a"], "time_limit_s": -1}', b'{"command": ["a"], "restart": "perhaps"}',
        b'{"command": ["a"], "log_limit": 0}', b'{"command": ["a"], "env": {"A": 1}}',
        b'{"command": ["a"], "env": {"A": null}}',
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)  # fmt: skip
def test_what_is_no_job_is_refused(api: Api, body: bytes) -> None:
    answer = api.post("jobs", body)
    assert answer.status == 400 and answer.error["kind"] == "InvalidRequest"
    assert not api.node.specs


def test_what_the_node_refuses_leaves_nothing_behind(api: Api) -> None:
    before = set((api.directory / "jobs").glob("*"))
    for problem, status in (
        (InvalidRequest("no"), 400),
        (EnvironmentProblem("the disk is full"), 503),
        (NotReady("later"), 503),
        (RuntimeError("a bug"), 500),
    ):
        api.node.problem = problem
        answer = api.post("jobs", {"command": ["a"], "id": "gone"})
        assert answer.status == status and "a bug" not in answer.text
    assert eventually(lambda: set((api.directory / "jobs").glob("*")) == before)
    assert not list((api.directory / "uploads").glob("partial-*"))


def test_bodies_are_bounded(api: Api) -> None:
    answer = api.post("jobs", json.dumps({"command": ["x" * 3 * 2**20]}))
    assert answer.status == 413 and answer.error["kind"] == "TooLarge"


def test_orders_reach_the_node(api: Api) -> None:
    id = api.submit()
    for order, state in (("hold", "held"), ("resume", "running"), ("cancel", "cancelled")):
        answer = api.post(f"jobs/{id}/{order}")
        assert answer.status == 200 and answer.json == {"id": id}
        assert api.node.states[id] == state
    assert api.post(f"jobs/{id}/checkpoint").json == {"checkpoint": "/checkpoints/60"}
    asked = api.post(f"jobs/{id}/checkpoint", {"within_s": 5})
    assert asked.json == {"checkpoint": "/checkpoints/5"}
    for wrong in ({"within_s": 0}, {"within_s": 10**6}, {"within": 5}, []):
        assert api.post(f"jobs/{id}/checkpoint", wrong).status == 400
    api.node.become(id, "succeeded")
    assert api.post(f"jobs/{id}/hold").status == 400


@pytest.mark.parametrize("path", ["jobs/none", "jobs/none/log", "nothing", "jobs/a/b/c"])
def test_what_is_not_there_is_said(api: Api, path: str) -> None:
    answer = api.get(path)
    assert answer.status == 404 and answer.error["kind"] == "NotFound"


def test_methods_that_are_not_there_are_refused(api: Api) -> None:
    for method, path, there in (
        ("DELETE", "jobs", {"GET", "HEAD", "POST"}),
        ("GET", "jobs/x/cancel", {"POST"}),
        ("POST", "files/x", {"GET", "HEAD", "PUT"}),
    ):
        answer = api.ask(method, path)
        assert answer.status == 405
        assert set(answer.headers["allow"].split(", ")) == there


# --- logs -------------------------------------------------------------------------------------


def place(answer: Any) -> str:
    return str(answer.headers["cotenant-next-offset"])


def test_a_log_is_read_on_from_where_one_got_to(api: Api) -> None:
    id = api.submit()
    first = api.get(f"jobs/{id}/log")
    assert first.status == 200 and first.data == b""
    api.node.log(id).write_bytes(b"one\n\xff")
    second = api.get(f"jobs/{id}/log?offset={place(first)}")
    assert second.data == b"one\n\xff" and second.headers["cotenant-job-state"] == "queued"
    assert api.get(f"jobs/{id}/log?offset={place(second)}").data == b""


def test_a_log_that_was_moved_is_read_to_its_end_first(api: Api) -> None:
    id = api.submit()
    log = api.node.log(id)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"one\n")
    at = place(api.get(f"jobs/{id}/log"))
    with log.open("ab") as file:
        file.write(b"two\n")
    log.rename(f"{log}.1")
    log.write_bytes(b"three\n")
    found = b""
    for _ in range(4):
        answer = api.get(f"jobs/{id}/log?offset={at}")
        assert "cotenant-log-gap" not in answer.headers
        found, at = found + answer.data, place(answer)
    assert found == b"two\nthree\n"


def test_what_the_log_dropped_is_said_to_be_missing(api: Api) -> None:
    id = api.submit()
    api.node.log(id).write_bytes(b"new\n")
    answer = api.get(f"jobs/{id}/log?offset=999999999-5")
    assert answer.data == b"new\n" and answer.headers["cotenant-log-gap"]


def test_a_request_waits_for_more_of_a_log(api: Api) -> None:
    id = api.submit()
    at = place(api.get(f"jobs/{id}/log"))
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(api.get, f"jobs/{id}/log?offset={at}&wait=20")
        time.sleep(0.3)
        assert not waits.done()
        api.node.log(id).write_bytes(b"at last\n")
        assert waits.result(20).data == b"at last\n"


def test_nobody_waits_for_a_job_that_has_ended(api: Api) -> None:
    id = api.submit()
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(api.get, f"jobs/{id}/log?wait=30")
        api.node.become(id, "succeeded")
        answer = waits.result(20)
    assert answer.data == b"" and answer.headers["cotenant-job-state"] == "succeeded"


def test_who_waits_by_a_name_stays_with_the_job_that_had_it(api: Api) -> None:
    old = api.submit(name="nightly")
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(api.get, "jobs/nightly/log?wait=20")
        time.sleep(0.3)
        api.node.become(api.submit(name="nightly"), "succeeded")
        time.sleep(0.6)
        api.node.log(old).write_bytes(b"of the old one\n")
        answer = waits.result(20)
    assert answer.data == b"of the old one\n"
    assert answer.headers["cotenant-job-state"] == "queued"


def test_who_waits_is_answered_when_the_node_stops(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with serving(tmp_path) as api:
            waits = pool.submit(api.get, f"jobs/{api.submit()}/log?wait=30")
            time.sleep(0.3)
        assert waits.result(20).status == 200


@pytest.mark.parametrize("query", ["offset=x", "offset=-1", "offset=1-2-3", "wait=x", "wait=nan"])
def test_what_is_no_place_in_a_log_is_refused(api: Api, query: str) -> None:
    assert api.get(f"jobs/{api.submit()}/log?{query}").status == 400


@pytest.mark.parametrize("trick", ["link", "pipe"])
def test_a_job_cannot_have_other_files_read_as_its_log(
    api: Api, tmp_path: Path, trick: str
) -> None:
    id = api.submit()
    (tmp_path / "secret").write_text("secret")
    if trick == "link":
        api.node.log(id).symlink_to(tmp_path / "secret")
    else:
        os.mkfifo(api.node.log(id))
    assert api.get(f"jobs/{id}/log").data == b""


# --- files ------------------------------------------------------------------------------------


def packed(*members: tuple[str, bytes], **more: Any) -> bytes:
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w:gz") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in more.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))
    return found.getvalue()


def upload(api: Api, data: bytes, name: str = "") -> Any:
    return api.ask("PUT", f"files/{name or sha256(data)}", data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_job_runs_in_the_files_that_it_brought(api: Api) -> None:
    data = packed(("train.py", b"print(1)"), ("data/x", b"7"))
    assert api.get(f"files/{sha256(data)}").status == 404
    assert upload(api, data).status == 201
    assert api.get(f"files/{sha256(data)}").json["bytes"] == len(data)
    id = api.submit(files=sha256(data))
    place = Path(api.node.specs[id].cwd)
    assert (place / "train.py").read_bytes() == b"print(1)" and (place / "data/x").exists()
    assert place.is_relative_to(api.directory / "jobs" / id)
    assert api.submit(files=sha256(data), id=id) == id


def test_the_same_job_with_other_files_is_another(api: Api) -> None:
    one, two = packed(("a", b"1")), packed(("a", b"2"))
    for data in (one, two):
        upload(api, data)
    api.submit(files=sha256(one), id="mine")
    answer = api.post("jobs", {"command": ["train"], "files": sha256(two), "id": "mine"})
    assert answer.status == 409


def test_files_that_are_not_what_they_are_called_are_refused(api: Api) -> None:
    data = packed(("a", b"1"))
    assert upload(api, data, "0" * 64).status == 400
    assert api.get("files/" + "0" * 64).status == 404
    for name in ("x", "A" * 64, "%2e%2e"):
        assert upload(api, data, name).status in (400, 404)
    answer = api.post("jobs", {"command": ["train"], "files": "1" * 64})
    assert answer.status == 404 and not api.node.specs


def test_an_upload_is_bounded(api: Api) -> None:
    large = os.urandom(UPLOAD + 1)
    assert upload(api, large).status == 413
    chunked = api.ask("PUT", f"files/{sha256(large)}", iter([large]))
    assert chunked.status == 413
    assert api.ask("PUT", f"files/{sha256(large)}", large, token="reader").status == 403
    assert not list((api.directory / "uploads").glob("partial-*"))


def header_bomb() -> bytes:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 2**40
    return gzip.compress(member.tobuf() + bytes(UPLOAD))


def many() -> bytes:
    return packed(*((f"{n}", b"") for n in range(20)))


def linked() -> bytes:
    """Short names, that lead far down."""
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w:gz") as archive:
        below = "/".join("d" * 200 for _ in range(4))
        for name, kind, to in (
            (below, tarfile.DIRTYPE, ""),
            ("link", tarfile.SYMTYPE, below),
            (f"link/{below}", tarfile.DIRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, to
            archive.addfile(member)
    return found.getvalue()


@pytest.mark.parametrize(
    "made",
    [
        lambda: packed(("x", bytes(uploading.UNPACKED * UPLOAD + 1))),
        lambda: packed(*((f"{n}", bytes(UPLOAD)) for n in range(uploading.UNPACKED + 1))),
        header_bomb,
        many,
        lambda: packed(("../x", b"")),
        lambda: packed(("x", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        lambda: packed(("x", b""), type=tarfile.SYMTYPE, linkname="../../../x"),
        lambda: packed(("x", b""), type=tarfile.CHRTYPE),
        lambda: packed(("x", b"1"))[:-20],
        lambda: b"no archive",
        lambda: gzip.compress(b"no archive" * 100),
        lambda: packed(("x" * 300, b"1")),
        lambda: packed(("d/" * 1200 + "x", b"1")),
        linked,
        lambda: packed(("x", b"1"), pax_headers={"mtime": "1e300"}),
    ],
    ids=[
        "one large file", "many large files", "a header", "many members", "above", "a link",
        "a link above", "a device", "cut short", "no gzip", "no tar", "a long name",
        "deep", "deep by a link", "no date",
    ],
)  # fmt: skip
def test_an_archive_that_would_do_harm_is_refused(
    api: Api, made: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "MEMBERS", 15)
    data = made()
    assert upload(api, data).status == 201
    before = set(api.directory.rglob("*"))
    answer = api.post("jobs", {"command": ["train"], "files": sha256(data)})
    assert answer.status == 400 and answer.error["kind"] == "InvalidRequest"
    assert not api.node.specs and set(api.directory.rglob("*")) == before


def test_what_is_sent_several_times_at_once_is_unpacked_once(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(api, data := packed(("a", b"1")))
    unpacked, began = [], threading.Event()
    before = uploading.Uploads._unpack

    async def slowly(self: uploading.Uploads, archive: Path, directory: Path) -> None:
        unpacked.append(archive)
        began.set()
        await asyncio.sleep(0.2)
        await before(self, archive, directory)

    monkeypatch.setattr(uploading.Uploads, "_unpack", slowly)
    wanted = {"command": ["train"], "files": sha256(data), "id": "mine"}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(api.post, "jobs", wanted)
        assert began.wait(10)
        answers = [
            f.result() for f in [first, *(pool.submit(api.post, "jobs", wanted) for _ in "ab")]
        ]
    assert [answer.json for answer in answers] == [{"id": "mine"}] * 3
    assert len(unpacked) == 1


def test_a_full_disk_is_not_held_against_the_archive(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(api, data := packed(("a", b"1")))
    finds_it_full = tmp_path / "python"
    finds_it_full.write_text(f"#!/bin/sh\nexit {unpack.FULL}\n")
    finds_it_full.chmod(0o700)
    monkeypatch.setattr(uploading.sys, "executable", str(finds_it_full))
    answer = api.post("jobs", {"command": ["train"], "files": sha256(data)})
    assert answer.status == 503 and answer.error["kind"] == "EnvironmentProblem"
    assert not api.node.specs


def test_who_unpacks_tells_a_full_disk_from_a_bad_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(packed(("a", b"1")))
    for code, kind in ((errno.ENOSPC, OSError), (errno.EACCES, unpack.Refused)):
        monkeypatch.setattr(tarfile.TarFile, "extract", _raising(OSError(code, "no")))
        with pytest.raises(kind):
            unpack.unpack(str(archive), str(tmp_path), UPLOAD, 10)


def test_who_unpacks_ends_with_the_node(tmp_path: Path) -> None:
    archive, place = tmp_path / "archive", tmp_path / "place"
    os.mkfifo(archive)
    place.mkdir()
    words = [sys.executable, "-m", unpack.__name__, str(archive), str(place), str(2**20), "9"]
    node = subprocess.Popen(
        ["sh", "-c", '"$@" & echo began; wait', "sh", *words], stdout=subprocess.PIPE
    )
    assert node.stdout is not None and node.stdout.readline() == b"began\n"
    data = packed(*((name, os.urandom(50_000)) for name in ("first", "second", "third")))
    with archive.open("wb", buffering=0) as pipe:
        pipe.write(data[:60_000])
        assert eventually((place / "first").exists)
        node.kill()
        node.wait()
        with contextlib.suppress(BrokenPipeError):
            pipe.write(data[60_000:])
    node.stdout.read()  # until all that have it have ended
    assert not (place / "third").exists()


def test_what_a_killed_node_left_and_cannot_be_removed_keeps_none_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "partial-1").mkdir()
    (tmp_path / "partial-2").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", _raising(OSError(errno.ENOTEMPTY, "not empty")))
        uploading.Uploads(tmp_path, UPLOAD)
    uploading.Uploads(tmp_path, UPLOAD)
    assert not list(tmp_path.iterdir())


def _raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_archives_that_nobody_uses_give_way(own: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [packed(("x", os.urandom(UPLOAD * 3 // 4))) for _ in range(uploading.KEPT + 2)]
    for data in found:
        assert upload(own, data).status == 201

    def here() -> list[int]:
        return [own.get(f"files/{sha256(data)}").status for data in found]

    assert here()[0] == 404 and here()[-1] == 200
    monkeypatch.setattr(uploading, "UNUSED_S", -10.0)
    own.app._uploads.forget_old()
    assert set(here()) == {404}


def test_an_upload_that_is_given_up_leaves_nothing(own: Api) -> None:
    with socket.create_connection(("127.0.0.1", own.port), 20) as sock:
        head = f"PUT /api/v1/files/{'0' * 64} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
        sock.sendall(f"{head}Authorization: Bearer token-chief\r\n\r\nabc".encode())
        uploads = own.directory / "uploads"
        assert eventually(lambda: bool(list(uploads.glob("partial-*"))))
    assert eventually(lambda: not list(uploads.glob("partial-*")))


def test_many_upload_at_a_time_and_some_are_told_to_wait(own: Api) -> None:
    head = f"PUT /api/v1/files/{'0' * 64} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    socks = [socket.create_connection(("127.0.0.1", own.port), 20) for _ in range(8)]
    try:
        for sock in socks:
            sock.sendall(f"{head}Authorization: Bearer token-chief\r\n\r\nabc".encode())
        answered = threading.Semaphore(0)

        def read(sock: socket.socket) -> bytes:
            try:
                return sock.recv(4096)
            except OSError:  # it was closed by us before there was an answer
                return b""
            finally:
                answered.release()

        with ThreadPoolExecutor(8) as pool:
            found = [pool.submit(read, sock) for sock in socks]
            assert answered.acquire(timeout=20)
            for sock in socks:
                sock.shutdown(socket.SHUT_RDWR)
            statuses = [one.result(20)[9:12] for one in found]
        assert b"429" in statuses
    finally:
        for sock in socks:
            sock.close()
