"""Containers that use a claim, started by podman and runc from the driver's CDI spec."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from cotenant.domain.errors import NotFound
from cotenant.kube.paths import Paths
from cotenant.kube.plugin import Plugin
from tests.fake_kubelet import FakeKubelet
from tests.kube_standins import POOL, NodeSocket, StandinClaims, StandinNode, claim, unit
from tests.live.kube.conftest import Podman, shown


class Watching(StandinNode):
    """Looks, when it adopts a process, whether the container's program has run, and whether the
    host knows the process."""

    def __init__(self, pages: Path, library: Path) -> None:
        super().__init__()
        self.pages, self.library = str(pages), str(library)
        self.ran_before: list[bool] = []
        self.on_host: list[bool] = []
        self.takes = True

    def adopt(self, id: str, pid: int) -> None:
        if not self.takes:
            raise NotFound(f"nothing is reserved under {id}")
        self.ran_before.append((Path(self.pages) / "ran").exists())
        self.on_host.append(Path(f"/proc/{pid}").exists() and pid != os.getpid())
        super().adopt(id, pid)


class Host:
    def __init__(self, folder: Path, podman: Podman, stack: ExitStack) -> None:
        pages, library = folder / "pages", folder / "library.so"
        pages.mkdir()
        (pages / "page").write_text("control page")
        library.write_text("library")
        (folder / "boot").write_text("boot-1")
        self.pages, self.library, self.podman = pages, library, podman
        self.node, self.cluster = Watching(pages, library), StandinClaims()
        paths = Paths(
            control=folder / "control.sock",
            registry=folder / "registry",
            plugin=folder / "plugin",
            cdi=folder / "cdi",
            boot_id=folder / "boot",
        )
        stack.enter_context(NodeSocket(self.node, paths.control))
        plugin = Plugin(self.node, self.cluster, paths, POOL, period_s=3600)
        plugin.start()
        stack.callback(plugin.stop)
        self.kubelet = FakeKubelet(paths.registry)
        self.kubelet.start()
        stack.callback(self.kubelet.stop)
        self._cdi, self._stack = paths.cdi, stack

    def prepare(self, *results: dict[str, Any]) -> list[str]:
        """The CDI devices of a claim, known to podman."""
        uid = str(uuid4())
        given = claim(uid, *results)
        self.cluster.put(given)
        devices, error = self.kubelet.prepare(given)[uid]
        assert not error
        self._stack.enter_context(shown(self._cdi, uid))
        return [name for each in devices for name in each.cdi]


@pytest.fixture
def host(tmp_path: Path, podman: Podman) -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(tmp_path, podman, stack)


def test_a_container_has_what_it_needs_and_is_adopted_before_its_program_runs(host: Host) -> None:
    devices = host.prepare(unit(0))
    script = (
        f"busybox touch {host.pages}/ran; echo $COTENANT_STANDIN; echo $LD_PRELOAD;"
        f" busybox cat {host.pages}/page; (echo changed > {host.library}) 2>/dev/null || echo ro"
    )
    done = host.podman.run(script.replace("busybox", "/bin/busybox"), *devices)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["cpu0", str(host.library)]
    assert done.stdout.endswith("control pagero\n")
    assert host.library.read_text() == "library"
    assert (host.pages / "ran").exists()
    assert host.node.ran_before == [False]
    assert host.node.on_host == [True]
    assert set(host.node.adopted) == set(host.node.held)


def test_a_container_with_two_requests_is_adopted_for_both(host: Host) -> None:
    devices = host.prepare(unit(0, request="left"), unit(0, "cpu1", request="right"))
    done = host.podman.run("echo $COTENANT_STANDIN", *devices)
    assert done.returncode == 0, done.stderr
    assert set(host.node.adopted) == set(host.node.held)
    assert len(host.node.held) == 2


def test_a_container_that_the_node_does_not_take_is_not_started(host: Host) -> None:
    devices = host.prepare(unit(0))
    host.node.takes = False
    done = host.podman.run(f"/bin/busybox touch {host.pages}/ran", *devices)
    assert done.returncode != 0
    assert "cotenant:" in done.stderr
    assert not (host.pages / "ran").exists()
