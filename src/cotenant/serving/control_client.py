"""The control API's client: synchronous, for whoever runs beside the node (``serving.control`` has
the operations and their wire format)."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any, Final

import msgspec

from cotenant.domain import errors
from cotenant.domain.errors import CotenantError, EnvironmentProblem, InvalidRequest
from cotenant.domain.port import IndexEntry, JobStatus
from cotenant.domain.reservation import Answer, Reservation, ReservationStatus
from cotenant.domain.workload import JobSpec

LINE_BYTES: Final = 2**20
PATH_BYTES: Final = 107
"""Longest path of a Unix socket on Linux (108 bytes with the closing zero)."""
_ANSWER_BYTES: Final = 64 * 2**20
LOADING_S: Final = 600.0
"""What loads or unloads a model is waited for so long."""


class ControlClient:
    """A synchronous client, for the command line. ``timeout`` in seconds, per request.

    Every method raises EnvironmentProblem if no node answers, and otherwise the error that
    the node raised.
    """

    def __init__(self, path: str | Path, timeout: float = 10.0) -> None:
        self._path = Path(path)
        self._timeout = timeout

    def status(self) -> dict[str, Any]:
        """What the node says of itself; see NodePort.status."""
        return msgspec.convert(self._call("status"), dict[str, Any])

    def plan(self, dry_run: bool = False) -> dict[str, Any]:
        """The plan in force, and what would be planned now; see NodePort.plan."""
        return msgspec.convert(self._call("plan", dry_run=dry_run), dict[str, Any])

    def jobs(self) -> list[JobStatus]:
        """All jobs, oldest first."""
        return msgspec.convert(self._call("jobs"), list[JobStatus])

    def submit(self, spec: JobSpec) -> str:
        """Queue a job; returns its id."""
        return str(self._call("submit", **msgspec.to_builtins(spec)))

    def cancel(self, ref: str) -> str:
        """Cancel a job by id, unique prefix or name; returns its id."""
        return str(self._call("cancel", ref=ref))

    def hold(self, ref: str) -> str:
        """Keep a job from running until it is resumed; returns its id."""
        return str(self._call("hold", ref=ref))

    def resume(self, ref: str) -> str:
        """Let a held job run again; returns its id."""
        return str(self._call("resume", ref=ref))

    def log_path(self, ref: str) -> str:
        """Path of the job's log file."""
        return str(self._call("log_path", ref=ref))

    def checkpoint(self, ref: str, within_s: float = 60.0) -> str:
        """Have a running job write a checkpoint now; the path that it reports. Raises NotFound,
        NotReady where it has not said so in time, InvalidRequest if it cannot be asked."""
        answer_by = within_s + self._timeout
        return str(self._call("checkpoint", answer_by, ref=ref, within_s=within_s))

    def models(self) -> list[IndexEntry]:
        """All models in the repository, loaded or not, by name and version."""
        return msgspec.convert(self._call("models"), list[IndexEntry])

    def load(self, name: str) -> None:
        """Have the newest version of a model serve; raises ModelError, NotFound."""
        self._call("load", LOADING_S, name=name)

    def unload(self, name: str) -> None:
        """Drain and unload a model; raises NotFound."""
        self._call("unload", LOADING_S, name=name)

    def rollback(self, name: str) -> str:
        """Have the version before serve, until ``load``; which that is. Raises ModelError,
        NotFound, InvalidRequest if there is none."""
        return str(self._call("rollback", LOADING_S, name=name))

    def reserve(self, reservation: Reservation, dry_run: bool = False) -> Answer:
        """Ask the planner for room and, unless it is a ``dry_run``, keep it; the same again changes
        nothing. Raises InvalidRequest for what can never be, and for another under the same id."""
        fields = msgspec.to_builtins(reservation)
        return msgspec.convert(self._call("reserve", dry_run=dry_run, **fields), Answer)

    def release(self, id: str) -> None:
        """Give a reservation up; its processes run on, unconfined. No effect if there is none."""
        self._call("release", id=id)

    def adopt(self, id: str, pid: int) -> None:
        """Have a process on this host, with all that descends from it, be the reservation's.
        Raises NotFound, NotReady, InvalidRequest."""
        self._call("adopt", id=id, pid=pid)

    def reservations(self) -> list[ReservationStatus]:
        """All reservations, oldest first."""
        return msgspec.convert(self._call("reservations"), list[ReservationStatus])

    def shutdown(self) -> None:
        """Ask the node to stop; returns once it has agreed."""
        self._call("shutdown")

    def _call(self, op: str, timeout: float = 0.0, /, **fields: Any) -> Any:
        timeout = timeout or self._timeout
        check_length(self._path)
        try:
            line = msgspec.json.encode({"op": op, **fields}) + b"\n"
        except UnicodeEncodeError:
            raise InvalidRequest(
                "command, names and directories must be UTF-8 text; rename what is not"
            ) from None
        if len(line) > LINE_BYTES:
            raise InvalidRequest(
                f"the request is {len(line)} bytes; the node accepts {LINE_BYTES}"
                " (is a command or environment too long?)"
            )
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(timeout)
                sock.connect(str(self._path))
                # A node that refuses us closes without reading; its answer says why.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    sock.sendall(line)
                with sock.makefile("rb") as stream:
                    answer = stream.readline(_ANSWER_BYTES)
        except (FileNotFoundError, ConnectionRefusedError):
            raise EnvironmentProblem(
                f"no node is running in {self._path.parent}; "
                "start one with: cotenant serve cotenant.yaml"
            ) from None
        except PermissionError:
            raise EnvironmentProblem(
                f"the node in {self._path.parent} belongs to another user; "
                "run this as that user, or as root"
            ) from None
        except TimeoutError:
            raise EnvironmentProblem(
                f"the node in {self._path.parent} did not answer within {timeout:g} s"
            ) from None
        except OSError as exc:
            raise EnvironmentProblem(
                f"cannot talk to the node in {self._path.parent}: {exc.strerror or exc}"
            ) from None
        return self._result(answer)

    def _result(self, answer: bytes) -> Any:
        if not answer.endswith(b"\n"):
            raise EnvironmentProblem(
                f"the node in {self._path.parent} closed the connection without an answer;"
                " it may be stopping"
            )
        reply = msgspec.json.decode(answer, type=dict[str, Any])
        if reply.get("ok"):
            return reply.get("result")
        kind = getattr(errors, str(reply.get("kind")), CotenantError)
        raise kind(reply.get("error", "the node refused without saying why"))


def check_length(path: Path) -> None:
    """Raise EnvironmentProblem for a path that is too long for a socket."""
    length = len(os.fsencode(path))
    if length > PATH_BYTES:
        raise EnvironmentProblem(
            f"the control socket's path has {length} bytes, but Linux allows {PATH_BYTES}:"
            f" {path}; choose a shorter state directory"
        )
