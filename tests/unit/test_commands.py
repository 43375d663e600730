"""The commands against a control server with a node made of answers."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cotenant.cli import commands
from cotenant.cli.joblog import JobLog
from cotenant.cli.submitting import has_input, inherited
from cotenant.domain.actions import Action, WakeAt
from cotenant.domain.device import DeviceSpec
from cotenant.domain.errors import (
    EnvironmentProblem,
    InvalidRequest,
    JournalError,
    NotFound,
)
from cotenant.domain.events import Event
from cotenant.domain.port import IndexEntry, JobStatus
from cotenant.domain.units import S
from cotenant.domain.workload import JobSpec, RestartPolicy
from cotenant.optimize import arguments
from cotenant.optimize.recipes.known import chosen, lacking
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.state import DispatcherState
from cotenant.serving.control import ControlServer
from tests.replay.histories import record
from tests.unit.test_plan_view import plan_document
from tests.unit.test_views import status

PROGRAM = """
import argparse, sys
from cotenant.cli.commands import add_commands
parser = argparse.ArgumentParser()
add_commands(parser.add_subparsers(required=True))
args = parser.parse_args()
sys.exit(args.func(args))
"""


class StubNode:
    """Answers what the commands ask; one job, ``train``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.submitted: list[JobSpec] = []
        self.asked: list[tuple[str, str]] = []
        self.state, self.reason = "running", ""
        self.code: int | None = None

    def status(self) -> dict[str, Any]:
        journal = {"directory": str(self.directory / "journal"), "dropped": 0, "error": None}
        return status(journal=journal, state_dir=str(self.directory))

    def plan(self, dry_run: bool) -> dict[str, Any]:
        return plan_document(dry_run)

    def jobs(self) -> list[JobStatus]:
        job = JobStatus("a1b2c3d4", "train", self.state, ("x",), 1.0, 0.0, 1.0, 0)
        return [msgspec.structs.replace(job, reason=self.reason, exit_code=self.code)]

    def submit_job(self, spec: JobSpec) -> str:
        self.submitted.append(spec)
        return "a1b2c3d4"

    def cancel_job(self, ref: str) -> str:
        return self._ask("cancel", ref)

    def hold_job(self, ref: str) -> str:
        return self._ask("hold", ref)

    def resume_job(self, ref: str) -> str:
        return self._ask("resume", ref)

    def job_log_path(self, ref: str) -> str:
        self._ask("log", ref)
        return str(self.directory / "log")

    async def checkpoint_job(self, ref: str, within_s: float) -> str:
        self._ask("checkpoint", ref)
        return "/checkpoints/step-9"

    def index(self) -> list[IndexEntry]:
        return [IndexEntry("digits", "2", "READY", ""), IndexEntry("other", "", "UNAVAILABLE", "")]

    async def load(self, name: str) -> None:
        self.asked.append(("load", name))

    async def unload(self, name: str) -> None:
        self.asked.append(("unload", name))

    async def rollback(self, name: str) -> str:
        self.asked.append(("rollback", name))
        return "1"

    def _ask(self, what: str, ref: str) -> str:
        if ref not in ("train", "a1b2c3d4", "a1"):
            raise NotFound(f"there is no job {ref!r}")
        self.asked.append((what, ref))
        return "a1b2c3d4"


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubNode]:
    """A stub node behind a real control server in a thread of its own."""
    stub, loop, stop = StubNode(tmp_path), asyncio.new_event_loop(), asyncio.Event()
    ready = threading.Event()

    async def serve() -> None:
        server = ControlServer(stub, tmp_path / "control.sock", stop.set)  # type: ignore[arg-type]
        await server.start()
        ready.set()
        await stop.wait()
        await server.stop()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    monkeypatch.setenv("COTENANT_STATE_DIR", str(tmp_path))
    monkeypatch.setattr(commands, "FOLLOW_S", 0.01)
    monkeypatch.setattr(commands, "ASK_S", 0.02)
    yield stub
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


def cotenant(*argv: str) -> int:
    """Run a command as ``main`` does."""
    parser = argparse.ArgumentParser(prog="cotenant")
    commands.add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(argv)
    return int(args.func(args))


