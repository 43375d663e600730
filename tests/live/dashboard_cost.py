"""What viewers of the dashboard cost a node: ``python -m tests.live.dashboard_cost``, 2 minutes.

The node's own process is measured, in turns without a viewer and with some. It serves two models,
nobody asks them anything, and a job trains.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import tempfile
import threading
import time
from pathlib import Path

from tests.live.conftest import Box
from tests.live.test_dashboard import configured

SECONDS = 20
TURNS = (0, 1, 0, 1, 0, 8)


def cpu_seconds(pid: int) -> float:
    """Of a process with all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def look(port: int, until: float) -> None:
    """Read the stream as a browser does."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/dashboard/events")
    response = connection.getresponse()
    assert response.status == 200
    while time.monotonic() < until and response.readline():
        pass
    connection.close()


def measure(box: Box, viewers: int) -> float:
    """Share of a core (0..1) that the node took."""
    assert box.process is not None
    until = time.monotonic() + SECONDS + 1
    threads = [threading.Thread(target=look, args=(box.port, until)) for _ in range(viewers)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    began, before = time.monotonic(), cpu_seconds(box.process.pid)
    time.sleep(SECONDS)
    share = (cpu_seconds(box.process.pid) - before) / (time.monotonic() - began)
    for thread in threads:
        thread.join()
    return share


def main() -> None:
    """Print a line for each turn."""
    with tempfile.TemporaryDirectory(prefix="cotenant-") as directory:
        box = configured(Box(Path(directory), {}), plan_every="1s").start()
        with contextlib.closing(box):
            time.sleep(5)
            for viewers in TURNS:
                print(f"{viewers} viewers: {measure(box, viewers):.2%} of a core", flush=True)


if __name__ == "__main__":
    main()
