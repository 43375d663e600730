"""``cotenant plan`` and ``explain`` on a node that runs."""

from __future__ import annotations

import subprocess
import sys

from tests.live.conftest import Boxes

WAITS = ("sh", "-c", "while :; do sleep 0.05; done")
STAND_IN = {"kind": "null", "id": "other", "units": 3}


def test_a_dry_run_shows_what_would_come_and_changes_nothing(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "scale")
    devices = [STAND_IN, {"kind": "cpu"}]
    box.configure([{"name": "scale", "kinds": "cpu"}], devices=devices).start()
    box.submit(*WAITS, kinds=("cpu",))
    box.until(lambda: box.job("job").partitions)
    plain = box.control.plan()
    assert "next" not in plain
    where = {name for p in plain["plan"]["partitions"] for name in p["services"]}
    assert where == {"scale"}
    for _ in range(20):
        found = box.control.plan(dry_run=True)
        there = found["plan"]["partitions"]
        assert {p["id"] for p in there} == {p["id"] for p in box.status()["partitions"]}
        assert [d["id"] for d in found["devices"]] == ["other", "cpu"]
        assert all(d["steps"] == [] and not d["problem"] for d in found["devices"])


def test_explain_says_which_engine_executes_what(boxes: Boxes) -> None:
    box = boxes()
    box.model("work", "m", layers=2)
    box.configure([{"name": "m"}]).start()
    told = subprocess.run(
        [sys.executable, "-m", "cotenant", "explain", "--state-dir", str(box.state)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "onnxruntime" in told and "MatMul" in told and "rows on units" in told
