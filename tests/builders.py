"""Small builders: what a test arranges, in a line each."""

from __future__ import annotations

from typing import Any

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import DeviceSpec, Partition, PreemptLevel
from cotenant.domain.plan import Plan
from cotenant.domain.profile import Figures, ModelProfile
from cotenant.domain.request import Request
from cotenant.domain.units import MS, S
from cotenant.engines.base import Engine, Opening, TurnEngine
from cotenant.engines.registry import choose
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.invariants import check
from cotenant.policy.state import DispatcherState, WorkerState


def open_engine(opening: Opening) -> Engine | TurnEngine:
    """The engine that a worker would open; raises ModelError."""
    return choose(opening).open(opening)


def cpu(
    units: int, level: PreemptLevel = PreemptLevel.PRIORITY, id: str = "cpu", **kwargs: Any
) -> DeviceSpec:
    """A device of so many cores, which it can group in any way."""
    return DeviceSpec(
        id=id,
        kind=kwargs.pop("kind", "cpu"),
        units=tuple(range(units)),
        memory=kwargs.pop("memory", 0),
        shapes=tuple(range(1, units + 1)),
        preempt=level,
        revoke_ns=20_000,
        repartition_ns=100_000,
        **kwargs,
    )


def plan(
    services: dict[str, tuple[int, ...]],
    jobs: dict[str, tuple[int, ...]] | None = None,
    version: int = 1,
    **kwargs: Any,
) -> Plan:
    """One single-core partition ``p<core>`` per core named; service partitions are lendable."""
    jobs = jobs or {}
    cores = sorted({c for cs in (*services.values(), *jobs.values()) for c in cs})
    names = {c: f"p{c}" for c in cores}
    lendable = sorted({names[c] for cs in services.values() for c in cs})
    return Plan(
        version=version,
        partitions=tuple(Partition(names[c], "cpu", (c,)) for c in cores),
        services={s: tuple(names[c] for c in cs) for s, cs in services.items()},
        jobs={j: tuple(names[c] for c in cs) for j, cs in jobs.items()},
        lendable=tuple(kwargs.pop("lendable", lendable)),
        **kwargs,
    )


class World:
    """A dispatcher with a hand-driven clock; every event is followed by ``check``."""

    def __init__(self, level: PreemptLevel = PreemptLevel.PRIORITY, units: int = 2) -> None:
        self.d = Dispatcher((cpu(units, level),))
        self.now = 1 * S
        self.next_id = 0

    def send(self, event: e.Event, after: int = 0) -> list[a.Action]:
        self.now += after
        actions = self.d.handle(self.now, event)
        check(self.d)
        return actions

    def service(self, name: str = "s", objective: int = 50 * MS, **kwargs: Any) -> World:
        kwargs.setdefault("max_batch", 8)
        kwargs.setdefault("max_queue", 100)
        self.send(e.ServiceAdded(name, objective, **kwargs))
        return self

    def worker(
        self, name: str = "w0", service: str = "s", version: str = "1", exec_ns: int = 2 * MS
    ) -> World:
        profile = tuple((u, n, exec_ns * (3 + n) // 4) for u in (1, 2) for n in (1, 2, 4, 8))
        load(self.d.state, name, service, version)
        self.send(e.WorkerUp(name, service, version, "cpu", profile))
        return self

    def offer(
        self, version: str, service: str = "s", exec_ns: int = 2 * MS, revision: int = 0
    ) -> list[a.Action]:
        """A version is offered and all its instances come up."""
        actions = self.send(e.VersionOffered(service, version, revision))
        profile = tuple((u, n, exec_ns * (3 + n) // 4) for u in (1, 2) for n in (1, 2, 4, 8))
        for load in [x for x in actions if isinstance(x, a.Load)]:
            actions += self.send(e.WorkerUp(load.worker, service, version, load.device, profile))
        return actions

    def job(self, name: str = "j", units: int = 0, **kwargs: Any) -> list[a.Action]:
        """A job that may hold so many units (0: all) comes and runs."""
        if units:
            kwargs["limit"] = units / sum(self.d.compute.values())
        actions = self.send(e.JobQueued(name, **kwargs))
        started = [x for x in actions if isinstance(x, a.Start)]
        return actions + [x for s in started for x in self.send(e.JobReady(s.job))]

    def arrive(
        self,
        service: str = "s",
        slo: int = 50 * MS,
        after: int = 0,
        more: bool = False,
        timeout: int = 0,
        lag: int = 0,
        **kwargs: Any,
    ) -> list[a.Action]:
        """A request to be answered within ``slo``, or within ``timeout`` if its client set it. The
        dispatcher hears of it ``lag`` after it came, as it always does live."""
        self.now += after
        self.next_id += 1
        due = self.now + (timeout or slo)
        kwargs.setdefault("expires", due if timeout else 0)
        request = Request(self.next_id, service, self.now, due, **kwargs)
        return self.send(e.Arrived(request, more), after=lag)

    def planned(self, *args: Any, **kwargs: Any) -> list[a.Action]:
        """Send a plan and answer the repartition it may ask for."""
        actions = self.send(e.Planned(plan(*args, **kwargs)))
        for action in list(actions):
            if isinstance(action, a.Repartition):
                actions += self.send(e.Repartitioned(action.device, action.version))
        return actions


def load(
    state: DispatcherState, name: str, service: str, version: str = "1", device: str = "cpu"
) -> None:
    """As if an instance of a version that serves had been ordered under this name."""
    state.workers[name] = WorkerState(name, service, version, device)
    served = state.services[service]
    served.versions.setdefault(version, 0)
    served.version = served.version or version


def profiled(kind: str = "cpu", most_units: int = 4) -> ModelProfile:
    """What ``cotenant profile`` could have found: 10 ms for a row, less on more units."""
    counts = [units for units in (1, 2, 4) if units <= most_units]
    sizes = [(units, rows) for units in counts for rows in (1, 2, 4, 8)]
    return ModelProfile(
        model="a",
        version="1",
        kind=kind,
        device="",
        engine="onnxruntime",
        date="2026-01-01T00:00:00+00:00",
        units=most_units,
        libraries={},
        files=(),
        load_ns=2 * S,
        memory_loaded=50 * 2**20,
        memory_peak=60 * 2**20,
        host_peak=60 * 2**20,
        unjoined="",
        figures=tuple(
            Figures(u, r, 9, (8 + 2 * r) * MS // u, (9 + 2 * r) * MS // u, 0.1) for u, r in sizes
        ),
    )


def only(actions: list[a.Action], kind: type[Any]) -> list[Any]:
    """The actions of one kind."""
    return [x for x in actions if isinstance(x, kind)]


def one(actions: list[a.Action], kind: type[Any]) -> Any:
    """The single action of one kind."""
    found = only(actions, kind)
    assert len(found) == 1, f"wanted one {kind.__name__}, got {actions}"
    return found[0]
