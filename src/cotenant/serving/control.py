"""The control API: jobs and status for the command line, over a Unix socket.

Submitting a job is running code, so this never goes over a network: for that there is
``serving.jobs_api``, with tokens and TLS, which is off by default. The socket's mode is 0600 and
the peer's uid is checked on every connection: the node's own user, or root.

One request is one line of JSON, ``{"op": "status"}``; one answer is one line, ``{"ok": true,
"result": ...}`` or ``{"ok": false, "kind": "NotFound", "error": "..."}``. A connection can
carry any number of them, in turn. An op that takes its time holds up its own connection alone.

    op         fields                 result
    status                            what NodePort.status returns
    plan       dry_run (bool)         what NodePort.plan returns
    jobs                              list of JobStatus
    submit     those of JobSpec       the job's id; ``env`` is all of its environment. The same
                                      again under one ``id`` changes nothing
    cancel     ref                    the job's id
    hold       ref                    the job's id
    resume     ref                    the job's id
    log_path   ref                    path of the job's log
    checkpoint ref, within_s (60)     the path that the job reports once it has written it
    models                            list of IndexEntry: what is loaded, or could be
    load       name                   null, once the newest version serves; also after a rollback
    unload     name                   null, once it serves no more
    rollback   name                   the version before, once that serves
    reserve    those of Reservation,  an Answer: whether there is room, or why not
               dry_run (bool)
    release    id                     null
    adopt      id, pid                null
    reservations                      list of ReservationStatus
    shutdown                          null; the node then stops
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cotenant.domain.errors import CotenantError, EnvironmentProblem, InvalidRequest
from cotenant.domain.port import NodePort
from cotenant.domain.reservation import Reservation
from cotenant.domain.workload import JobSpec
from cotenant.serving.control_client import LINE_BYTES, check_length

log = logging.getLogger("cotenant.serving")

_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid


class ControlServer:
    """Serves the control API on the node's loop until stopped."""

    def __init__(self, node: NodePort, path: str | Path, on_shutdown: Callable[[], None]) -> None:
        self._node = node
        self._path = Path(path)
        self._on_shutdown = on_shutdown
        self._server: asyncio.Server | None = None
        self._inode = 0
        self._connections: set[asyncio.Task[None]] = set()
        self._ops: dict[str, Callable[[dict[str, Any]], Any]] = {
            "status": lambda _: node.status(),
            "plan": lambda fields: node.plan(fields.get("dry_run") is True),
            "jobs": lambda _: node.jobs(),
            "submit": lambda fields: node.submit_job(_job_spec(fields)),
            "cancel": lambda fields: node.cancel_job(_ref(fields)),
            "hold": lambda fields: node.hold_job(_ref(fields)),
            "resume": lambda fields: node.resume_job(_ref(fields)),
            "log_path": lambda fields: node.job_log_path(_ref(fields)),
            "checkpoint": lambda fields: node.checkpoint_job(_ref(fields), _within(fields)),
            "models": lambda _: node.index(),
            "load": lambda fields: node.load(_model(fields)),
            "unload": lambda fields: node.unload(_model(fields)),
            "rollback": lambda fields: node.rollback(_model(fields)),
            "reserve": lambda fields: node.reserve(
                _reservation(fields), fields.get("dry_run") is True
            ),
            "release": lambda fields: node.release(_outside(fields)),
            "adopt": lambda fields: node.adopt(_outside(fields), _pid(fields)),
            "reservations": lambda _: node.reservations(),
            "shutdown": lambda _: None,
        }

    async def start(self) -> None:
        """Listen; raises EnvironmentProblem if the path is too long, taken or not writable."""
        check_length(self._path)
        _remove_stale(self._path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.bind(str(self._path))
            # Nobody can connect before listen(), so there is no moment with other rights.
            self._path.chmod(0o600)
            self._inode = self._path.stat().st_ino
        except OSError as exc:
            sock.close()
            raise EnvironmentProblem(
                f"cannot create the control socket {self._path}: {exc.strerror};"
                " choose a state directory that this user can write"
            ) from None
        self._server = await asyncio.start_unix_server(self._connected, sock=sock, limit=LINE_BYTES)

    async def stop(self) -> None:
        """Stop listening, end the connections, remove the socket's file."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:  # else another node has taken the place
                self._path.unlink()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            pass  # by stop(); asyncio's stream server would log it as an error
        finally:
            self._connections.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = _peer_uid(writer)
        if uid not in (0, os.geteuid()):
            log.warning("refused a control connection of uid %d", uid)
            await _send(writer, _failure("EnvironmentProblem", "this node belongs to another user"))
            return
        while True:
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.IncompleteReadError:
                return
            except asyncio.LimitOverrunError:
                message = f"a request line is longer than {LINE_BYTES} bytes"
                await _send(writer, _failure("TooLarge", message))
                return
            answer, stop = await self._handle(line)
            await _send(writer, answer)
            if stop:
                self._on_shutdown()
                return

    async def _handle(self, line: bytes) -> tuple[dict[str, Any], bool]:
        """The answer to one request line, and whether to shut down after sending it."""
        op = ""
        try:
            fields = _fields(line)
            op = str(fields.pop("op", ""))
            run = self._ops.get(op)
            if run is None:
                raise InvalidRequest(f"unknown op {op[:64]!r}; use one of {', '.join(self._ops)}")
            result = run(fields)
            if inspect.isawaitable(result):
                result = await result
            return {"ok": True, "result": result}, op == "shutdown"
        except CotenantError as exc:
            return _failure(type(exc).__name__, str(exc)), False
        except Exception:
            log.exception("control op %s failed inside the node", op)
            return _failure("CotenantError", "the node failed; its log says how"), False


def _fields(line: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as exc:
        raise InvalidRequest(f"a request is one line with one JSON object: {exc}") from None


def _job_spec(fields: dict[str, Any]) -> JobSpec:
    unknown = fields.keys() - set(JobSpec.__struct_fields__)
    if unknown:
        raise InvalidRequest(f"unknown job fields: {', '.join(sorted(unknown))}")
    try:
        return msgspec.convert({"id": "", **fields}, JobSpec)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"the job cannot be submitted: {exc}") from None


def _ref(fields: dict[str, Any]) -> str:
    ref = fields.get("ref")
    if not isinstance(ref, str) or not ref:
        raise InvalidRequest("ref is missing; give a job's id, a unique prefix of it, or its name")
    return ref


def _model(fields: dict[str, Any]) -> str:
    name = fields.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest("name is missing; give that of a model")
    return name


def _within(fields: dict[str, Any]) -> float:
    within_s = fields.get("within_s", 60.0)
    if isinstance(within_s, bool) or not isinstance(within_s, int | float) or not within_s > 0:
        raise InvalidRequest("within_s is no number of seconds above 0")
    return float(within_s)


def _reservation(fields: dict[str, Any]) -> Reservation:
    given = {name: value for name, value in fields.items() if name != "dry_run"}
    try:
        return msgspec.convert(given, Reservation)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"this cannot be reserved: {exc}") from None


def _outside(fields: dict[str, Any]) -> str:
    id = fields.get("id")
    if not isinstance(id, str) or not id:
        raise InvalidRequest("id is missing; give the id that the reservation was made under")
    return id


def _pid(fields: dict[str, Any]) -> int:
    pid = fields.get("pid")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid < 1:
        raise InvalidRequest("pid is missing; give that of a process, as this host numbers them")
    return pid


def _failure(kind: str, message: str) -> dict[str, Any]:
    return {"ok": False, "kind": kind, "error": message}


async def _send(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
    writer.write(msgspec.json.encode(answer) + b"\n")
    await writer.drain()


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    sock = writer.get_extra_info("socket")
    uid: int = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[1]
    return uid


def _remove_stale(path: Path) -> None:
    """Remove the socket of a node that is gone; raises EnvironmentProblem if one answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            if path.is_socket():
                path.unlink(missing_ok=True)
                return
            raise EnvironmentProblem(
                f"{path} is in the way of the control socket and is not a socket; remove it"
            ) from None
        except OSError as exc:
            raise EnvironmentProblem(
                f"cannot use {path} for the control socket: {exc.strerror or exc}"
            ) from None
    raise EnvironmentProblem(
        f"another node is running in {path.parent}; stop it (cotenant stop --state-dir "
        f"{path.parent}), or choose another state directory"
    )
