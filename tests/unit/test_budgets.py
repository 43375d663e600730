"""Memory of a device among instances and jobs: who gets it, who gives it, when it comes back."""

from __future__ import annotations

from typing import Any

import msgspec

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.costs import Copy, Eviction
from cotenant.domain.request import Refusal
from cotenant.domain.units import MS, S
from cotenant.policy.dispatcher import Dispatcher
from tests.builders import World, cpu, one, only

LOAD = 100 * MS


class Box(World):
    """A device of 1,000 bytes; services that need some, and jobs that report what they have."""

    def __init__(self, evicts: bool = True) -> None:
        super().__init__()
        self.d = Dispatcher((cpu(2, memory=1000, evicts=evicts),))
        self.names: list[str] = []

    def serve(self, name: str, memory: int, unloads: bool = True, **more: Any) -> list[a.Action]:
        """A service comes, and its instance if there is memory for it."""
        self.service(name, memory={"": memory}, unloads=unloads, **more)
        actions = self.send(e.VersionOffered(name, "1"))
        self.names.append(name)
        actions += self.planned(dict.fromkeys(self.names, (0, 1)), version=len(self.names))
        return [*actions, *self.loaded(actions)]

    def loaded(self, actions: list[a.Action]) -> list[a.Action]:
        """What was ordered to be loaded is there a while later."""
        found: list[a.Action] = []
        self.now += LOAD
        for load in only(actions, a.Load):
            profile = ((1, 1, MS), (2, 1, MS))
            up = e.WorkerUp(load.worker, load.service, load.version, "cpu", profile)
            found += self.send(up)
        return found

    def unloaded(self, actions: list[a.Action]) -> list[a.Action]:
        """What was ordered to go is gone."""
        gone = only(actions, a.Unload)
        return [x for order in gone for x in self.send(e.WorkerDown(order.worker))]

    def has(self, job: str, held: int, evictable: int | None = None) -> list[a.Action]:
        evictable = held if evictable is None else evictable
        return self.send(e.Held(job, held, held, evictable, 0), after=S)

    def used(self, service: str, after: int = 0) -> None:
        """A request is answered."""
        dispatch = one(self.arrive(service, after=after), a.Dispatch)
        self.send(e.BatchDone(dispatch.batch.id, MS), after=MS)

    def booked(self, name: str) -> int:
        return self.d.books.devices["cpu"].account.holders[name].has


def sizes(actions: list[a.Action]) -> list[tuple[str, int]]:
    return [(order.holder, order.size) for order in only(actions, a.Resize)]


# --- jobs -----------------------------------------------------------------------------------


def test_what_is_offered_waits_for_as_long_as_giving_takes() -> None:
    def declined(byte_ns: float, wait_s: int) -> bool:
        box = Box()
        slow = Eviction(Copy(0, byte_ns), Copy(0, byte_ns))
        spec = msgspec.structs.replace(box.d.devices[0], eviction=slow)
        box.send(e.DeviceChanged(spec))
        box.job("j", memory=900, kept=200)
        box.has("j", 900)
        actions = box.serve("s", 500, unloads=False)
        for _ in range(wait_s):
            actions += box.send(e.Woke(), after=S)
        return bool(only(actions, a.Decline))

    assert declined(0.0, 60)
    assert not declined(0.2 * S, 60), "400 bytes take 80 s"
    assert declined(0.2 * S, 180)


def test_what_was_taken_from_a_job_is_asked_of_who_idles() -> None:
    box = Box()
    box.job("j", memory=900, kept=200)
    box.has("j", 900)
    box.serve("s", 500)
    box.loaded(box.send(e.Held("j", 500, 900, 500, 0)))
    assert box.booked("j") == 500
    box.used("s")
    gone = box.send(e.Held("j", 499, 900, 499, 0), after=3600 * S)
    assert only(gone, a.Unload), "it idles, and the job rests until it has all back"


