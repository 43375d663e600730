"""Boosts of a node's workloads, as Kueue would read them."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
import yaml

from cotenant.domain.errors import ConfigError, CotenantError, EnvironmentProblem
from cotenant.domain.port import JobStatus
from cotenant.domain.reservation import Adopted, Reservation, ReservationStatus
from cotenant.kube.boost import BOOST, BY, Booster, HttpQueue, Rules

NOW = 1_000_000.0
RULES = Rules(points=10, fresh_s=600)


class Cluster:
    """Pods with claims, their Workloads, and one or two nodes that they run on."""

    def __init__(self) -> None:
        self.claims: dict[str, Any] = {}
        self.pods: dict[str, Any] = {}
        self.loads: dict[str, Any] = {}
        self.patches = 0

    def add(self, name: str, priority: int = 1000) -> None:
        """A JobSet's Workload."""
        labels = {"kueue.x-k8s.io/job-uid": f"uid-{name}"}
        meta = {"namespace": "training", "name": name, "labels": labels, "annotations": {}}
        self.loads[name] = {"metadata": meta, "spec": {"priority": priority}}

    def effective(self, name: str) -> int:
        """As Kueue has it: priority and boost."""
        load = self.loads[name]
        return int(load["spec"]["priority"]) + int(load["metadata"]["annotations"].get(BOOST, "0"))

    def claim(self, namespace: str, name: str) -> dict[str, Any] | None:
        return self.claims.get(name)

    def pod(self, namespace: str, name: str) -> dict[str, Any] | None:
        return self.pods.get(name)

    def workloads(self, selector: str, namespace: str = "") -> list[dict[str, Any]]:
        key, _, wanted = selector.replace(" in ", "=").partition("=")
        values = wanted.strip("()").split(",")
        found = [w for w in self.loads.values() if w["metadata"]["labels"].get(key) in values]
        return json.loads(json.dumps(found))

    def annotate(self, workload: dict[str, Any], metadata: dict[str, Any]) -> None:
        self.patches += 1
        load = self.loads[workload["metadata"]["name"]]
        for what, changes in metadata.items():
            for key, value in changes.items():
                if value is None:
                    load["metadata"][what].pop(key, None)
                else:
                    load["metadata"][what][key] = value


class Node:
    """What a node says of its jobs and reservations."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.booster = Booster(self, cluster, name, RULES)
        self._jobs: dict[str, JobStatus] = {}
        self._reservations: dict[str, ReservationStatus] = {}

    def jobs(self) -> list[JobStatus]:
        return list(self._jobs.values())

    def reservations(self) -> list[ReservationStatus]:
        return list(self._reservations.values())

    def starts(self, load: str, checkpoint_at: float = 0.0) -> None:
        """A pod of the workload runs here."""
        uid = f"claim-{load}-{id(self)}"
        pod = {
            "metadata": {"name": load, "labels": {"jobset.sigs.k8s.io/jobset-uid": f"uid-{load}"}}
        }
        self.cluster.pods[uid] = pod
        users = [{"resource": "pods", "name": uid}]
        self.cluster.claims[uid] = {"metadata": {"uid": uid}, "status": {"reservedFor": users}}
        self._jobs[load] = JobStatus(
            id=load, name=load, state="running", command=(), weight=1, guaranteed=0, created=0,
            restarts=0, checkpoint_at=checkpoint_at,
        )  # fmt: skip
        made = Reservation(id=f"k8s:{uid}/cpu/1", device="cpu", units=1, name=f"training/{uid}")
        self._reservations[load] = ReservationStatus(made, load, "ready", adopted=(Adopted(1, 1),))

    def checkpoints(self, load: str, at: float) -> None:
        self._jobs[load] = msgspec.structs.replace(self._jobs[load], checkpoint_at=at)

    def leaves(self, load: str) -> None:
        """The pod is gone; the job's record stays."""
        del self._reservations[load]

    def look(self, now: float = NOW) -> None:
        self.booster.step(now)


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    for name in ("a", "b", "new"):
        made.add(name)
    return made


def test_of_those_that_run_the_freshly_checkpointed_make_room_first(cluster: Cluster) -> None:
    node = Node(cluster, "box")
    node.starts("a", NOW - 5)
    node.starts("b", NOW - 5000)
    node.look()
    assert cluster.effective("a") < cluster.effective("b")


def test_of_those_that_wait_the_freshly_checkpointed_run_first(cluster: Cluster) -> None:
    node = Node(cluster, "box")
    node.starts("a")
    node.starts("b")
    node.look()
    node.checkpoints("a", NOW + 2)  # its last word, said between two looks
    node.leaves("a")
    node.leaves("b")
    node.look(NOW + 10)
    assert cluster.effective("a") > cluster.effective("b") == cluster.effective("new")
    assert not [w for w in cluster.loads.values() if BY in w["metadata"]["labels"]]


@pytest.mark.parametrize("running", [0.0, NOW - 5, NOW - 5000])
@pytest.mark.parametrize("waiting", [0.0, NOW - 5, NOW - 5000])
def test_who_waits_never_drives_out_its_like(running: float, waiting: float) -> None:
    assert RULES.boost(False, waiting, NOW) <= RULES.boost(True, running, NOW)


