"""The control socket: what the command line asks, and what it must not be able to do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotenant.domain.errors import CotenantError, EnvironmentProblem, InvalidRequest, NotFound
from cotenant.domain.workload import JobSpec, RestartPolicy
from cotenant.serving import control
from cotenant.serving.control import ControlServer
from cotenant.serving.control_client import LINE_BYTES, ControlClient
from tests.contract.fake_node import FakeNode


def with_server(tmp_path: Path, use: Callable[[Any], Any], node: Any = None) -> Any:
    """Run ``use`` (in a thread) beside a server; it gets path, node, client and stopped."""

    async def main() -> Any:
        stopped = asyncio.Event()
        server = ControlServer(node or FakeNode(), tmp_path / "control.sock", stopped.set)
        await server.start()
        try:
            result = await asyncio.to_thread(use, tmp_path / "control.sock")
            return result, stopped.is_set()
        finally:
            await server.stop()

    result = asyncio.run(main())
    assert not (tmp_path / "control.sock").exists()
    return result


def speak(path: Path, data: bytes) -> list[dict[str, Any]]:
    """Send raw bytes, then read answers until the server closes or we have hung up."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as stream:
            return [json.loads(line) for line in stream]


def test_every_operation_reaches_the_node(tmp_path: Path) -> None:
    node = FakeNode()
    spec = JobSpec(
        "", "train", ("python", "t.py"), env={"A": "ž"}, restart=RestartPolicy.NEVER, memory=2**40
    )

    def use(path: Path) -> None:
        client = ControlClient(path)
        assert client.status() == {"node": "fake"}
        assert client.plan(dry_run=True) == {"dry_run": True}
        assert client.plan() == {"dry_run": False}
        assert client.submit(spec) == "j1"
        (job,) = client.jobs()
        assert (job.name, job.command, job.created) == ("train", ("python", "t.py"), 12.5)
        assert client.cancel("train") == "j1"
        assert client.hold("j1") == "j1"
        assert client.resume("j1") == "j1"
        assert client.log_path("j1").endswith("log")
        assert client.checkpoint("j1", 1.0) == "/checkpoints/step-9"
        assert [e.name for e in client.models()] == [e.name for e in node.index()]
        name = node.index()[0].name
        client.load(name)
        assert client.rollback(name) == "1"
        client.unload(name)

    assert with_server(tmp_path, use, node) == (None, False)
    assert node.submitted == [spec]


def test_what_takes_its_time_holds_up_nobody_else(tmp_path: Path) -> None:
    class Slow(FakeNode):
        async def load(self, name: str) -> None:
            await going.wait()

        def hold_job(self, ref: str) -> str:
            going.set()
            return "j1"

    going = asyncio.Event()

    def use(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as stream:
            sock.settimeout(20)
            sock.connect(str(path))
            sock.sendall(b'{"op": "load", "name": "m"}\n')
            assert ControlClient(path).status() == {"node": "fake"}
            ControlClient(path).hold("j1")
            assert json.loads(stream.readline()) == {"ok": True, "result": None}

    with_server(tmp_path, use, Slow())


def test_shutdown_is_answered_before_it_happens(tmp_path: Path) -> None:
    assert with_server(tmp_path, lambda path: ControlClient(path).shutdown()) == (None, True)


def test_errors_keep_their_kind(tmp_path: Path) -> None:
    def use(path: Path) -> None:
        with pytest.raises(NotFound, match="no job 'x'"):
            ControlClient(path).cancel("x")
        with pytest.raises(InvalidRequest, match="ref is missing"):
            ControlClient(path).cancel("")

    with_server(tmp_path, use)


def test_a_bug_is_answered_without_its_details(tmp_path: Path, caplog: Any) -> None:
    class Broken(FakeNode):
        def status(self) -> dict[str, Any]:
            raise RuntimeError("secret")

    def use(path: Path) -> None:
        with pytest.raises(CotenantError, match="its log says how"):
            ControlClient(path).status()

    with_server(tmp_path, use, Broken())
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"", "one JSON object"),
        (b"[]", "one JSON object"),
        (b"{", "one JSON object"),
        (b"\xff\xfe", "one JSON object"),
        (b"[" * 100_000, "one JSON object"),
        (b"{}", "unknown op"),
        (b'{"op": 5}', "unknown op '5'"),
        (b'{"op": "cancel"}', "ref is missing"),
        (b'{"op": "cancel", "ref": 7}', "ref is missing"),
        (b'{"op": "submit"}', "missing required field `name`"),
        (b'{"op": "submit", "name": "a", "command": "ls"}', "command"),
        (b'{"op": "submit", "name": "a", "command": [], "colour": 1}', "fields: colour"),
        (b'{"op": "submit", "name": "a", "command": ["ls"], "restart": "x"}', "restart"),
    ],
)
def test_a_malformed_request_is_refused_and_the_next_one_served(
    tmp_path: Path, line: bytes, says: str
) -> None:
    data = line + b'\n{"op": "status"}\n'
    (bad, good), _ = with_server(tmp_path, lambda path: speak(path, data))
    assert (bad["ok"], bad["kind"]) == (False, "InvalidRequest")
    assert says in bad["error"]
    assert good == {"ok": True, "result": {"node": "fake"}}


