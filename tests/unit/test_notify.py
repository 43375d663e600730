"""Service managers are told what they ask to be told, by whichever socket they name."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from pathlib import Path

import pytest

from cotenant.cli.notify import ServiceManager


def listener(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind("\0" + address[1:] if address.startswith("@") else address)
    sock.settimeout(10)
    return sock


def heard(sock: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in sock.recv(4096).decode().splitlines())


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "n") if request.param == "path" else f"@cotenant-{secrets.token_hex(8)}"


def test_what_is_said_arrives_at_a_path_and_at_an_abstract_socket(address: str) -> None:
    with listener(address) as sock:
        manager = ServiceManager.of({"NOTIFY_SOCKET": address})
        manager.ready("loads")
        assert heard(sock) == {"READY": "1", "MAINPID": str(os.getpid()), "STATUS": "loads"}
        manager.status("serves")
        assert heard(sock) == {"STATUS": "serves"}
        manager.stopping("stops", 1.5)
        assert heard(sock) == {
            "STOPPING": "1",
            "EXTEND_TIMEOUT_USEC": "1500000",
            "STATUS": "stops",
        }


def test_its_variables_are_taken_out_of_the_environment() -> None:
    environ = {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "HOME": "/"}
    ServiceManager.of(environ)
    assert environ == {"HOME": "/"}


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": "vsock:2:1"}, {"WATCHDOG_USEC": "9"}])
def test_where_nobody_can_be_told_nothing_is_done(environ: dict[str, str]) -> None:
    manager = ServiceManager.of(environ)
    manager.ready("")
    asyncio.run(manager.beat())


def test_a_manager_that_is_gone_stops_nobody(tmp_path: Path) -> None:
    ServiceManager(str(tmp_path / "gone")).ready("")


def test_it_beats_if_it_is_asked_to(tmp_path: Path) -> None:
    address = str(tmp_path / "n")

    async def beats(environ: dict[str, str]) -> int:
        beating = asyncio.create_task(ServiceManager.of(environ).beat())
        await asyncio.sleep(0)
        for _ in range(200):
            await asyncio.sleep(0.001)
        beating.cancel()
        count = 0
        sock.setblocking(False)
        while True:
            try:
                assert heard(sock) == {"WATCHDOG": "1"}
            except BlockingIOError:
                return count
            count += 1

    with listener(address) as sock:
        asked = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "20000"}
        assert asyncio.run(beats({**asked, "WATCHDOG_PID": str(os.getpid())})) > 1
        assert asyncio.run(beats(dict(asked))) > 1
        assert asyncio.run(beats({**asked, "WATCHDOG_PID": "1"})) == 0
        assert asyncio.run(beats({"NOTIFY_SOCKET": address})) == 0
