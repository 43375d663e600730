"""Claims are prepared, held, given up: by the real preparer and files, with stand-ins for the node
and the API server."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cotenant.domain.errors import (
    CotenantError,
    EnvironmentProblem,
    InvalidRequest,
    NotFound,
    NotReady,
)
from cotenant.kube.cdi import Specs
from cotenant.kube.checkpoint import Checkpoint
from cotenant.kube.forgotten import Forgotten
from cotenant.kube.preparing import ClaimRef, Preparer, Site
from tests.kube_standins import POOL, StandinClaims, StandinNode, claim, device, share, unit


class Box:
    """A driver's files, and what it talks to. ``restart`` is a driver that starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node = StandinNode()
        self.cluster = StandinClaims()
        self.boot = "boot-1"
        self.restart()

    def restart(self) -> None:
        self.checkpoint = Checkpoint(self.folder / "claims")
        self.checkpoint.open()
        self.specs = Specs(self.folder / "cdi")
        self.specs.open()
        site = Site(POOL, ("/usr/bin/python3", "/hook.py", "/control.sock"), self.boot)
        self.preparer = Preparer(self.node, self.cluster, self.checkpoint, self.specs, site)
        self.preparer.recover()

    def reboot(self) -> None:
        """The container runtime's folder is emptied, and what ran is gone."""
        for path in (self.folder / "cdi").iterdir():
            path.unlink()
        (self.folder / "cdi").rmdir()
        self.boot += "'"
        self.restart()

    def prepare(self, given: dict[str, Any], patience_s: float = 5.0) -> list[Any]:
        return self.preparer.prepare(_ref(given), time.monotonic() + patience_s)

    def unprepare(self, given: dict[str, Any], patience_s: float = 5.0) -> None:
        self.preparer.unprepare(_ref(given), time.monotonic() + patience_s)

    def allocate(self, uid: str, *results: dict[str, Any], **more: Any) -> dict[str, Any]:
        made = claim(uid, *results, **more)
        self.cluster.put(made)
        return made

    def spec(self, uid: str) -> dict[str, Any]:
        return json.loads(self.specs.path(uid).read_text())


def _ref(given: dict[str, Any]) -> ClaimRef:
    meta = given["metadata"]
    return ClaimRef(meta["uid"], meta["namespace"], meta["name"])


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def _until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_claim_is_reserved_described_and_recorded(box: Box) -> None:
    given = box.allocate("a", unit(0), unit(1))
    first, second = box.prepare(given)
    assert [first.device, second.device] == ["cpu0-unit-0", "cpu0-unit-1"]
    assert first.cdi == ("cotenant.dev/claim=a-work",)
    assert second.cdi == (), "a container that uses the request needs its edits once"
    (reservation,) = box.node.held.values()
    assert (reservation.device, reservation.units) == ("cpu0", 2)
    (described,) = box.spec("a")["devices"]
    assert described["name"] == "a-work"
    assert box.checkpoint.get("a").prepared


def test_each_request_is_a_device_of_its_own(box: Box) -> None:
    given = box.allocate("a", unit(0, request="left"), unit(0, "cpu1", request="right/small"))
    found = box.prepare(given)
    assert [d.request for d in found] == ["left", "right"]
    names = [d["name"] for d in box.spec("a")["devices"]]
    assert names == ["a-left", "a-right"]


def test_preparing_again_changes_nothing(box: Box) -> None:
    given = box.allocate("a", unit(0))
    assert box.prepare(given) == box.prepare(given)
    assert [kind for kind, _ in box.node.events] == ["reserve"]


def test_it_waits_until_the_node_has_the_space(box: Box) -> None:
    box.node.slow = 3
    box.prepare(box.allocate("a", unit(0)))
    assert box.checkpoint.get("a").prepared


def test_what_takes_too_long_is_an_error_and_goes_on_where_it_was(box: Box) -> None:
    box.node.stuck = True
    given = box.allocate("a", unit(0))
    with pytest.raises(NotReady):
        box.prepare(given, patience_s=0.05)
    assert box.node.held and not box.specs.claims()
    box.node.stuck = False
    box.prepare(given)
    assert [kind for kind, _ in box.node.events] == ["reserve"]


def test_what_the_node_refuses_leaves_nothing(box: Box) -> None:
    given = box.allocate("a", unit(0), unit(0, "cpu1", request="other"))
    box.node.held["theirs"] = _whole(box, "cpu1")
    with pytest.raises(InvalidRequest):
        box.prepare(given)
    assert set(box.node.held) == {"theirs"}
    assert not box.checkpoint.entries() and not box.specs.claims()


