"""Processes of the check's own: with or without the shim, asked by lines of JSON."""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from cotenant.devices.nvidia import page as layout
from cotenant.devices.nvidia.page import ControlPage

from record import MS, Setting

HERE = Path(__file__).resolve().parent
_SLOTS = struct.Struct("<256I")
"""64 slots: done, put, loose, reserved."""


class Died(Exception):
    """The process ended, failed at what it was asked, or did not answer in time."""


def environment(setting: Setting, behind: Path | None = None, shim: bool = False) -> dict[str, str]:
    """Variables of a process. ``behind``: its gate's control page. ``shim`` alone: calls only pass
    through the shim."""
    found = dict(os.environ)
    found["PYTHONUNBUFFERED"] = "1"
    if not (behind or shim):
        return found
    library = str(Path(setting.shim, "libcuda.so.1"))
    found["LD_PRELOAD"] = " ".join(filter(None, (library, found.get("LD_PRELOAD"))))
    paths = (setting.shim, found.get("LD_LIBRARY_PATH"))
    found["LD_LIBRARY_PATH"] = ":".join(filter(None, paths))
    if setting.driver:
        found[layout.DRIVER_VARIABLE] = setting.driver
    if behind:
        found[layout.VARIABLE] = str(behind)
    return found


class Job:
    """A process that answers: ``job.py``, or another program of the check."""

    def __init__(
        self,
        setting: Setting,
        behind: Path | None = None,
        shim: bool = False,
        program: tuple[str, ...] = ("job.py",),
    ) -> None:
        self._setting = setting
        self._rest = b""
        self._lost = ""
        errors = Path(setting.folder, f"stderr-{time.monotonic_ns()}")
        self._errors: IO[bytes] = errors.open("w+b")
        name, *words = program
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / name), setting.loop, *words],
            env=environment(setting, behind, shim),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self.pid = self._process.pid

    def tell(self, what: str, **more: Any) -> None:
        """Ask, and fetch the answer later."""
        assert self._process.stdin is not None
        if self._lost:
            raise Died(self._lost)
        try:
            self._process.stdin.write(json.dumps({"do": what, **more}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Died(self._last_words()) from error

    def answer(self, seconds: float = 60) -> dict[str, Any]:
        """To what was asked; raises Died, and from then on always where it took too long."""
        assert self._process.stdout is not None
        if self._lost:
            raise Died(self._lost)
        end = time.monotonic() + seconds
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                self._lost = f"no answer within {seconds:.0f} s: {self._last_words()}"
                raise Died(self._lost)
            more = os.read(descriptor, 1 << 16)
            if not more:
                raise Died(self._last_words())
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise Died(found["error"])
        return found

    def ask(self, what: str, seconds: float = 60, **more: Any) -> dict[str, Any]:
        """Ask and wait for the answer."""
        self.tell(what, **more)
        return self.answer(seconds)

    def _last_words(self) -> str:
        self._errors.flush()
        text = Path(self._errors.name).read_text(errors="replace").strip()
        code = self._process.poll()
        ended = "it runs" if code is None else f"it ended with {code}"
        return f"{ended}; {text.splitlines()[-1] if text else 'it said nothing'}"

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_page(
    setting: Setting, name: str, bound_ns: int, channels: int = layout.LEFT
) -> ControlPage:
    """A control page in the section's folder."""
    path = Path(setting.folder, f"{setting.name}-{name}")
    page = ControlPage(path, bound_ns=bound_ns, channels=channels)
    page.open()
    return page


class Look:
    """The seat of one process, read from memory: what a node that knows which seats are in use
    needs to see a drain. ``ControlPage.drained`` reads all seats, by system calls."""

    def __init__(self, page: ControlPage, pid: int) -> None:
        self._page = page
        self._pid = pid
        self._data = page.path.read_bytes()
        self._at = self._find()
        self._file = page.path.open("rb")

    def _find(self) -> int:
        for index in range(layout.SEATS):
            at = layout.HEAD_BYTES + index * layout.SEAT_BYTES
            magic, pid, attached, *_ = layout.SEAT.unpack_from(self._data, at)
            if magic == layout.SEAT_MAGIC and pid == self._pid and attached:
                return at
        raise Died(f"process {self._pid} has no seat: the shim is not in it")

    def _read(self) -> tuple[bool, int]:
        data = os.pread(self._file.fileno(), layout.SLOTS_AT + _SLOTS.size, self._at)
        entered, left = layout.SEAT.unpack_from(data)[4:6]
        slots = _SLOTS.unpack_from(data, layout.SLOTS_AT)
        quiet = entered == left and slots[0::4] == slots[1::4] and not any(slots[2::4])
        return quiet, entered

    def drained(self) -> bool:
        """Of a process that uses 64 streams at most, its gate being closed."""
        first, second = self._read(), self._read()
        return first[0] and second[0] and first[1] == second[1]

    def wait(self, seconds: float) -> int:
        """Ns until drained; raises Died if it takes longer than so many seconds."""
        begun = beaten = time.monotonic_ns()
        while not self.drained():
            now = time.monotonic_ns()
            if now - begun > seconds * 1e9:
                raise Died(f"not drained within {seconds:g} s")
            if now - beaten > 200 * MS:
                self._page.beat()
                beaten = now
        return time.monotonic_ns() - begun

    def close(self) -> None:
        """Once."""
        self._file.close()
