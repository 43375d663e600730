"""A fleet answers each call to a device once, on the loop, whatever the device does."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from cotenant.devices.base import Device
from cotenant.devices.null import NullDevice
from cotenant.domain.device import Partition, PreemptLevel, Tenant, TenantKind
from cotenant.domain.errors import DeviceError, EnvironmentProblem
from cotenant.runtime import caller
from cotenant.runtime.caller import TIMEOUT_S
from cotenant.runtime.fleet import Fleet
from tests.fakes import FAILURES, Broken, SlowDevice

PATIENCE_S = 20.0
SHORT = {**TIMEOUT_S, "grant": 0.05, "revoke": 0.05, "bind": 0.05, "attach": 0.05,
         "launch": 0.05, "repartition": 0.05, "close": 0.1}  # fmt: skip
JOB, WORKER = Tenant("j", TenantKind.JOB), Tenant("w", TenantKind.WORKER)
P0, P1 = Partition("p0", "slow", (0,)), Partition("p1", "slow", (1,))
QUICK = Partition("q0", "null", (0,))


class Answers:
    """What came back: (tag, "done" or "failed", result or reason), all on one thread."""

    def __init__(self) -> None:
        self.all: list[tuple[Any, str, Any]] = []
        self._thread = threading.get_ident()

    def done(self, tag: Any, result: Any) -> None:
        self._add(tag, "done", result)

    def failed(self, tag: Any, why: str) -> None:
        assert why
        self._add(tag, "failed", why)

    def _add(self, tag: Any, how: str, what: Any) -> None:
        assert threading.get_ident() == self._thread
        assert tag not in [seen for seen, _, _ in self.all], f"{tag} was answered twice"
        self.all.append((tag, how, what))

    @property
    def how(self) -> dict[Any, str]:
        return {tag: how for tag, how, _ in self.all}

    async def have(self, *tags: Any) -> None:
        await until(lambda: set(tags) <= set(self.how), lambda: str(self.all))


async def until(true: Callable[[], object], say: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"waited in vain: {say()}"
        await asyncio.sleep(0.002)


Story = Callable[[Fleet, Answers], Coroutine[Any, Any, None]]


def play(story: Story, *devices: Device, timeouts: dict[str, float] | None = None) -> None:
    """Run a story with an open fleet; jobs and workers are attached to blocking devices."""

    async def main() -> None:
        fleet, answers = Fleet(devices, timeouts or dict(TIMEOUT_S)), Answers()
        await fleet.open()
        for spec in fleet.specs:
            for tenant in (JOB, WORKER):
                if spec.kind == "null" and not isinstance(devices[0], Broken):
                    await fleet.attached([spec.id], tenant, 1)
        await story(fleet, answers)
        await fleet.close()

    asyncio.run(main())


def test_a_quick_device_has_answered_when_the_call_returns() -> None:
    async def story(fleet: Fleet, answers: Answers) -> None:
        fleet.grant("j", QUICK, "grant", answers.done, answers.failed)
        fleet.revoke("j", QUICK, "revoke", answers.done, answers.failed)
        fleet.bind("w", QUICK, "bind", answers.done, answers.failed)
        fleet.repartition("null", (QUICK,), "repartition", answers.done, answers.failed)
        assert answers.how == dict.fromkeys(("grant", "revoke", "bind", "repartition"), "done")

    play(story, NullDevice())


@pytest.mark.parametrize("error", [DeviceError("no"), ValueError("what"), RuntimeError()])
def test_whatever_a_quick_device_raises_is_a_failure(error: Exception) -> None:
    async def story(fleet: Fleet, answers: Answers) -> None:
        part = Partition("p", "broken", (0,))
        fleet.grant("j", part, "grant", answers.done, answers.failed)
        fleet.revoke("j", part, "revoke", answers.done, answers.failed)
        fleet.bind("w", part, "bind", answers.done, answers.failed)
        fleet.attach(["broken"], JOB, 1, "attach", answers.done, answers.failed)
        fleet.repartition("broken", (part,), "repartition", answers.done, answers.failed)
        assert set(answers.how.values()) == {"failed"}
        assert len(answers.all) == 5
        with pytest.raises(DeviceError):
            await fleet.launch(["broken"], JOB)
        fleet.look()

    play(story, Broken(error))


def test_what_a_caller_does_with_an_answer_is_no_failure_of_the_device() -> None:
    async def story(fleet: Fleet, answers: Answers) -> None:
        def done(tag: object, result: object) -> None:
            raise LookupError("a bug of ours")

        with pytest.raises(LookupError):
            fleet.bind("w", QUICK, "bind", done, answers.failed)
        assert answers.all == []

    play(story, NullDevice())


def test_a_blocking_device_is_never_called_on_the_loop() -> None:
    slow = SlowDevice(seed=1, slowest_s=0.01)

    async def story(fleet: Fleet, answers: Answers) -> None:
        fleet.repartition("slow", (P0, P1), "layout", answers.done, answers.failed)
        fleet.grant("j", P0, "grant", answers.done, answers.failed)
        fleet.bind("w", P1, "bind", answers.done, answers.failed)
        assert answers.all == []
        await answers.have("layout", "grant", "bind")
        fleet.revoke("j", P0, "revoke", answers.done, answers.failed)
        await answers.have("revoke")
        fleet.look()
        await until(lambda: set(fleet.memory("slow")) == {"j", "w"})
        assert set(answers.how.values()) == {"done"}
        assert threading.current_thread().name not in slow.threads

    play(story, slow)


@pytest.mark.parametrize("number", range(len(FAILURES)))
def test_whatever_a_blocking_device_raises_is_a_failure(number: int) -> None:
    slow = SlowDevice()

    async def story(fleet: Fleet, answers: Answers) -> None:
        for kind in ("grant", "revoke", "bind"):
            slow.fail(kind, FAILURES[number]())
            tenant = "w" if kind == "bind" else "j"
            getattr(fleet, kind)(tenant, P0, kind, answers.done, answers.failed)
            await answers.have(kind)
        assert set(answers.how.values()) == {"failed"}
        fleet.grant("j", P0, "again", answers.done, answers.failed)
        await answers.have("again")
        assert answers.how["again"] == "done"

    play(story, slow)


def test_a_device_that_hangs_holds_up_neither_others_nor_the_end() -> None:
    slow = SlowDevice()
    let_go = slow.hang("bind")

    async def story(fleet: Fleet, answers: Answers) -> None:
        fleet.bind("w", P0, "hangs", answers.done, answers.failed)
        fleet.grant("j", P1, "behind", answers.done, answers.failed)
        fleet.grant("j", QUICK, "elsewhere", answers.done, answers.failed)
        assert answers.how == {"elsewhere": "done"}
        await answers.have("hangs", "behind")
        assert answers.how["hangs"] == answers.how["behind"] == "failed"

    play(story, slow, NullDevice(), timeouts=SHORT)
    let_go()


def test_calls_do_not_wait_for_what_drains() -> None:
    slow = SlowDevice()

    async def story(fleet: Fleet, answers: Answers) -> None:
        let_go = slow.hang("revoke")
        fleet.revoke("j", P0, "drains", answers.done, answers.failed)
        fleet.bind("w", P1, "bind", answers.done, answers.failed)
        await answers.have("bind")
        await until(lambda: "revoke" not in slow._hanging)
        fleet.revoke("j", P1, "other", answers.done, answers.failed)
        await answers.have("other")
        assert "drains" not in answers.how
        let_go()
        await answers.have("drains")
        assert set(answers.how.values()) == {"done"}

    play(story, slow)


def test_a_revocation_waits_for_the_grant_that_it_takes_back() -> None:
    slow = SlowDevice()

    async def story(fleet: Fleet, answers: Answers) -> None:
        let_go = slow.hang("grant")
        fleet.grant("j", P0, "grant", answers.done, answers.failed)
        fleet.revoke("j", P0, "revoke", answers.done, answers.failed)
        await asyncio.sleep(0.02)
        assert answers.all == []
        let_go()
        await answers.have("grant", "revoke")
        assert slow.held == {"j": set()}

    play(story, slow)


def test_a_grant_that_comes_too_late_is_taken_back_before_the_next() -> None:
    slow = SlowDevice()

    async def story(fleet: Fleet, answers: Answers) -> None:
        let_go = slow.hang("grant")
        fleet.grant("j", P0, "late", answers.done, answers.failed)
        await answers.have("late")
        assert answers.how["late"] == "failed"
        let_go()
        await until(lambda: ("revoke", "j", "p0") in slow.log)
        assert slow.held == {"j": set()}

        let_go = slow.hang("grant")
        fleet.grant("j", P0, "late again", answers.done, answers.failed)
        await answers.have("late again")
        fleet.grant("j", P0, "next", answers.done, answers.failed)
        let_go()
        await answers.have("next")
        if answers.how["next"] == "done":
            assert slow.held == {"j": {"p0"}}
        kinds = [kind for kind, _, _ in slow.log if kind in ("grant", "revoke")]
        assert kinds[:4] == ["grant", "revoke", "grant", "revoke"]

    play(story, slow, timeouts={**TIMEOUT_S, "grant": 0.05})


@pytest.mark.parametrize("hangs", [False, True])
def test_a_job_that_cannot_be_taken_off_where_it_came_too_late_is_told_of(hangs: bool) -> None:
    slow = SlowDevice()

    async def story(fleet: Fleet, answers: Answers) -> None:
        strays: list[tuple[str, str]] = []
        fleet.astray = lambda job, partition, _: strays.append((job, partition))
        let_go = slow.hang("grant")
        fleet.grant("j", P0, "late", answers.done, answers.failed)
        await answers.have("late")
        if hangs:
            let_go_later = slow.hang("revoke")
        else:
            slow.fail("revoke", DeviceError("it does not yield"))
        let_go()
        await until(lambda: strays == [("j", "p0")])
        fleet.grant("j", P0, "next", answers.done, answers.failed)
        await answers.have("next")
        if hangs:
            let_go_later()

    play(story, slow, timeouts={**TIMEOUT_S, "grant": 0.05, "revoke": 0.05})


def test_a_layout_that_comes_too_late_is_taken_back() -> None:
    slow = SlowDevice()

    async def story(fleet: Fleet, answers: Answers) -> None:
        fleet.repartition("slow", (P0,), "first", answers.done, answers.failed)
        await answers.have("first")
        let_go = slow.hang("repartition")
        fleet.repartition("slow", (P0, P1), "late", answers.done, answers.failed)
        await answers.have("late")
        let_go()
        await until(lambda: [what for _, _, what in slow.log if what] == ["p0", "p0 p1", "p0"])
        await until(lambda: slow.layout == (P0,))
        assert answers.how == {"first": "done", "late": "failed"}

    play(story, slow, timeouts={**TIMEOUT_S, "repartition": 0.05})


def test_what_was_not_begun_in_time_is_not_begun_any_more() -> None:
    slow = SlowDevice()

    async def story(fleet: Fleet, answers: Answers) -> None:
        let_go = slow.hang("bind")
        fleet.bind("w", P0, "hangs", answers.done, answers.failed)
        fleet.grant("j", P0, "waits", answers.done, answers.failed)
        await answers.have("hangs", "waits")
        let_go()
        fleet.bind("w", P1, "after", answers.done, answers.failed)
        await answers.have("after")
        assert slow.held == {"j": set()}
        assert ("grant", "j", "p0") not in slow.log

    play(story, slow, timeouts=SHORT)


def test_a_tenant_is_attached_to_all_its_devices_or_not_at_all() -> None:
    one, two = SlowDevice(seed=1, slowest_s=0.01), SlowDevice(device_id="two")
    new = Tenant("new", TenantKind.JOB)

    async def story(fleet: Fleet, answers: Answers) -> None:
        levels = await fleet.attached(["slow", "two"], new, 1)
        assert levels == {"slow": PreemptLevel.GATE, "two": PreemptLevel.GATE}
        assert "new" in fleet.levels("two")
        fleet.detach(["slow", "two"], "new")
        await until(lambda: "new" not in {**fleet.levels("slow"), **fleet.levels("two")})
        two.fail("attach", DeviceError("it is full"))
        fleet.attach(["slow", "two"], new, 1, "attach", answers.done, answers.failed)
        await answers.have("attach")
        assert answers.how == {"attach": "failed"}
        fleet.detach(["slow", "two"], "new")
        await until(lambda: "new" not in {**one.held, **two.held})

    play(story, one, two)


def test_who_was_attached_too_late_is_detached_in_the_end() -> None:
    slow = SlowDevice()
    new = Tenant("new", TenantKind.JOB)

    async def story(fleet: Fleet, answers: Answers) -> None:
        let_go = slow.hang("attach")
        fleet.attach(["slow"], new, 1, "late", answers.done, answers.failed)
        await answers.have("late")
        fleet.detach(["slow"], "new")
        fleet.attach(
            ["slow"], Tenant("other", TenantKind.JOB), 1, "x", answers.done, answers.failed
        )
        await answers.have("x")
        let_go()
        await until(lambda: ("detach", "new", "") in slow.log)
        await until(lambda: "new" not in slow.held)
        assert "new" not in fleet.levels("slow")

    play(story, slow, timeouts={**TIMEOUT_S, "attach": 0.05})


def test_a_launch_joins_what_all_devices_want() -> None:
    async def story(fleet: Fleet, answers: Answers) -> None:
        found = await fleet.launch(["slow", "two"], JOB)
        assert found.env == {"ON": "two", "slow": "1", "two": "1"}

    play(story, SlowDevice(), SlowDevice(device_id="two"))


def test_a_device_that_does_not_open_is_said_and_the_others_are_closed() -> None:
    closed: list[str] = []

    class Fine(NullDevice):
        def close(self) -> None:
            closed.append(self.spec.id)

    class Absent(NullDevice):
        def open(self) -> None:
            raise EnvironmentProblem("there is no such device")

    async def main() -> None:
        fleet = Fleet([Fine("first"), Absent("second")])
        with pytest.raises(EnvironmentProblem, match="no such device"):
            await fleet.open()
        assert closed == ["first"]

    asyncio.run(main())


def test_two_devices_that_are_one_are_refused_by_both_their_names() -> None:
    class Named(NullDevice):
        closed = 0

        def __init__(self, id: str, hardware: str) -> None:
            super().__init__(id)
            self._spec = msgspec.structs.replace(self._spec, hardware=hardware)

        def close(self) -> None:
            Named.closed += 1

    async def main() -> None:
        others = [Named("a", "GPU-1"), Named("b", ""), Named("c", ""), Named("d", "GPU-2")]
        fleet = Fleet(others)
        await fleet.open()
        await fleet.close()
        fleet = Fleet([*others, Named("e", "GPU-1")])
        with pytest.raises(EnvironmentProblem, match=r"a and e .*GPU-1"):
            await fleet.open()

    asyncio.run(main())
    assert Named.closed == 4 + 5


def test_a_look_that_fails_or_hangs_stops_no_look_elsewhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow = SlowDevice()

    async def story(fleet: Fleet, answers: Answers) -> None:
        let_go = slow.hang("facts")
        fleet.look()
        await until(lambda: set(fleet.memory("null")) == {"j", "w"})
        for _ in range(3):
            fleet.look()
        assert fleet.memory("slow") == {}
        let_go()
        await until(lambda: set(fleet.memory("slow")) == {"j", "w"})
        slow.fail("facts", OSError("gone"))
        with caplog.at_level(logging.WARNING, "cotenant.devices"):
            fleet.look()
            await until(lambda: caplog.records)
        assert set(fleet.memory("slow")) == {"j", "w"}, "what was known last stands"

    play(story, slow, NullDevice())


@pytest.mark.parametrize("seed", range(12))
def test_every_call_is_answered_once_and_a_job_holds_what_it_was_told(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Random histories on a device that is slow, fails and runs into time-outs."""
    slow, chance = SlowDevice(2, seed, slowest_s=0.01, failing=0.2), random.Random(seed)

    async def story(fleet: Fleet, answers: Answers) -> None:
        for number in range(60):
            kind = chance.choice(("grant", "revoke", "bind"))
            part, tenant = chance.choice((P0, P1)), "w" if kind == "bind" else "j"
            tag = (number, kind, part.id)
            getattr(fleet, kind)(tenant, part, tag, answers.done, answers.failed)
            if chance.random() < 0.5:
                await asyncio.sleep(chance.uniform(0.0, 0.01))
        await until(lambda: len(answers.all) == 60)
        await until(lambda: not fleet._callers["slow"]._line)
        for part in ("p0", "p1"):
            mine = [kind for kind, _, what in slow.log if what == part and kind != "bind"]
            assert (part in slow.held["j"]) == (mine[-1:] == ["grant"])
            told = [tag for tag, how in answers.how.items() if tag[2] == part and how == "done"]
            last = max((t for t in told if t[1] != "bind"), default=None)
            stuck = any(
                record.levelno >= logging.ERROR and "taken back" in record.message
                for record in caplog.records
            )
            if part in slow.held["j"] and not stuck:
                assert last is not None
                assert last[1] == "grant", "it holds what nobody was told"

    patient = {**TIMEOUT_S, "grant": 0.03, "revoke": 0.05, "bind": 0.03}

    async def main() -> None:
        slow._failing, failing = 0.0, slow._failing
        fleet, answers = Fleet([slow], patient), Answers()
        await fleet.open()
        for tenant in (JOB, WORKER):
            await fleet.attached(["slow"], tenant, 1)
        slow._failing = failing
        await story(fleet, answers)
        await fleet.close()

    asyncio.run(main())


