"""Process trees as ``/proc`` shows them: who descends from whom, what they use, ending them.

Everything here tolerates processes that vanish, appear or become zombies while it looks: what
cannot be read is left out. A pid alone names a process only as long as it lives; keep its
``start_time`` next to it and compare both.

The job shim imports this file, so it imports next to nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

STOP_WITHIN_S = 0.002
_PAUSE_S = 0.00002
_PASSES = 10
_PR_SET_PDEATHSIG = 1

TYPE_CHECKING = False  # ``typing`` costs the shim more to import than all of this file
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping

TICKS_PER_SECOND: int = os.sysconf("SC_CLK_TCK")
PAGE_BYTES: int = os.sysconf("SC_PAGE_SIZE")


class Stat:
    """What matters of one ``/proc/<pid>/stat`` (proc(5)). Times are clock ticks."""

    __slots__ = (
        "cpu_ticks",
        "group",
        "parent",
        "pid",
        "reaped_ticks",
        "start",
        "state",
        "threads",
    )

    def __init__(self, pid: int, fields: list[bytes]) -> None:
        self.pid = pid
        self.state = fields[0]
        self.parent = int(fields[1])
        self.group = int(fields[2])
        self.cpu_ticks = int(fields[11]) + int(fields[12])
        self.reaped_ticks = int(fields[13]) + int(fields[14])
        self.threads = int(fields[17])
        self.start = int(fields[19])

    @property
    def is_dead(self) -> bool:
        """Ended, waiting to be reaped. A leader that ended before its other threads is not."""
        return self.state in (b"Z", b"X") and self.threads <= 1


def _read(path: str) -> bytes:
    """The whole of a small /proc file; empty if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def stat(pid: int) -> Stat | None:
    """One process, or None if there is none with this pid."""
    return _stat(pid, f"/proc/{pid}/stat")


def thread_stat(tid: int) -> Stat | None:
    """One thread by itself; ``stat`` of its id would show the sum over its process."""
    return _stat(tid, f"/proc/{tid}/task/{tid}/stat")


def _stat(pid: int, path: str) -> Stat | None:
    # The name stands in brackets and may itself hold brackets and spaces: count from the last.
    _, _, rest = _read(path).rpartition(b")")
    fields = rest.split()
    return Stat(pid, fields) if len(fields) > 19 else None


def is_stopped(pid: int) -> bool:
    """Whether a process stands still because of a signal; one that is traced does not count."""
    found = stat(pid)
    return found is not None and found.state == b"T"


def ignores(pid: int, sent: signal.Signals) -> bool:
    """Whether a process lets a signal pass as if it had not been sent."""
    _, _, mask = _read(f"/proc/{pid}/status").partition(b"\nSigIgn:\t")
    return bool(mask) and bool(int(mask.split()[0], 16) >> (sent - 1) & 1)


def runs(pid: int) -> bool:
    """Whether a process runs or could at any moment: it is neither stopped nor in the kernel."""
    found = stat(pid)
    return found is not None and found.state in b"RS"


def start_time(pid: int) -> int:
    """Start of a process in clock ticks after boot; 0 if it does not exist or is a zombie."""
    found = stat(pid)
    return found.start if found is not None and not found.is_dead else 0


def scan() -> dict[int, Stat]:
    """All processes there are; some 15 microseconds for each of them."""
    stats = (stat(pid) for pid in _pids())
    return {found.pid: found for found in stats if found is not None}


def descendants(root: int, table: Mapping[int, Stat] | None = None) -> list[int]:
    """Pids below ``root`` (not itself), parents first, zombies left out.

    Orphans that went to another reaper are not found, so the root should be a subreaper
    (``PR_SET_CHILD_SUBREAPER``). The kernel's own lists of children are not used: they are
    exact only while the tree stands still, and not every kernel has them.
    """
    table = scan() if table is None else table
    below: dict[int, list[int]] = {}
    for found in table.values():
        below.setdefault(found.parent, []).append(found.pid)
    tree = [root]
    for pid in tree:  # grows while it is walked
        tree.extend(below.get(pid, ()))
    return [pid for pid in tree[1:] if not table[pid].is_dead]


def family(
    root: int, adopted: Mapping[int, int], table: Mapping[int, Stat] | None = None
) -> list[int]:
    """``descendants`` of ``root``, and those processes that were ``adopted`` with all that descends
    from them: pid and ``start_time`` of each; who has such a pid since is left alone."""
    table = scan() if table is None else table
    found = dict.fromkeys(descendants(root, table))
    for pid, start in adopted.items():
        there = table.get(pid)
        if there is not None and there.start == start and not there.is_dead:
            found[pid] = None
            found.update(dict.fromkeys(descendants(pid, table)))
    return list(found)


def threads(pids: Iterable[int]) -> list[int]:
    """Thread ids of these processes; scheduling and affinity are per thread."""
    ids: list[int] = []
    for pid in pids:
        try:
            ids.extend(int(name) for name in os.listdir(f"/proc/{pid}/task"))
        except OSError:
            continue
    return ids


def run_delays() -> dict[int, int]:
    """Ns that each thread of this process has waited for a core so far (``schedstat``, proc(5));
    empty where the kernel does not count it."""
    delays: dict[int, int] = {}
    for tid in threads([os.getpid()]):
        fields = _read(f"/proc/self/task/{tid}/schedstat").split()
        if len(fields) > 1:
            delays[tid] = int(fields[1])
    return delays


