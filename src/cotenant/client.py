"""``cotenant.Client``: jobs and status of a node, from a program.

    with cotenant.Client("https://box:8443", token=token, ca="box.pem") as client:
        job = client.submit(["python", "train.py"], files="experiment", time_limit="8h")
        for data in client.follow(job):
            sys.stdout.buffer.write(data)
        assert client.wait(job).state == "succeeded"

Without an address it speaks to the node on this machine, by its control socket.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

import msgspec

from cotenant.cli import finding
from cotenant.cli.submitting import inherited
from cotenant.domain.errors import InvalidRequest, NotReady
from cotenant.domain.port import JobStatus, find_job
from cotenant.domain.submission import Submission
from cotenant.domain.units import S, parse_bytes, parse_duration
from cotenant.domain.workload import ENDED_STATES, Share
from cotenant.serving import joblogs
from cotenant.serving.control_client import ControlClient
from cotenant.serving.joblogs import Piece
from cotenant.serving.jobs_client import JobsClient

FOLLOW_S: Final = 20.0
"""Seconds that a request for more of a log waits for it."""
LOOK_S: Final = 0.2
MOST_LOOK_S: Final = 2.0

Restart = Literal["never", "on-failure", "always"]


class _Node(Protocol):
    """A node, however it is asked."""

    def status(self) -> dict[str, Any]: ...
    def jobs(self) -> list[JobStatus]: ...
    def job(self, ref: str) -> JobStatus: ...
    def submit(self, wanted: Submission, files: Path | None) -> str: ...
    def hold(self, ref: str) -> str: ...
    def resume(self, ref: str) -> str: ...
    def cancel(self, ref: str) -> str: ...
    def checkpoint(self, ref: str, within_s: float) -> str: ...
    def log(self, ref: str, place: str, wait_s: float) -> tuple[Piece, str]: ...


class Client:
    """A node's jobs. One client may be used by several threads.

    ``url``: of its jobs API, such as ``https://box:8443`` (``$COTENANT_URL``); without one it is
    the node on this machine that commands would mean: of ``state_dir``, called ``node``, or the
    only one. ``token`` (``$COTENANT_TOKEN``) and ``ca``, a PEM file to check the node's certificate
    with (``$COTENANT_CA``; else the system's authorities), go with a url. ``timeout``: seconds that
    an answer may take.

    A job is named by its id, a unique beginning of it, or its name. All methods raise
    EnvironmentProblem if no node answers, and what else the node raises, as in
    ``cotenant.domain.errors``: NotFound, InvalidRequest, Forbidden for what a token is not for.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        ca: str | os.PathLike[str] | None = None,
        state_dir: str | os.PathLike[str] | None = None,
        node: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        url = url or (None if state_dir or node else os.environ.get("COTENANT_URL"))
        self._node: _Node
        if url:
            token = token or os.environ.get("COTENANT_TOKEN", "")
            found = os.fspath(ca) if ca else os.environ.get("COTENANT_CA")
            self._node = JobsClient(url, token, found, timeout)
        else:
            directory = finding.directory(os.fspath(state_dir) if state_dir else None, node)
            self._node = _Here(ControlClient(directory / finding.SOCKET, timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held between two calls; here so that a ``with`` reads as usual."""

    def status(self) -> dict[str, Any]:
        """What the node says of itself, as ``cotenant status --json``."""
        return self._node.status()

    def jobs(self) -> list[JobStatus]:
        """All jobs, oldest first."""
        return self._node.jobs()

    def job(self, ref: str) -> JobStatus:
        """One job; raises NotFound."""
        return self._node.job(ref)

    def submit(  # noqa: PLR0913 - as many as a job has
        self,
        command: Sequence[str],
        *,
        name: str = "",
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        files: str | os.PathLike[str] | None = None,
        weight: float = 1.0,
        guaranteed: Share = 0.0,
        limit: Share = 1.0,
        kinds: Sequence[str] = (),
        memory: int | str = 0,
        time_limit: float | str = 0.0,
        after: Sequence[str] = (),
        restart: Restart = "on-failure",
        max_restarts: int = 5,
        id: str = "",
    ) -> str:
        """Queue a job; its id. Words and numbers are as those of ``cotenant run``.

        ``memory`` in bytes, or ``"2GiB"``; ``time_limit`` in seconds, or ``"8h"``; 0: none.
        ``files``: a directory that the job runs in. Over the network it gets a copy (without .git
        and __pycache__), which goes with the node's record of the job; on this machine it is that
        directory itself. ``cwd``: an absolute directory on the box, in place of files. ``env`` is
        added to the node's minimal environment, on this machine to that of this process.
        ``id``: to be chosen where the same call may be made again, say after a crash.

        Raises InvalidRequest for what cannot run, TooLarge, NotFound for a job in ``after``,
        Conflict for another job under ``id``.
        """
        if isinstance(command, str):
            raise InvalidRequest('the command is a list of words, such as ["python", "train.py"]')
        if files is not None and cwd:
            raise InvalidRequest("the job runs in its files: give files or cwd")
        fields = {
            "id": id,
            "name": name,
            "command": list(command),
            "cwd": cwd,
            "env": dict(env or {}),
            "weight": weight,
            "guaranteed": guaranteed,
            "limit": limit,
            "kinds": list(kinds),
            "memory": _in(parse_bytes, memory) if isinstance(memory, str) else memory,
            "time_limit_s": (
                _in(parse_duration, time_limit) / S if isinstance(time_limit, str) else time_limit
            ),
            "after": list(after),
            "restart": restart,
            "max_restarts": max_restarts,
        }
        try:
            wanted = msgspec.convert(fields, Submission)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"the job cannot be submitted: {error}") from None
        return self._node.submit(wanted, None if files is None else Path(files))

    def hold(self, ref: str) -> str:
        """Keep a job from running until ``resume``; its id. Raises NotFound, and InvalidRequest for
        one that has ended."""
        return self._node.hold(ref)

    def resume(self, ref: str) -> str:
        """Let a held job run again; its id. Raises NotFound."""
        return self._node.resume(ref)

    def cancel(self, ref: str) -> str:
        """End a job for good; its id. Raises NotFound."""
        return self._node.cancel(ref)

    def checkpoint(self, ref: str, within: float = 60.0) -> str:
        """Have a running job write a checkpoint; the path or URL that it reports ``within`` so many
        seconds, on the box. Raises NotFound, InvalidRequest if it cannot be asked, NotReady."""
        return self._node.checkpoint(ref, within)

    def log(self, ref: str) -> bytes:
        """All that is kept of a job's output. Raises NotFound."""
        id, place, found = self.job(ref).id, joblogs.START, bytearray()
        while True:
            piece, _ = self._node.log(id, place, 0.0)
            if not piece.data:
                return bytes(found)
            found += piece.data
            place = piece.next

    def follow(self, ref: str) -> Iterator[bytes]:
        """A job's output, from the oldest that is kept until the job has ended, as it comes. What
        the log drops before it could be read is left out. Raises NotFound."""
        id, place = self.job(ref).id, joblogs.START
        while True:
            piece, state = self._node.log(id, place, FOLLOW_S)
            if piece.data:
                yield piece.data
            elif state in ENDED_STATES:
                return
            place = piece.next

    def wait(self, ref: str, timeout: float | None = None) -> JobStatus:
        """How a job ended, once it has. Raises NotFound, and NotReady if it has not ``timeout``
        seconds from now."""
        id, look_s = self.job(ref).id, LOOK_S
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            job = self.job(id)
            if job.state in ENDED_STATES:
                return job
            if end is not None and time.monotonic() >= end:
                raise NotReady(f"job {id} is {job.state}; it has not ended within {timeout:g} s")
            left = look_s if end is None else min(look_s, max(0.0, end - time.monotonic()))
            time.sleep(left)
            look_s = min(MOST_LOOK_S, look_s * 1.5)


class _Here:
    """The node on this machine, by its control socket."""

    def __init__(self, control: ControlClient) -> None:
        self._control = control
        self.status = control.status
        self.jobs = control.jobs
        self.hold = control.hold
        self.resume = control.resume
        self.cancel = control.cancel
        self.checkpoint = control.checkpoint

    def job(self, ref: str) -> JobStatus:
        return find_job(self._control.jobs(), ref)

    def submit(self, wanted: Submission, files: Path | None) -> str:
        place = Path(wanted.cwd) if wanted.cwd else files or Path.cwd()
        if not place.is_dir():
            raise InvalidRequest(f"{place} is no directory")
        return self._control.submit(wanted.spec(str(place.absolute()), inherited()[0]))

    def log(self, ref: str, place: str, wait_s: float) -> tuple[Piece, str]:
        path, end = self._control.log_path(ref), time.monotonic() + wait_s
        while True:
            state = self.job(ref).state
            piece = joblogs.read(path, place)
            if piece.data or piece.gap or state in ENDED_STATES or time.monotonic() >= end:
                return piece, state
            time.sleep(LOOK_S)


def _in(parse: Any, text: str) -> int:
    try:
        return int(parse(text))
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
