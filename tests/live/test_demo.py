"""The demo: it tells its story, and Ctrl-C in the middle leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.marked import PATIENCE_S, Marked

for needed in ("torch", "sklearn", "onnx", "matplotlib"):
    pytest.importorskip(needed)

DEMO = Path(__file__).parents[2] / "examples" / "digits" / "demo.py"


class Demo(Marked):
    """The demo, writing into its directory."""

    def __init__(self, directory: Path, *options: str) -> None:
        super().__init__(directory, str(DEMO), "--out", str(directory / "out"), *options)


def test_a_short_run_writes_its_picture_and_its_samples(directory: Path) -> None:
    demo = Demo(directory, "--arms", "cotenant", "--seconds", "4")
    try:
        assert demo.process.wait(PATIENCE_S) == 0, demo.said
    finally:
        demo.end()
    picture = (directory / "out" / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    document = json.loads((directory / "out" / "demo.json").read_text())
    arm = document["arms"]["cotenant"]
    requests = len(document["stream"]["due_s"])
    assert len(arm["status"]) == len(arm["latency_ms"]) == len(arm["predicted"]) == requests
    assert arm["status"].count(200) > requests / 2
    assert arm["summary"]["steps_per_s"] > 0
    assert {holder for *_, holder in document["cotenant_core_spans"]} == {"served", "trained"}
    assert "req/s" in demo.said and "last stage" in demo.said
    assert demo.left_behind() == []


def test_ctrl_c_leaves_nothing_behind(directory: Path) -> None:
    demo = Demo(directory, "--arms", "cotenant", "--seconds", "30")
    try:
        demo.wait_for("Cotenant     ")  # the first line of the live table
        os.killpg(demo.process.pid, signal.SIGINT)
        assert demo.process.wait(30) == 130, demo.said
    finally:
        demo.end()
    assert "Traceback" not in demo.said
    assert demo.left_behind() == []
