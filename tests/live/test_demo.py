"""The demo: it tells its story, and Ctrl-C in the middle leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

for needed in ("torch", "sklearn", "onnx", "matplotlib"):
    pytest.importorskip(needed)

DEMO = Path(__file__).parents[2] / "examples" / "digits" / "demo.py"
PATIENCE_S = 90.0


class Demo:
    """The demo as a process of its own, recognisable with all it starts."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self._mark = f"WEFT_DEMO_TEST={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        self._output = (directory / "output").open("w+")
        (directory / "tmp").mkdir()
        self.process = subprocess.Popen(
            [sys.executable, str(DEMO), "--out", str(directory / "out"), *options],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, name: value, "TMPDIR": str(directory / "tmp")},
            start_new_session=True,
        )

    @property
    def said(self) -> str:
        return (self.directory / "output").read_text()

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.05)

    def left_behind(self) -> list[str]:
        """Processes that it (or anything it started) started, and files in its directory."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self._mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found + [str(path) for path in (self.directory / "tmp").iterdir()]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)
        self._output.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    # Not pytest's own: the path of a Unix socket must be short.
    path = Path(tempfile.mkdtemp(prefix="weft-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_a_short_run_writes_its_picture_and_its_samples(directory: Path) -> None:
    demo = Demo(directory, "--arms", "weft", "--seconds", "4")
    try:
        assert demo.process.wait(PATIENCE_S) == 0, demo.said
    finally:
        demo.end()
    picture = (directory / "out" / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    document = json.loads((directory / "out" / "demo.json").read_text())
    arm = document["arms"]["weft"]
    requests = len(document["stream"]["due_s"])
    assert len(arm["status"]) == len(arm["latency_ms"]) == len(arm["predicted"]) == requests
    assert arm["status"].count(200) > requests / 2
    assert arm["summary"]["steps_per_s"] > 0
    assert {holder for *_, holder in document["weft_core_spans"]} == {"served", "trained"}
    assert "req/s" in demo.said and "last stage" in demo.said
    assert demo.left_behind() == []


def test_ctrl_c_leaves_nothing_behind(directory: Path) -> None:
    demo = Demo(directory, "--arms", "weft", "--seconds", "30")
    try:
        demo.wait_for("Weft     ")  # the first line of the live table
        os.killpg(demo.process.pid, signal.SIGINT)
        assert demo.process.wait(30) == 130, demo.said
    finally:
        demo.end()
    assert "Traceback" not in demo.said
    assert demo.left_behind() == []
