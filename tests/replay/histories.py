"""Random histories of dispatcher and planner, and the journals they leave."""

from __future__ import annotations

import random
from pathlib import Path

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import PreemptLevel
from cotenant.domain.plan import Plan
from cotenant.domain.snapshot import JobFacts, ServiceFacts, Snapshot
from cotenant.domain.units import MS, S
from cotenant.policy.planner import Planner
from cotenant.telemetry.journal import Header, Journal, checkpoint
from tests.property.test_dispatcher_random import Weakening

PLAN_EVERY = 20
"""Events between two runs of the planner."""


class Recorded(Weakening):
    """Chaos beside a planner fed with random snapshots; both are written to a journal."""

    def __init__(
        self, seed: int, level: PreemptLevel, units: int, directory: Path, segment_bytes: int
    ) -> None:
        super().__init__(seed, level, units)
        self.planner = Planner()
        self.planned: list[tuple[int, Snapshot, Plan | None]] = []
        self.facts = random.Random(seed + 1)
        self.journal = Journal(directory, self.header, segment_bytes=segment_bytes, keep=1000)

    def header(self) -> Header:
        return checkpoint(self.d, self.planner, self.now, 1.7e9 + self.now / S)

    def send(self, event: e.Event) -> None:
        super().send(event)
        self.journal.append(*self.history[-1])
        if len(self.history) % PLAN_EVERY == 0:
            snapshot = self.snapshot()
            plan = self.planner.plan(snapshot)
            self.planned.append((self.now, snapshot, plan))
            self.journal.append_plan(*self.planned[-1])

    def snapshot(self) -> Snapshot:
        rate = self.facts.choice([1.0, 40.0, 400.0])
        service = ServiceFacts(
            name="s0", objective=50 * MS, percentile=99.0, guaranteed=0.0, limit=1.0, max_batch=8,
            rate=rate, rate_trend=0.0, p95=9 * MS,
            refused=0, answered=int(rate), exec_ns={"cpu": {"1x1": 5 * MS, "1x8": 20 * MS}},
        )  # fmt: skip
        jobs = tuple(JobFacts(j, 1.0, 0.0, 1.0, 1.0, 0) for j in sorted(self.jobs))
        plan = self.d.state.plan
        return Snapshot(self.now, self.devices, plan, (service,), jobs)


def record(
    directory: Path,
    seed: int = 1,
    level: PreemptLevel = PreemptLevel.PRIORITY,
    units: int = 2,
    steps: int = 250,
    segment_bytes: int = 8000,
) -> Recorded:
    """A random history written to ``directory``, rotated often."""
    world = Recorded(seed, level, units, directory, segment_bytes)
    world.journal.open()
    world.run(steps)
    world.journal.close()
    assert world.journal.dropped == 0 and world.journal.error is None
    return world


def tamper(action: a.Action) -> a.Action:
    """The same action with another cause: the least change there is."""
    fields = {name: getattr(action, name) for name in action.__struct_fields__}
    return type(action)(**{**fields, "cause": "tampered"})
