"""The first five minutes on a real box: a model's file is served and asked by the line that was
printed, a first configuration serves, and the demo leaves nothing behind however it ends."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cotenant.cli.bench.model import write_model
from cotenant.cli.main import main
from cotenant.serving.control_client import ControlClient
from tests.live.conftest import scale_model, until
from tests.marked import PATIENCE_S, Marked

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")


@contextlib.contextmanager
def served(directory: Path, *command: str) -> Iterator[Marked]:
    process = Marked(directory, "-m", "cotenant", "serve", *command)
    try:
        yield process
    finally:
        process.end()


# --- a model's file ---------------------------------------------------------------------------


@needs_curl
@pytest.mark.parametrize("make", [scale_model, write_model], ids=["small", "large"])
def test_the_line_that_is_printed_works(directory: Path, make: object) -> None:
    assert callable(make)
    make(directory / "a model.onnx")
    state = directory / "state"
    options = ("--http", "127.0.0.1:0", "--latency", "25ms", "--state-dir", str(state))
    with served(directory, str(directory / "a model.onnx"), *options) as node:
        node.wait_for("curl")
        until(lambda: node.said.endswith("\n\n"))
        (line,) = re.findall(r"^.*curl .*$", node.said, re.MULTILINE)
        asked = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
        assert json.loads(asked.stdout)["outputs"], asked.stdout
        node.process.send_signal(signal.SIGINT)
        assert node.process.wait(PATIENCE_S) == 0, node.said
        assert not list(state.glob("served-*"))
        assert node.left_behind() == []


def test_a_file_that_is_no_model_ends_it_with_the_reason(directory: Path) -> None:
    (directory / "no.onnx").write_bytes(b"nothing")
    state = str(directory / "state")
    options = ("--http", "127.0.0.1:0", "--state-dir", state)
    with served(directory, str(directory / "no.onnx"), *options) as node:
        assert node.process.wait(PATIENCE_S) == 1
        assert "no.onnx cannot be served" in node.said and "Traceback" not in node.said


def test_the_first_configuration_serves(directory: Path) -> None:
    scale_model(directory / "models" / "scale" / "1" / "model.onnx")
    assert main(["init", str(directory)]) == 0
    path = directory / "cotenant.yaml"
    path.write_text(re.sub(r"127\.0\.0\.1:800\d", "127.0.0.1:0", path.read_text()))
    with served(directory, str(path)) as node:
        node.wait_for("serving on")
        status = ControlClient(directory / "cotenant-state" / "control.sock").status()
        assert [service["state"] for service in status["services"]] == ["READY"]


# --- the demo ---------------------------------------------------------------------------------


@pytest.fixture
def demo(directory: Path) -> Iterator[Marked]:
    demo = Marked(directory, "-m", "cotenant", "demo", "--seconds", "6")
    yield demo
    demo.end()


def test_both_ways_are_shown_and_nothing_is_left(demo: Marked) -> None:
    assert demo.process.wait(PATIENCE_S) == 0, demo.said
    assert "http://127.0.0.1:" in demo.said and "\x1b" not in demo.said
    *_, on, off = demo.said.strip().splitlines()
    assert on.startswith("on ") and off.startswith("off ")
    assert demo.left_behind() == []


@pytest.mark.parametrize(
    ("number", "when", "code"),
    [
        (signal.SIGINT, "starting two nodes", 130),
        (signal.SIGTERM, "starting a training job", 143),
        (signal.SIGINT, "steps/s", 0),
    ],
)
def test_a_signal_leaves_nothing_behind(
    demo: Marked, number: signal.Signals, when: str, code: int
) -> None:
    demo.wait_for(when)
    demo.process.send_signal(number)
    assert demo.process.wait(PATIENCE_S) == code, demo.said
    assert "Traceback" not in demo.said
    assert demo.left_behind() == []
