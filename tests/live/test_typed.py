"""What the README and the how-tos tell a reader to type is typed here, block by block, in copies of
the repository: a box is such a copy, and the node that serves in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import pages
from tests.installed import SITE
from tests.pages import ROOT

PATIENCE_S = 60.0
pytestmark = pytest.mark.timeout(300)
BIN = Path(sys.executable).parent
CANNOT = {
    "make demo": "makes an environment and takes minutes; tests/live/test_demo.py runs the demo",
    "make test": "is what runs this test",
    "make wheel": "compiles; tests/live/test_wheel.py looks at what make test built",
    "pip install": "installs packages",
    "cotenant demo": "takes a minute; tests/live/test_first_minutes.py and test_demo_llm.py run it",
    "cotenant serve model.onnx": "needs a model of the reader's; test_first_minutes.py serves one",
    "make deb": "fetches packages; tests/live/test_debian.py makes one without what it would fetch",
    "sudo": "changes the machine; tests/live/test_debian.py installs in a root of its own",
    "podman": "fetches an image; tests/unit/test_deploying.py looks at the container file",
    "kubectl": "needs a cluster; tests/unit/test_manifests.py checks what is applied",
    "helm": "needs a cluster; tests/unit/test_deploying.py renders the chart",
}
"""Commands, by how they begin, that no test can type, and why. tests/unit/test_docs.py looks at
them all the same: files that they name are there, commands of ours parse."""

ALL = [(page, block) for page in pages.TYPED for block in pages.commands(page)]
README = [block for page, block in ALL if page == ROOT / "README.md"]
BOXES = [block for page, block in ALL if page.name == "howto-several-boxes.md"]


def why_not(command: str) -> str:
    """Why it cannot be typed here, or ""."""
    return next((why for start, why in CANNOT.items() if command.startswith(start)), "")


class Box:
    """A copy of what the commands need. ``given``: what a reader would replace in them, and by
    what."""

    def __init__(self, root: Path, given: dict[str, str]) -> None:
        self.root, self.given = root, given
        self.typed: list[str] = []
        self._serving: list[subprocess.Popen[str]] = []
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self._env = {**os.environ, "PATH": path, "PYTHONPATH": SITE}
        self._env.pop("COTENANT_STATE_DIR", None)
        for name in ("quickstart", "moving"):
            shutil.copytree(
                ROOT / "examples" / name,
                root / "examples" / name,
                ignore=shutil.ignore_patterns("models", "cotenant-state", "__pycache__"),
            )
        for file in root.glob("examples/*/*.*"):
            file.write_text(self.replaced(file.read_text()))

    def replaced(self, text: str) -> str:
        for written, meant in self.given.items():
            text = text.replace(written, meant)
        return text

    def say(self, command: str, cwd: Path | None = None) -> str:
        """What a command prints that ends by itself."""
        self.typed.append(command)
        done = subprocess.run(
            ["bash", "-c", self.replaced(command)],
            cwd=cwd or self.root,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, command: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        """One that stays in its terminal."""
        self.typed.append(command)
        return subprocess.Popen(
            ["bash", "-c", f"exec {self.replaced(command)}"],
            cwd=cwd or self.root,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def serve(self, command: str, ready: Callable[[], object], cwd: Path | None = None) -> None:
        process = self.start(command, cwd)
        self._serving.append(process)
        until(lambda: ready() or process.poll() is not None)
        assert process.poll() is None, process.stdout and process.stdout.read()

    def close(self) -> None:
        for process in self._serving:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        self._serving.clear()


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def boxes(directory: Path) -> Iterator[Callable[[str, dict[str, str]], Box]]:
    if not (BIN / "cotenant").exists():
        pytest.skip("the command cotenant is not installed beside this Python")
    made: list[Box] = []

    def box(name: str, given: dict[str, str]) -> Box:
        made.append(Box(directory / name, given))
        return made[-1]

    yield box
    for one in made:
        one.close()


def test_the_quick_start(boxes: Callable[[str, dict[str, str]], Box]) -> None:
    for module in ("onnx", "sklearn", "tritonclient"):
        pytest.importorskip(module)
    box = boxes("box", {"127.0.0.1:8000": free_port(), "127.0.0.1:8001": free_port()})
    said = {}
    for block in README:
        cwd = box.root
        for command in block:
            if why_not(command):
                continue
            if command.startswith("cd "):
                cwd = box.root / command.removeprefix("cd ")
                box.typed.append(command)
            elif command.startswith("cotenant serve"):
                box.serve(command, lambda: serving(box), cwd)
            elif command == "cotenant top":
                watched = box.start(command, cwd)
                assert watched.stdout
                assert any("digits" in line for line in watched.stdout)
                watched.send_signal(signal.SIGINT)
                watched.communicate(timeout=PATIENCE_S)
            else:
                said[command] = box.say(command, cwd)
    assert "it is a" in said["python client.py"]
    assert all(text.strip() for text in said.values())
    assert box.typed == [c for block in README for c in block if not why_not(c)]


def serving(box: Box) -> bool:
    """Whether a client would be answered."""
    with contextlib.suppress(OSError):
        asked = f"http://{box.given['127.0.0.1:8000']}/v2/models/digits/ready"
        with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
            return bool(answer.status == 200)
    return False


def test_a_job_moves_to_another_box(
    boxes: Callable[[str, dict[str, str]], Box], tmp_path: Path
) -> None:
    first, second = (block for block in BOXES if not any(map(why_not, block)))
    shared = tmp_path / "shared"
    given = {"/shared/train": str(shared)}

    def node(name: str) -> Box:
        box = boxes(name, given)
        (box.root / "node.yaml").write_text("node: {http: null, grpc: null}\n")
        control = box.root / "cotenant-state" / "control.sock"
        box.serve("cotenant serve node.yaml", control.exists)
        box.typed.clear()
        return box

    box = node("first")
    run, *rest = first
    box.say(run)
    until(lambda: list(shared.glob("step-*.npz")))
    told = [box.say(command) for command in rest][-1]
    assert '"checkpoint": ' in told
    assert box.typed == first
    until(lambda: '"running"' not in box.say("cotenant jobs --json"))
    box.close()

    newest = max(shared.glob("step-*.npz"))
    given["step-000001234.npz"] = newest.name
    box = node("second")
    for command in second:
        box.say(command)
    assert box.typed == second
    step = int(newest.stem.removeprefix("step-"))
    until(lambda: f"goes on from step {step}" in box.say("cotenant logs train"))
    box.say("cotenant cancel train")


UNTYPED = [
    pytest.param(why_not(command), id=f"{page.name}: {command}")
    for page, block in ALL
    for command in block
    if why_not(command)
]


@pytest.mark.parametrize("why", UNTYPED)
def test_what_cannot_be_typed_here(why: str) -> None:
    pytest.skip(why)


def test_every_block_is_typed_or_said_not_to_be() -> None:
    """A page whose commands no test above types has none that could be."""
    typed = [*README, *BOXES]
    rest = [c for _, block in ALL if block not in typed for c in block]
    assert not [command for command in rest if not why_not(command)]
    commands = [command for _, block in ALL for command in block]
    assert all(any(c.startswith(start) for c in commands) for start in CANNOT)
