"""Processes from elsewhere that are to belong to a job: which may, and which still do."""

from __future__ import annotations

import os
from collections.abc import Iterable

from cotenant.devices import proctree
from cotenant.domain.reservation import Adopted


def living(adopted: Iterable[Adopted]) -> tuple[Adopted, ...]:
    """Those that live. A process that has got the pid of one since is another."""
    return tuple(p for p in adopted if proctree.start_time(p.pid) == p.start)


def not_adoptable(process: Adopted) -> str:
    """Why a process cannot be adopted; "" if it can. The node and those above it are not
    somebody's program; nor are workers, and jobs that it started."""
    if not process.start:
        return "it does not exist, or has ended"
    if process.pid == 1:
        return "it is the first process of this machine"
    table = proctree.scan()
    if process.pid in proctree.descendants(os.getpid(), table):
        return "the node started it"
    above = os.getpid()
    while above in table:
        if above == process.pid:
            return "it is the node itself, or what the node runs under"
        above = table[above].parent
    return ""
