"""A process that does what it is told by lines of JSON, and answers by lines: ``job.py LOOP``.

It is run behind the gate, with the shim alone, or with neither; it does not know which.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cotenant.devices.nvidia.trial import Program

from driver import Device, cu, open_device
from evicting import Held, Plain
from kernels import Kernel, Kernels
from loop import Drive, Loop, Talk
from tenants import Tenants

IN_FLIGHT_US = 8_000
"""Of launches that ``drive`` puts on the stream, gate or not: more than a page's bound."""


class Worker:
    """What the process holds: a stream, kernels, and what was begun."""

    def __init__(self, loop: Path) -> None:
        self.device: Device = open_device()
        self.kernels = Kernels(self.device)
        self.loop = Loop(loop)
        self.stream = cu("cuStreamCreate", 1)
        self._made: dict[tuple[str, float], Kernel] = {}
        self._drive: Drive | None = None
        self._held: Held | None = None
        self._plain: Plain | None = None
        self._program: Program | None = None
        self.tenants = Tenants(self.device, self.kernels, self.loop)

    def _kernel(self, kind: str, us: float) -> Kernel:
        if (kind, us) not in self._made:
            make = self.kernels.spin if kind == "spin" else self.kernels.work
            self._made[kind, us] = make(us)
        return self._made[kind, us]

    def burst(self, us: float, count: int) -> dict[str, Any]:
        """So many launches, then wait for them."""
        launching, total = self.loop.burst(self._kernel("spin", us), self.stream, count)
        return {"launching_ns": launching, "total_ns": total}

    def drive(self, us: float, talk: str, kind: str = "spin") -> dict[str, Any]:
        """Launches without end."""
        kernel, shared = self._kernel(kind, us), Talk(Path(talk))
        depth = max(4, round(IN_FLIGHT_US / us))
        self._drive = self.loop.drive(kernel, self.device.context, self.stream, shared, depth)
        return {}

    def halt(self) -> dict[str, Any]:
        """End what ``drive`` began."""
        assert self._drive is not None
        launched = self._drive.halt()
        self._drive = None
        return {"launched": launched}

    def hold(self, size: int, piece: int, seed: int, seconds: float) -> dict[str, Any]:
        """Take memory and fill it."""
        self._held = Held(self.kernels, self.stream)
        return self._held.take(size, piece, seed, seconds)

    def hold_plain(self, size: int, piece: int, seed: int, seconds: float) -> dict[str, Any]:
        """The same, as any job does."""
        self._plain = Plain(self.kernels, self.stream)
        return self._plain.take(size, piece, seed, seconds)

    def evict(self) -> dict[str, Any]:
        """Give all of it back, its contents kept on the host."""
        assert self._held is not None
        return self._held.evict()

    def restore(self) -> dict[str, Any]:
        """Have it again, at the same addresses."""
        assert self._held is not None
        return self._held.restore()

    def kernel(self, step: str) -> dict[str, Any]:
        """Of the long one of the self-test: ``start``, ``steps`` or ``end``; see ``Program``."""
        self._program = self._program or Program()
        return {"said": getattr(self._program, step)()}

    def sums(self) -> dict[str, Any]:
        """Checksums of what is held."""
        held = self._held or self._plain
        assert held is not None
        return {"sums": held.sums()}


def main() -> None:
    """Open the device, say so, and answer until nobody asks."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def say(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    begun = time.monotonic()
    try:
        worker = Worker(Path(sys.argv[1]))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise
    say({"device": worker.device.name, "started_s": time.monotonic() - begun})
    for line in sys.stdin:
        asked = json.loads(line)
        what = asked.pop("do")
        owner = worker if hasattr(worker, what) else worker.tenants
        answer: Callable[..., dict[str, Any]] = getattr(owner, what)
        try:
            say(answer(**asked))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