class Shrinking(NullDevice):
    """A device that is another one with each change of layout, done or refused."""

    refuses = False

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        self._spec = msgspec.structs.replace(self._spec, repartition_ns=len(partitions))
        if self.refuses:
            raise DeviceError("no")


def test_what_a_device_says_of_itself_is_asked_again_after_a_change_of_layout() -> None:
    device = Shrinking("slow", 2)

    async def main() -> None:
        fleet, answers = Fleet([device, NullDevice("other")]), Answers()
        told: list[int] = []
        fleet.respecified = lambda spec: told.append(spec.repartition_ns)
        await fleet.open()
        fleet.repartition("slow", (P0, P1), "first", answers.done, answers.failed)
        assert [spec.repartition_ns for spec in fleet.specs] == [2, 0]
        assert fleet.partition("p1") == P1 and fleet.partition("p9") is None
        device.refuses = True
        fleet.repartition("slow", (P0,), "second", answers.done, answers.failed)
        assert answers.how == {"first": "done", "second": "failed"}
        assert [spec.repartition_ns for spec in fleet.specs] == [1, 0]
        assert fleet.partition("p1") == P1, "it has what it had"
        fleet.repartition("slow", (P1,), "third", answers.done, answers.failed)
        assert told == [2, 1], "each once"
        await fleet.close()

    asyncio.run(main())


