"""A node whose jobs are submitted from elsewhere: over TLS, with tokens and files, by the client
and the commands that a user would take."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import cotenant
from cotenant.cli.main import main
from cotenant.domain.errors import CotenantError, Forbidden
from tests.certificates import made

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

TRAIN = """
import pathlib, sys, time
print("began in", sorted(path.name for path in pathlib.Path().iterdir()), flush=True)
for step in range(int(sys.argv[1])):
    print("step", step, flush=True)
    time.sleep(0.1)
"""


API = {
    "address": "127.0.0.1:0",
    "tokens": "tokens.json",
    "certificate": "certificate.pem",
    "key": "key.pem",
}


def configured(box: Box, capsys: pytest.CaptureFixture[str]) -> Box:
    """A box with a certificate, and the tokens ``chief`` and ``reader``, which it keeps as
    ``tokens``."""
    made(box.directory)
    tokens = {}
    for name, scopes in (("chief", "read,submit,control"), ("reader", "read")):
        file = str(box.directory / "tokens.json")
        assert main(["token", "add", name, "--scope", scopes, "--file", file]) == 0
        tokens[name] = capsys.readouterr().out.strip()
    box.tokens = tokens  # type: ignore[attr-defined]
    return box.configure([], node={"jobs_api": API})


def client(box: Box, name: str = "chief") -> cotenant.Client:
    token = box.tokens[name]  # type: ignore[attr-defined]
    address = box.status()["jobs_api"]
    return cotenant.Client(address, token=token, ca=box.directory / "certificate.pem")


@pytest.fixture
def box(boxes: Boxes, capsys: pytest.CaptureFixture[str]) -> Box:
    return configured(boxes(), capsys).start()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "experiment"
    directory.mkdir()
    (directory / "train.py").write_text(TRAIN)
    yield directory


def test_a_job_with_files_is_looked_after_from_elsewhere(box: Box, files: Path) -> None:
    command = [sys.executable, "train.py"]
    with client(box) as chief:
        short = chief.submit([*command, "3"], files=files, name="short", restart="never")
        log = b"".join(chief.follow("short")).decode()
        assert log.startswith("began in ['train.py']") and "step 2" in log
        assert chief.wait(short).state == "succeeded" and chief.log(short).decode() == log
        long = chief.submit([*command, "100000"], files=files, name="long")
        box.until(lambda: b"step" in chief.log(long))
        chief.hold(long)
        box.until(lambda: chief.job(long).state == "held")
        chief.resume("long")
        box.until(lambda: chief.job(long).state == "running")
        with pytest.raises(Forbidden):
            client(box, "reader").cancel(long)
        assert client(box, "reader").job(long).state == "running"
        chief.cancel(long)
        assert chief.wait(long).state == "cancelled"


def test_who_follows_outlives_a_node_that_is_killed(box: Box, files: Path) -> None:
    chief = client(box)
    port = int(box.status()["jobs_api"].rpartition(":")[2])
    job = chief.submit([sys.executable, "train.py", "60"], files=files, restart="never")
    found: list[bytes] = []

    def follow() -> None:
        with contextlib.suppress(CotenantError):
            found.extend(chief.follow(job))

    thread = threading.Thread(target=follow)
    thread.start()
    box.until(lambda: b"step 3" in b"".join(found))
    box.stop(signal.SIGKILL)
    box.configure([], node={"jobs_api": {**API, "address": f"127.0.0.1:{port}"}})
    box.start()
    thread.join(60)
    steps = [line for line in b"".join(found).decode().splitlines() if line.startswith("step")]
    assert steps == [f"step {n}" for n in range(60)]
    assert chief.wait(job, timeout=60).state == "succeeded"


def test_a_job_knows_little_of_who_sent_it(box: Box) -> None:
    job = client(box).submit([sys.executable, "-c", "import os; print(sorted(os.environ))"])
    told = b"".join(client(box).follow(job)).decode()
    assert "PATH" in told and "COTENANT_TOKEN" not in told and "PYTHONPATH" not in told


def test_a_revoked_token_is_worth_nothing_without_a_restart(box: Box) -> None:
    reader = client(box, "reader")
    assert reader.jobs() == []
    assert main(["token", "revoke", "reader", "--file", str(box.directory / "tokens.json")]) == 0

    def refused() -> bool:
        try:
            reader.jobs()
        except Forbidden:
            return True
        return False

    box.until(refused)
    assert client(box).jobs() == []


def test_commands_speak_to_a_node_elsewhere(box: Box, files: Path) -> None:
    address = box.status()["jobs_api"]
    env = {
        "COTENANT_TOKEN": box.tokens["chief"],  # type: ignore[attr-defined]
        "COTENANT_CA": str(box.directory / "certificate.pem"),
    }

    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        command, *rest = words
        line = [sys.executable, "-m", "cotenant.cli.main", command, "--node", address, *rest]
        return subprocess.run(
            line,
            env={**os.environ, **env},
            capture_output=True,
            check=False,
            text=True,
            timeout=120,
        )

    ran = typed("run", "--files", str(files), "--follow", "--", sys.executable, "train.py", "2")
    assert ran.returncode == 0 and "step 1" in ran.stdout
    job = typed("run", "--name", "long", "--", "sleep", "1000").stdout.strip()
    assert job in typed("jobs", "--json").stdout
    for order in ("hold", "release", "cancel"):
        assert typed(order, "long").returncode == 0
    assert box.until(lambda: box.job(job).state == "cancelled")
    assert "jobs API" in typed("models").stderr


@pytest.mark.parametrize("wrong", ["tokens", "certificate", "key", "mismatch", "writable"])
def test_a_node_does_not_start_with_files_that_it_cannot_use(
    boxes: Boxes, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    box = configured(boxes(), capsys)
    if wrong == "mismatch":
        made(box.directory / "other").key.replace(box.directory / "key.pem")
    elif wrong == "writable":
        (box.directory / "tokens.json").chmod(0o666)
    else:
        (box.directory / API[wrong]).unlink()
    process = box.spawn()
    assert process.wait(60) == 1
    assert "jobs_api" in box.log()
