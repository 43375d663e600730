"""Whether the launch gate works on this GPU, and whether kernels can be stopped in their middle:
tried, with processes of our own (``trial``).

What is tried of the gate: that the process takes a seat, waits while the gate is closed, goes on
when it opens, that the gate drains behind it, and that all of this works a second time.
Of channels: that a kernel stands still while another process computes, goes on, and makes all of
its steps.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from cotenant.devices.nvidia import trial
from cotenant.devices.nvidia.gates import Gates
from cotenant.devices.nvidia.page import DISABLED, LEFT, ORPHANED, PREEMPTED, ControlPage
from cotenant.devices.nvidia.shim import driver, shim
from cotenant.devices.nvidia.trial import STEPS
from cotenant.domain.errors import DeviceError
from cotenant.domain.units import MS

T = TypeVar("T")
JOB: Final = "/self-test"
BESIDE: Final = "/self-test-beside"
"""No job has a slash in its name."""
WITHIN_S: Final = 30.0
"""For all that one process does: a first context takes seconds on a machine with many GPUs."""
HELD_S: Final = 0.05
"""How long the process is watched doing nothing."""
HOLDS: Final = 3
"""How often its kernel is stopped."""
TRIES: Final = 3
"""Where the machine stood still meanwhile: a process that takes the node for dead opens its gate,
and then nothing was learnt of the gate."""
_LOOK_S: Final = 0.001


class NoGate(DeviceError):
    """``what`` stands against a gate here, and ``how`` to change that, "" if that is not known."""

    def __init__(self, what: str, how: str = "") -> None:
        super().__init__(f"{what}; {how}" if how else what)
        self.what, self.how = what, how


class _StoodStill(NoGate):
    """Not the gate failed, but this process was not on time."""


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
    """Try the gate. Raises NoGate with what did not happen. ``gates`` are open; ``gpu``: a UUID."""

    def once() -> None:
        with _trials(gates, gpu, JOB) as (job,):
            _try_gate(gates, job)

    _tried(once)


def run_channels(gates: Gates, gpu: str) -> int:
    """Try to stop a kernel in its middle, where the gate works: how long (ns) that took at most.
    Leaves ``gates.channels`` at the way that works. Raises NoGate, and leaves channels alone, where
    none does."""

    def once() -> int:
        with _trials(gates, gpu, JOB, BESIDE) as (job, beside):
            return _try_channels(gates, job, beside)

    failed = NoGate("")
    for gates.channels in (DISABLED, PREEMPTED):
        try:
            return _tried(once)
        except NoGate as error:
            failed = error
    gates.channels = LEFT
    raise failed


def _tried(once: Callable[[], T]) -> T:
    """``once``, and again where the machine stood still."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(_StoodStill):
            return once()
    return once()


@contextlib.contextmanager
def _trials(gates: Gates, gpu: str, *jobs: str) -> Iterator[list[_Trial]]:
    """Processes that are ready; whatever happens is NoGate, and nothing is left of them."""
    trials: list[_Trial] = []
    try:
        with contextlib.ExitStack() as stack:
            for name in jobs:
                trials.append(_Trial(gates, gpu, name))
                stack.enter_context(trials[-1])
            yield trials
    except (OSError, DeviceError) as error:
        why = str(error) if isinstance(error, NoGate) else f"tried here: {error}"
        kind = _StoodStill if any(trial.orphaned for trial in trials) else NoGate
        raise kind(why) from error


def _try_gate(gates: Gates, job: _Trial) -> None:
    for _ in range(2):
        job.say("fill")
        job.until(lambda: job.waits() or job.speaks(), "it is not held back")
        time.sleep(HELD_S)
        if job.speaks() or not job.waits():
            raise NoGate("tried here: the closed gate let a call through")
        gates.grant(JOB)
        job.hear("it does not go on when the gate opens")
        gates.revoke(JOB)
    if not any(seat.copies >= 2 for seat in job.page.seats()):
        raise NoGate("tried here: calls are not counted")