def test_another_level_of_a_tenant_is_told_once() -> None:
    seen: list[tuple[str, str, PreemptLevel]] = []
    slow = SlowDevice(2)

    async def story(fleet: Fleet, _: Answers) -> None:
        fleet.changed = lambda *what: seen.append(what)
        for level in (PreemptLevel.GATE, PreemptLevel.NONE, PreemptLevel.NONE, PreemptLevel.GATE):
            slow.level = level
            looks = slow.looks
            fleet.look()
            await until(lambda looks=looks: slow.looks > looks)
            await until(lambda level=level: fleet.levels("slow")["j"] is level)

    play(story, slow)
    levels = [level for tenant, _, level in seen if tenant == "j"]
    assert levels == [PreemptLevel.NONE, PreemptLevel.GATE]


def test_a_look_that_fails_or_hangs_is_trouble_until_one_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caller, "LATE_S", 0.01)
    slow = SlowDevice(2)

    async def story(fleet: Fleet, _: Answers) -> None:
        slow.fail("facts", DeviceError("it fell off the bus"))
        fleet.look()
        await until(lambda: "off the bus" in fleet.trouble("slow"))
        fleet.look()
        await until(lambda: not fleet.trouble("slow"))
        let_go = slow.hang("facts")
        fleet.look()
        await until(lambda: fleet.look() or fleet.trouble("slow"))
        let_go()
        await until(lambda: fleet.look() or not fleet.trouble("slow"))

    play(story, slow)


def test_looks_go_on_while_memory_is_taken_from_a_job() -> None:
    slow = SlowDevice()

    async def story(fleet: Fleet, _: Answers) -> None:
        let_go = slow.hang("evict")
        fleet.evict("slow", "j", 1)
        for _ in range(3):
            looks = slow.looks
            fleet.look()
            await until(lambda looks=looks: slow.looks > looks)
            fleet.evict("slow", "j", 1)
        let_go()
        await until(lambda: ("evict", "j", "") in slow.log)
        fleet.look()
        await until(lambda: not fleet._callers["slow"]._evicting)
        assert slow.log.count(("evict", "j", "")) == 1, "orders that overlap are one"

    play(story, slow)