def test_a_job_that_goes_on_elsewhere_is_that_nodes_to_speak_of(cluster: Cluster) -> None:
    here, there = Node(cluster, "here"), Node(cluster, "there")
    here.starts("a", NOW - 5)
    here.look()
    here.leaves("a")
    there.starts("a")  # before the first node looked again
    there.look(NOW + 1)
    for later in range(2, 10):
        here.look(NOW + later)
        there.look(NOW + later)
    there.look(NOW + 5000)
    assert cluster.effective("a") == 1000 + RULES.boost(True, NOW - 5, NOW + 5000)
    there.checkpoints("a", NOW + 4999)
    there.look(NOW + 5000)
    assert cluster.effective("a") == 1000 + RULES.boost(True, NOW + 4999, NOW + 5000)


def test_of_a_job_on_two_nodes_the_one_speaks_that_has_the_checkpoint(cluster: Cluster) -> None:
    first, second = Node(cluster, "first"), Node(cluster, "second")
    first.starts("a")
    second.starts("a", NOW - 5)
    for node in (first, second, first, second, first):
        node.look()
    assert cluster.effective("a") == 1000 + RULES.boost(True, NOW - 5, NOW)
    settled = cluster.patches
    first.look()
    second.look()
    assert cluster.patches == settled


def test_a_node_that_was_started_anew_says_the_last_word_of_the_one_before(
    cluster: Cluster,
) -> None:
    node = Node(cluster, "a-name-that-is-longer-than-any-label-may-be." * 3)
    node.starts("a", NOW - 5000)
    node.look()
    node.leaves("a")
    again = Node(cluster, "a-name-that-is-longer-than-any-label-may-be." * 3)
    again.look(NOW + 10)
    assert cluster.effective("a") == cluster.effective("new")


def test_a_claim_of_the_same_name_is_not_taken_for_the_one_before(cluster: Cluster) -> None:
    node = Node(cluster, "box")
    node.starts("a", NOW)
    for claim in cluster.claims.values():
        claim["metadata"]["uid"] = "another"
    node.look()
    assert cluster.effective("a") == cluster.effective("new")


# --- over HTTP


class Server(http.server.BaseHTTPRequestHandler):
    """Answers what ``answers`` has, and keeps what it was asked."""

    answers: dict[str, Any]
    asked: list[tuple[str, str, str, bytes]]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.headers.get("Content-Type") or ""
        self.asked.append((self.command, self.path, kind, body))
        found = self.answers.get(urlsplit(self.path).path)
        data = json.dumps(found if not isinstance(found, int) else {"message": "no"}).encode()
        self.send_response(404 if found is None else found if isinstance(found, int) else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PATCH = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Quietly."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[type[Server], Path]]:
    pytest.importorskip("lightkube")
    handler = type("Handler", (Server,), {"answers": {}, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "clusters": [
                {"name": "here", "cluster": {"server": f"http://127.0.0.1:{made.server_port}"}}
            ],
            "users": [{"name": "me", "user": {"token": "secret"}}],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        yield handler, tmp_path / "kubeconfig"
        made.shutdown()
        thread.join()


def test_what_is_asked_of_an_api_server(server: tuple[type[Server], Path]) -> None:
    handler, kubeconfig = server
    base = "/apis/kueue.x-k8s.io/v1beta2"
    load = {"metadata": {"namespace": "training", "name": "a"}}
    handler.answers = {
        f"{base}/namespaces/training/workloads": {"items": [load]},
        f"{base}/namespaces/training/workloads/a": load,
        "/apis/resource.k8s.io/v1/namespaces/training/resourceclaims/c": {"metadata": {}},
    }
    queue = HttpQueue.connect(kubeconfig)
    assert queue.claim("training", "c") == {"metadata": {}}
    assert queue.claim("training", "other") is None
    assert queue.pod("training", "p") is None
    assert queue.workloads("x in (a,b)", "training") == [load]
    queue.annotate(load, {"labels": {BY: None}})
    queue.annotate({"metadata": {"namespace": "training", "name": "gone"}}, {})
    selector = parse_qs(urlsplit(handler.asked[3][1]).query)["labelSelector"]
    assert selector == ["x in (a,b)"]
    method, _, kind, body = handler.asked[4]
    assert (method, kind) == ("PATCH", "application/merge-patch+json")
    assert json.loads(body) == {"metadata": {"labels": {BY: None}}}


def test_what_fails_is_said_as_ours(server: tuple[type[Server], Path], tmp_path: Path) -> None:
    handler, kubeconfig = server
    queue = HttpQueue.connect(kubeconfig)
    handler.answers = {"/api/v1/namespaces/training/pods/p": 403}
    with pytest.raises(EnvironmentProblem):
        queue.pod("training", "p")
    with pytest.raises(EnvironmentProblem, match="Kueue"):
        queue.workloads("x=y")
    with pytest.raises(ConfigError):
        HttpQueue.connect(tmp_path / "none")
    nobody = yaml.safe_load(kubeconfig.read_text())
    nobody["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:1"
    kubeconfig.write_text(yaml.safe_dump(nobody))
    with pytest.raises(CotenantError):
        HttpQueue.connect(kubeconfig).pod("training", "p")
