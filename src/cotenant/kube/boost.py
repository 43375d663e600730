"""Which queued jobs of a cluster lose little by being moved, said to Kueue as a priority boost.

Kueue adds the annotation ``kueue.x-k8s.io/priority-boost`` of a Workload to its priority (its
feature gate PriorityBoost). Each node says it of the workloads whose pods have space there:

| the job's newest checkpoint | its workload runs | was driven out, and waits |
| --- | --- | --- |
| is fresh (was, when it left) | ``points`` | ``points`` |
| is not, or there is none | ``points + 1`` | nothing |

Of those of one priority class that run, the freshly checkpointed make room first: they lose least.
Of those that wait, they run first. And who waits never has more than who runs, so nobody drives out
its like (with ``withinClusterQueue: LowerPriority``), to be driven out by it in turn.

What a node must remember is written on the Workload: whose word it is, and when the checkpoint was.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from cotenant.domain.errors import CotenantError, EnvironmentProblem
from cotenant.domain.port import JobStatus
from cotenant.domain.reservation import ReservationStatus
from cotenant.domain.units import S, parse_duration
from cotenant.serving.control_client import ControlClient

log = logging.getLogger("cotenant.kube")

Object = dict[str, Any]
_Key = tuple[str, str]
"""Namespace and name."""

BOOST: Final = "kueue.x-k8s.io/priority-boost"
CHECKPOINT_AT: Final = "cotenant.dev/checkpoint-at"
"""Annotation: seconds since 1970, of the newest checkpoint."""
BY: Final = "cotenant.dev/boosted-by"
"""Label: the node whose word the boost is. It is gone once the pods are."""
JOB_UID: Final = "kueue.x-k8s.io/job-uid"
"""Label of a Workload: the uid of the JobSet, Job or Pod that it is of."""
_OWNERS: Final = ("jobset.sigs.k8s.io/jobset-uid", "batch.kubernetes.io/controller-uid")
_RESERVED: Final = "k8s:"
"""What the ids of reservations begin with that are a claim's; its uid follows."""
_LABEL: Final = 63
"""Characters that the value of a label may have."""


class Rules(NamedTuple):
    """A checkpoint is fresh for ``fresh_s`` seconds."""

    points: int = 10
    fresh_s: float = 600.0

    def boost(self, runs: bool, checkpoint_at: float, now: float) -> int:
        """See the module's text. Times in seconds since 1970; 0: there is no checkpoint."""
        fresh = checkpoint_at > 0 and now - checkpoint_at <= self.fresh_s
        if runs:
            return self.points + (not fresh)
        return self.points if fresh else 0


class Node(Protocol):
    """``ControlClient``, as far as it is needed."""

    def jobs(self) -> list[JobStatus]: ...

    def reservations(self) -> list[ReservationStatus]: ...


class Queue(Protocol):
    """The API server, as far as it is needed. Every method raises CotenantError."""

    def claim(self, namespace: str, name: str) -> Object | None: ...

    def pod(self, namespace: str, name: str) -> Object | None: ...

    def workloads(self, selector: str, namespace: str = "") -> list[Object]:
        """Kueue's Workloads with such labels, of all namespaces unless one is named."""
        ...

    def annotate(self, workload: Object, metadata: Object) -> None:
        """Change annotations and labels; None removes one. No effect if it is gone."""
        ...


class Booster:
    """The boosts of one node's workloads."""

    def __init__(self, node: Node, queue: Queue, name: str, rules: Rules | None = None) -> None:
        self._node = node
        self._queue = queue
        self._rules = rules or Rules()
        # The names of nodes may be longer than labels.
        plain = len(name) <= _LABEL
        self._name = name if plain else hashlib.sha256(name.encode()).hexdigest()[:_LABEL]
        self._jobs: dict[_Key, set[str]] = {}
        """The node's jobs of each workload that had pods here at the last look: who is told to
        leave reports a checkpoint last, and is gone."""

    def step(self, now: float) -> None:
        """Say what holds now (s since 1970) where that is not said. Raises CotenantError."""
        here: dict[_Key, Object] = {}
        jobs: dict[_Key, set[str]] = {}
        for workload, job in self._running():
            here[_key(workload)] = workload
            jobs.setdefault(_key(workload), set()).add(job)
        reported = {job.id: job.checkpoint_at for job in self._node.jobs()}

        def newest(key: _Key) -> float:
            ids = jobs.get(key) or self._jobs.get(key) or ()
            return max((reported.get(id, 0.0) for id in ids), default=0.0)

        for key, workload in here.items():
            self._of_running(workload, newest(key), now)
        for workload in self._queue.workloads(f"{BY}={self._name}"):
            if (key := _key(workload)) not in here:
                self._of_waiting(workload, newest(key), now)
        self._jobs = jobs

    def _running(self) -> Iterator[tuple[Object, str]]:
        """Workloads that have pods here, each with a job of the node's."""
        for status in self._node.reservations():
            if status.adopted and status.reservation.id.startswith(_RESERVED):
                for workload in self._workloads(status):
                    yield workload, status.job

    def _workloads(self, status: ReservationStatus) -> list[Object]:
        namespace, _, name = status.reservation.name.partition("/")
        claim = self._queue.claim(namespace, name)
        uid = status.reservation.id.removeprefix(_RESERVED).partition("/")[0]
        if claim is None or claim["metadata"]["uid"] != uid:
            return []
        users = (claim.get("status") or {}).get("reservedFor") or []
        pods = [self._queue.pod(namespace, u["name"]) for u in users if u["resource"] == "pods"]
        owners = sorted({owner for pod in pods if pod is not None for owner in _owners(pod)})
        if not owners:
            return []
        return self._queue.workloads(f"{JOB_UID} in ({','.join(owners)})", namespace)

    def _of_running(self, workload: Object, at: float, now: float) -> None:
        _, by, known = _said(workload)
        if by not in ("", self._name) and at <= known:
            return  # of a job on several nodes the one speaks that has the newest checkpoint
        # Of a run that has not reported one yet, that of an earlier run is the newest.
        at = max(at, known)
        self._say(workload, self._rules.boost(True, at, now), self._name, at)

    def _of_waiting(self, workload: Object, at: float, now: float) -> None:
        _, _, known = _said(workload)
        at = max(at, known)
        self._say(workload, self._rules.boost(False, at, now), "", at)

    def _say(self, workload: Object, boost: int, by: str, at: float) -> None:
        wanted = str(boost) if boost else "", by, float(int(at))
        if _said(workload) == wanted:
            return
        metadata = {
            "annotations": {
                BOOST: wanted[0] or None,
                CHECKPOINT_AT: str(int(at)) if at else None,
            },
            "labels": {BY: by or None},
        }
        self._queue.annotate(workload, metadata)
        extra = {"workload": "/".join(_key(workload)), "boost": boost}
        log.info("boost of %(workload)s: %(boost)s", extra, extra=extra)


