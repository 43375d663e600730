"""The clients of ``cotenant demo``, a process of their own: requests at their times, whether or not
earlier ones were answered.

``python -m cotenant.cli.demo.asking`` reads one JSON order from standard input. It writes when it
began, then a line for each answer as it comes: when it was due (s), its status, its latency (ms).
"""

from __future__ import annotations

import json
import os
import sys
import time

from cotenant.cli.bench.loadgen import Connection, Generator, prepare


class Telling(Generator):
    """Says each answer at once."""

    def answered(self, connection: Connection, start: int) -> None:
        super().answered(connection, start)
        at = connection.index
        line = f"{self._due[at] / 1e9:.4f} {self.status[at]} {self.latency_ms[at]:.4f}\n"
        os.write(sys.stdout.fileno(), line.encode())


def main() -> None:
    """One order in, answers out."""
    from cotenant.cli.bench.arrivals import poisson

    order = json.load(sys.stdin)
    prepare(order["core"])
    times = poisson(order["rate"], order["seconds"], order["seed"])
    generator = Telling(order["port"], [bytes.fromhex(order["request"])], times, 2.0)
    os.write(sys.stdout.fileno(), f"{time.monotonic():.6f}\n".encode())
    generator.run()


if __name__ == "__main__":
    main()