def _whole(box: Box, name: str) -> Any:
    from cotenant.domain.reservation import Reservation

    return Reservation("theirs", name, units=4)


def test_a_device_that_vanished_is_named(box: Box) -> None:
    box.node.devices = [device("cpu1")]
    with pytest.raises(InvalidRequest, match="cpu0"):
        box.prepare(box.allocate("a", unit(0)))
    assert not box.checkpoint.entries()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c["metadata"].update(uid="another"), InvalidRequest),
        (lambda c: c["status"].update(reservedFor=[]), InvalidRequest),
        (lambda c: c["status"].pop("allocation"), InvalidRequest),
        (
            lambda c: c["status"]["allocation"]["devices"]["results"][0].update(pool="p"),
            InvalidRequest,
        ),
        (lambda c: c["metadata"].update(name="elsewhere"), NotFound),
    ],
)
def test_a_claim_that_is_not_this_nodes_to_prepare_is_refused(
    box: Box, change: Callable[[Any], Any], error: type[CotenantError]
) -> None:
    given = claim("a", unit(0))
    stored = claim("a", unit(0))
    change(stored)
    box.cluster.put(stored)
    with pytest.raises(error):
        box.prepare(given)
    assert not box.node.held and not box.checkpoint.entries()


@pytest.mark.parametrize("uid", ["", "../a", "a/b", "a" * 64])
def test_a_uid_that_is_none_reaches_no_file(box: Box, uid: str) -> None:
    with pytest.raises(InvalidRequest):
        box.prepare(claim(uid, unit(0)))


def test_without_the_api_server_only_what_is_prepared_is_answered(box: Box) -> None:
    old, new = box.allocate("a", unit(0)), box.allocate("b", unit(1))
    before = box.prepare(old)
    box.cluster.away = True
    box.restart()
    assert box.prepare(old) == before
    with pytest.raises(EnvironmentProblem):
        box.prepare(new)
    box.unprepare(old)
    assert not box.node.held and not box.checkpoint.entries()


def test_without_the_node_nothing_is_lost(box: Box) -> None:
    given, late = box.allocate("a", unit(0)), box.allocate("b", unit(1))
    box.prepare(given)
    box.node.away = True
    for call in (lambda: box.prepare(late), lambda: box.unprepare(given)):
        with pytest.raises(EnvironmentProblem):
            call()
    assert box.checkpoint.get("a").prepared
    assert box.specs.claims() == {"a"}
    box.node.away = False
    box.prepare(late)
    box.unprepare(given)
    assert len(box.node.held) == 1


def test_unpreparing_is_complete_and_may_be_done_again(box: Box) -> None:
    given = box.allocate("a", unit(0))
    box.prepare(given)
    box.unprepare(given)
    assert not box.node.held and not box.checkpoint.entries() and not box.specs.claims()
    box.unprepare(given)
    box.node.away = True
    box.unprepare(claim("unknown", unit(0)))


def test_a_force_deleted_pod_keeps_its_device_until_it_is_unprepared(box: Box) -> None:
    old = box.allocate("a", unit(0))
    box.prepare(old)
    box.cluster.drop("claim-a")
    new = box.allocate("b", unit(0))
    with pytest.raises(InvalidRequest, match="claim-a"):
        box.prepare(new)
    assert len(box.node.held) == 1
    box.unprepare(old)
    box.prepare(new)
    assert len(box.node.held) == 1


def test_time_and_space_of_one_silicon_exclude_each_other(box: Box) -> None:
    box.prepare(box.allocate("a", share(10, "s1")))
    with pytest.raises(InvalidRequest, match="claim-a"):
        box.prepare(box.allocate("b", unit(0)))


def test_shares_of_time_are_shared_up_to_all_of_it(box: Box) -> None:
    for index in range(10):
        box.prepare(box.allocate(f"c{index}", share(10, f"s{index}")))
    (found,) = box.prepare(box.allocate("other", share(100, "s", "cpu1")))
    assert found.share_id == "s"
    with pytest.raises(InvalidRequest, match="claim-c0"):
        box.prepare(box.allocate("more", share(1, "s-more")))
    assert len(box.node.held) == 11


