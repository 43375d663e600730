"""``cotenant simulate`` as its user types it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cotenant.cli.main import main
from cotenant.cli.simulate.command import interval

SCENARIO = """
name: small
story: a test
duration: 5s
device: {kind: cpu, units: 2}
services:
  - name: a
    objective: {latency: 50ms}
    cost: {first: 5ms, per_row: 2ms}
    arrivals: {kind: poisson, rate: 20}
jobs:
  - {name: j, cost: {rate: 5}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "small.yaml"
    found.write_text(SCENARIO)
    return found


def test_a_table_a_document_and_reasons(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "out.json"
    args = ["simulate", str(path), "--policies", "cotenant,static,exclusive", "--seeds", "2"]
    assert main([*args, "--json", str(out), "--why"]) == 0
    printed = capsys.readouterr().out
    assert "small: a test" in printed
    assert "first layout" in printed
    document = json.loads(out.read_text())
    assert set(document["best_setting"]) == {"cotenant", "static", "exclusive"}
    rates = {r["policy"]: r["job_rate"] for r in document["runs"]}
    assert rates["exclusive"] == 0
    assert rates["cotenant"] > 0


def test_a_chart(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.png"
    args = ["simulate", str(path), "--policies", "cotenant", "--seeds", "1", "--duration", "3s"]
    assert main([*args, "--plot", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--policies", "cotenant,magic"], "no policy 'magic'; there are cotenant"),
        (["--seeds", "0"], "--seeds: must be at least 1"),
        (["--duration", "long"], "--duration"),
        (["--json", "/no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_bad_options_are_named(
    path: Path, args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", str(path), *args]) == 1
    assert said in capsys.readouterr().err


def test_an_objective_that_load_breaks_is_said_with_what_would_do(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    path.write_text(SCENARIO.replace("rate: 20", "rate: 300").replace("50ms", "15ms"))
    out = tmp_path / "out.json"
    args = [
        "simulate",
        str(path),
        "--policies",
        "cotenant",
        "--seeds",
        "1",
        "--json",
        str(out),
    ]
    assert main(args) == 0
    printed = " ".join(capsys.readouterr().out.split())
    (missed,) = json.loads(out.read_text())["missed"]
    assert missed["service"] == "a" and missed["met_by"] == []
    assert "a misses its objective, infeasible for every policy here: " in printed
    changes = (missed["latency"] / 1e6, 100 * missed["requests"])
    said = "the smallest change that would do is latency: {:g}ms or {:.3g} % of its requests"
    assert said.format(*changes) in printed

    def attained(text: str) -> float:
        path.write_text(text)
        assert main([*args[:-2], "--no-search", "--json", str(out)]) == 0
        (run,) = (r for r in json.loads(out.read_text())["runs"] if r["policy"] == "cotenant")
        share: float = run["services"]["a"]
        return share

    asked = path.read_text()
    assert attained(asked) == pytest.approx(missed["attained"])
    assert "would do" not in capsys.readouterr().out
    assert attained(asked.replace("15ms", f"{changes[0]:g}ms")) >= 0.99
    assert attained(asked.replace("15ms", f"{changes[0] / 1.15:g}ms")) < 0.99


def test_an_objective_that_is_met_is_not_mentioned(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    args = ["simulate", str(path), "--policies", "cotenant", "--seeds", "1", "--json", str(out)]
    assert main(args) == 0
    assert "misses" not in capsys.readouterr().out
    assert json.loads(out.read_text())["missed"] == []


def test_interval_is_students() -> None:
    assert interval([1.0]) == 0
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.30 / 3**0.5, rel=0.01)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_an_end_from_outside_leaves_no_process(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(SCENARIO.replace("duration: 5s", "duration: 100000s"))
    command = [sys.executable, "-m", "cotenant", "simulate", str(path), "--seeds", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        parent = psutil.Process(process.pid)
        workers: list[psutil.Process] = []
        # The workers are there, and have said that they ignore Ctrl-C.
        while len(workers) < 2 or not all(w.cpu_times().user > 0.5 for w in workers):
            assert process.poll() is None
            time.sleep(0.05)
            workers = parent.children()
        process.send_signal(sent)
        _, said = process.communicate(timeout=30)
        assert process.returncode == code
        assert said == b""
        _, left = psutil.wait_procs(workers, timeout=30)
    assert left == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--duration", "0s"], "--duration: must be longer than 0"),
        (["--duration", ""], "--duration: "),
        (["--json", "."], "is a folder"),
        (["--json", "x", "--plot", "x"], "is named twice"),
        (["--json", "/dev/full"], "cannot write"),
    ],
)
def test_what_cannot_be_written_or_run_is_said(
    path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["simulate", str(path), "--policies", "cotenant", "--seeds", "1", *options]) == 1
    assert said in capsys.readouterr().err


def test_a_policy_that_is_not_modelled_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    two = "devices: [{kind: cpu, name: x, units: 1}, {kind: cpu, name: y, units: 1}]"
    path = tmp_path / "two.yaml"
    path.write_text(SCENARIO.replace("device: {kind: cpu, units: 2}", two))
    assert main(["simulate", str(path), "--policies", "shared,cotenant,tgs", "--seeds", "1"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out: shared, tgs (not modelled where several devices train)" in printed
    assert main(["simulate", str(path), "--policies", "shared,tgs", "--seeds", "1"]) == 1
    assert "add cotenant" in capsys.readouterr().err