def child(*argv: str, **kwargs: Any) -> subprocess.Popen[bytes]:
    """The same in a process of its own."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", PROGRAM, *argv]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, **kwargs)


def test_status_jobs_and_top_show_the_node(
    node: StubNode, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["status"], ["jobs"], ["top", "--once"], ["plan"], ["plan", "--dry-run"]):
        assert cotenant(*argv) == 0
        shown = capsys.readouterr().out
        assert "train" in shown and "\x1b" not in shown, "no colours in a pipe"


def test_json_is_what_the_node_said(node: StubNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert cotenant("status", "--json") == 0
    assert json.loads(capsys.readouterr().out) == node.status()
    assert cotenant("plan", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out) == node.plan(dry_run=True)
    assert cotenant("jobs", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "train"


def test_without_a_node_there_is_one_clear_error(tmp_path: Path) -> None:
    for name in ("status", "jobs", "top", "plan"):
        with pytest.raises(EnvironmentProblem, match="no node is running"):
            cotenant(name, "--state-dir", str(tmp_path / "none"))


def test_the_state_directory_has_a_default(node: StubNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COTENANT_STATE_DIR", raising=False)
    monkeypatch.chdir(node.directory)
    Path("cotenant-state").symlink_to(node.directory)
    assert cotenant("jobs") == 0


def test_run_submits_the_whole_specification(
    node: StubNode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--name", "n", "--weight", "2", "--guaranteed", "25%", "--limit", "0.5"]
    options += ["--memory", "2GiB", "--restart", "always", "--max-restarts", "3"]
    options += ["--env", "A=1", "--env", "B=x=y", "--cwd", "/", "--grace", "1.5m"]
    monkeypatch.setattr(os, "environb", {b"B": b"0", b"C": b"2", b"COTENANT_STATE_DIR": b"x"})
    assert cotenant("run", *options, "--", "python", "t.py", "--name", "other", "--", "-x") == 0
    assert capsys.readouterr().out == "a1b2c3d4\n"
    assert node.submitted == [
        JobSpec(
            id="", name="n", command=("python", "t.py", "--name", "other", "--", "-x"), cwd="/",
            env={"A": "1", "B": "x=y", "C": "2"}, weight=2.0, guaranteed=0.25, limit=0.5,
            grace=90 * S, memory=2 * 2**30, restart=RestartPolicy.ALWAYS, max_restarts=3,
        )
    ]  # fmt: skip


def test_run_can_end_a_job_in_time_let_it_wait_and_try_it_again(node: StubNode) -> None:
    cotenant("run", "--time-limit", "2h", "--after", "a", "--after", "b", "--", "true")
    cotenant("run", "--retry", "3", "--", "true")
    cotenant("run", "--retry", "0", "--on", "cpu", "--", "true")
    limited, again, once = node.submitted
    assert (limited.time_limit, limited.after) == (7200 * S, ("a", "b"))
    assert (again.restart, again.max_restarts) == (RestartPolicy.ON_FAILURE, 3)
    assert (once.restart, once.kinds) == (RestartPolicy.NEVER, ("cpu",))
    with pytest.raises(InvalidRequest):
        cotenant("run", "--retry", "1", "--restart", "always", "--", "true")


def test_run_has_the_defaults_of_a_job_and_this_shells_environment_and_directory(
    node: StubNode,
) -> None:
    cotenant("run", "--", "true")
    env = inherited()[0]
    assert env
    assert node.submitted == [
        JobSpec(id="", name="", command=("true",), cwd=str(Path.cwd()), env=env)
    ]


def test_optimize_submits_a_job_that_asks_for_the_same(
    node: StubNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = tmp_path / "models" / "m" / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_text("a model")
    options = ["--recipes", "int8,nncf", "--units", "1", "--max-drop", "0.02", "--promote"]
    parsed = arguments_of(["m", "--models", str(tmp_path / "models"), *options])
    needed = chosen(parsed.recipes)
    if any(map(lacking, needed)):
        pytest.skip("a recipe lacks what it needs")
    assert cotenant("optimize", "m", "--models", str(tmp_path / "models"), *options) == 0
    assert capsys.readouterr().out == "a1b2c3d4\n"
    (spec,) = node.submitted
    assert spec.restart is RestartPolicy.NEVER
    module = spec.command.index("cotenant.optimize")
    assert spec.command[module - 1] == "-m"
    assert vars(arguments_of(spec.command[module + 1 :])) == vars(parsed)


def arguments_of(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.add(parser)
    return parser.parse_args(list(words))


def test_a_job_inherits_all_but_what_is_a_nodes_or_no_text() -> None:
    environ = {
        b"PATH": b"/opt/venv/bin:/bin",
        b"EMPTY": b"",
        b"BASH_FUNC_f%%": b"() {  :\n}",
        "NAÏVE".encode(): "é猫".encode(),
        b"LATIN": b"caf\xe9",
        b"COTENANT_TOKEN": b"secret",
        b"COTENANT_JOB_ID": b"the job that submits",
    }
    env, left_out = inherited(environ)
    assert env == {
        "PATH": "/opt/venv/bin:/bin",
        "EMPTY": "",
        "BASH_FUNC_f%%": "() {  :\n}",
        "NAÏVE": "é猫",
    }
    assert left_out == ["LATIN"]


def test_what_is_not_passed_on_is_said_and_the_job_is_submitted(
    node: StubNode, tmp_path: Path
) -> None:
    (tmp_path / "script").write_text("print(1)")
    env = {**os.environ, "LATIN": "caf\udce9"}
    with (tmp_path / "script").open() as script:
        run = child("run", "--", "python", "-", stdin=script, env=env)
        out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, b"a1b2c3d4\n")
    assert err.count(b"stdin") == 1
    assert b"LATIN" in err
    assert "LATIN" not in node.submitted[0].env


@pytest.mark.parametrize("kind", ["closed", "null", "empty pipe", "idle pipe"])
def test_a_shell_without_input_hears_nothing_of_it(kind: str) -> None:
    read, write = os.pipe()
    null = os.open(os.devnull, os.O_RDONLY)
    if kind != "idle pipe":
        os.close(write)
    fd = {"closed": -1, "null": null}.get(kind, read)
    assert not has_input(fd)
    os.close(read)
    os.close(null)
    if kind == "idle pipe":
        os.close(write)


def test_a_pipe_with_something_in_it_is_input() -> None:
    read, write = os.pipe()
    os.write(write, b"x")
    assert has_input(read)
    os.read(read, 1)
    assert not has_input(read)
    os.close(read)
    os.close(write)


def test_a_directory_that_is_gone_and_a_command_that_is_no_text_are_said(
    node: StubNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match="UTF-8"):
        cotenant("run", "--", "caf\udce9")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(EnvironmentProblem, match="--cwd"):
        cotenant("run", "--", "true")
    assert node.submitted == []


@pytest.mark.parametrize(
    "argv",
    [
        ["run"],
        ["run", "--weight", "0", "--", "true"],
        ["run", "--weight", "nan", "--", "true"],
        ["run", "--guaranteed", "2", "--", "true"],
        ["run", "--guaranteed", "cpu=2", "--", "true"],
        ["run", "--limit", "cpu=0.5,cpu=1", "--", "true"],
        ["run", "--memory", "lots", "--", "true"],
        ["run", "--env", "A", "--", "true"],
        ["run", "--grace", "5", "--", "true"],
        ["run", "--restart", "maybe", "--", "true"],
        ["run", "--max-restarts", "-1", "--", "true"],
        ["run", "--time-limit", "5", "--", "true"],
        ["jobs", "--node", "a", "--state-dir", "b"],
        ["models", "reload", "m"],
        ["infer", "m"],
        ["top", "--interval", "-1"],
        ["logs"],
        ["logs", "j", "-n", "-3"],
        ["replay"],
    ],
)
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cotenant(*argv)
    assert exit.value.code == 2
    assert "usage: cotenant" in capsys.readouterr().err


def test_help_of_every_command_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    commands.add_commands(subparsers)
    assert len(subparsers.choices) == 20
    for name in subparsers.choices:
        with pytest.raises(SystemExit) as exit:
            cotenant(name, "--help")
        assert exit.value.code == 0
        assert "%%" not in capsys.readouterr().out


def test_jobs_are_cancelled_held_and_released(
    node: StubNode, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, said in (("cancel", "cancelled"), ("hold", "held"), ("release", "released")):
        assert cotenant(name, "train") == 0
        assert capsys.readouterr().out == f"{said} a1b2c3d4\n"
    assert node.asked == [("cancel", "train"), ("hold", "train"), ("resume", "train")]
    with pytest.raises(NotFound):
        cotenant("cancel", "other")


def test_logs_print_all_or_the_last_lines(
    node: StubNode, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    log = node.directory / "log"
    assert cotenant("logs", "train") == 0
    assert capfdbinary.readouterr().out == b"", "no output yet"
    log.write_bytes(b"one\ntwo\n\xff\xfe three\n")
    cotenant("logs", "train")
    assert capfdbinary.readouterr().out == b"one\ntwo\n\xff\xfe three\n"
    cotenant("logs", "train", "-n", "2")
    assert capfdbinary.readouterr().out == b"two\n\xff\xfe three\n"


def test_logs_of_a_service_are_what_its_workers_print(
    node: StubNode, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    service = node.status()["services"][0]["name"]
    log = node.directory / "workers" / f"{service}.log"
    log.parent.mkdir()
    log.write_bytes(b"one\ntwo\n")
    assert cotenant("logs", service, "-n", "1") == 0
    assert cotenant("logs", f"service:{service}") == 0
    assert capfdbinary.readouterr().out == b"two\none\ntwo\n"
    for unknown in ("service:train", "neither"):
        with pytest.raises(NotFound):
            cotenant("logs", unknown)


def test_checkpoint_prints_where_it_is(node: StubNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert cotenant("checkpoint", "train", "--timeout", "5s") == 0
    assert capsys.readouterr().out == "/checkpoints/step-9\n"
    assert node.asked == [("checkpoint", "train")]


def test_models_are_listed_loaded_and_rolled_back(
    node: StubNode, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cotenant("models") == 0
    assert "digits" in capsys.readouterr().out
    for action in ("load", "unload", "rollback"):
        assert cotenant("models", action, "digits", "--json") == 0
        assert [m["name"] for m in json.loads(capsys.readouterr().out)] == ["digits"]
    assert node.asked == [(a, "digits") for a in ("load", "unload", "rollback")]
    with pytest.raises(InvalidRequest, match="cotenant models load"):
        cotenant("models", "load")


def test_following_a_log_ends_with_the_job(
    node: StubNode, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    log = node.directory / "log"
    log.write_bytes(b"old\nfirst\n")

    def go_on() -> None:
        time.sleep(0.1)
        with log.open("ab") as file:
            file.write(b"second\n")
        log.rename(node.directory / "log.1")
        log.write_bytes(b"third\n")
        time.sleep(0.1)
        node.state = "succeeded"
        with log.open("ab") as file:
            file.write(b"last\n")

    writer = threading.Thread(target=go_on)
    writer.start()
    assert cotenant("logs", "-f", "-n", "1", "train") == 0
    writer.join()
    assert capfdbinary.readouterr().out == b"first\nsecond\nthird\nlast\n"


def test_run_with_follow_says_how_it_ended(
    node: StubNode, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (node.directory / "log").write_bytes(b"hello\n")
    node.state = "succeeded"
    assert cotenant("run", "--follow", "--", "true") == 0
    assert capfdbinary.readouterr().out == b"hello\n"
    for code, expected in ((3, 3), (-15, 143), (None, 1)):
        node.state, node.reason, node.code = "failed", "as it goes", code
        assert cotenant("run", "--follow", "--", "false") == expected
        assert b"as it goes" in capfdbinary.readouterr().err


@pytest.mark.parametrize("lines", range(9))
@pytest.mark.parametrize("end", [b"\n", b""])
def test_the_last_lines_are_found_across_both_files(tmp_path: Path, lines: int, end: bytes) -> None:
    (tmp_path / "log.1").write_bytes(b"1\n22\n\n4\n")
    (tmp_path / "log").write_bytes(b"5\n66\n7" + end)
    log = JobLog(tmp_path / "log")
    whole = [b"1", b"22", b"", b"4", b"5", b"66", b"7"]
    wanted = b"\n".join(whole[max(0, 7 - lines) :]) + end if lines else b""
    assert b"".join(log.read(lines)) == wanted
    assert b"".join(log.read(lines)) == b""
    log.close()


def test_the_last_lines_of_a_long_log_are_found(tmp_path: Path) -> None:
    lines = [b"x" * (i % 977) for i in range(2000)]
    (tmp_path / "log").write_bytes(b"\n".join(lines) + b"\n")
    for count in (1, 500, 1999, 2000, 5000):
        log = JobLog(tmp_path / "log")
        found = b"".join(log.read(count))
        assert found == b"\n".join(lines[-count:]) + b"\n"
        log.close()


def test_explain_finds_the_journal_with_and_without_a_node(
    node: StubNode, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record(tmp_path / "journal", seed=4, segment_bytes=3000)
    assert cotenant("explain", "--last", "2") == 0
    text = capsys.readouterr().out
    assert "Plans, newest first" in text and text.count("before:") == 2
    assert cotenant("explain", "--journal", str(tmp_path / "journal"), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["plans"]) > 2 and told["arrived"] > 0
    assert cotenant("explain", "--state-dir", str(tmp_path / "journal" / "..")) == 0
    with pytest.raises(JournalError, match="no journal here"):
        cotenant("explain", "--journal", str(tmp_path / "none"))


class Sleepy:
    """Cotenant's policy, but it wakes up a nanosecond later."""

    def __init__(self, devices: tuple[DeviceSpec, ...], state: DispatcherState | None) -> None:
        self._policy = Dispatcher(devices, state)
        self.state = self._policy.state

    def handle(self, now: int, event: Event) -> list[Action]:
        actions = self._policy.handle(now, event)
        return [WakeAt(x.cause, x.at + 1) if isinstance(x, WakeAt) else x for x in actions]


