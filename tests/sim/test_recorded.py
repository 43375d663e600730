"""Scenarios from journals: what a simulated node was asked and what it cost come out again."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cotenant.cli.main import main
from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.device import PreemptLevel
from cotenant.domain.errors import JournalError
from cotenant.domain.plan import Plan
from cotenant.domain.snapshot import Snapshot
from cotenant.domain.units import S
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.planner import Planner
from cotenant.sim.policies import Scheduled, simulate
from cotenant.sim.recorded import Recording
from cotenant.sim.scenario import Scenario
from cotenant.sim.world import World
from cotenant.telemetry.journal import checkpoint
from cotenant.telemetry.records import MAGIC, Entry, PlanRecord, Record, block
from tests.sim.test_scenario import GOOD
from tests.sim.test_world import scenario

JOB = "{name: j, cost: {rate: 5, parallel: 0.5, resume: 0ms}}"


class Journaled:
    """A run that leaves a node's journal."""

    def __init__(self, found: Scenario) -> None:
        self.scenario = found
        self.spec = found.device.spec
        first = checkpoint(Dispatcher((self.spec,)), Planner(), 0, 1.0)
        self.entries: list[Entry] = [first]
        self.outcome = World(found, Planner(), (0, 0), observer=self).run()

    def decided(self, now: int, event: e.Event, actions: list[a.Action]) -> None:
        self.entries.append(Record(now, event, tuple(actions)))

    def planned(self, now: int, snapshot: Snapshot, plan: Plan | None) -> None:
        self.entries.append(PlanRecord(now, snapshot, plan))


def arrivals(world: Journaled) -> list[int]:
    records = [x.event for x in world.entries if isinstance(x, Record)]
    return [x.request.arrived for x in records if isinstance(x, e.Arrived)]


@pytest.fixture(scope="module")
def run() -> Journaled:
    found = scenario(units=4, rate=40, jobs=JOB, seconds=90)
    return Journaled(found)


def test_what_was_asked_comes_out_again(run: Journaled) -> None:
    found = Recording(run.entries).scenario()
    (service,) = found.services
    (original,) = run.scenario.services
    assert service.spec.slo == original.spec.slo
    assert service.spec.instances == original.spec.instances
    assert service.spec.batch.max == original.spec.batch.max
    asked = [
        r.event.request
        for r in run.entries
        if isinstance(r, Record) and isinstance(r.event, e.Arrived)
    ]
    assert list(service.arrivals.times(None)) == [r.arrived for r in asked]  # type: ignore[arg-type]
    assert [j.spec.id for j in found.jobs] == ["j"]
    assert found.device.spec == run.spec


def test_what_it_cost_comes_out_again(run: Journaled) -> None:
    costs = Recording(run.entries).costs()
    (service,) = run.scenario.services
    execution = costs.executions[service.spec.name]
    assert execution.source == "measured profile"
    for units, rows, ns in execution.profile:
        assert ns == pytest.approx(service.costs["cpu"].mean(units, rows), rel=0.1)
    job = costs.jobs["j"]
    assert job.speed(4) == pytest.approx(run.scenario.jobs[0].cost.speed(4), rel=0.05)
    assert costs.device.revoke.mean == pytest.approx(20_000, rel=0.3)
    assert "90 s" in costs.device.source


def test_what_workers_had_at_hand_is_not_taken_for_what_starting_costs() -> None:
    more = "batch: {max: 1}"
    busy = Journaled(scenario(units=1, first="1ms", rate=600, more=more, latency="1s", seconds=20))
    dispatches = [x for e in busy.entries if isinstance(e, Record) for x in e.actions]
    assert sum(isinstance(x, a.Dispatch) and x.after > 0 for x in dispatches) > 1000
    costs = Recording(busy.entries).costs()
    assert costs.device.start.mean == pytest.approx(100_000, rel=0.1)
    (execution,) = costs.executions.values()
    assert execution.mean(1, 1) == pytest.approx(1_000_000, rel=0.01)


def test_the_record_simulated_again_is_like_the_run(run: Journaled) -> None:
    recording = Recording(run.entries)
    again = simulate(recording.scenario(), Scheduled(), 1)
    before, after = run.outcome.services["a"], again.services["a"]
    assert after.offered == before.offered
    for share in (0.5, 0.95):
        assert after.quantile_ns(share) == pytest.approx(before.quantile_ns(share), rel=0.15)
    assert again.figures()["job_rate"] == pytest.approx(run.outcome.figures()["job_rate"], rel=0.05)


def test_windows_are_put_end_to_end(run: Journaled) -> None:
    windows = [(10 * S, 20 * S), (50 * S, 55 * S)]
    recording = Recording(run.entries, windows)
    found = recording.scenario()
    times = list(found.services[0].arrivals.times(None))  # type: ignore[arg-type]
    inside = [at for at in arrivals(run) if any(start <= at < end for start, end in windows)]
    assert found.duration == 15 * S
    assert len(times) == len(inside)
    assert times == sorted(times)
    assert times[-1] < 15 * S


def test_a_journal_in_which_nothing_was_asked_is_refused() -> None:
    world = Journaled(scenario(rate=0, jobs=JOB, seconds=5))
    with pytest.raises(JournalError, match="no service that was asked"):
        Recording(world.entries)


def test_a_device_that_changed_is_as_it_was_at_the_end(run: Journaled) -> None:
    recording = Recording(run.entries)
    spec = msgspec.structs.replace(recording.devices[0], preempt=PreemptLevel.NONE)
    now = recording.ended
    changed = Recording([*run.entries, Record(now, e.DeviceChanged(spec), ())])
    assert changed.devices == (spec,)


def test_costs_of_another_service_are_refused(run: Journaled) -> None:
    costs = Recording(run.entries).costs()
    other = msgspec.structs.replace(costs, executions={})
    with pytest.raises(JournalError, match="say nothing of a"):
        Recording(run.entries).scenario(other)


def write(entries: list[Entry], directory: Path) -> Path:
    directory.mkdir()
    (directory / "00000001-x.cotj").write_bytes(MAGIC + block(entries))
    return directory


def test_the_command_takes_a_journal_and_other_devices(
    run: Journaled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = str(write(run.entries, tmp_path / "journal"))
    options = ["--policies", "cotenant,temporal", "--seeds", "1"]
    assert main(["simulate", "--from-journal", journal, *options]) == 0
    said = capsys.readouterr().out
    assert "a recorded run's arrivals" in said
    assert "measured profile" in said
    other = tmp_path / "other.yaml"
    other.write_text(GOOD.replace("units: 4", "units: 8"))
    assert (
        main(["simulate", str(other), "--from-journal", journal, "--costs", journal, *options]) == 0
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a scenario, or a journal"),
        (["--from-journal", "nowhere"], "cannot be read"),
        (["{scenario}", "--costs", "nowhere"], "--costs: only goes with --from-journal"),
    ],
)
def test_what_does_not_go_together_is_said(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(GOOD)
    assert main(["simulate", *(x.format(scenario=path) for x in arguments)]) != 0
    assert said in capsys.readouterr().err


def test_a_journal_of_another_version_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1.cotj").write_bytes(b"cotenant journal 1\n")
    assert main(["simulate", "--from-journal", str(tmp_path)]) != 0
    assert "journal format 1, this Cotenant reads 2" in capsys.readouterr().err
