"""The driver as a kubelet meets it, over real sockets."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from cotenant.domain.errors import EnvironmentProblem
from cotenant.kube import services
from cotenant.kube.paths import Paths
from cotenant.kube.plugin import Plugin
from tests.fake_kubelet import FakeKubelet, health_of
from tests.kube_standins import POOL, StandinClaims, StandinNode, claim, device, unit

HEALTHY, UNHEALTHY = 1, 2


class Host:
    """A machine with a kubelet and what a driver talks to."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.node, self.cluster = StandinNode(), StandinClaims()
        (folder / "boot").write_text("boot-1\n")
        self.paths = Paths(
            control=folder / "control.sock",
            registry=folder / "registry",
            plugin=folder / "plugin",
            cdi=folder / "cdi",
            boot_id=folder / "boot",
        )
        self.paths.registry.mkdir()
        self.kubelet = FakeKubelet(self.paths.registry)
        self._stack = stack
        stack.callback(self.kubelet.stop)

    def driver(self, **options: Any) -> Plugin:
        made = Plugin(self.node, self.cluster, self.paths, POOL, period_s=0.05, **options)
        made.start()
        self._stack.callback(made.stop)
        return made


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(tmp_path, stack)


def until(true: Callable[[], Any]) -> Any:
    end = time.monotonic() + 40
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_the_kubelet_finds_and_takes_the_driver(host: Host) -> None:
    plugin = host.driver()
    host.kubelet.start()
    endpoint, services = until(lambda: host.kubelet.registered.get("cotenant.dev"))
    assert endpoint == str(host.paths.service_socket)
    assert services[0] == "v1.DRAPlugin"
    assert "v1alpha1.DRAResourceHealth" in services
    assert plugin.healthy
    for path in (host.paths.service_socket, host.paths.registration_socket):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    plugin.stop()
    until(lambda: not host.kubelet.registered)
    assert not plugin.healthy
    assert not list(host.paths.registry.iterdir())


def test_a_kubelet_that_refuses_is_noticed(host: Host) -> None:
    plugin = host.driver()
    host.kubelet.accept = False
    host.kubelet.start()
    until(lambda: not plugin.healthy)


def test_claims_of_one_call_are_answered_each_by_itself(host: Host) -> None:
    host.driver()
    host.kubelet.start()
    good, bad = claim("a", unit(0)), claim("b", unit(9, "gpu7"))
    for each in (good, bad):
        host.cluster.put(each)
    missing = claim("c", unit(1))
    answers = host.kubelet.prepare(good, bad, missing)
    devices, error = answers["a"]
    assert not error
    (found,) = devices
    assert (found.requests, found.pool, found.device) == (["work"], POOL, "cpu0-unit-0")
    assert found.cdi == ["cotenant.dev/claim=a-work"]
    assert "gpu7" in answers["b"][1]
    assert answers["c"][1]
    assert set(host.kubelet.unprepare(good, bad, missing).values()) == {""}
    assert not host.node.held


def test_an_answer_comes_before_the_kubelet_stops_waiting(host: Host) -> None:
    host.driver()
    host.kubelet.start()
    host.node.stuck = True
    given = claim("a", unit(0))
    host.cluster.put(given)
    _, error = host.kubelet.prepare(given, timeout=3.0)["a"]
    assert "in use" in error, "the node's reason"


def test_a_kubelet_that_restarts_finds_the_driver_again(host: Host) -> None:
    host.driver()
    host.kubelet.start()
    given = claim("a", unit(0))
    host.cluster.put(given)
    before = host.kubelet.prepare(given)
    host.kubelet.stop()
    host.kubelet.start()
    assert host.kubelet.prepare(given) == before
    assert [kind for kind, _ in host.node.events] == ["reserve"]


def test_a_kubelet_that_goes_in_the_middle_may_ask_again(host: Host) -> None:
    host.driver()
    host.kubelet.start()
    host.node.stuck = True
    given = claim("a", unit(0))
    host.cluster.put(given)
    failed: list[Exception] = []

    def call() -> None:
        try:
            host.kubelet.prepare(given)
        except grpc.RpcError as exc:
            failed.append(exc)

    thread = threading.Thread(target=call)
    thread.start()
    until(lambda: host.node.held)
    host.kubelet.stop()
    thread.join()
    assert failed
    host.node.stuck = False
    host.kubelet.start()
    until(lambda: not host.kubelet.try_prepare(given)[1])
    assert [kind for kind, _ in host.node.events] == ["reserve"]


def test_a_driver_that_is_stopped_does_not_wait_for_the_node(host: Host) -> None:
    first = host.driver()
    host.kubelet.start()
    host.node.stuck = True
    given = claim("a", unit(0))
    host.cluster.put(given)
    answers: list[str] = []

    def call() -> None:
        with contextlib.suppress(grpc.RpcError):
            answers.append(host.kubelet.prepare(given)["a"][1])

    thread = threading.Thread(target=call)
    thread.start()
    until(lambda: host.node.held)
    first.stop()
    thread.join()
    assert all(answers), "no claim was said to be prepared"
    host.node.stuck = False
    host.driver()
    until(lambda: not host.kubelet.try_prepare(given)[1])
    assert [kind for kind, _ in host.node.events] == ["reserve"]