def test_replay_exits_with_1_on_a_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, seed=4)
    assert cotenant("replay", str(tmp_path)) == 0
    assert "no difference" in capsys.readouterr().out
    assert cotenant("replay", "--json", str(tmp_path)) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True
    monkeypatch.setattr("cotenant.sim.replay.Dispatcher", Sleepy)
    assert cotenant("replay", str(tmp_path)) == 1
    assert "first difference" in capsys.readouterr().out
    with pytest.raises(JournalError):
        cotenant("replay", str(tmp_path / "none"))


@pytest.mark.parametrize("argv", [["top", "--interval", "0.05"], ["logs", "-f", "train"]])
def test_ctrl_c_ends_quietly(node: StubNode, argv: list[str]) -> None:
    (node.directory / "log").write_bytes(b"x\n")
    process = child(*argv)
    assert process.stdout is not None
    assert process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.parametrize("argv", [["top", "--interval", "0.01"], ["logs", "train"], ["jobs"]])
def test_a_reader_that_goes_away_ends_it_quietly(node: StubNode, argv: list[str]) -> None:
    (node.directory / "log").write_bytes(b"x\n" * 500_000)
    process = child(*argv)
    assert process.stdout is not None and process.stderr is not None
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    assert process.wait(timeout=20) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_top_is_drawn_on_a_terminal_and_survives_a_restart(node: StubNode) -> None:
    import pty

    main, side = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, "top", "--interval", "0.05"]
    process = subprocess.Popen(
        command, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm"}
    )
    os.close(side)
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        end = time.monotonic() + 20
        while text not in shown:
            assert time.monotonic() < end, shown[-2000:]
            shown += os.read(main, 65536)

    until(b"PARTITION")
    socket = node.directory / "control.sock"
    socket.rename(node.directory / "away.sock")
    until(b"no node is running")
    (node.directory / "away.sock").rename(socket)
    process.send_signal(signal.SIGINT)
    # The terminal's buffer must be read, or the process cannot end.
    while process.poll() is None:
        try:
            shown += os.read(main, 65536)
        except OSError:
            break
    assert process.wait(20) == 0
    assert b"Traceback" not in shown and b"\x1b[?1049l" in shown, "the screen is given back"
    os.close(main)