def _try_channels(gates: Gates, job: _Trial, beside: _Trial) -> int:
    """A kernel stands still while another process computes, and makes all of its steps."""
    took = []
    gates.grant(JOB)
    job.ask("start", "no kernel starts")
    for _ in range(HOLDS):
        took.append(gates.revoke(JOB))
        if not job.page.holds:
            raise NoGate(f"tried here: a kernel cannot be stopped ({_refusals(job.page)})")
        before = job.steps()
        gates.grant(BESIDE)
        beside.ask("fill", "beside a kernel that is stopped nothing is computed")
        gates.revoke(BESIDE)
        time.sleep(HELD_S)
        if job.steps() != before:
            raise NoGate("tried here: a kernel goes on although the driver says it is stopped")
        gates.grant(JOB)
        job.until(_beyond(job, before), "a kernel that was stopped does not go on")
    job.ask("end", "a kernel that was stopped does not end")
    if job.steps() != STEPS:
        raise NoGate("tried here: a kernel that was stopped did not do all of its work")
    return max(took)


def _beyond(job: _Trial, steps: int) -> Callable[[], bool]:
    return lambda: job.steps() > steps


def _refusals(page: ControlPage) -> str:
    errors = sorted({seat.channels.error for seat in page.seats()} - {0})
    return f"the driver says {', '.join(map(hex, errors))}" if errors else "no answer"


class _Trial:
    """A process of ``trial`` behind its own gate, ready."""

    def __init__(self, gates: Gates, gpu: str, job: str) -> None:
        self._gates, self._job = gates, job
        self.orphaned = False
        """Whether it took this process for dead, known at its end."""
        launch = gates.launch(job)
        self.page: ControlPage = gates.page(job)
        self._end = time.monotonic() + WITHIN_S
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-P", trial.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=launch.applied({**os.environ, "CUDA_VISIBLE_DEVICES": gpu}),
            )
        except OSError:
            gates.forget(job)
            raise

    def __enter__(self) -> _Trial:
        try:
            self.hear("the process did not get as far as a stream", b"ready\n")
            if not self.page.attached(self._process.pid):
                raise NoGate("tried here: a process does not come by the gate to the driver")
        except BaseException:
            self._finish()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def _finish(self) -> None:
        self.orphaned = any(seat.flags & ORPHANED for seat in self.page.seats())
        self._process.kill()
        self._process.communicate()
        self._gates.forget(self._job)

    def ask(self, what: str, otherwise: str) -> bytes:
        """What the process answers beside ``done``; ``otherwise`` is wrong where it does not."""
        self.say(what)
        return self.hear(otherwise)

    def steps(self) -> int:
        """How far the kernel is."""
        return int(self.ask("steps", "it does not say how far its kernel is"))

    def waits(self) -> bool:
        """Whether it waits at its gate."""
        return any(seat.waiting for seat in self.page.seats())

    def speaks(self) -> bool:
        """Whether it has answered, or ended."""
        return self._readable(0)

    def _readable(self, within_s: float) -> bool:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return bool(selector.select(within_s))

    def say(self, what: str) -> None:
        """Order something."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{what}\n".encode())
            self._process.stdin.flush()
        except OSError as error:
            raise NoGate(f"tried here: the process is gone ({error})") from error

    def until(self, true: Callable[[], bool], otherwise: str) -> None:
        """Wait for something."""
        while not true():
            if time.monotonic() > self._end or self._process.poll() is not None:
                raise self._failed(otherwise)
            time.sleep(_LOOK_S)

    def hear(self, otherwise: str, start: bytes = b"done") -> bytes:
        """The rest of a line that begins so."""
        assert self._process.stdout is not None
        left = max(0.0, self._end - time.monotonic())
        line = self._process.stdout.readline() if self._readable(left) else b""
        if not line.startswith(start):
            raise self._failed(otherwise)
        return line.removeprefix(start)

    def _failed(self, what: str) -> NoGate:
        """With what the process said, if it ended."""
        said = ""
        if self._process.poll() is not None and self._process.stderr is not None:
            said = self._process.stderr.read().decode(errors="replace").strip()[-300:]
        return NoGate(f"tried here: {what}{f' ({said})' if said else ''}")
