"""The whole: a node, ``cotenant-dra`` as it is started, a container; the API server and the kubelet
are stand-ins on real sockets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cotenant.kube.names import DRIVER
from tests.fake_apiserver import ApiServer
from tests.fake_kubelet import FakeKubelet
from tests.kube_fakes import claim
from tests.kube_oracle import binding
from tests.live.conftest import Box, Boxes, until
from tests.live.kube.conftest import Podman, shown

NODE = "n1"
CORES = tuple(sorted(os.sched_getaffinity(0)))[:2]
TWO_CORES = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")


class Host:
    """A machine of a cluster. ``start`` and ``kill`` are of the driver."""

    def __init__(self, folder: Path, box: Box, api: ApiServer) -> None:
        self.box, self.api = box, api
        self.cdi = folder / "cdi"
        self._kubelet_dir = folder
        self._kubeconfig = api.kubeconfig(folder)
        self._log = folder / "log"
        self.kubelet = FakeKubelet(folder / "plugins_registry")
        self.kubelet.registry.mkdir()
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "cotenant.kube.command", "--state-dir", self.box.state]
        command += ["--node-name", NODE, "--kubeconfig", self._kubeconfig, "--cdi-dir", self.cdi]
        with self._log.open("ab") as log:
            self.driver = subprocess.Popen(
                [str(word) for word in [*command, "--kubelet-dir", self._kubelet_dir]],
                stderr=log,
                env={**os.environ, "NO_PROXY": "127.0.0.1"},
            )

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.driver is not None
        self.driver.send_signal(number)
        return self.driver.wait(40)

    def log(self) -> str:
        return self._log.read_text()[-2000:]

    def allocate(self, name: str, *results: dict[str, Any]) -> dict[str, Any]:
        """A pod's claim gets devices of this node's pool."""
        found = [{"driver": DRIVER, "pool": NODE, **each} for each in results]
        made = claim(name, {"devices": {"results": found}})
        requests = {each["request"] for each in results}
        made["spec"]["devices"]["requests"] = [
            {"name": each, "exactly": {"deviceClassName": DRIVER}} for each in sorted(requests)
        ]
        made["status"]["reservedFor"] = [{"resource": "pods", "name": "pod", "uid": "pod-uid"}]
        return self.api.put("resourceclaims", made)

    def prepare(self, given: dict[str, Any]) -> list[str]:
        """The CDI devices, once the kubelet has asked as often as it takes."""
        said: list[Any] = []

        def prepared() -> bool:
            said[:] = self.kubelet.try_prepare(given)
            return not said[1]

        until(prepared, lambda: (said, self.log()))
        return [name for device in said[0] for name in device.cdi]


@pytest.fixture
def host(boxes: Boxes, directory: Path) -> Iterator[Host]:
    box = boxes().configure([], devices=[{"kind": "cpu", "cores": list(CORES)}]).start()
    with ExitStack() as stack:
        stack.callback(_release_all, box)
        api = ApiServer()
        api.start()
        stack.callback(api.stop)
        api.put("nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        made = Host(directory, box, api)
        made.start()
        stack.callback(lambda: made.driver is None or made.stop())
        made.kubelet.start()
        stack.callback(made.kubelet.stop)
        yield made


def _release_all(box: Box) -> None:
    """What stands for pods that have not come outlives the node. No driver runs any more that would
    reserve it again."""
    for status in box.control.reservations():
        box.control.release(status.reservation.id)
    until(lambda: not any(job.pid for job in box.control.jobs()))


def unit(index: int) -> dict[str, Any]:
    return {"request": "work", "device": f"cpu-unit-{index}"}


def share(per_cent: int) -> dict[str, Any]:
    base = {
        "request": "work",
        "device": "cpu-time",
        "shareID": "0e1c2b7a-5b6f-4a11-9c3e-aa01",
    }
    return {**base, "consumedCapacity": {"share": str(per_cent)}}


ALONE = """
i=0
while [ $i -lt 5000 ]; do
  i=$((i+1))
  if /bin/busybox grep 'Cpus_allowed_list:.[0-9]*$' /proc/self/status; then break; fi
done
while [ $i -lt 500000 ]; do i=$((i+1)); done
"""
"""Busy until it is on one core, and somewhat longer: the other is to see the same."""


@TWO_CORES
def test_containers_run_on_the_cores_that_their_pods_claimed(host: Host, podman: Podman) -> None:
    given = [host.allocate(name, unit(index)) for index, name in enumerate("ab")]
    devices = [host.prepare(each) for each in given]
    with ExitStack() as stack:
        for each in given:
            stack.enter_context(shown(host.cdi, each["metadata"]["uid"]))
        with ThreadPoolExecutor() as pool:
            done = list(pool.map(lambda names: podman.run(ALONE, *names), devices))
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert {each.stdout.split()[1] for each in done} == {str(core) for core in CORES}
    for each in given:
        assert host.kubelet.unprepare(each) == {each["metadata"]["uid"]: ""}
    assert not list(host.cdi.glob("*.json"))


@TWO_CORES
def test_preparing_does_not_wait_for_what_is_published(host: Host) -> None:
    until(lambda: host.api.all("resourceslices"))
    go_on = threading.Event()

    def hang(path: str) -> None:
        if "resourceslices" in path or path.endswith("/status"):
            go_on.wait(60)

    host.api.before_write = hang
    try:
        host.prepare(host.allocate("c", share(25)))
        assert not go_on.is_set()
    finally:
        go_on.set()
        host.api.before_write = None


@TWO_CORES
def test_what_was_given_up_can_be_had_again_at_once(host: Host) -> None:
    given = host.allocate("c", unit(0))
    for _ in range(3):
        host.prepare(given)
        (status,) = _all(host)
        assert status.state == "ready"
        assert host.kubelet.unprepare(given) == {given["metadata"]["uid"]: ""}


@TWO_CORES
def test_a_force_deleted_pod_keeps_what_it_has_through_a_kill(host: Host) -> None:
    given = host.allocate("c", share(60))
    host.prepare(given)
    until(lambda: binding(host.api.get("resourceclaims", "ns/c"), True) == "binds", host.log)
    (before,) = host.box.control.reservations()
    host.api.remove("resourceclaims", "ns/c")
    host.stop(signal.SIGKILL)
    host.start()
    other = host.allocate("d", {**share(60), "shareID": "0e1c2b7a-5b6f-4a11-9c3e-aa02"})
    until(lambda: "ns/c" in host.kubelet.try_prepare(other)[1], host.log)
    (after,) = host.box.control.reservations()
    assert after.reservation == before.reservation
    host.kubelet.unprepare(given)
    until(lambda: not any(s.reservation == before.reservation for s in _all(host)), host.log)


def _all(host: Host) -> Any:
    return host.box.control.reservations()


@TWO_CORES
def test_the_api_server_is_away_and_the_node_restarts(host: Host) -> None:
    given = host.allocate("c", share(25))
    before = host.prepare(given)
    host.api.stop()
    host.box.stop(signal.SIGKILL)
    host.box.start()
    host.stop(signal.SIGKILL)
    host.start()
    assert host.prepare(given) == before
    assert host.kubelet.unprepare(given) == {given["metadata"]["uid"]: ""}
    until(lambda: not _all(host), host.log)
    host.api.start()
