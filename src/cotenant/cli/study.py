"""A study of the journal in a process of its own: ``python -m cotenant.cli.study KIND ...``.

What is found goes to standard output as JSON; why there is nothing, to standard error, and the
exit code is 1. It gives way to everything else on the box and takes no more than it may.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from pathlib import Path

import msgspec

from cotenant.devices import proctree
from cotenant.domain.errors import CotenantError

CPU_S = 90
DATA_BYTES = 2 * 2**30
EXPLAINED_BYTES = 2 * 2**20
"""Of the newest journal that is read whole for an explanation."""


def main(arguments: list[str]) -> int:
    """``explain NICE DIRECTORY LAST`` or ``compare NICE DIRECTORY POLICY SECONDS PATIENCE``."""
    kind, nice, directory, *rest = arguments
    _give_way(int(nice))
    try:
        found = _explain(Path(directory), *rest) if kind == "explain" else None
        if kind == "compare":
            found = _compare(Path(directory), *rest)
    except CotenantError as error:
        print(error, file=sys.stderr)
        return 1
    except MemoryError:
        print("it takes more memory than a study may have; ask for less time", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(found))
    return 0


def _give_way(nice: int) -> None:
    proctree.end_with_parent(signal.SIGKILL)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.nice(nice)
    with contextlib.suppress(OSError):  # where memory runs short, this goes first
        Path("/proc/self/oom_score_adj").write_text("800")
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _explain(directory: Path, last: str) -> object:
    from cotenant.telemetry.explain import explain
    from cotenant.telemetry.records import recent

    return explain(recent(directory, EXPLAINED_BYTES), time.time(), int(last))


def _compare(directory: Path, policy: str, seconds: str, patience: str) -> object:
    from cotenant.cli.whatif import compare

    return compare(directory, policy, int(seconds), float(patience))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
