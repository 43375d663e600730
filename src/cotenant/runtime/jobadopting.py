"""Jobs that stand for reservations, and the processes from elsewhere that belong to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from cotenant.devices import proctree
from cotenant.domain.errors import InvalidRequest, NotReady
from cotenant.domain.reservation import Adopted
from cotenant.domain.workload import JobState
from cotenant.runtime.jobledger import JobLedger
from cotenant.runtime.joblive import LiveJob
from cotenant.runtime.jobstore import JobRecord


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


class JobAdopting:
    """The jobs that stand for reservations. ``live``: the jobs that run, which come and go.
    ``on_adopts`` is told of a process that belongs to a job from now on."""

    def __init__(
        self,
        ledger: JobLedger,
        live: Mapping[str, LiveJob],
        on_adopts: Callable[[str, Adopted], None],
    ) -> None:
        self._ledger = ledger
        self._live = live
        self._on_adopts = on_adopts

    def reservations(self) -> dict[str, JobRecord]:
        """The jobs that stand for reservations and are not being ended, by the outside id."""
        found = {}
        for record in self._ledger.records.values():
            ends = record.ended or record.state is JobState.STOPPING
            if record.spec.reservation is not None and not ends:
                found[record.spec.reservation.id] = record
        return found

    def adopt(self, id: str, pid: int) -> None:
        """Have a process of this host be a reservation's job's, with all that descends from it.
        Raises ``NotReady`` before that runs, ``InvalidRequest`` for a process that is not there or
        is the node's own."""
        record, live = self._ledger.records[id], self._live.get(id)
        if live is None or not live.run.shim_pid:
            raise NotReady(f"job {id} is {record.state.value}; wait until its space is there")
        process = Adopted(pid, proctree.start_time(pid))
        if process in record.adopted:
            return
        if why := not_adoptable(process):
            raise InvalidRequest(f"process {pid} cannot be adopted: {why}")
        for other in self._ledger.records.values():
            if process in other.adopted and not other.ended:
                raise InvalidRequest(f"process {pid} belongs to job {other.spec.id} already")
        adopted = (*living(record.adopted), process)
        self._ledger.step(id, record.state, adopted=adopted)
        live.run.take_in(adopted)
        if live.told:
            self._on_adopts(id, process)

    def adopted(self, id: str) -> tuple[Adopted, ...]:
        """The processes from elsewhere that belong to a job and live."""
        return living(self._ledger.records[id].adopted)