def _key(workload: Object) -> _Key:
    return workload["metadata"]["namespace"], workload["metadata"]["name"]


def _said(workload: Object) -> tuple[str, str, float]:
    """The boost, whose word it is, and when its checkpoint was, as the Workload has them."""
    annotations: Mapping[str, str] = workload["metadata"].get("annotations") or {}
    labels: Mapping[str, str] = workload["metadata"].get("labels") or {}
    at = annotations.get(CHECKPOINT_AT, "")
    known = float(at) if re.fullmatch(r"[0-9]{1,12}", at) else 0.0
    return annotations.get(BOOST, ""), labels.get(BY, ""), known


def _owners(pod: Object) -> list[str]:
    meta = pod["metadata"]
    labels = meta.get("labels") or {}
    references = meta.get("ownerReferences") or []
    found = [labels.get(label) for label in _OWNERS]
    return [uid for uid in (*found, *(r.get("uid") for r in references), meta.get("uid")) if uid]


class HttpQueue:
    """A Queue over HTTP, by a client of ``lightkube``."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @classmethod
    def connect(cls, kubeconfig: Path | None = None) -> HttpQueue:
        """By what ``cluster.connected`` finds. Raises ConfigError."""
        from cotenant.kube.cluster import connected

        return cls(connected(kubeconfig))

    def claim(self, namespace: str, name: str) -> Object | None:
        path = f"apis/resource.k8s.io/v1/namespaces/{namespace}/resourceclaims/{name}"
        return self._call("GET", path)

    def pod(self, namespace: str, name: str) -> Object | None:
        return self._call("GET", f"api/v1/namespaces/{namespace}/pods/{name}")

    def workloads(self, selector: str, namespace: str = "") -> list[Object]:
        where = f"namespaces/{namespace}/" if namespace else ""
        path = f"apis/kueue.x-k8s.io/v1beta2/{where}workloads"
        found = self._call("GET", path, params={"labelSelector": selector})
        if found is None:
            raise EnvironmentProblem("the cluster has no Workloads: install Kueue, 0.17 or newer")
        items: list[Object] = found.get("items") or []
        return items

    def annotate(self, workload: Object, metadata: Object) -> None:
        namespace, name = _key(workload)
        path = f"apis/kueue.x-k8s.io/v1beta2/namespaces/{namespace}/workloads/{name}"
        merge = {"Content-Type": "application/merge-patch+json"}
        self._call("PATCH", path, json={"metadata": metadata}, headers=merge)

    def _call(self, method: str, path: str, **kwargs: Any) -> Object | None:
        """None if there is no such thing."""
        try:
            response = self._client.request(method, path, **kwargs)
            if response.status_code == 404:
                return None
            if not response.is_success:
                text = response.text[:400]
                raise EnvironmentProblem(f"the API server says {response.status_code}: {text}")
            answer: Object = response.json()
        except CotenantError:
            raise
        except Exception as error:  # the client's own errors are of several libraries
            kind = type(error).__name__
            raise EnvironmentProblem(f"the API server: {kind}: {error}") from None
        return answer


def run(booster: Booster, every_s: float, stop: threading.Event) -> None:
    """Until told to stop. What fails is logged, once for each reason, and tried again."""
    last = ""
    while True:
        try:
            booster.step(time.time())
            last = ""
        except CotenantError as error:
            if str(error) != last:
                log.warning("boosts are not said: %s", error)
            last = str(error)
        if stop.wait(every_s):
            return


def main(argv: Sequence[str] | None = None) -> int:
    """The process beside a node; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        fresh, every = parse_duration(args.fresh) / S, parse_duration(args.every) / S
        queue = HttpQueue.connect(args.kubeconfig)
        node = ControlClient(args.state_dir / "control.sock")
        run(Booster(node, queue, args.node_name, Rules(args.points, fresh)), every, stop)
    except (CotenantError, ValueError) as error:
        print(f"cotenant.kube.boost: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cotenant.kube.boost", description=_SUMMARY)
    parser.add_argument("--state-dir", type=Path, required=True, help="that of the node")
    parser.add_argument("--node-name", required=True, help="what the cluster calls this machine")
    parser.add_argument("--kubeconfig", type=Path, help="default: KUBECONFIG, or the pod's account")
    parser.add_argument("--points", type=int, default=Rules().points)
    parser.add_argument("--fresh", default="10m", help="how long a checkpoint is fresh")
    parser.add_argument("--every", default="10s", help="how often to look")
    return parser


_SUMMARY = "Tell Kueue which jobs of a Cotenant node lose little by being moved."

if __name__ == "__main__":
    sys.exit(main())