def test_sockets_that_something_removes_are_made_anew(host: Host) -> None:
    plugin = host.driver()
    host.kubelet.start()
    until(lambda: host.kubelet.registered)
    for path in (host.paths.registration_socket, host.paths.service_socket):
        path.unlink()
    until(lambda: plugin.healthy)
    given = claim("a", unit(0))
    host.cluster.put(given)
    assert not host.kubelet.prepare(given)["a"][1]


def test_stale_sockets_are_replaced(host: Host) -> None:
    host.paths.plugin.mkdir()
    for path in (host.paths.registration_socket, host.paths.service_socket):
        path.write_text("left by somebody")
    host.driver()
    host.kubelet.start()
    until(lambda: host.kubelet.registered)


def test_one_driver_runs_at_a_time(host: Host) -> None:
    first = host.driver()
    with pytest.raises(EnvironmentProblem):
        host.driver()
    assert first.healthy
    first.stop()
    assert host.driver().healthy


@pytest.mark.parametrize("taken", ["registry", "plugin"])
def test_a_folder_for_sockets_that_cannot_be_used_is_named(host: Host, taken: str) -> None:
    path = getattr(host.paths, taken)
    if path.exists():
        path.rmdir()
    path.write_text("a file where a folder should be")
    with pytest.raises(EnvironmentProblem, match=str(path)):
        host.driver()


def test_a_full_folder_for_sockets_is_named(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def full(self: socket.socket, address: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(socket.socket):
        bind = full

    monkeypatch.setattr(socket, "socket", Full)
    with pytest.raises(EnvironmentProblem, match=str(host.paths.service_socket)):
        host.driver()


def test_a_path_that_is_too_long_for_a_socket_is_refused(host: Host) -> None:
    object.__setattr__(host.paths, "registry", host.paths.registry / ("deep" * 30))
    with pytest.raises(EnvironmentProblem):
        host.driver()


def test_a_cdi_folder_that_cannot_be_used_does_not_keep_claims_from_being_given_up(
    host: Host,
) -> None:
    first = host.driver()
    host.kubelet.start()
    given, other = claim("a", unit(0)), claim("b", unit(1))
    for each in (given, other):
        host.cluster.put(each)
    host.kubelet.prepare(given)
    first.stop()
    for path in host.paths.cdi.iterdir():
        path.unlink()
    host.paths.cdi.rmdir()
    host.paths.cdi.write_text("a file where a folder should be")
    host.driver()
    assert str(host.paths.cdi) in host.kubelet.prepare(other)["b"][1]
    host.paths.cdi.unlink()
    assert not host.kubelet.prepare(other)["b"][1]
    until(lambda: len(list(host.paths.cdi.iterdir())) == 2)


@pytest.mark.parametrize("service", ["v1.DRAResourceHealth", "v1alpha1.DRAResourceHealth"])
def test_health_follows_the_node(host: Host, service: str) -> None:
    host.driver()
    host.kubelet.start()
    given = claim("a", unit(0))
    host.cluster.put(given)
    host.kubelet.prepare(given)
    stream = host.kubelet.watch_health(service)
    key = (POOL, "cpu0-unit-0")

    def told(health: int) -> str:
        for message in stream:
            found, why = health_of(message).get(key, (-1, ""))
            if found == health:
                return why
        raise AssertionError("the stream ended")

    told(HEALTHY)
    host.node.devices = [device("cpu0", trouble="it does not answer"), device("cpu1")]
    assert told(UNHEALTHY) == "it does not answer"
    host.node.devices = [device("cpu1")]
    assert told(UNHEALTHY) != "it does not answer"
    host.node.away = True
    assert told(0)
    host.node.away = False
    host.node.devices = [device("cpu0")]
    told(HEALTHY)
    stream.cancel()


def test_what_is_prepared_is_kept_whatever_becomes_of_the_claim(host: Host) -> None:
    plugin = host.driver()
    host.kubelet.start()
    given = claim("a", unit(0))
    host.cluster.put(given)
    host.kubelet.prepare(given)
    host.cluster.drop("claim-a")
    assert plugin.kept() == set(host.node.held)
    host.kubelet.unprepare(given)
    assert not plugin.kept()


def test_a_clock_that_jumps_changes_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.driver()
    host.kubelet.start()
    given = claim("a", unit(0))
    host.cluster.put(given)
    for jump in (-1e9, 1e9):
        clock = SimpleNamespace(time=lambda by=jump: time.time() + by, monotonic=time.monotonic)
        monkeypatch.setattr(services, "time", clock)
        assert not host.kubelet.prepare(given)["a"][1]
        stream = host.kubelet.watch_health()
        assert any(health_of(told).keys() == {(POOL, "cpu0-unit-0")} for told in stream)
        stream.cancel()
        assert not host.kubelet.unprepare(given)["a"]


def test_the_hook_on_the_host_is_the_drivers(host: Host) -> None:
    from cotenant.kube import hook

    host.driver()
    assert host.paths.hook.read_text() == Path(hook.__file__).read_text()
    assert os.access(host.paths.hook, os.R_OK)