def cpu_seconds(
    root: int, adopted: Mapping[int, int], table: Mapping[int, Stat] | None = None
) -> float:
    """CPU seconds used by a ``family``, the dead that were waited for included.

    The root's own time is left out. Processes whose parent ignores SIGCHLD are lost from the
    sum when they end: the kernel adds them to nobody.
    """
    table = scan() if table is None else table
    ticks = table[root].reaped_ticks if root in table else 0
    for pid in family(root, adopted, table):
        ticks += table[pid].cpu_ticks + table[pid].reaped_ticks
    return ticks / TICKS_PER_SECOND


def resident_bytes(pids: Iterable[int]) -> int:
    """Sum of the resident set sizes of these processes: cheap, and an upper bound.

    Pages that several of them share (libraries, memory not yet written after a fork, shared
    mappings) count once in each; ``proportional_bytes`` counts them once in all.
    """
    return sum(_resident(pid) for pid in pids)


def proportional_bytes(pids: Iterable[int]) -> int:
    """Sum of the proportional set sizes (PSS, proc(5)): a page that n processes share counts
    1/n in each of them.

    Costs milliseconds for each GiB of a process. Where the kernel does not say (another user's
    process), the resident set counts.
    """
    return sum(_proportional(pid) for pid in pids)


def _resident(pid: int) -> int:
    fields = _read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * PAGE_BYTES if len(fields) > 1 else 0


def _proportional(pid: int) -> int:
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return _resident(pid)


def marked(variable: str, value: str) -> list[int]:
    """Processes that were started with ``variable=value`` in their environment.

    Finds what lost its ancestors. Misses processes of other users (unless we are root) and
    those that were started with a cleaned environment.
    """
    entry = b"\0" + f"{variable}={value}".encode() + b"\0"
    me = os.getpid()
    return [
        pid
        for pid in _pids()
        if pid != me and entry in b"\0" + _read(f"/proc/{pid}/environ") + b"\0"
    ]


def send(pids: Iterable[int], *signals: signal.Signals) -> None:
    """Send each signal to each process; those that are gone or not ours are skipped."""
    for pid in pids:
        for number in signals:
            try:
                os.kill(pid, number)
            except OSError:
                break


def watchers(tree: Iterable[int], table: Mapping[int, Stat]) -> set[int]:
    """Those of a tree with a child in a process group of its own: shells with job control,
    script, launchers. They may act on the news that a child was stopped."""
    inside = set(tree)
    parents = {
        table[pid].parent
        for pid in inside
        if (parent := table.get(table[pid].parent)) and parent.group != table[pid].group
    }
    return parents & inside


def stop(pids: Iterable[int], watching: Container[int]) -> list[int]:
    """SIGSTOP, parents first (as ``descendants`` has them); returns whom it reached.

    Those of ``watching`` stand still before their children are stopped: a shell that sees its
    child stop takes that for Ctrl-Z, and goes on to its next command. That takes some 0.2 ms
    each; one that takes longer than ``STOP_WITHIN_S`` is left for later with those after it.
    """
    reached: list[int] = []
    for pid in pids:
        send([pid], signal.SIGSTOP)
        if pid in watching:
            end = time.monotonic() + STOP_WITHIN_S
            while runs(pid):
                if time.monotonic() > end:
                    return reached
                time.sleep(_PAUSE_S)  # it may want the very core that we are on
        reached.append(pid)
    return reached


def await_stopped(pids: Iterable[int]) -> None:
    """Wait until the kernel has stopped them, at most ``STOP_WITHIN_S``."""
    end = time.monotonic() + STOP_WITHIN_S
    for pid in pids:
        while runs(pid):
            if time.monotonic() > end:
                return


def continue_again(pids: Iterable[int]) -> None:
    """Continue each of these once it has stopped itself, within ``STOP_WITHIN_S`` in all."""
    end = time.monotonic() + STOP_WITHIN_S
    for pid in pids:
        while not is_stopped(pid):
            if time.monotonic() > end:
                return
            time.sleep(_PAUSE_S)
        send([pid], signal.SIGCONT)


def freeze(root: int, adopted: Mapping[int, int]) -> None:
    """Stop a ``family``, again until nobody new turns up."""
    stopped: set[int] = set()
    for _ in range(_PASSES):
        table = scan()
        tree = family(root, adopted, table)
        new = [pid for pid in tree if pid not in stopped]
        if not new:
            break
        stopped.update(stop(new, watchers(tree, table)))


def kill(find: Callable[[], list[int]], within_s: float = 5.0) -> list[int]:
    """SIGKILL all that ``find`` returns until it returns none; the rest after ``within_s``.

    They are frozen first, so that what forks faster than we look does not outrun us. What is
    left cannot be killed: it sits in the kernel (a dead disk, a hung driver) or is not ours.
    """
    end = time.monotonic() + within_s
    pause = 0.001
    while left := find():
        if time.monotonic() > end:
            return left
        send(left, signal.SIGSTOP)
        send(find(), signal.SIGKILL)
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return []


def end_with_parent(sent: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, sent, 0, 0, 0)
