"""Instances that are bound to a partition: loaded where it is, used there alone, gone before it."""

from __future__ import annotations

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import Partition, PreemptLevel
from cotenant.domain.plan import Plan
from cotenant.domain.units import MS, S
from cotenant.policy.dispatcher import Dispatcher
from tests.builders import World, cpu, one, only

PROFILE = ((1, 1, 2 * MS), (1, 8, 8 * MS))
CUTS = {"ab|cd": ("ab", "cd"), "ab|c|d": ("ab", "c", "d"), "abcd": ("abcd",)}


class Box(World):
    """A device of four units that binds jobs and instances, and a service ``s`` with a version."""

    def __init__(self, services: tuple[str, ...] = ("s",)) -> None:
        super().__init__()
        gpu = cpu(4, PreemptLevel.GATE, id="gpu", kind="gpu", pins_jobs=True, pins_workers=True)
        self.d = Dispatcher((gpu,))
        self.version = 0
        for name in services:
            self.service(name)
            self.send(e.VersionOffered(name, "1"))

    def plan(
        self,
        cut: str,
        services: dict[str, tuple[str, ...]],
        jobs: dict[str, tuple[str, ...]] | None = None,
        lendable: tuple[str, ...] = (),
    ) -> list[a.Action]:
        """Plan these partitions, named by their units."""
        self.version += 1
        parts = tuple(Partition(n, "gpu", tuple(map("abcd".index, n))) for n in CUTS[cut])
        return self.send(e.Planned(Plan(self.version, parts, services, jobs or {}, lendable)))

    def made(self) -> list[a.Action]:
        """The layout that was ordered is there."""
        return self.send(e.Repartitioned("gpu", self.version))

    def up(self, load: a.Load) -> list[a.Action]:
        """An instance is loaded."""
        return self.send(e.WorkerUp(load.worker, load.service, load.version, load.device, PROFILE))

    def stands(self, cut: str, services: dict[str, tuple[str, ...]], **kwargs: object) -> None:
        """All of a plan is done."""
        actions = self.plan(cut, services, **kwargs)  # type: ignore[arg-type]
        if only(actions, a.Repartition):
            actions = self.made()
        for load in only(actions, a.Load):
            self.up(load)


def test_an_instance_is_loaded_in_each_partition_of_its_service_once_that_is_there() -> None:
    box = Box()
    ordered = box.plan("ab|cd", {"s": ("ab", "cd")})
    assert not only(ordered, a.Load) and only(ordered, a.Repartition)
    assert sorted(x.partition for x in only(box.made(), a.Load)) == ["ab", "cd"]


def test_it_takes_batches_there_alone() -> None:
    box = Box()
    box.plan("ab|cd", {"s": ("ab", "cd")})
    place = {}
    for load in only(box.made(), a.Load):
        place[load.worker] = load.partition
        box.up(load)
    sent = [one(box.arrive(slo=S), a.Dispatch) for _ in range(2)]
    assert {x.worker: x.partition for x in sent} == place
    box.send(e.WorkerDown(sent[0].worker))
    again = one(box.send(e.BatchDone(sent[1].batch.id, MS)), a.Dispatch)
    assert (again.worker, again.partition) == (sent[1].worker, sent[1].partition)


def test_a_partition_goes_once_its_instance_is_gone_and_that_has_finished() -> None:
    box = Box()
    box.stands("ab|cd", {"s": ("ab", "cd")})
    sent = [one(box.arrive(slo=S), a.Dispatch) for _ in range(2)]
    there = {x.partition: x for x in sent}
    actions = box.plan("ab|c|d", {"s": ("ab", "c")})
    assert not only(actions, a.Repartition | a.Unload)
    gone = one(box.send(e.BatchDone(there["cd"].batch.id, MS)), a.Unload)
    assert gone.worker == there["cd"].worker
    box.send(e.BatchDone(there["ab"].batch.id, MS))
    assert one(box.arrive(), a.Dispatch).partition == "ab", "what stays serves on"
    assert only(box.send(e.WorkerDown(gone.worker)), a.Repartition)
    load = one(box.made(), a.Load)
    assert load.partition == "c"


def test_an_old_instance_serves_until_the_new_one_is_warm() -> None:
    box = Box()
    box.stands("ab|cd", {"s": ("ab",)})
    box.plan("ab|c|d", {"s": ("c",)})
    load = one(box.made(), a.Load)
    first = one(box.arrive(), a.Dispatch)
    assert (load.partition, first.partition) == ("c", "ab")
    box.send(e.BatchDone(first.batch.id, MS))
    gone = one(box.up(load), a.Unload)
    assert gone.worker == first.worker
    assert one(box.arrive(), a.Dispatch).partition == "c"


def test_what_stands_already_is_warmed_before_the_layout_changes() -> None:
    box = Box(("s", "t"))
    box.stands("ab|cd", {"s": ("ab",), "t": ("cd",)})
    (load,) = only(box.plan("ab|c|d", {"s": ("ab",), "t": ("ab",)}), a.Load)
    assert (load.service, load.partition) == ("t", "ab")
    box.up(load)
    assert box.d.state.partitions["ab"].services == ["s"], "not before its plan is in force"
    (gone,) = (w.id for w in box.d.state.workers.values() if w.place == "cd")
    assert only(box.send(e.WorkerDown(gone)), a.Repartition)
    box.made()
    assert box.d.state.partitions["ab"].services == ["s", "t"]


def test_where_the_layout_is_refused_the_old_one_serves_again() -> None:
    box = Box()
    box.stands("ab|cd", {"s": ("ab", "cd")})
    gone = one(box.plan("ab|c|d", {"s": ("ab", "c")}), a.Unload)
    assert only(box.send(e.WorkerDown(gone.worker)), a.Repartition)
    actions = box.send(e.ActionFailed("Repartition", "gpu", "", "busy"))
    assert one(actions, a.Load).partition == "cd"


def test_a_job_that_is_to_have_the_old_partition_runs_there_once_the_instance_is_gone() -> None:
    box = Box()
    box.stands("ab|cd", {"s": ("ab",)})
    box.plan("ab|c|d", {"s": ("c",)}, {"j": ("ab",)})
    load = one(box.made(), a.Load)
    assert one(box.send(e.JobQueued("j")), a.Start).partition == "ab"
    assert not only(box.send(e.JobReady("j")), a.Grant), "it serves there yet"
    assert one(box.up(load), a.Grant).partition == "ab"
