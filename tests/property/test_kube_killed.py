"""A driver that is killed at any step, and whatever else happens to a host, in random order.

``Steps`` counts what reaches the disk or the node, and kills before one of these, or after it has
taken effect and before the driver knows. A real process that is killed is in ``tests/live``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.domain.errors import CotenantError
from cotenant.kube import cdi
from cotenant.kube.cdi import Specs
from cotenant.kube.checkpoint import Checkpoint
from cotenant.kube.preparing import ClaimRef, Preparer, Site
from tests.kube_standins import POOL, StandinClaims, StandinNode, claim, share, unit

HOOK = ("/usr/bin/python3", "/hook.py", "/control.sock")


class Killed(BaseException):
    """The driver is no more: nothing of it runs on, no cleaning up either."""


class Steps:
    """Kills at step ``at``; never if that is 0."""

    def __init__(self) -> None:
        self.at = 0
        self.count = 0

    def __call__(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._count()
            result = step(*args, **kwargs)
            self._count()
            return result

        return counted

    def _count(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise Killed


class Mortal:
    """A node as a driver sees it that may be killed."""

    def __init__(self, node: StandinNode, steps: Steps) -> None:
        self.status = node.status
        self.adopt = node.adopt
        self.reserve = steps(node.reserve)
        self.release = steps(node.release)
        self.reservations = steps(node.reservations)


class Host:
    def __init__(self, folder: Path, steps: Steps) -> None:
        self.folder = folder
        self.steps = steps
        self.node, self.cluster = StandinNode(), StandinClaims()
        self.boots = 1
        self.restart()

    def restart(self) -> None:
        self.checkpoint = Checkpoint(self.folder / "claims")
        self.specs = Specs(self.folder / "cdi")
        site = Site(POOL, HOOK, f"boot-{self.boots}")
        node = Mortal(self.node, self.steps)
        self.preparer = Preparer(node, self.cluster, self.checkpoint, self.specs, site)
        self.checkpoint.open()
        self.preparer.recover()

    def reboot(self) -> None:
        self.boots += 1
        for path in (self.folder / "cdi").glob("*"):
            path.unlink()
        self.restart()

    def prepare(self, asked: dict[str, Any]) -> None:
        self.preparer.prepare(_ref(asked), time.monotonic() + 0.1)

    def unprepare(self, asked: dict[str, Any]) -> None:
        self.preparer.unprepare(_ref(asked), time.monotonic() + 0.1)

    def check(self) -> None:
        """Whatever happened, and while nothing is being done."""
        known = self.checkpoint.entries()
        ids = [id for entry in known for id in entry.ids]
        assert len(ids) == len(set(ids))
        assert set(self.node.held) <= set(ids), "something is reserved that nothing names"
        assert self.specs.claims() == {entry.uid for entry in known if entry.prepared}
        for entry in known:
            if entry.prepared:
                found = json.loads(self.specs.path(entry.uid).read_text())
                assert found == cdi.spec(entry.uid, entry.edits, HOOK)
        whole = [
            result.device
            for entry in known
            for promise in entry.promises
            for result in promise.results
            if not result.share_id
        ]
        assert len(whole) == len(set(whole)), "a device was booked twice"

    def settle(self) -> None:
        """All is there again, and the kubelet goes on as it does: what it was told to prepare it
        asks for again until it has it or the claim is gone."""
        self.steps.at = 0
        self.node.away = self.cluster.away = False
        self.restart()
        self.preparer.reconcile()
        self.preparer.reconcile()
        self.check()
        for entry in self.checkpoint.entries():
            if entry.prepared and entry.uid not in self.preparer.problems:
                assert set(entry.ids) <= set(self.node.held)


def _ref(asked: dict[str, Any]) -> ClaimRef:
    meta = asked["metadata"]
    return ClaimRef(meta["uid"], meta["namespace"], meta["name"])


@contextlib.contextmanager
def host() -> Iterator[Host]:
    steps = Steps()
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", steps(lambda fd: None))
        patch.setattr(Path, "replace", steps(Path.replace))
        patch.setattr(Path, "unlink", steps(Path.unlink))
        yield Host(Path(folder), steps)


CLAIMS = {
    "a": claim("a", unit(0), unit(1)),
    "b": claim("b", unit(1), unit(0, "cpu1", request="other")),
    "c": claim("c", share(60, "s1", "cpu1")),
    "d": claim("d", share(50, "s2", "cpu1")),
}


def _every_step(act: Callable[[Host], None], before: Callable[[Host], None]) -> Iterator[Host]:
    """A host for each step of ``act`` at which the driver was killed."""
    for at in itertools.count(1):
        with host() as found:
            before(found)
            found.steps.count, found.steps.at = 0, at
            try:
                act(found)
            except Killed:
                yield found
            else:
                assert at > 8, "it takes some steps"
                return


def _allocate(found: Host) -> None:
    found.cluster.put(CLAIMS["b"])


def _prepare(found: Host) -> None:
    found.prepare(CLAIMS["b"])


def _unprepare(found: Host) -> None:
    found.unprepare(CLAIMS["b"])


def _prepared(found: Host) -> None:
    _allocate(found)
    _prepare(found)


def test_killed_while_preparing_the_kubelet_asks_again() -> None:
    for found in _every_step(_prepare, _allocate):
        found.settle()
        _prepare(found)
        found.check()
        assert len(found.node.held) == 2
        _unprepare(found)
        assert not found.node.held and not found.checkpoint.entries()


def test_killed_while_preparing_the_pod_is_deleted_meanwhile() -> None:
    for found in _every_step(_prepare, _allocate):
        found.cluster.drop("claim-b")
        found.settle()
        prepared = [entry for entry in found.checkpoint.entries() if entry.prepared]
        assert bool(found.node.held) == bool(prepared), "only what was done waits for the kubelet"
        _unprepare(found)
        assert not found.node.held and not found.checkpoint.entries()


def test_killed_while_unpreparing_the_kubelet_asks_again() -> None:
    for found in _every_step(_unprepare, _prepared):
        found.settle()
        _unprepare(found)
        found.check()
        assert not found.node.held and not found.checkpoint.entries()


def test_killed_while_taking_back_what_was_refused() -> None:
    def act(found: Host) -> None:
        with contextlib.suppress(CotenantError):
            _prepare(found)

    def before(found: Host) -> None:
        _allocate(found)
        found.node.devices = found.node.devices[:1]
        real = found.node.status
        found.preparer._node.status = lambda: {  # type: ignore[method-assign]
            "devices": [*real()["devices"], {**real()["devices"][0], "id": "cpu1"}]
        }

    for found in _every_step(act, before):
        found.cluster.drop("claim-b")
        found.settle()
        assert not found.node.held and not found.checkpoint.entries()


def test_killed_at_a_start_after_a_reboot() -> None:
    def before(found: Host) -> None:
        _prepared(found)
        found.node.lose()

    def act(found: Host) -> None:
        found.reboot()
        found.preparer.reconcile()
        found.preparer.reconcile()

    for found in _every_step(act, before):
        found.settle()
        assert len(found.node.held) == 2


NAMES = st.sampled_from(sorted(CLAIMS))
EVENTS = st.one_of(
    st.tuples(st.just("prepare"), NAMES, st.integers(0, 24)),
    st.tuples(st.just("unprepare"), NAMES, st.integers(0, 12)),
    st.tuples(st.just("reconcile"), st.just(""), st.integers(0, 12)),
    st.tuples(st.sampled_from(["drop", "allocate"]), NAMES, st.just(0)),
    st.tuples(
        st.sampled_from(["reboot", "restart", "lose", "node", "api", "refuse"]),
        st.just(""),
        st.just(0),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=25))
def test_nothing_leaks_and_nothing_is_booked_twice(history: list[tuple[str, str, int]]) -> None:
    with host() as found:
        for asked in CLAIMS.values():
            found.cluster.put(asked)
        for what, name, at in history:
            found.steps.count, found.steps.at = 0, at
            try:
                _do(found, what, name)
            except CotenantError:
                pass
            except Killed:
                found.steps.at = 0
                found.restart()
            found.check()
        for asked in CLAIMS.values():
            found.settle()
            found.unprepare(asked)
        found.check()
        assert not found.node.held and not found.checkpoint.entries()


def _do(found: Host, what: str, name: str) -> None:
    match what:
        case "prepare":
            found.prepare(CLAIMS[name])
        case "unprepare":
            found.unprepare(CLAIMS[name])
        case "reconcile":
            found.preparer.reconcile()
        case "drop":
            found.cluster.drop(f"claim-{name}")
        case "allocate":
            found.cluster.put(CLAIMS[name])
        case "reboot" | "restart":
            getattr(found, what)()
        case "lose":
            found.node.lose()
        case "node":
            found.node.away = not found.node.away
        case "api":
            found.cluster.away = not found.cluster.away
        case "refuse":
            found.node.refuse = "" if found.node.refuse else "no more today"
