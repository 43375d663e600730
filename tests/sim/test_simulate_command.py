"""``weft simulate`` as its user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.cli.main import main
from weft.cli.simulate.command import interval

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
    args = ["simulate", str(path), "--policies", "weft,static,exclusive", "--seeds", "2"]
    assert main([*args, "--json", str(out), "--why"]) == 0
    printed = capsys.readouterr().out
    assert "small: a test" in printed
    assert "first layout" in printed
    document = json.loads(out.read_text())
    assert set(document["best_setting"]) == {"weft", "static", "exclusive"}
    rates = {r["policy"]: r["job_rate"] for r in document["runs"]}
    assert rates["exclusive"] == 0
    assert rates["weft"] > 0


def test_a_chart(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.png"
    args = ["simulate", str(path), "--policies", "weft", "--seeds", "1", "--duration", "3s"]
    assert main([*args, "--plot", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--policies", "weft,magic"], "no policy 'magic'; there are weft"),
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


def test_interval_is_students() -> None:
    assert interval([1.0]) == 0
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.30 / 3**0.5, rel=0.01)