def test_a_job_has_what_others_leave_and_gives_it_back_when_it_is_needed() -> None:
    box = Box()
    box.job("j", memory=900, kept=200)
    assert not sizes(box.has("j", 900)), "nobody else wants it"
    load = box.serve("s", 500, unloads=False)
    assert not only(load, a.Load), "there is no memory for it yet"
    assert sizes(load) == [("j", 500)]
    assert not only(box.has("j", 700), a.Load)
    assert only(actions := box.has("j", 500), a.Load)
    assert sizes(actions) == [("j", -1)], "it gave what it was to give"


def test_what_a_job_has_not_taken_it_need_not_give() -> None:
    box = Box(evicts=False)
    box.job("j", memory=900, kept=100)
    assert not sizes(box.has("j", 300))
    assert only(box.serve("s", 600, unloads=False), a.Load)
    assert box.booked("j") == 400
    assert sizes(box.has("j", 500)) == [("j", 400)]


def test_a_job_is_never_asked_for_what_it_is_guaranteed() -> None:
    box = Box()
    box.job("j", memory=900, kept=600)
    box.has("j", 600)
    actions = box.serve("s", 500, unloads=False)
    assert not sizes(actions) and not only(actions, a.Load)
    assert only(actions, a.Decline), "it is told that this cannot be"


def test_what_a_job_cannot_be_made_to_give_is_not_lent_to_it() -> None:
    box = Box(evicts=False)
    box.job("j", memory=900, kept=200)
    assert only(box.serve("s", 500, unloads=False), a.Decline)
    assert not only(box.send(e.JobQueued("k", memory=200)), a.Start)


def test_a_job_that_turns_out_to_give_is_lent_what_is_above_its_guarantee() -> None:
    box = Box(evicts=False)
    box.job("j", memory=900, kept=200)
    box.has("j", 300)
    assert only(box.send(e.JobQueued("k", memory=700)), a.Start)


def test_a_job_that_takes_what_is_not_there_is_told_to_give_it() -> None:
    box = Box()
    box.serve("s", 800, unloads=False)
    box.job("j", memory=900, kept=100)
    assert not sizes(box.has("j", 200))
    assert sizes(box.has("j", 450)) == [("j", 200)]
    assert sizes(box.has("j", 200)) == [("j", -1)]


def test_a_job_without_a_limit_has_what_is_free_if_it_can_give_it() -> None:
    box = Box(evicts=False)
    box.job("j")
    box.has("j", 700, evictable=0)
    assert only(box.serve("s", 500), a.Load), "nobody relies on what it leaves"
    box.has("j", 700)
    assert box.booked("j") == 500


def test_a_job_that_waits_starts_when_others_have_given_what_it_is_guaranteed() -> None:
    box = Box()
    box.job("j", memory=900, kept=100)
    box.has("j", 900)
    waits = box.send(e.JobQueued("k", memory=500))
    assert not only(waits, a.Start) and sizes(waits) == [("j", 500)]
    assert one(box.has("j", 500), a.Start).job == "k"


def test_a_job_that_goes_while_it_waits_leaves_nothing() -> None:
    box = Box()
    box.job("j", memory=900, kept=100)
    box.has("j", 900)
    box.send(e.JobQueued("k", memory=500))
    assert sizes(box.send(e.JobExited("k"), after=S)) == [("j", -1)], "nobody needs it any more"
    assert set(box.d.books.devices["cpu"].account.holders) == {"j"}


# --- instances that idle --------------------------------------------------------------------


def asleep() -> tuple[Box, list[a.Action]]:
    """A service that was silent for long lost its instance to another."""
    box = Box()
    box.serve("old", 600)
    box.used("old")
    box.now += 100 * S
    return box, box.serve("new", 600)


def test_an_idle_instance_makes_way() -> None:
    box, actions = asleep()
    assert only(actions, a.Unload) and not only(actions, a.Load)
    assert one(box.unloaded(actions), a.Load).service == "new"


def test_an_instance_that_is_used_does_not_make_way() -> None:
    box = Box()
    box.serve("old", 600)
    used = one(box.arrive("old"), a.Dispatch)
    box.now += 100 * S
    assert not only(box.serve("new", 600), a.Unload)
    box.send(e.BatchDone(used.batch.id, MS))
    assert only(box.send(e.Woke(), after=2 * S), a.Unload), "it waited for its turn"


