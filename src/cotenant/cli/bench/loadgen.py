"""An open-loop load generator for one HTTP endpoint on loopback, run as a process of its own.

``python -m cotenant.cli.bench.loadgen`` reads one JSON order from standard input and writes one
JSON answer. Requests are sent at their times whether or not earlier ones were answered, each on
an idle kept-alive connection (a new one if none is idle), so a slow server cannot slow the
arrivals down. Latency counts from the time the request was due.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time

PRIORITY = 30
"""Above server and workers: the clients of a real box are other machines."""
MOST_CONNECTIONS = 512


class Connection:
    """One kept-alive connection and the response being read on it."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.buffer = b""
        self.index = -1

    def read(self) -> int:
        """Status of a complete response, 0 while it is not complete; -1 if the server closed."""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return 0
        except OSError:
            return -1
        if not data:
            return -1
        self.buffer += data
        return self.status()

    def status(self) -> int:
        """Of what was read so far; 0 while that is not all."""
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found or len(body) < _length(head):
            return 0
        self.buffer = b""
        return int(head[9:12])


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return int(line[15:])
    return 0


class Generator:
    """Runs one order; see ``run``."""

    connection: type[Connection] = Connection

    def __init__(
        self, port: int, requests: list[bytes], times: list[float], drain_s: float
    ) -> None:
        self._port = port
        self._requests = requests
        """Sent in turn."""
        self._due = [round(t * 1e9) for t in times]
        self._drain_ns = round(drain_s * 1e9)
        self._poll = select.epoll()
        self._busy: dict[int, Connection] = {}
        self._idle: list[Connection] = []
        self.latency_ms: list[float] = [-1.0] * len(times)
        self.status: list[int] = [0] * len(times)
        self.lag_ms: list[float] = [0.0] * len(times)

    def run(self) -> None:
        """Send everything, wait at most the drain time for the last answers."""
        start = time.monotonic_ns() + 5_000_000
        end = start + (self._due[-1] if self._due else 0) + self._drain_ns
        position = 0
        while position < len(self._due) or self._busy:
            now = time.monotonic_ns()
            if now > end:
                break
            at = self.next_at(position, start, end)
            if now >= at and at < end:
                self._send(position, start + self._due[position], now)
                position += 1
                continue
            # epoll itself counts in milliseconds; select on its descriptor does not.
            select.select([self._poll], [], [], max(0, at - now) / 1e9)
            for fd, _ in self._poll.poll(0):
                self._receive(fd, start)

    def next_at(self, position: int, start: int, end: int) -> int:
        """When the next request is sent; ``end`` if none is before somebody is answered."""
        return start + self._due[position] if position < len(self._due) else end

    def answered(self, connection: Connection, start: int) -> None:
        """A request got an answer, or lost its connection."""
        done = time.monotonic_ns() - start - self._due[connection.index]
        self.latency_ms[connection.index] = done / 1e6

    def _send(self, index: int, due: int, now: int) -> None:
        self.lag_ms[index] = (now - due) / 1e6
        if not self._idle and len(self._busy) >= MOST_CONNECTIONS:
            return  # counted as never answered
        connection = self._idle.pop() if self._idle else self._connect()
        connection.index = index
        self._busy[connection.sock.fileno()] = connection
        with contextlib.suppress(BlockingIOError, OSError):
            connection.sock.sendall(self._requests[index % len(self._requests)])

    def _connect(self) -> Connection:
        connection = self.connection(self._port)
        self._poll.register(connection.sock.fileno(), select.EPOLLIN)
        return connection

    def _receive(self, fd: int, start: int) -> None:
        connection = self._busy.get(fd)
        if connection is None:
            return
        status = connection.read()
        if status == 0:
            return
        del self._busy[fd]
        self.status[connection.index] = status
        self.answered(connection, start)
        if status > 0:
            self._idle.append(connection)
        else:
            self._poll.unregister(fd)
            connection.sock.close()


def prepare(core: int | None) -> None:
    """Run on this core, and above those who answer, as far as that is allowed."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))


def main() -> None:
    """Entry point: one order in, one answer out."""
    order = json.load(sys.stdin)
    prepare(order["core"])
    generator = Generator(
        order["port"], [bytes.fromhex(order["request"])], order["times"], order["drain_s"]
    )
    for connection in [generator._connect() for _ in range(order["warm_connections"])]:
        generator._idle.append(connection)
    before = time.process_time()
    generator.run()
    json.dump(
        {
            "latency_ms": generator.latency_ms,
            "status": generator.status,
            "lag_ms": generator.lag_ms,
            "cpu_s": time.process_time() - before,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
