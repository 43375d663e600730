"""The driver's controllers against an API server over HTTP that comes and goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from cotenant.domain.errors import ConfigError
from cotenant.kube import command
from cotenant.kube.binding import Binding
from cotenant.kube.claimwatch import ClaimWatch
from cotenant.kube.cluster import HttpCluster
from cotenant.kube.names import AWAY, GONE
from cotenant.kube.ports import ClusterAway, ClusterRefused, Conflict, Expired, Object
from cotenant.kube.publisher import Publisher
from cotenant.kube.waiting import Backoff
from tests.fake_apiserver import ApiServer
from tests.kube_fakes import FakeNode, ask, claim, cpu, gpu_mig, npu
from tests.kube_oracle import Oracle, binding

EVERY: dict[str, Object] = {"all": {}}
TIME = 'device.attributes["cotenant.dev"].mode == "time"'
NPU = 'device.attributes["cotenant.dev"].kind == "npu"'


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    found = ApiServer()
    found.start()
    found.put("nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
    yield found
    found.stop()


@pytest.fixture
def cluster(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HttpCluster]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = HttpCluster.connect(server.kubeconfig(tmp_path), watch_s=2)
    yield found
    found.close()


class Bench:
    """A driver that runs. ``schedule`` allocates from what is published."""

    def __init__(self, server: ApiServer, cluster: HttpCluster, node: FakeNode) -> None:
        self.server, self.node = server, node
        self.watch = ClaimWatch(cluster, "n1", Backoff(0.05, 0.2))
        self.parts = [
            Binding(node, cluster, "n1", self.watch, period=0.3),
            Publisher(node, cluster, "n1", self.watch.allocated, period=0.1, patience=2),
            self.watch,
        ]
        for part in self.parts:
            part.start()

    def stop(self) -> None:
        for part in reversed(self.parts):
            part.stop()

    @property
    def oracle(self) -> Oracle:
        return Oracle(self.server.all("resourceslices"), EVERY)

    def published(self) -> bool:
        return bool(self.server.all("resourceslices")) and self.oracle.complete

    def schedule(self, name: str, *requests: Object) -> Object:
        eventually(self.published)
        found = self.oracle.allocate(name, list(requests))
        assert found is not None
        item = claim(name, found)
        item["spec"]["devices"]["requests"] = list(requests)
        return self.server.put("resourceclaims", item)

    def state(self, name: str) -> str:
        return binding(self.server.get("resourceclaims", f"ns/{name}"), True)

    def taints(self) -> dict[str, set[str]]:
        return {
            name: {taint["key"] for taint in device.get("taints", [])}
            for name, device in self.oracle.devices.items()
        }


@pytest.fixture
def bench(server: ApiServer, cluster: HttpCluster) -> Iterator[Bench]:
    found = Bench(server, cluster, FakeNode(cpu(70), gpu_mig(), npu()))
    yield found
    found.stop()


def share(per_cents: str) -> Object:
    return ask("a", "all", share=per_cents, selector=TIME)


def test_a_claim_from_the_slices_to_the_pod(bench: Bench) -> None:
    bench.schedule("c", share("40"))
    eventually(lambda: bench.state("c") == "binds")
    assert len(bench.node.kept) == 1
    assert bench.server.refused == []
    (owner,) = bench.server.all("resourceslices")[0]["metadata"]["ownerReferences"]
    assert owner["uid"] == bench.server.get("nodes", "n1")["metadata"]["uid"]
    bench.server.remove("resourceclaims", "ns/c")
    eventually(lambda: not bench.node.kept)


def test_an_outage_takes_nothing_away(bench: Bench) -> None:
    bench.schedule("kept", share("20"))
    bench.schedule("dropped", ask("n", "all", selector=NPU))
    eventually(lambda: {bench.state("kept"), bench.state("dropped")} == {"binds"})
    bench.server.stop()
    meanwhile = Oracle(bench.server.all("resourceslices"), EVERY)
    bench.server.remove("resourceclaims", "ns/dropped")
    held = meanwhile.allocate("new", [share("30")])
    assert held is not None
    bench.server.put("resourceclaims", claim("new", held))
    eventually(lambda: not bench.watch.current)
    time.sleep(0.5)
    assert len(bench.node.kept) == 2
    bench.server.start()
    eventually(lambda: bench.state("new") == "binds")
    eventually(lambda: {r.name for r in bench.node.kept.values()} == {"ns/kept", "ns/new"})


def test_a_watch_that_is_too_old_begins_anew(bench: Bench) -> None:
    eventually(lambda: bench.watch.current)
    for number in range(3):
        bench.server.forget_history()
        bench.schedule(
            f"c{number}", ask("a", "all", selector='device.attributes["cotenant.dev"].units == 1')
        )
        eventually(lambda name=f"c{number}": bench.state(name) == "binds")


@pytest.mark.parametrize("code", [403, 410, 429, 500, 503])
def test_a_server_that_refuses_for_a_while_is_asked_again(bench: Bench, code: int) -> None:
    eventually(bench.published)
    bench.server.failing = [code] * 8
    bench.schedule("c", share("40"))
    eventually(lambda: bench.state("c") == "binds")


def test_whoever_writes_first_is_read_again(bench: Bench) -> None:
    eventually(bench.published)
    overtaken = iter(range(3))

    def before_write(path: str) -> None:
        if path.endswith("/status") and next(overtaken, None) is not None:
            held = bench.server.get("resourceclaims", "ns/c")
            held["metadata"].setdefault("labels", {})["n"] = "x"
            bench.server.put("resourceclaims", held)

    bench.server.before_write = before_write
    bench.schedule("c", share("40"))
    eventually(lambda: bench.state("c") == "binds")
    assert bench.server.get("resourceclaims", "ns/c")["metadata"]["labels"] == {"n": "x"}


def test_a_node_that_is_away_is_said_to_be(bench: Bench) -> None:
    eventually(bench.published)
    bench.node.away = True
    eventually(
        lambda: (
            bench.published()
            and set(map(frozenset, bench.taints().values())) == {frozenset({AWAY})}
        )
    )
    bench.node.away = False
    eventually(lambda: bench.published() and not any(bench.taints().values()))


def test_an_allocated_device_is_never_withdrawn(bench: Bench) -> None:
    bench.schedule("c", ask("n", "all", selector=NPU))
    eventually(lambda: bench.state("c") == "binds")
    bench.node.devices = [cpu(70)]
    eventually(lambda: bench.published() and bench.taints().get("npu-whole") == {GONE})
    eventually(
        lambda: bench.published() and set(bench.taints()) - {"npu-whole"} == set(cpu_names())
    )
    bench.server.remove("resourceclaims", "ns/c")
    eventually(lambda: bench.published() and "npu-whole" not in bench.taints())


def cpu_names() -> Iterator[str]:
    yield from (f"cpu-unit-{n}" for n in range(70))
    yield from (f"cpu-block-{n}" for n in range(8))
    yield "cpu-time"


def test_lists_are_read_page_by_page(server: ApiServer, cluster: HttpCluster) -> None:
    for number in range(7):
        server.put("resourceclaims", claim(f"c{number}"))
    found, version = cluster.claims()
    assert len(found) == 7
    assert int(version) >= 107


def test_a_watch_goes_on_from_a_bookmark(server: ApiServer, cluster: HttpCluster) -> None:
    _, version = cluster.claims()
    events = cluster.watch_claims(version)
    threading.Timer(0.1, server.bookmark).start()
    kind, mark = next(events)
    assert kind == "BOOKMARK"
    server.put("resourceclaims", claim("c"))
    for kind, item in cluster.watch_claims(mark["metadata"]["resourceVersion"]):
        assert (kind, item["metadata"]["name"]) == ("ADDED", "c")
        break


def test_what_errors_mean(server: ApiServer, cluster: HttpCluster) -> None:
    assert cluster.claim("ns", "none") is None
    cluster.delete_slice("none")
    server.forget_history()
    with pytest.raises(Expired):
        list(cluster.watch_claims("1"))
    held = server.put("resourceclaims", claim("c"))
    server.put("resourceclaims", held)
    with pytest.raises(Conflict):
        cluster.update_claim_status(held)
    for code, error in ((403, ClusterRefused), (422, ClusterRefused), (429, ClusterAway)):
        server.failing = [code]
        with pytest.raises(error):
            cluster.claims()
    server.stop()
    with pytest.raises(ClusterAway):
        cluster.claims()
    with pytest.raises(ClusterAway):
        list(cluster.watch_claims("1"))


@pytest.mark.parametrize(
    "parameters",
    [
        b"[" * 4000 + b"]" * 4000,
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b"9" * 9000,
        b'"\\ud800"',
        b"1e999",
    ],
)
def test_claims_are_read_whatever_somebody_stored(parameters: bytes) -> None:
    odd = b'{"metadata":{"resourceVersion":"7"},"spec":{"p":{"a":"[\\"{","x":%s}}}' % parameters
    event = b'{"type":"ADDED","object":%s}' % odd
    page = b'{"metadata":{"resourceVersion":"8"},"items":[%s,{"metadata":{}}]}' % odd

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=event if b"watch=" in request.url.query else page)

    transport = httpx.MockTransport(answer)
    cluster = HttpCluster(httpx.Client(transport=transport, base_url="http://here"))
    found, _ = cluster.claims()
    assert len(found) == 2
    assert found[0]["spec"]["p"]["a"] == '["{'
    ((kind, item),) = cluster.watch_claims("7")
    assert (kind, item["metadata"]) == ("ADDED", found[0]["metadata"])
    cluster.close()


def test_a_status_is_written_without_the_rest_of_it(
    server: ApiServer, cluster: HttpCluster
) -> None:
    """The server compares parameters by the byte."""
    held = claim("c", {"devices": {"results": [], "config": []}})
    stored = server.put("resourceclaims", held)
    read = cluster.claim("ns", "c")
    assert read is not None
    read["status"]["allocation"]["devices"]["config"] = "in our own way"
    cluster.update_claim_status(read)
    status = server.get("resourceclaims", "ns/c")["status"]
    assert status["allocation"] == stored["status"]["allocation"]


def test_what_cannot_be_a_kubeconfig_is_said(tmp_path: Path) -> None:
    broken = tmp_path / "config"
    for text in ("", "{", "contexts: []", "current-context: x"):
        broken.write_text(text)
        with pytest.raises(ConfigError):
            HttpCluster.connect(broken)
    with pytest.raises(ConfigError):
        HttpCluster.connect(tmp_path / "none")


def test_the_command_runs_until_it_is_told_to_end(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    stop, seen = threading.Event(), []
    plugin: Any = type("Plugin", (), {})()
    plugin.start, plugin.stop = lambda: seen.append("start"), lambda: seen.append("stop")
    plugin.kept = frozenset
    monkeypatch.setattr(command, "_plugin", lambda *_: plugin)
    monkeypatch.setattr(command, "ControlClient", lambda _: FakeNode(cpu(2)))
    args = command._parser().parse_args(
        [
            *("--state-dir", str(tmp_path), "--node-name", "n1"),
            *("--kubeconfig", str(server.kubeconfig(tmp_path))),
        ]
    )
    threads = set(threading.enumerate())
    runs = threading.Thread(target=command._serve, args=(args, stop))
    runs.start()
    eventually(lambda: len(server.all("resourceslices")) > 1)
    stop.set()
    runs.join(timeout=20)
    assert seen == ["start", "stop"]
    assert not runs.is_alive()
    assert len(server.all("resourceslices")) > 1
    eventually(
        lambda: {t for t in threading.enumerate() if "process_request" not in t.name} <= threads
    )


def test_the_command_wants_to_know_which_node_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(command, "log_from", lambda _: None)
    monkeypatch.delenv("NODE_NAME", raising=False)
    assert command.main(["--state-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("cotenant-dra: ")