def test_what_is_to_be_kept_is_kept() -> None:
    box = Box()
    box.serve("old", 600, unloads=False)
    box.now += 100 * S
    assert not only(box.serve("new", 600), a.Unload)
    assert not only(box.send(e.Woke(), after=2 * S), a.Unload)
    assert only(box.serve("third", 600, unloads=False), a.Decline)


def test_a_request_wakes_a_service_and_waits_for_it_if_it_can() -> None:
    box, actions = asleep()
    box.loaded(box.unloaded(actions))
    box.now += 100 * S
    hasty = box.arrive("old", slo=50 * MS)
    assert one(hasty, a.Reject).refusal == Refusal.UNAVAILABLE
    assert only(hasty, a.Unload), "the other idles now"
    patient = box.arrive("old", slo=5 * S)
    assert not only(patient, a.Reject)
    load = box.unloaded(hasty)
    assert only(box.loaded(load), a.Dispatch)


def test_a_service_is_loaded_before_it_is_expected_to_be_wanted() -> None:
    box = Box()
    box.serve("often", 600)
    for _ in range(8):  # in silences of a minute
        box.used("often", after=60 * S)
    last = box.now
    box.job("j", memory=900, kept=100)
    box.now += 10 * S
    taken = box.has("j", 500)
    assert only(taken, a.Unload), "it is not expected to be wanted soon"
    box.unloaded(taken)
    box.has("j", 100)
    while box.now < last + 60 * S:
        at = box.d.state.armed
        assert at, "it looks again"
        box.now = max(box.now, at)
        if loads := only(box.send(e.Woke()), a.Load):
            assert loads[0].service == "often"
            break
    assert box.now < last + 60 * S - LOAD


def test_requests_that_wait_for_a_load_that_fails_are_answered() -> None:
    box, actions = asleep()
    box.loaded(box.unloaded(actions))
    box.now += 100 * S
    wake = box.arrive("old", slo=5 * S)
    load = one(box.unloaded(wake), a.Load)
    assert only(box.send(e.LoadFailed(load.worker, "no file")), a.Reject)


def test_what_is_offered_is_loaded_also_where_its_service_sleeps() -> None:
    box, actions = asleep()
    box.loaded(box.unloaded(actions))
    box.now += 100 * S
    offered = box.send(e.VersionOffered("old", "2", 1))
    loads = only(box.unloaded(offered), a.Load)
    assert {load.version for load in loads} <= {"1", "2"} and loads


def test_an_instance_that_is_larger_than_was_said_takes_what_others_leave() -> None:
    box = Box()
    box.service("s")
    actions = box.send(e.VersionOffered("s", "1"))
    actions += box.planned({"s": (0, 1)})
    load = one(actions, a.Load)
    box.send(e.WorkerUp(load.worker, "s", "1", "cpu", ((1, 1, MS),), memory=700))
    assert box.booked(load.worker) == 700
    assert not only(box.send(e.JobQueued("j", memory=400)), a.Start)
    assert only(box.send(e.JobQueued("k", memory=300)), a.Start)


# --- results that are kept ------------------------------------------------------------------


def test_results_have_what_is_free_and_give_it_first() -> None:
    box = Box()
    box.serve("s", 600, unloads=False)
    box.job("j", memory=400, kept=100)
    box.has("j", 100)
    assert sizes(box.has("s/results", 300)) == [("s/results", 300)], "that is all that is free"
    assert sizes(box.has("j", 300)) == [("s/results", 100)]
    assert box.booked("j") == 300
    assert not sizes(box.has("s/results", 100)), "there is no more"
    assert sizes(box.has("j", 100)) == [("s/results", -1)]
    box.has("s/results", 0)
    assert "s/results" not in box.d.books.devices["cpu"].account.holders


# --- what was found in review ---------------------------------------------------------------


