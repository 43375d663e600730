"""Taking memory back from running programs: the kernel writes their pages to swap.

Two ways, both of Linux and both of use only where there is swap. A cgroup of version 2 that was
delegated to this process (``Delegate=yes`` of systemd) reclaims what its programs touch least
(``memory.reclaim``, kernel 5.19). Without one pages are named (``process_madvise``, kernel 5.10),
the largest mappings first; that takes CAP_SYS_NICE. A program that touches such a page again has it
back: nothing is lost but time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Protocol

PROCESS_MADVISE: Final = 440
MADV_PAGEOUT: Final = 21
IOVECS: Final = 1024
"""As many pieces as one call takes (IOV_MAX)."""
CAP_SYS_NICE: Final = 23
LEAF: Final = "cotenant-node"
CGROUPS: Final = Path("/sys/fs/cgroup")
NO_SWAP: Final = "this machine has no swap"
NO_RIGHT: Final = "no cgroup is delegated to this process, and it lacks CAP_SYS_NICE"

_libc = ctypes.CDLL(None, use_errno=True)


class Reclaim(Protocol):
    """A way to take memory back from a job."""

    name: str

    def place(self, job: str) -> str:
        """The cgroup that the job's processes are to be started in; "" if in none."""

    def take(self, job: str, pids: Iterable[int], size: int) -> None:
        """Take up to ``size`` bytes back from a job, whose processes these are. Raises OSError;
        that less could be taken is no error. Blocks while pages are written."""

    def forget(self, job: str) -> None:
        """The job is gone."""


def find(proc: Path = Path("/proc"), cgroups: Path = CGROUPS) -> tuple[Reclaim | None, str]:
    """The way that this machine has, or None and why it has none."""
    if not _has_swap(proc):
        return None, NO_SWAP
    with contextlib.suppress(OSError):
        return Cgroups(_own(proc, cgroups)), ""
    return (Pageout(proc), "") if _may_name_pages(proc) else (None, NO_RIGHT)


def way(proc: Path = Path("/proc"), cgroups: Path = CGROUPS) -> tuple[str, str]:
    """The name of the way that ``find`` would take, or "" and why there is none. Changes nothing,
    so it does not try whether the kernel lets a delegated cgroup be divided."""
    if not _has_swap(proc):
        return "", NO_SWAP
    with contextlib.suppress(OSError):
        base = _own(proc, cgroups)
        controllers = (base / "cgroup.controllers").read_text().split()
        if "memory" in controllers and os.access(base / "cgroup.subtree_control", os.W_OK):
            return Cgroups.name, ""
    return (Pageout.name, "") if _may_name_pages(proc) else ("", NO_RIGHT)


def _has_swap(proc: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # a kernel without swap, some sandboxes
        return len((proc / "swaps").read_text().splitlines()) >= 2
    return False


def _may_name_pages(proc: Path) -> bool:
    status = (proc / "self/status").read_text()
    capabilities = next(x for x in status.splitlines() if x.startswith("CapEff:"))
    return bool(int(capabilities.split()[1], 16) >> CAP_SYS_NICE & 1)


def _own(proc: Path, cgroups: Path) -> Path:
    for line in (proc / "self/cgroup").read_text().splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            found = cgroups / path.lstrip("/")
            return found.parent if found.name == LEAF else found  # an earlier node moved there
    raise FileNotFoundError("no cgroup of version 2")


class Cgroups:
    """A cgroup for each job below one that was delegated to this process, which itself moves to a
    leaf of it. Raises OSError where that is not allowed, or memory is not among its controllers."""

    name = "memory.reclaim"

    def __init__(self, base: Path) -> None:
        self._base = base
        if "memory" not in (base / "cgroup.controllers").read_text().split():
            raise FileNotFoundError(f"{base} does not control memory")
        own = base / LEAF
        own.mkdir(exist_ok=True)
        (own / "cgroup.procs").write_text(str(os.getpid()))
        # Refused while others are in it: then it is not ours.
        (base / "cgroup.subtree_control").write_text("+memory")

    def place(self, job: str) -> str:
        """See Reclaim."""
        path = self._base / f"job-{job}"
        path.mkdir(exist_ok=True)
        return str(path)

    def take(self, job: str, _: Iterable[int], size: int) -> None:
        """See Reclaim."""
        with contextlib.suppress(BlockingIOError):  # less than that could be reclaimed
            (self._base / f"job-{job}" / "memory.reclaim").write_text(str(size))

    def forget(self, job: str) -> None:
        """See Reclaim."""
        with contextlib.suppress(OSError):  # it was never made, or something of it is left
            (self._base / f"job-{job}").rmdir()


class Pageout:
    """Pages of a job are named to the kernel, those of its largest mappings first."""

    name = "process_madvise"

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._cursors: dict[str, dict[tuple[int, int], int]] = {}
        """Of each job: how far its mappings were named, by process and start."""

    def place(self, _: str) -> str:
        """See Reclaim."""
        return ""

    def take(self, job: str, pids: Iterable[int], size: int) -> None:
        """See Reclaim."""
        refused: OSError | None = None
        cursors = self._cursors.setdefault(job, {})
        for pid in pids:
            if size <= 0:
                return
            try:
                size -= self._page_out(pid, size, cursors)
            except (ProcessLookupError, FileNotFoundError):
                continue  # it has ended
            except OSError as error:  # it locks its memory, say; others may not
                refused = error
        if refused is not None:
            raise refused

    def forget(self, job: str) -> None:
        """See Reclaim."""
        self._cursors.pop(job, None)

    def _page_out(self, pid: int, size: int, cursors: dict[tuple[int, int], int]) -> int:
        """Bytes of one process that the kernel was told of: those behind the ones before."""
        fd = os.pidfd_open(pid)  # first: what is read then is of this process
        try:
            ranges, told = [], 0
            for start, length in sorted(self._mappings(pid), key=lambda m: -m[1])[:IOVECS]:
                done = cursors.get((pid, start), 0)
                done = done if done < length else 0
                count = min(length - done, size - told)
                if count > 0:
                    ranges.append((start + done, count))
                    cursors[pid, start] = done + count
                    told += count
            if not ranges:
                return 0
            vector = (ctypes.c_size_t * (2 * len(ranges)))(*(n for pair in ranges for n in pair))
            if _libc.syscall(PROCESS_MADVISE, fd, vector, len(ranges), MADV_PAGEOUT, 0) < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            os.close(fd)
        return told

    def _mappings(self, pid: int) -> list[tuple[int, int]]:
        """Start and length of the private memory of a process that it can write."""
        found = []
        for line in (self._proc / str(pid) / "maps").read_text().splitlines():
            span, rights, _, _, inode = line.split()[:5]
            if rights == "rw-p" and inode == "0" and "[stack]" not in line:
                start, end = (int(text, 16) for text in span.split("-"))
                found.append((start, end - start))
        return found
