"""Whose the core time was, as the kernel counted it: the same way in every arm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from cotenant.devices import proctree

_MARKS = {
    b"cotenant.runtime.worker": "served",
    b"cotenant.cli.main": "served",
    b"train.py": "trained",
}


class CoreTime(NamedTuple):
    """Core seconds since the meter was made. What is missing to the whole went to the clients,
    this demo, the kernel and whatever else runs on the box."""

    served: float
    trained: float
    idle: float


class Meter:
    """Follows everything that this process has started."""

    def __init__(self, cores: list[int]) -> None:
        self._names = {f"cpu{core}".encode() for core in cores}
        self._kinds: dict[int, str] = {}
        self._ticks: dict[int, int] = {}
        self._spent = {"served": 0, "trained": 0}
        self._idle = self._idle_ticks()
        self.read()
        self._spent = {"served": 0, "trained": 0}

    def read(self) -> CoreTime:
        """Up to now. Processes that came and went between two calls are missed."""
        for pid in proctree.descendants(os.getpid()):
            found = proctree.stat(pid)
            if found is None:
                continue
            kind = self._kinds.get(pid) or self._kind(pid)
            if kind:
                self._spent[kind] += max(0, found.cpu_ticks - self._ticks.get(pid, 0))
                self._ticks[pid] = found.cpu_ticks
        idle = self._idle_ticks() - self._idle
        spent = self._spent["served"], self._spent["trained"], idle
        return CoreTime(*(ticks / proctree.TICKS_PER_SECOND for ticks in spent))

    def _kind(self, pid: int) -> str:
        """By the command line; a process that has not come to its exec is asked again."""
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return ""
        kind = next((kind for mark, kind in _MARKS.items() if mark in line), "")
        if kind:
            self._kinds[pid] = kind
        return kind

    def _idle_ticks(self) -> int:
        lines = Path("/proc/stat").read_bytes().splitlines()
        fields = [line.split() for line in lines]
        return sum(int(f[4]) + int(f[5]) for f in fields if f[0] in self._names)