def test_another_allocation_takes_the_place_of_the_old_one(box: Box) -> None:
    box.prepare(box.allocate("a", unit(0)))
    box.prepare(box.allocate("a", unit(3, "cpu1")))
    assert [r.device for r in box.node.held.values()] == ["cpu1"]


def test_a_request_whose_devices_want_different_things_is_refused(box: Box) -> None:
    with pytest.raises(InvalidRequest, match="COTENANT_STANDIN"):
        box.prepare(box.allocate("a", unit(0), unit(0, "cpu1")))
    assert not box.node.held and not box.checkpoint.entries()


def test_unpreparing_does_not_wait_for_a_claim_to_become_ready(box: Box) -> None:
    box.node.stuck = True
    given = box.allocate("a", unit(0))
    failed: list[CotenantError] = []

    def prepare() -> None:
        try:
            box.prepare(given, patience_s=60)
        except CotenantError as exc:
            failed.append(exc)

    thread = threading.Thread(target=prepare)
    thread.start()
    _until(lambda: box.node.held)
    box.unprepare(given, patience_s=30)
    thread.join()
    assert failed and not box.node.held and not box.checkpoint.entries()


def test_many_claims_at_once_are_all_prepared(box: Box) -> None:
    box.node.devices = [device("cpu0", 40)]
    given = [box.allocate(f"c{index}", unit(index)) for index in range(40)]
    with ThreadPoolExecutor(20) as pool:
        for _ in range(3):
            list(pool.map(lambda each: box.prepare(each, patience_s=60), given))
            assert len(box.specs.claims()) == len(box.node.held) == 40
            looking = pool.submit(box.preparer.reconcile)
            list(pool.map(lambda each: box.unprepare(each, patience_s=60), given))
            looking.result()
            assert not box.specs.claims() and not box.node.held


def test_claims_do_not_wait_for_each_other(box: Box) -> None:
    box.prepare(box.allocate("quick", unit(1)))
    box.node.stuck = True
    thread = threading.Thread(target=lambda: _quietly(box, box.allocate("slow", unit(0))))
    thread.start()
    _until(lambda: len(box.node.held) == 2)
    box.unprepare(claim("quick", unit(1)))
    assert thread.is_alive()
    box.node.stuck = False
    thread.join()


def _quietly(box: Box, given: dict[str, Any]) -> None:
    box.prepare(given, patience_s=60)


# -- what a start finds


def test_a_reboot_has_the_specs_written_anew(box: Box) -> None:
    box.prepare(box.allocate("a", unit(0)))
    before = box.spec("a")
    box.node.away = True
    box.reboot()
    assert box.spec("a") == before
    box.node.away = False
    box.node.lose()
    box.preparer.reconcile()
    box.preparer.reconcile()
    assert len(box.node.held) == 1
    assert box.checkpoint.get("a").boot == box.boot


def test_what_a_container_needs_is_described_anew_when_it_changes(box: Box) -> None:
    box.prepare(box.allocate("a", unit(0)))
    box.node.pages = "/dev/shm/elsewhere"
    box.preparer.reconcile()
    assert "/dev/shm/elsewhere" in json.dumps(box.spec("a"))
    box.restart()
    assert "/dev/shm/elsewhere" in json.dumps(box.spec("a"))


def test_specs_of_ours_that_nobody_holds_are_removed_and_no_others(box: Box) -> None:
    box.prepare(box.allocate("a", unit(0)))
    folder = box.folder / "cdi"
    ours = [folder / "cotenant.dev-claim_gone.json", folder / ".cotenant.dev-claim_a.json.part"]
    theirs = [folder / n for n in ("vendor.com-gpu.json", "cotenant.dev-other.json", ".x.part")]
    for path in (*ours, *theirs):
        path.write_text("{}")
    box.restart()
    assert not any(path.exists() for path in ours) and box.specs.path("a").exists()
    assert all(path.exists() for path in theirs)


def test_a_damaged_record_is_kept_aside_and_its_claim_can_still_be_given_up(box: Box) -> None:
    given, sound = box.allocate("a", unit(0)), box.allocate("b", unit(1))
    box.prepare(given)
    box.prepare(sound)
    record = box.folder / "claims" / "a.json"
    record.write_bytes(record.read_bytes()[:-20])
    box.restart()
    assert [entry.uid for entry in box.checkpoint.entries()] == ["b"]
    assert any("a." in path.name for path in record.parent.iterdir())
    assert box.preparer.kept() == set(box.node.held), "its pod may run"
    assert box.specs.claims() == {"a", "b"}
    box.unprepare(given)
    assert len(box.node.held) == 1
    assert [path.name for path in record.parent.iterdir()] == ["b.json"]


