"""What a container runtime runs before a container's program: have the node adopt its process.

    python hook.py CONTROL_SOCKET RESERVATION...

The runtime writes the container's state (the OCI runtime specification's ``State``, JSON) to the
standard input. Its ``pid`` is the process that is to become the program, as the host sees it. If
the node does not take it within five seconds, this ends with 1 and a line that says why, and the
runtime does not start the container: nothing runs beside what it was promised.

A copy of this file lies beside the kubelet and is run by whatever Python the host has (3.8 or
newer), so it needs the standard library alone.
"""

from __future__ import annotations

import json
import socket
import sys
import time

GIVE_UP_S = 5.0
_PAUSE_S = 0.05
_STATE_BYTES = 2**20
_ANSWER_BYTES = 2**20


class _Refused(Exception):
    """The node said no; asking again is of no use."""


def main(argv: list[str]) -> int:
    """The exit status: 0 once each of the reservations has the process."""
    end = time.monotonic() + GIVE_UP_S
    try:
        if len(argv) < 2:
            raise _Refused("it needs the control socket and at least one reservation")
        pid = _pid(sys.stdin.buffer.read(_STATE_BYTES))
        for reservation in argv[1:]:
            _adopt(argv[0], reservation, pid, end)
    except (OSError, ValueError, _Refused) as exc:
        reason = " ".join(str(exc).split())
        print(f"cotenant: the container is not started: {reason}", file=sys.stderr)
        return 1
    return 0


def _pid(state: bytes) -> int:
    found = json.loads(state)
    pid = found.get("pid") if isinstance(found, dict) else None
    if type(pid) is not int or pid <= 0:
        raise _Refused("the container runtime named no process; createRuntime hooks get one")
    return pid


def _adopt(path: str, reservation: str, pid: int, end: float) -> None:
    """Asks again while the node is starting, or while the reservation waits for its space."""
    request = {"op": "adopt", "id": reservation, "pid": pid}
    while True:
        try:
            answer = _ask(path, json.dumps(request).encode() + b"\n", end)
            if answer.get("ok"):
                return
            reason = str(answer.get("error", "the node refused without saying why"))
            if answer.get("kind") != "NotReady":
                raise _Refused(f"{reservation}: {reason}")
        except OSError as exc:
            reason = f"no node answers at {path}: {exc.strerror or exc}"
        if time.monotonic() + _PAUSE_S >= end:
            raise _Refused(f"{reservation}: {reason}")
        time.sleep(_PAUSE_S)


def _ask(path: str, line: bytes, end: float) -> dict:  # type: ignore[type-arg]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(max(end - time.monotonic(), 0.001))
        sock.connect(path)
        sock.sendall(line)
        with sock.makefile("rb") as stream:
            answer = stream.readline(_ANSWER_BYTES)
    if not answer.endswith(b"\n"):
        raise OSError("it closed the connection without an answer")
    found = json.loads(answer)
    if not isinstance(found, dict):
        raise ValueError("the node's answer is not understood")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
