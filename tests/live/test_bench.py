"""The colocation benchmark: it reports every arm, and however it ends nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.marked import PATIENCE_S, Marked

for needed in ("torch", "onnx"):
    pytest.importorskip(needed)

COMMAND = ("-m", "cotenant", "bench", "colocate", "--load", "0.1", "--seconds", "1", "--arms")


def test_every_arm_is_reported_for_services_of_several_lengths(directory: Path) -> None:
    out = directory / "out.json"
    arms = ("alone", "train", "cotenant")
    options = ("--rounds", "1", "--json", str(out), "--service", "1ms,10ms")
    bench = Marked(directory, *COMMAND, ",".join(arms), *options)
    try:
        assert bench.process.wait(PATIENCE_S) == 0, bench.said
    finally:
        bench.end()
    short, long = json.loads(out.read_text())["loads"]
    assert 2 * short["exec_ms"] < long["exec_ms"]
    for load in (short, long):
        for arm in arms:
            figures = load["arms"][arm]
            assert (figures["train_rate"] > 0) == (arm != "alone"), figures
            assert (figures["p99_ms"] is None) == (arm == "train"), figures
        assert set(load["ratios"]["cotenant"]) >= {"p99_vs_alone", "train_vs_left"}
    assert left_behind(bench) == []


def test_every_arm_is_reported_for_a_language_model(directory: Path) -> None:
    pytest.importorskip("tokenizers")
    write = pytest.importorskip("tests.unit.llm_files").write
    model = write(directory / "tiny.gguf", text=True, context_length=128)
    out = directory / "out.json"
    arms = ("alone", "train", "unmanaged", "cotenant")
    options = ("--llm", "--model", str(model), "--answer", "6", "--rounds", "1")
    bench = Marked(directory, *COMMAND, ",".join(arms), *options, "--json", str(out))
    try:
        assert bench.process.wait(PATIENCE_S) == 0, bench.said
    finally:
        bench.end()
    (load,) = json.loads(out.read_text())["loads"]
    assert load["rate"] == pytest.approx(load["load"] * load["sustained_rate"])
    for arm in arms:
        raw, figures = load["rounds"][0]["raw"][arm], load["arms"][arm]
        assert (figures["train_rate"] > 0) == (arm != "alone"), figures
        assert figures["failed"] == 0
        assert bool(raw["samples"]) == (arm != "train")
        for sample, status in zip(raw["samples"], raw["status"], strict=True):
            assert (sample.get("tokens") == 6) == (status == 200), raw
            assert bool(sample) == (status == 200)
    assert {"ttft_p99_vs_alone", "tpot_p99_vs_alone", "train_vs_left"} <= set(
        load["ratios"]["cotenant"]
    )
    assert left_behind(bench) == []


def test_a_language_model_that_is_not_there_is_said_so(directory: Path) -> None:
    bench = Marked(directory, *COMMAND, "alone,train", "--llm", "--model", "nowhere.gguf")
    try:
        assert bench.process.wait(PATIENCE_S) != 0
    finally:
        bench.end()
    assert "nowhere.gguf" in bench.said
    assert "Traceback" not in bench.said


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_however_it_ends_nothing_is_left_behind(directory: Path, sent: signal.Signals) -> None:
    bench = Marked(directory, *COMMAND, "alone,train,cotenant", "--rounds", "60")
    try:
        bench.wait_for("round 1/60")
        os.kill(bench.process.pid, sent)
        code = bench.process.wait(60)
    finally:
        bench.end()
    assert "Traceback" not in bench.said
    if sent == signal.SIGKILL:
        end = time.monotonic() + PATIENCE_S
        while left := [x for x in left_behind(bench) if not x.startswith(str(directory))]:
            assert time.monotonic() < end, left
            time.sleep(0.1)
    else:
        assert code == 130
        assert left_behind(bench) == []


def test_who_is_told_to_stop_before_the_first_round_leaves_nothing_behind(directory: Path) -> None:
    """While it measures how long a request takes, with a node and a load generator."""
    bench = Marked(directory, *COMMAND, "alone,train")
    try:
        end = time.monotonic() + PATIENCE_S
        while not any("loadgen" in each for each in bench.left_behind()):
            assert time.monotonic() < end, bench.said
            time.sleep(0.05)
        bench.process.terminate()
        assert bench.process.wait(60) == 130
    finally:
        bench.end()
    assert "Traceback" not in bench.said
    assert left_behind(bench) == []


def left_behind(bench: Marked) -> list[str]:
    """All but the caches that PyTorch makes for itself."""
    return [x for x in bench.left_behind() if "/torchinductor_" not in x and "/.ses" not in x]