def test_a_damaged_record_can_be_made_anew(box: Box) -> None:
    given = box.allocate("a", unit(0))
    box.prepare(given)
    (box.folder / "claims" / "a.json").write_bytes(b"")
    box.restart()
    box.prepare(given)
    box.reboot()
    assert box.specs.claims() == {"a"}
    assert [kind for kind, _ in box.node.events] == ["reserve"]


@pytest.mark.parametrize("gone", [True, False])
def test_what_was_never_finished_is_taken_back_once_nobody_wants_it(box: Box, gone: bool) -> None:
    box.node.stuck = True
    given = box.allocate("a", unit(0))
    with pytest.raises(NotReady):
        box.prepare(given, patience_s=0.0)
    if gone:
        box.cluster.drop("claim-a")
    box.restart()
    box.preparer.reconcile()
    assert bool(box.node.held) is not gone
    assert bool(box.checkpoint.entries()) is not gone


def test_while_the_api_server_is_away_nothing_is_taken_back(box: Box) -> None:
    box.node.stuck = True
    with pytest.raises(NotReady):
        box.prepare(box.allocate("a", unit(0)), patience_s=0.0)
    box.cluster.away = True
    box.restart()
    with pytest.raises(EnvironmentProblem):
        box.preparer.reconcile()
    assert box.node.held


def test_what_cannot_be_reserved_again_is_a_problem_of_the_claim(box: Box) -> None:
    box.prepare(box.allocate("a", unit(0)))
    box.node.lose()
    box.node.devices = [device("cpu1")]
    box.preparer.reconcile()
    assert set(box.preparer.problems) == {"a"}
    box.node.devices = [device("cpu0")]
    box.preparer.reconcile()
    box.preparer.reconcile()
    assert not box.preparer.problems and box.node.held


# -- claims that nobody will have unprepared


def test_what_is_gone_and_unused_for_long_is_given_up(box: Box) -> None:
    for uid, index in (("used", 0), ("there", 1), ("forgotten", 2)):
        box.prepare(box.allocate(uid, unit(index)))
    (used,) = box.checkpoint.get("used").ids
    box.node.adopt(used, 4711)
    for uid in ("used", "forgotten"):
        box.cluster.drop(f"claim-{uid}")
    box.preparer._forgotten = Forgotten(box.cluster, forget_s=3600)
    box.preparer.reconcile()
    assert len(box.node.held) == 3
    box.preparer._forgotten = Forgotten(box.cluster, forget_s=0)
    box.cluster.away = True
    box.preparer.reconcile()
    assert len(box.node.held) == 3
    box.cluster.away = False
    box.preparer.reconcile()
    assert {entry.uid for entry in box.checkpoint.entries()} == {"used", "there"}
    assert len(box.node.held) == 2
    assert box.specs.claims() == {"used", "there"}


def test_what_was_seen_again_is_not_forgotten(box: Box) -> None:
    box.prepare(box.allocate("a", unit(0)))
    entry = box.checkpoint.get("a")
    watched = Forgotten(box.cluster, forget_s=100)
    given = box.cluster.claim("team", "claim-a")
    assert given is not None
    for now, there in ((0, False), (90, True), (180, False), (270, False)):
        box.cluster.put(given) if there else box.cluster.drop("claim-a")
        assert not watched.look(entry, used=False, now=now)
    assert watched.look(entry, used=False, now=281)


# -- the disk


@pytest.mark.parametrize("folder", ["claims", "cdi"])
def test_a_folder_that_cannot_be_written_is_named_and_nothing_leaks(
    box: Box, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = box.allocate("a", unit(0))
    real = Path.replace

    def full(self: Path, target: Any) -> Path:
        if self.parent.name == folder:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(EnvironmentProblem, match=folder):
            box.prepare(given)
    assert not box.node.held and not box.checkpoint.entries() and not box.specs.claims()
    assert [path for name in ("claims", "cdi") for path in (box.folder / name).glob("*")] == []
    box.prepare(given)


def test_a_full_disk_keeps_no_claim_from_being_given_up(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = box.allocate("a", unit(0))
    box.prepare(given)
    real = os.open

    def full(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, flags, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(EnvironmentProblem):
            box.prepare(box.allocate("b", unit(1)))
        box.unprepare(given)
    assert not box.node.held and not box.checkpoint.entries() and not box.specs.claims()