def test_lines_are_bounded(tmp_path: Path) -> None:
    def use(path: Path) -> None:
        client = ControlClient(path)
        with pytest.raises(InvalidRequest, match="the node accepts"):
            client.cancel("x" * LINE_BYTES)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(path))
            with contextlib.suppress(ConnectionError):  # the node need not read it all
                sock.sendall(b"x" * (4 * LINE_BYTES))
        assert client.status() == {"node": "fake"}

    with_server(tmp_path, use)


def test_only_the_owner_may_connect(tmp_path: Path, monkeypatch: Any) -> None:
    def use(path: Path) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        monkeypatch.setattr(control, "_peer_uid", lambda _: 12345)
        with pytest.raises(EnvironmentProblem, match="belongs to another user"):
            ControlClient(path).status()

    with_server(tmp_path, use)


def test_no_node_is_said_plainly(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with pytest.raises(
        EnvironmentProblem, match=r"no node is running in .*cotenant serve cotenant\.yaml"
    ):
        ControlClient(path).status()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with pytest.raises(EnvironmentProblem, match="no node is running"):
        ControlClient(path).status()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))

    def use(path: Path) -> dict[str, Any]:
        second = ControlServer(FakeNode(), path, lambda: None)
        with pytest.raises(EnvironmentProblem, match="another node is running"):
            asyncio.run(second.start())
        return ControlClient(path).status()

    assert with_server(tmp_path, use) == ({"node": "fake"}, False)


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.write_text("precious")
    server = ControlServer(FakeNode(), path, lambda: None)
    with pytest.raises(EnvironmentProblem, match="is not a socket"):
        asyncio.run(server.start())
    assert path.read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_explained(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 108) / "control.sock"
    with pytest.raises(EnvironmentProblem, match="Linux allows 107"):
        ControlClient(path).status()
    with pytest.raises(EnvironmentProblem, match="shorter state directory"):
        asyncio.run(ControlServer(FakeNode(), path, lambda: None).start())


def test_a_silent_node_times_out(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(path))
        mute.listen()
        with pytest.raises(EnvironmentProblem, match=r"did not answer within 0\.2 s"):
            ControlClient(path, timeout=0.2).status()


def test_stopping_ends_open_connections(tmp_path: Path) -> None:
    async def main() -> bytes:
        server = ControlServer(FakeNode(), tmp_path / "c.sock", lambda: None)
        await server.start()
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "c.sock"))
        writer.write(b'{"op": "status"}\n')
        await reader.readline()
        await server.stop()
        rest = await reader.read()
        writer.close()
        return rest

    assert asyncio.run(main()) == b""