def test_top_takes_keys_on_a_terminal_and_gives_it_back(node: StubNode) -> None:
    import pty
    import termios

    (node.directory / "log").write_bytes(b"what the job printed\n")
    main, side = pty.openpty()
    before = termios.tcgetattr(side)
    command = [sys.executable, "-c", PROGRAM, "top", "--interval", "0.05"]
    process = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm"}
    )
    shown = b""

    def until(true: Callable[[], bool]) -> None:
        nonlocal shown
        end = time.monotonic() + 30
        while not true():
            assert time.monotonic() < end, shown[-2000:]
            if select.select([main], [], [], 0.05)[0]:
                shown += os.read(main, 65536)

    def says(text: bytes) -> Callable[[], bool]:
        return lambda: text in shown

    def press(keys: bytes) -> None:
        nonlocal shown
        shown = b""
        os.write(main, keys)

    until(says(b"quit"))
    press(b"\x1b[Bh")
    until(lambda: node.asked == [("hold", "a1b2c3d4")])
    press(b"c")
    until(says(b"y/n"))
    press(b"n")
    until(says(b"quit"))
    press(b"cy")
    until(lambda: node.asked[-1] == ("cancel", "a1b2c3d4"))
    press(b"l")
    until(says(b"what the job printed"))
    press(b"q\r")
    until(says(b"why train"))
    press(b"q/none")
    until(says(b"filter: none"))
    press(b"\x1b")
    until(says(b"quit"))
    press(b"q")
    until(lambda: process.poll() is not None)
    assert process.returncode == 0
    assert b"Traceback" not in shown and ("cancel", "a1b2c3d4") in node.asked
    assert termios.tcgetattr(side) == before, "the terminal is as it was"
    os.close(side)
    os.close(main)
