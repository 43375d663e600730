"""``cotenant.on_memory``: a job hears that others need memory; outside Cotenant nothing happens."""

from __future__ import annotations

import json
import socket
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from cotenant import memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE_S = 20.0


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.settimeout(PATIENCE_S)
        monkeypatch.setenv("COTENANT_REPORT_SOCKET", str(tmp_path / "s"))
        monkeypatch.setenv("COTENANT_JOB_ID", "j1")
        monkeypatch.setenv("COTENANT_JOB_RUN", "r1")
        monkeypatch.setattr(memory, "_listener", None)
        yield sock
    if memory._listener is not None:
        memory._listener.close()


def test_outside_cotenant_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COTENANT_REPORT_SOCKET", raising=False)
    before = threading.active_count()
    assert memory.on_memory(print) is False
    assert memory.on_checkpoint(print) is False
    assert threading.active_count() == before


def test_who_is_asked_hears_how_much_it_may_have(node: socket.socket) -> None:
    heard: list[int] = []
    done = threading.Event()

    def give(most: int) -> None:
        heard.append(most)
        if len(heard) == 2:
            done.set()

    assert memory.on_memory(give) is True
    told, address = node.recvfrom(4096)
    assert json.loads(told) == {"job": "j1", "run": "r1", "memory": True}
    for message in (
        {"run": "r1", "most": 1000},
        {"run": "another", "most": 1},
        {"run": "r1"},
        [],
        {"run": "r1", "most": 500},
    ):
        node.sendto(json.dumps(message).encode(), address)
    node.sendto(b"\xff", address)
    assert done.wait(PATIENCE_S)
    assert heard == [1000, 500]


def test_who_can_be_asked_for_a_checkpoint_is_asked_for_no_memory(node: socket.socket) -> None:
    saved = threading.Event()
    assert memory.on_checkpoint(saved.set) is True
    told, address = node.recvfrom(4096)
    assert json.loads(told) == {"job": "j1", "run": "r1", "saves": True}
    node.sendto(b'{"run": "another", "checkpoint": true}', address)
    node.sendto(b'{"run": "r1", "checkpoint": true}', address)
    assert saved.wait(PATIENCE_S)
    assert memory.on_memory() is True
    assert json.loads(node.recv(4096)) == {"job": "j1", "run": "r1", "memory": True, "saves": True}


def test_what_the_program_raises_is_its_own(
    node: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    done = threading.Event()

    def broken(most: int) -> None:
        raise RuntimeError("no caches here")

    memory.on_memory(broken)
    memory.on_memory(lambda _: done.set())
    _, address = node.recvfrom(4096)
    node.sendto(b'{"run": "r1", "most": 5}', address)
    assert done.wait(PATIENCE_S)
    assert "no caches here" in capsys.readouterr().err


@pytest.mark.parametrize("used", [True, False])
def test_frameworks_caches_are_given_back_after_the_programs_own(
    node: socket.socket, monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    heard: list[str] = []
    done = threading.Event()

    def last() -> SimpleNamespace:
        heard.append("cupy")
        return SimpleNamespace(free_all_blocks=done.set)

    cuda = SimpleNamespace(is_initialized=lambda: used, empty_cache=lambda: heard.append("torch"))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    cupy = SimpleNamespace(get_default_memory_pool=last)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    memory.on_memory(lambda _: heard.append("program"))
    _, address = node.recvfrom(4096)
    node.sendto(b'{"run": "r1", "most": 5}', address)
    assert done.wait(PATIENCE_S)
    assert heard == (["program", "torch", "cupy"] if used else ["program", "cupy"])


def test_no_framework_is_imported_to_ask_it(
    node: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    memory._give_device_caches(0)
    assert "torch" not in sys.modules
    assert "cupy" not in sys.modules


def test_one_frameworks_trouble_is_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-imported module has no attributes yet."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    memory._give_device_caches(0)
