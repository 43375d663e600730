"""``cotenant demo llm`` on a real box: it answers, and however it ends nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cotenant.devices import proctree
from tests.marked import PATIENCE_S, Marked
from tests.unit.llm_files import TOKENS, write

READY = "Ask something"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    likely = {len(TOKENS) - 1: 5.0, TOKENS.index("a"): 5.0}  # so that answers end
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return write(path, text=True, template=TEMPLATE, likely=likely, context_length=2048)


class Demo(Marked):
    """The demo, asked over a pipe."""

    def __init__(self, directory: Path, model: Path, *options: str) -> None:
        command = ("-m", "cotenant", "demo", "llm", "--model", str(model), *options)
        super().__init__(directory, *command, stdin=subprocess.PIPE)

    def ask(self, *lines: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        self.process.stdin.flush()

    def node(self) -> int:
        """The process id of the node."""
        for pid in proctree.descendants(self.process.pid):
            if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
        raise AssertionError("there is no node")

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        super().end()


@pytest.fixture
def demo(directory: Path, model: Path) -> Iterator[Demo]:
    demo = Demo(directory, model)
    yield demo
    demo.end()


def test_questions_are_answered_and_nothing_is_left(demo: Demo) -> None:
    demo.ask("hello", "/stats", "/train off", "hello again")
    assert demo.process.stdin is not None
    demo.process.stdin.close()
    assert demo.process.wait(PATIENCE_S) == 0, demo.said
    assert demo.said.count("first token ") >= 2 + 1  # and once in the table
    assert "steps/s" in demo.said and "training off" in demo.said
    assert "objective p95" in demo.said
    assert "\x1b" not in demo.said
    assert demo.left_behind() == []


def test_what_is_kept_stays_and_nothing_else_does(directory: Path, model: Path) -> None:
    kept = directory / "kept"
    demo = Demo(directory, model, "--no-train", "--keep", str(kept))
    try:
        demo.ask("hello", "/quit")
        assert demo.process.wait(PATIENCE_S) == 0, demo.said
    finally:
        demo.end()
    assert (kept / "cotenant.yaml").is_file() and (kept / "log").is_file()
    assert "training off" in demo.said
    assert demo.left_behind() == []


def test_a_node_that_dies_is_told_and_nothing_is_left(demo: Demo) -> None:
    demo.wait_for(READY)
    demo.ask("hello")
    demo.wait_for("you: hello")
    os.kill(demo.node(), signal.SIGKILL)
    assert demo.process.wait(PATIENCE_S) == 1, demo.said
    assert "the node was killed by SIGKILL" in demo.said
    assert "Traceback" not in demo.said
    assert demo.left_behind() == []


@pytest.mark.parametrize(
    ("number", "when"),
    [(signal.SIGTERM, "starting a node"), (signal.SIGHUP, READY), (signal.SIGINT, READY)],
)
def test_a_signal_leaves_nothing_behind(demo: Demo, number: signal.Signals, when: str) -> None:
    demo.wait_for(when)
    demo.process.send_signal(number)
    assert demo.process.wait(PATIENCE_S) == 128 + number, demo.said
    assert "Traceback" not in demo.said
    assert demo.left_behind() == []