def test_what_is_offered_serves_only_once_it_was_loaded() -> None:
    box = Box()
    box.serve("s", 600)
    box.used("s")
    box.now += 100 * S
    offered = box.send(e.VersionOffered("s", "2", 1))
    assert only(offered, a.Unload), "the one before makes room"
    offered += box.planned({"s": (0, 1)}, version=9)
    assert not only(offered, a.Serve)
    load = one(box.unloaded(offered), a.Load)
    assert load.version == "2"
    assert one(box.loaded([load]), a.Serve).version == "2"


def test_an_instance_is_not_unloaded_before_it_was_up() -> None:
    box = Box()
    box.service("a", memory={"": 600}, unloads=True)
    box.send(e.VersionOffered("a", "1"))
    load = one(box.planned({"a": (0, 1)}), a.Load)
    box.names.append("a")
    assert not only(box.serve("k", 600, unloads=False), a.Unload)
    assert one(box.loaded([load]), a.Serve).service == "a"


def test_versions_that_do_not_fit_together_take_turns_too() -> None:
    box = Box()
    box.serve("s", 600, keep=2)
    box.used("s")
    box.now += 100 * S
    box.loaded(box.unloaded(box.send(e.VersionOffered("s", "2", 1))))
    waits = box.arrive("s", slo=5 * S, version="1")
    loads = box.unloaded(waits)
    if not only(waits, a.Reject):
        assert only(box.loaded(loads), a.Dispatch)
    box.send(e.Woke(), after=10 * S)
    assert not box.d.state.queued, "nobody waits for ever"


def test_a_job_grows_into_its_guarantee_whoever_has_borrowed_that() -> None:
    box = Box()
    box.job("j", memory=900, kept=500)
    box.has("j", 100)
    box.serve("s", 600)
    box.arrive("s")
    assert not sizes(box.has("j", 500)), "it is its own"
    assert sizes(box.has("j", 700)) == [("j", 500)]


def test_what_a_job_leaves_of_its_guarantee_is_lent() -> None:
    box = Box()
    box.job("j", memory=500)
    box.has("j", 100)
    assert only(box.serve("s", 800), a.Load)


def test_who_cannot_have_all_takes_nothing_from_others() -> None:
    box = Box()
    box.serve("c", 600)
    box.arrive("c")
    assert not only(box.serve("a", 600), a.Load)
    assert only(box.serve("d", 300), a.Load), "that is free"


def test_what_never_fits_beside_what_stays_is_declined() -> None:
    box = Box()
    box.serve("k", 600, unloads=False)
    assert only(box.serve("u", 600), a.Decline)


def test_what_was_declined_keeps_nothing_from_jobs() -> None:
    box = Box()
    box.job("j", memory=600)
    assert only(box.serve("s", 500, unloads=False), a.Decline)
    assert only(box.send(e.JobQueued("k", memory=300)), a.Start)


def test_who_waits_for_memory_that_nobody_is_to_give_is_told_at_once() -> None:
    box, actions = asleep()
    box.loaded(box.unloaded(actions))
    box.arrive("new")
    assert one(box.arrive("old", slo=5 * S), a.Reject).refusal == Refusal.UNAVAILABLE


def test_a_job_that_does_not_give_keeps_nobody_waiting_for_ever() -> None:
    box = Box()
    box.job("j", memory=900, kept=100)
    box.has("j", 900)
    assert not only(box.serve("s", 500, unloads=False), a.Decline)
    declined = [x for _ in range(40) for x in only(box.send(e.Woke(), after=S), a.Decline)]
    assert len(declined) == 1


def test_whether_it_may_be_unloaded_can_change() -> None:
    box = Box()
    box.serve("s", 600)
    box.used("s")
    box.service("s", memory={"": 600}, unloads=False)
    box.now += 100 * S
    assert only(box.serve("k", 600, unloads=False), a.Decline)
    box.service("s", memory={"": 600}, unloads=True)
    assert only(box.send(e.VersionOffered("k", "1", 1)), a.Unload)


def test_requests_to_a_service_that_is_there_are_not_watched() -> None:
    box = Box()
    box.serve("s", 600)
    for _ in range(20):
        box.used("s", after=S)
    assert len(box.d.state.watches) < 20, "nobody has to look whether they wait in vain"
