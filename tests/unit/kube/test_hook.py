"""The hook as a container runtime runs it: a program with the container's state on its input."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cotenant.domain.errors import NotReady
from cotenant.domain.reservation import Reservation
from cotenant.kube import hook
from tests.kube_standins import NodeSocket, StandinNode

STATE = {"ociVersion": "1.0.2", "id": "c", "status": "creating", "pid": 4711, "bundle": "/b"}


def run(path: Path, *ids: str, state: object = STATE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", hook.__file__, str(path), *ids]
    return subprocess.run(
        command, input=json.dumps(state), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def node() -> StandinNode:
    made = StandinNode()
    for id in ("k8s:a/x", "k8s:a/y"):
        made.reserve(Reservation(id, "cpu0", units=1))
    return made


def test_every_reservation_gets_the_process(node: StandinNode, tmp_path: Path) -> None:
    with NodeSocket(node, tmp_path / "s"):
        done = run(tmp_path / "s", "k8s:a/x", "k8s:a/y")
    assert done.returncode == 0, done.stderr
    assert not done.stdout and not done.stderr
    assert node.adopted == {"k8s:a/x": [4711], "k8s:a/y": [4711]}


@pytest.mark.parametrize(
    "state", [{}, {"pid": 0}, {"pid": "4711"}, [], "text", {"pid": 1.5}, {"pid": True}]
)
def test_a_state_without_a_process_is_refused(
    node: StandinNode, tmp_path: Path, state: object
) -> None:
    with NodeSocket(node, tmp_path / "s"):
        done = run(tmp_path / "s", "k8s:a/x", state=state)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert not node.adopted


def test_a_reservation_that_is_gone_is_refused_in_one_line(
    node: StandinNode, tmp_path: Path
) -> None:
    with NodeSocket(node, tmp_path / "s"):
        done = run(tmp_path / "s", "k8s:gone")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "k8s:gone" in done.stderr


def test_without_a_node_it_gives_up_by_itself(tmp_path: Path) -> None:
    done = run(tmp_path / "s", "k8s:a/x")
    assert done.returncode == 1
    assert str(tmp_path / "s") in done.stderr


def test_a_node_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "s"))
        deaf.listen()
        done = run(tmp_path / "s", "k8s:a/x")
    assert done.returncode == 1


def test_a_node_that_starts_is_waited_for(node: StandinNode, tmp_path: Path) -> None:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(run(tmp_path / "s", "k8s:a/x").returncode))
    thread.start()
    time.sleep(0.3)
    with NodeSocket(node, tmp_path / "s"):
        thread.join()
    assert done == [0]


def test_a_reservation_that_waits_for_its_space_is_asked_for_again(
    node: StandinNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = node.adopt, []

    def later(id: str, pid: int) -> None:
        asked.append(id)
        if len(asked) < 3:
            raise NotReady("its partition is in use")
        real(id, pid)

    monkeypatch.setattr(node, "adopt", later)
    with NodeSocket(node, tmp_path / "s"):
        assert run(tmp_path / "s", "k8s:a/x").returncode == 0
    assert node.adopted == {"k8s:a/x": [4711]}


def test_it_imports_nothing_that_a_host_may_lack() -> None:
    code = f"import runpy, sys; runpy.run_path({hook.__file__!r}); print('cotenant' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
