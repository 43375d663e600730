"""What the commands print: right in a narrow terminal, with nothing measured, with odd names."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from cotenant.cli.views import (
    busy_bar,
    engines_view,
    explain_view,
    jobs_view,
    number,
    percent,
    plain,
    replay_view,
    seconds,
    status_view,
    top_view,
)
from cotenant.sim.replay import Difference, Report
from cotenant.telemetry.explain import (
    Explanation,
    Incident,
    Pause,
    PlanChange,
    RefusalGroup,
    SlowRequest,
)
from cotenant.telemetry.records import Gap


def show(view: RenderableType, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(view)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def status(**changes: Any) -> dict[str, Any]:
    job = {
        "id": "a1b2c3d4", "name": "train", "state": "running", "command": ["python", "t.py"],
        "weight": 1.0, "guaranteed": 0.25, "created": 1.0, "restarts": 2, "pid": 9,
        "exit_code": None, "reason": "", "progress": 1200.0, "progress_unit": "steps",
        "rate": 3.25, "cpu_s": 8.0, "held_s": 75.0, "pauses": 4, "partitions": ["cpu:0", "cpu:1"],
        "metrics": {"loss": 0.123456},
    }  # fmt: skip
    service = {
        "name": "digits", "model": "digits", "version": "3", "state": "READY", "reason": "",
        "objective_ms": 20.0, "percentile": 99.0, "rate": 150.5, "queue": 2, "batch_mean": 3.4,
        "p50_ms": 4.0, "p95_ms": 11.0, "p99_ms": 25.0, "attainment": 0.982, "misses": 12,
        "refused": {"OVERLOADED": 3, "EXPIRED": 0}, "answered": 5000, "workers": 1,
    }  # fmt: skip
    partition = {
        "id": "cpu:0", "device": "cpu", "units": [0], "services": ["digits"], "owners": [],
        "holder": "job:a1b2c3d4", "slice_ms": 40.0,
        "busy": {"service:digits": 0.31, "job:a1b2c3d4": 0.6}, "revoke_p50_us": 20.0,
        "revoke_p99_us": 90.0, "switches": 1234,
    }  # fmt: skip
    whole = {
        "version": "0.1.0", "pid": 17, "uptime_s": 3700.0, "state_dir": "cotenant-state",
        "http": "127.0.0.1:8000", "grpc": None, "ready": True, "draining": False,
        "devices": [
            {"id": "cpu", "kind": "cpu", "units": [0, 1], "level": "PRIORITY", "trains": True,
             "memory": 8 * 2**30, "limits": ["no real-time scheduling"],
             "tenants": {"a1b2c3d4": {"level": "PRIORITY", "memory": 3 * 2**20}}},
            {"id": "other", "kind": "null", "units": [0], "level": "GATE", "trains": False,
             "memory": 0, "limits": ["a stand-in"],
             "tenants": {"digits#1": {"level": "GATE", "memory": None}}},
        ],
        "plan": {"version": 3, "reasons": ["job train came"], "age_s": 12.0},
        "partitions": [partition, {**partition, "id": "cpu:1", "holder": "batch:digits"}],
        "services": [service], "jobs": [job],
        "journal": {"directory": "cotenant-state/journal", "dropped": 0, "error": None},
    }  # fmt: skip
    return {**whole, **changes}


def nulls(value: Any) -> Any:
    """The same with every number None, as before anything was measured."""
    if isinstance(value, dict):
        return {key: nulls(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [nulls(inner) for inner in value]
    return None if isinstance(value, int | float) and not isinstance(value, bool) else value


def test_top_shows_who_runs_where_and_how_well() -> None:
    text = show(top_view(status()))
    row = next(line for line in text.splitlines() if line.startswith("cpu:0"))
    assert row.split()[1:3] == ["cpu", "train"], "a job is shown by its name"
    assert "██████▒▒▒▒▒▒▒▒▒▒▒▒··" in row
    assert "train 60%, digits 31%" in row
    assert "40ms" in row and "90us" in row and "1,234" in row
    row = next(line for line in text.splitlines() if line.startswith("digits"))
    for part in ("150.5", "25.0", "p99 20ms", "98.2%", "3 overloaded", "READY"):
        assert part in row
    row = next(line for line in text.splitlines() if line.startswith("a1b2c3d4"))
    for part in ("running", "cpu:0 cpu:1", "1,200 steps", "3.25", "1m15s", "guaranteed 25%"):
        assert part in row
    assert text.rstrip().endswith("plan 3 (12.0s old): job train came")


def test_status_tells_addresses_device_and_what_it_lacks() -> None:
    text = show(status_view(status()))
    for part in ("ready", "up 1h01m", "http 127.0.0.1:8000", "no real-time", "a stand-in"):
        assert part in text
    cpu, other = (x for x in text.splitlines() if x.startswith("device"))
    for part in ("cpu", "2 units", "8GiB", "level PRIORITY", "train 3MiB"):
        assert part in cpu
    for part in ("other", "1 units", "level GATE", "jobs do not run here"):
        assert part in other
    assert "digits#1" not in other, "what is not known is not shown"
    assert "grpc" not in text


@pytest.mark.parametrize("width", [20, 40, 80, 300])
@pytest.mark.parametrize("view", [status_view, top_view])
def test_no_line_is_wider_than_the_terminal(view: Any, width: int) -> None:
    assert max(map(len, show(view(status()), width).splitlines())) <= width


@pytest.mark.parametrize("view", [status_view, top_view])
def test_nothing_measured_yet_is_a_dash(view: Any) -> None:
    text = show(view(nulls(status())))
    assert "–" in text and "None" not in text


@pytest.mark.parametrize("view", [status_view, top_view])
def test_an_empty_node_is_shown(view: Any) -> None:
    text = show(view(status(partitions=[], services=[], jobs=[], plan={}, journal={}, device={})))
    assert "no services" in text and "no plan yet" in text
    show(view({}))


def test_names_are_never_markup_nor_control_sequences() -> None:
    job = status()["jobs"][0]
    text = show(jobs_view([{**job, "name": "[red]x[/]", "reason": "a\x1b[31mb\nc"}]))
    assert "[red]x[/]" in text
    assert "\x1b" not in text and "a?[31mb?c" in text


def test_a_paused_partition_and_a_failing_journal_are_said() -> None:
    whole = status(journal={"directory": "j", "dropped": 1500, "error": "cannot write j: full"})
    whole["partitions"][0]["slice_ms"] = 0
    text = show(top_view(whole, problem="no answer"))
    for part in ("paused", "cannot write j: full", "1,500 records were dropped", "no answer"):
        assert part in text


def test_an_unavailable_service_says_why() -> None:
    service = {**status()["services"][0], "state": "UNAVAILABLE", "reason": "bad opset"}
    assert "UNAVAILABLE: bad opset" in show(status_view(status(services=[service])))


@pytest.mark.parametrize(
    "busy", [{}, {"a": 0.5}, {"a": 1.2}, {"a": 0.33, "b": 0.33, "job:c": 0.34}, {"a": -1.0}]
)
def test_a_bar_is_always_as_wide_as_it_should_be(busy: dict[str, float]) -> None:
    assert len(busy_bar(busy, {}, cells=10).plain) == 10


def test_values_are_short() -> None:
    assert [number(x) for x in (None, 0.0, 12.34, 12345.6)] == ["–", "0.0", "12.3", "12,346"]
    assert [percent(x) for x in (None, 0.314)] == ["–", "31%"]
    shown = [seconds(x) for x in (None, 0.85, 12, 200, 7500, 300_000)]
    assert shown == ["–", "850ms", "12.0s", "3m20s", "2h05m", "3d11h"]
    assert plain(None).plain == "–"


def test_no_jobs_are_said_to_be_none() -> None:
    assert show(jobs_view([])) == "no jobs\n"


def test_an_explanation_has_a_section_for_each_answer() -> None:
    told = Explanation(asked=1000.0, since=900.0, until=990.0, arrived=50, answered=40)
    told.plans = [PlanChange(950.0, 4, ("s: over",), "p0 for s", "p0-1 for s")]
    told.refusals = [
        RefusalGroup("s", "OVERLOADED", "too much", 7, 0.7, 0.1, 901, 989, "request 5")
    ]
    told.jobs = [Incident(960.0, "j1", "its processes ended")]
    told.slowest = [SlowRequest(120.0, 5, "s", 970.0, "waited")]
    told.pauses = [Pause(980.0, "p0", ("s",), "p95 high", None), Pause(981.0, "p1", (), "x", 2.5)]
    told.gaps = ["5 records were lost"]
    text = show(explain_view(told))
    for part in (
        "50 requests arrived and 40 were answered in the 1m30s up to",
        "5 records were lost", "plan 4: s: over", "before: p0 for s", "after:  p0-1 for s",
        "s: OVERLOADED 7× (0.70/s, 10.0% of arrivals)", "for example, request 5",
        "j1: its processes ended", "120.0 ms  request 5 of s", "(40 s ago)",
        "p0 was not lent for all the time since: p95 high", "p1 was not lent for 2.5s",
    ):  # fmt: skip
        assert part in text
    assert "Workers lost" not in text, "no heading without an answer"
    assert "no events" in show(explain_view(Explanation(asked=1000.0)))


def test_a_replay_says_what_differed() -> None:
    report = Report(segments=2, runs=1, events=10, gaps=[Gap(3, 1, 2, "torn")], versions=["0.0.9"])
    assert "no difference" in show(replay_view(report, "0.1.0"))
    report.difference = Difference("actions", 5, 6.0, "Woke()", ("A()",), ())
    text = show(replay_view(report, "0.1.0"))
    for part in ("first difference (actions) at 5 ns: Woke()", "journal: A()", "replay:  nothing"):
        assert part in text
    assert "written by Cotenant 0.0.9, replayed by 0.1.0" in text and "gap: 3 records: torn" in text


def engine(**changes: Any) -> dict[str, Any]:
    return {
        "instance": "digits#1", "device": "cpu", "variant": "original", "engine": "onnxruntime",
        "executed": ["CPUExecutionProvider: 1 Mul"], "measured": [(1, 1, 2_000_000)],
        "profile": None, "others": [], **changes,
    }  # fmt: skip


def test_engines_say_which_others_could_open_a_model_and_how_to_choose() -> None:
    others = [
        {"engine": "openvino", "refusal": ""},
        {"engine": "tensorrt", "refusal": "it runs elsewhere"},
    ]
    profile = {
        "kind": "cpu", "engine": "openvino", "device": "A Processor", "emulated": False,
        "date": "", "measured": [(2, 4, 3_000_000)],
    }  # fmt: skip
    said = show(engines_view({"digits": [engine(others=others, profile=profile)]}))
    for what in ("openvino", "engine:", "model.yaml", "tensorrt", "it runs elsewhere"):
        assert what in said
    assert "A Processor" in said and "4 on 2: 3 ms" in said


def test_instances_that_say_the_same_say_it_once_and_each_service_says_all() -> None:
    same = {"instance": "digits#2"}
    said = show(engines_view({"digits": [engine(), engine(**same)], "other": [engine()]}))
    assert said.count("1 Mul") == 2
