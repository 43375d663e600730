"""Who shares the device in the section ``colocate``: a service, and a training job beside it.

Either in PyTorch (``nets.py``) or as chains of kernels of the same shape. A process may hold
several services (one a kind of stream) and training jobs, and runs one of each at a time.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from cotenant.devices.nvidia.page import ControlPage

from driver import Device, cu
from kernels import Kernels
from loop import Loop
from processes import Look
from record import MS, US, S
from subsets import Subset, priorities, split

SPIN_NS = 300 * US
"""What is waited for by looking at the clock: a sleep may take that much longer than asked."""


class Service(Protocol):
    """What is asked."""

    def run(self) -> None:
        """One request; returns when it is answered."""


class Training(Protocol):
    """What takes the rest."""

    def step(self) -> None:
        """One step; the ones before the last are through when it returns."""

    def finish(self) -> None:
        """Wait for what is on its way."""


class Chain:
    """Kernels one after the other, then a wait: a request, or a step."""

    def __init__(self, loop: Loop, kernels: Kernels, stream: Any, shape: tuple[int, float]) -> None:
        self._loop, self._stream = loop, stream
        self._count, us = shape
        self._kernel = kernels.work(us)

    def run(self) -> None:
        """See Service."""
        self._loop.burst(self._kernel, self._stream, self._count)

    step = run

    def finish(self) -> None:
        """See Training: nothing is ever on its way."""


class Tenants:
    """What ``job.py`` can be asked for this section."""

    def __init__(self, device: Device, kernels: Kernels, loop: Loop) -> None:
        self._device, self._kernels, self._loop = device, kernels, loop
        self._services: dict[str, Service] = {}
        self._trainings: dict[str, Training] = {}
        self._pages: dict[str, ControlPage] = {}
        self._looks: dict[str, Look] = {}
        self._subsets: dict[str, Subset] = {}
        self._steps = 0
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        self._trouble = ""

    def _stream(self, kind: str, greater: bool) -> Any:
        """``plain``; ``priority``: the greatest for who is ``greater``, the least for others;
        ``green``: on half of the multiprocessors, who is ``greater`` on one half, others on the
        other."""
        if kind == "plain":
            return cu("cuStreamCreate", 1)
        if kind == "priority":
            return cu("cuStreamCreateWithPriority", 1, priorities()[greater])
        if not self._subsets:
            _, part, rest = split(0.5)
            self._subsets = {"part": Subset(part), "rest": Subset(rest)}
        return self._subsets["part" if greater else "rest"].stream()

    def service(self, kind: str, torch: bool, times: int = 30) -> dict[str, Any]:
        """Make one on a stream of this kind, and say how long it takes (ms)."""
        stream = self._stream(kind, True)
        if torch:
            from nets import NetService

            self._services[kind] = NetService(int(stream))
        else:
            self._services[kind] = Chain(self._loop, self._kernels, stream, (40, 25))
        taken = []
        for _ in range(times):
            begun = time.monotonic_ns()
            self._services[kind].run()
            taken.append((time.monotonic_ns() - begun) / MS)
        return {"ms": taken, "processors": self._count("part", kind)}

    def training(self, kind: str, torch: bool, times: int = 5) -> dict[str, Any]:
        """Make a job on a stream of this kind."""
        stream = self._stream(kind, False)
        if torch:
            from nets import NetTraining

            self._trainings[kind] = NetTraining(int(stream))
        else:
            self._trainings[kind] = Chain(self._loop, self._kernels, stream, (10, 500))
        for _ in range(times):
            self._trainings[kind].step()
        self._trainings[kind].finish()
        return {"processors": self._count("rest", kind)}

    def _count(self, which: str, kind: str) -> int:
        green = kind == "green" and which in self._subsets
        return self._subsets[which].count if green else self._device.processors

    # --- the gate -----------------------------------------------------------------------------

    def page(self, name: str, path: str, bound_ns: int) -> dict[str, Any]:
        """Make a control page: this process is the node."""
        self._pages[name] = ControlPage(Path(path), bound_ns=bound_ns)
        self._pages[name].open()
        return {}

    def watch(self, name: str, pid: int) -> dict[str, Any]:
        """Whose drain is waited for where this page is closed."""
        self._looks[name] = Look(self._pages[name], pid)
        return {}

    # --- serving ------------------------------------------------------------------------------

    def serve(
        self, times: list[float], kind: str, gate: str, wait: bool, most_s: float
    ) -> dict[str, Any]:
        """Answer requests that come at these times (s), one after the other, for so long at most.

        ``gate``: whose is closed while any is unanswered; empty: nobody's. ``wait``: a closed gate
        is drained before the first of them runs.
        """
        service, page = self._services[kind], self._pages.get(gate)
        latencies: list[float] = []
        drains: list[float] = []
        busy, begun = 0, time.monotonic_ns()
        try:
            for at in times:
                due = begun + round(at * S)
                if time.monotonic_ns() < due:
                    if page:
                        page.open_gate()
                    _until(due, page)
                if time.monotonic_ns() - begun > most_s * S:
                    break
                if page and not page.closed:
                    closing = time.monotonic_ns()
                    page.close_gate()
                    if wait:
                        self._looks[gate].wait(2)
                        drains.append((time.monotonic_ns() - closing) / US)
                starts = time.monotonic_ns()
                service.run()
                over = time.monotonic_ns()
                busy += over - starts
                latencies.append((over - due) / MS)
        finally:
            if page:
                page.open_gate()
        return {
            "latencies_ms": latencies,
            "drains_us": drains,
            "busy_s": busy / S,
            "wall_s": (time.monotonic_ns() - begun) / S,
            "unanswered": len(times) - len(latencies),
        }

    # --- training -----------------------------------------------------------------------------

    def train(self, kind: str) -> dict[str, Any]:
        """Begin, in a thread."""
        training = self._trainings[kind]
        self._ends.clear()
        self._trouble = ""
        sys.setswitchinterval(1e-4)

        def run() -> None:
            try:
                cu("cuCtxSetCurrent", self._device.context)
                while not self._ends.is_set():
                    training.step()
                    self._steps += 1
                training.finish()
            except Exception as error:
                self._trouble = f"{type(error).__name__}: {error}"

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        return {}

    def steps(self) -> dict[str, Any]:
        """How many steps there were, and when that was asked."""
        if self._trouble:
            raise RuntimeError(self._trouble)
        return {"steps": self._steps, "at": time.monotonic()}

    def rest(self) -> dict[str, Any]:
        """End the training job."""
        self._ends.set()
        if self._thread is not None:
            self._thread.join()
        return {}


def _until(due: int, page: ControlPage | None) -> None:
    while (left := due - time.monotonic_ns()) > 0:
        if left > SPIN_NS:
            time.sleep(min(left - SPIN_NS, 200 * MS) / S)
            if page:
                page.beat()
