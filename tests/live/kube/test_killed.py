"""The driver as a process, killed in earnest, beside a kubelet and a node over real sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cotenant.kube.checkpoint import Checkpoint
from tests.fake_kubelet import FakeKubelet
from tests.kube_driver import paths
from tests.kube_standins import NodeSocket, StandinClaims, StandinNode, claim, unit

PATIENCE_S = 40.0
GIVEN = claim("a", unit(0), unit(0, "cpu1", request="other"))


class Host:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = paths(folder)
        self.node = StandinNode()
        self.cluster = StandinClaims(folder / "claims")
        self.paths.registry.mkdir()
        self.paths.boot_id.write_text("boot-1")
        self.kubelet = FakeKubelet(self.paths.registry)
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self, kill_at: int = 0) -> None:
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "tests.kube_driver", str(self.folder)],
            env={**os.environ, "KILL_AT": str(kill_at)},
        )

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.driver is not None:
            self.driver.send_signal(number)
            self.driver.wait(PATIENCE_S)
            self.driver = None

    def arm(self) -> None:
        (self.folder / "armed").touch()

    def disarm(self) -> None:
        (self.folder / "armed").unlink(missing_ok=True)

    def died(self) -> bool:
        assert self.driver is not None
        return self.driver.poll() == -signal.SIGKILL

    def check(self) -> None:
        """Node and files say the same."""
        checkpoint = Checkpoint(self.paths.checkpoint)
        checkpoint.open()
        entries = checkpoint.entries()
        assert sorted(id for entry in entries for id in entry.ids) == sorted(self.node.held)
        specs = {f"cotenant.dev-claim_{e.uid}.json" for e in entries if e.prepared}
        assert {path.name for path in self.paths.cdi.iterdir()} == specs

    def until(self, true: Callable[[], Any]) -> Any:
        end = time.monotonic() + PATIENCE_S
        while not (found := true()):
            assert time.monotonic() < end
            time.sleep(0.02)
        return found


@pytest.fixture
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory(prefix="kube-") as folder, contextlib.ExitStack() as stack:
        made = Host(Path(folder))
        made.cluster.put(GIVEN)
        stack.enter_context(NodeSocket(made.node, made.paths.control))
        stack.callback(made.kubelet.stop)
        stack.callback(made.stop)
        made.kubelet.start()
        yield made


@pytest.mark.parametrize("kill_at", [2, 5, 7, 9, 12, 15, 19])
def test_killed_while_preparing(host: Host, kill_at: int) -> None:
    host.start(kill_at)
    host.until(lambda: host.kubelet.registered)
    host.arm()
    host.kubelet.try_prepare(GIVEN)
    host.until(host.died)
    host.disarm()
    host.start()
    host.until(lambda: not host.kubelet.try_prepare(GIVEN)[1])
    assert len(host.node.held) == 2
    assert len({id for kind, id in host.node.events if kind == "reserve"}) == 2
    host.check()
    assert host.kubelet.unprepare(GIVEN) == {"a": ""}
    assert not host.node.held
    host.check()


@pytest.mark.parametrize("kill_at", [1, 4, 6, 8])
def test_killed_while_unpreparing(host: Host, kill_at: int) -> None:
    host.start(kill_at)
    assert not host.kubelet.prepare(GIVEN)["a"][1]
    host.arm()
    host.kubelet.try_unprepare(GIVEN)
    host.until(host.died)
    host.disarm()
    host.start()
    host.until(lambda: not host.kubelet.try_unprepare(GIVEN))
    assert not host.node.held
    host.check()


def test_killed_while_nobody_asks(host: Host) -> None:
    host.start()
    assert not host.kubelet.prepare(GIVEN)["a"][1]
    host.stop(signal.SIGKILL)
    for path in host.paths.cdi.iterdir():
        path.unlink()
    host.paths.boot_id.write_text("boot-2")
    host.node.lose()
    host.start()
    host.until(lambda: len(host.node.held) == 2)
    host.until(lambda: list(host.paths.cdi.iterdir()))
    host.stop()
    host.check()
