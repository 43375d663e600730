"""Whether the launch gate works on this GPU: tried, with a process of our own (``trial``).

What is tried: that the process takes a seat, waits while the gate is closed, goes on when it opens,
that the gate drains behind it, and that all of this works a second time.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cotenant.devices.nvidia import trial
from cotenant.devices.nvidia.gates import Gates
from cotenant.devices.nvidia.page import ControlPage
from cotenant.devices.nvidia.shim import driver, shim
from cotenant.domain.errors import DeviceError
from cotenant.domain.units import MS

JOB: Final = "/self-test"
"""No job has a slash in its name."""
WITHIN_S: Final = 30.0
"""For all of it: a first context takes seconds on a machine with many GPUs."""
HELD_S: Final = 0.05
"""How long the process is watched doing nothing at a closed gate."""
_LOOK_S: Final = 0.001


class NoGate(DeviceError):
    """``what`` stands against a gate here, and ``how`` to change that, "" if that is not known."""

    def __init__(self, what: str, how: str = "") -> None:
        super().__init__(f"{what}; {how}" if how else what)
        self.what, self.how = what, how


def gates_for(node: str, bound_ns: int = 2 * MS) -> Gates:
    """Gates, open, which are still to be tried (``run``); see ``Gates``. Raises NoGate."""
    gates = Gates(node, _ready(), bound_ns)
    try:
        gates.open()
    except DeviceError as error:
        raise NoGate(str(error)) from error
    return gates


def _ready() -> Path:
    """The driver; raises NoGate where the gate cannot even be tried."""
    if shim() is None:
        how = "install Cotenant where there is a C compiler, or in a source tree: make native"
        raise NoGate("the launch gate was not built", how)
    found = driver()
    if found is None:
        how = "add its folder to those of the loader (ldconfig)"
        raise NoGate("the driver's libcuda.so.1 was not found", how)
    return found


def run(gates: Gates, gpu: str) -> None:
    """Raises NoGate with what did not happen. ``gates`` are open; ``gpu``: a UUID."""
    try:
        _run(gates, gpu)
    except (OSError, DeviceError) as error:
        raise error if isinstance(error, NoGate) else NoGate(f"tried here: {error}") from error


def _run(gates: Gates, gpu: str) -> None:
    launch = gates.launch(JOB)
    env = launch.applied({**os.environ, "CUDA_VISIBLE_DEVICES": gpu})
    try:
        process = subprocess.Popen(
            [sys.executable, "-S", "-P", trial.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
        )
        try:
            _Trial(process, gates).run()
        finally:
            process.kill()
            process.communicate()
    finally:
        gates.forget(JOB)


class _Trial:
    def __init__(self, process: subprocess.Popen[bytes], gates: Gates) -> None:
        self._process = process
        self._gates = gates
        self._page: ControlPage = gates.page(JOB)
        self._end = time.monotonic() + WITHIN_S

    def run(self) -> None:
        self._hear(b"ready\n", "the process did not get as far as a stream")
        if not self._page.attached(self._process.pid):
            raise NoGate("tried here: a process does not come by the gate to the driver")
        for _ in range(2):
            self._say()
            self._until(lambda: any(s.waiting for s in self._page.seats()), "it is not held back")
            time.sleep(HELD_S)
            if any(seat.entered != seat.left for seat in self._page.seats()):
                raise NoGate("tried here: the closed gate let a call through")
            self._gates.grant(JOB)
            self._hear(b"done\n", "it does not go on when the gate opens")
            self._gates.revoke(JOB)
        if not any(seat.copies >= 2 for seat in self._page.seats()):
            raise NoGate("tried here: calls are not counted")

    def _say(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise NoGate(f"tried here: the process is gone ({error})") from error

    def _until(self, true: Callable[[], bool], otherwise: str) -> None:
        while not true():
            if time.monotonic() > self._end or self._process.poll() is not None:
                raise self._failed(otherwise)
            time.sleep(_LOOK_S)

    def _hear(self, line: bytes, otherwise: str) -> None:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            left = self._end - time.monotonic()
            if not selector.select(max(0.0, left)) or self._process.stdout.readline() != line:
                raise self._failed(otherwise)

    def _failed(self, what: str) -> NoGate:
        """With what the process said, if it ended."""
        said = ""
        if self._process.poll() is not None and self._process.stderr is not None:
            said = self._process.stderr.read().decode(errors="replace").strip()[-300:]
        return NoGate(f"tried here: {what}{f' ({said})' if said else ''}")
