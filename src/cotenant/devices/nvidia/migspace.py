"""A GPU whose MIG is on: its space is memory slices, and a partition is a GPU instance of ours with
one compute instance, which is what processes see.

* What an earlier node made and left (``migrecord``) is ours again.
* Instances that others made stay. The device's table is what they leave.
* At the end ours go, unless something still uses them: then the next node has them.
* One of ours that somebody else removes is missed at the next look, and made again with the next
  change of layout. Until then nothing is started there.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import msgspec

from cotenant.devices.nvidia.facts import Process
from cotenant.devices.nvidia.mig import MigController
from cotenant.devices.nvidia.migplan import Act, Seen, steps
from cotenant.devices.nvidia.migrecord import MigRecord
from cotenant.devices.nvidia.nvml import Code, NvmlError, NvmlGpu
from cotenant.domain import mig
from cotenant.domain.costs import MIG_MAKE, MIG_UNMAKE
from cotenant.domain.device import CUDA, PROCESSOR, DeviceSpec, LayoutStep, Partition
from cotenant.domain.errors import DeviceError, EnvironmentProblem
from cotenant.domain.mig import Placement, Placements, Table
from cotenant.domain.units import MS, S

log = logging.getLogger("cotenant.devices")

COMPUTE_NS: Final = 20 * MS
ASSUMED: Final = {
    Act.MAKE: MIG_MAKE - COMPUTE_NS,
    Act.MAKE_COMPUTE: COMPUTE_NS,
    Act.REMOVE: MIG_UNMAKE - COMPUTE_NS,
    Act.REMOVE_COMPUTE: COMPUTE_NS,
}
"""What steps take, until this machine has shown it; what the compute instance's part of it is, is
assumed."""
MOVE_NS: Final = 10 * S
"""What it costs a job to start again in another instance: assumed."""


class MigSpace:
    """``record``: the file that says which instances are ours."""

    takes_jobs = True

    def __init__(self, gpu: NvmlGpu, device: str, record: Path) -> None:
        self._gpu = gpu
        self._device = device
        self._record = MigRecord(record)
        self._control = MigController(gpu, self._record)
        self._uuid = ""
        self._table: Table | None = None
        self._word = ""
        self._seen: tuple[Seen, ...] = ()
        self._shown: dict[Placement, str] = {}
        """The UUIDs of our instances."""
        self._seats: dict[str, Placement] = {}
        """Where tenants were launched."""
        self._missed: dict[Placement, str] = {}
        """The UUIDs of those of our instances that are gone."""
        self._changing = False

    # --- life -------------------------------------------------------------------------------

    def open(self) -> None:
        self._record.open()
        try:
            self._uuid = self._gpu.uuid()
            self._control.open()
            self._look()
        except NvmlError as error:
            if error.code is not Code.NO_PERMISSION:
                raise
            raise EnvironmentProblem(
                f"device {self._device}: MIG is on, and only root may make and remove its "
                f"instances; run the node as root, or have root make the GPU whole: "
                f"nvidia-smi -i {self._gpu.index} -mig 0"
            ) from None
        if not any(profile.starts and profile.max_instances > 0 for profile in self.left.profiles):
            raise EnvironmentProblem(
                f"device {self._device}: all of the GPU is in MIG instances that Cotenant did not "
                f"make ({_names(self._foreign())}); have who made them remove some, such as by "
                f"nvidia-smi mig -i {self._gpu.index} -dci and then -dgi"
            )

    def close(self) -> None:
        self._seats.clear()
        if self._table is None:
            return
        try:
            self._control.reconcile(())
        except (DeviceError, OSError) as error:
            log.warning("MIG instances stay", extra={"device": self._device, "why": str(error)})

    def _look(self) -> None:
        """What there is now."""
        seen = self._control.seen()
        uuids = {d.gpu_instance: d.uuid for d in self._gpu.mig_devices()}
        self._shown = {
            s.placement: uuids[s.id] for s in seen if s.ours and s.whole and s.id in uuids
        }
        self._seen = seen
        self._missed = {}
        self._table = self._control.table.without(self._foreign())
        self._word = mig.word(self._table)

    def _foreign(self) -> Placements:
        return tuple(s.placement for s in self._seen if not s.ours)

    @property
    def left(self) -> Table:
        """What others leave of the GPU, as of the last look; valid after ``open``."""
        assert self._table is not None
        return self._table

    # --- what it is -------------------------------------------------------------------------

    def fit(self, spec: DeviceSpec) -> DeviceSpec:
        table, foreign = self.left, self._foreign()
        taken = {unit for placement in foreign for unit in self._control.table.units(placement)}
        units = tuple(unit for unit in range(table.memory_slices) if unit not in taken)
        beside = (f"{_names(foreign)}: not made by Cotenant, and left alone",) if foreign else ()
        return msgspec.structs.replace(
            spec,
            units=units,
            slices=table.compute_slices,
            mig=self._word,
            model=f"{spec.model} in MIG instances",
            shapes=tuple(sorted({p.compute for p in table.profiles if p.starts})),
            memory=spec.memory * len(units) // table.memory_slices,
            pins_jobs=True,
            pins_workers=True,
            move_ns=MOVE_NS,
            repartition_ns=sum(self._takes(act)[0] for act in Act),
            limits=(*spec.limits, *beside),
        )

    def _takes(self, act: Act) -> tuple[int, bool]:
        """The ns that a step is expected to take, and whether that was measured here."""
        measured = self._record.took(self._uuid).get(act.name)
        return (ASSUMED[act], False) if measured is None else (measured, True)

    # --- what changes -----------------------------------------------------------------------

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        wanted = self._placements(partitions)
        self._changing = True
        try:
            for timed in self._control.reconcile(wanted):
                self._record.learn(self._uuid, timed.step.act.name, timed.ns)
            self._record.save()
        finally:
            self._look()
            self._changing = False

    def preview(self, partitions: tuple[Partition, ...]) -> tuple[LayoutStep, ...]:
        wanted = self._placements(partitions)
        found = steps(self._seen, wanted, self._control.table)
        return tuple(LayoutStep(str(step), *self._takes(step.act)) for step in found)

    def _placements(self, partitions: tuple[Partition, ...]) -> Placements:
        found = tuple(self._placement(partition) for partition in partitions)
        problem = self.left.why_not(found)
        if problem is not None:
            beside = _names(self._foreign())
            room = f", beside {beside}, which Cotenant did not make" if beside else ""
            raise DeviceError(f"{self._device}: this layout is impossible{room}: {problem}")
        return found

    def _placement(self, partition: Partition) -> Placement:
        """The instance that a partition is."""
        start = partition.units[0] if partition.units else -1
        for profile in self._control.table.profiles:
            here = tuple(range(start, start + profile.size)) == partition.units
            alike = here and profile.compute == partition.compute
            if alike and not profile.media_extensions:
                return Placement(start, profile.name)
        raise DeviceError(f"{partition.id}: the GPU has no such MIG instance")

    # --- who is where -----------------------------------------------------------------------

    def shown(self, tenant: str, partition: Partition | None) -> str:
        if partition is None:
            raise DeviceError(f"{tenant}: on a GPU in MIG mode a process needs an instance")
        placement = self._placement(partition)
        uuid = self._shown.get(placement)
        if uuid is None or placement in self._missed:
            raise DeviceError(f"{tenant}: there is no instance {partition.id} (any more)")
        self._seats[tenant] = placement
        return uuid

    def worker(self, shown: str) -> dict[str, str]:
        return {PROCESSOR: f"{CUDA}{shown}"}

    def check(self, tenant: str, partition: Partition) -> None:
        seat = self._seats.get(tenant)
        if seat is not None and seat != self._placement(partition):
            raise DeviceError(
                f"{tenant}: its processes see {_names((seat,))} alone, not {partition.id}"
            )

    def forget(self, tenant: str) -> None:
        self._seats.pop(tenant, None)

    def trial(self) -> str:
        return next((self._shown[p] for p in sorted(self._shown)), "")

    def processes(self) -> tuple[Process, ...]:
        """Asked instance by instance: of a whole GPU in MIG mode drivers tell less. One may go
        meanwhile."""
        found: list[Process] = []
        there: set[str] = set()
        for instance in self._gpu.mig_handles():
            try:
                there.add(instance.uuid())
                found += instance.processes()
            except NvmlError as error:
                if error.code not in (Code.INVALID_ARGUMENT, Code.NOT_FOUND):
                    raise
        if not self._changing:
            self._missed = {p: uuid for p, uuid in self._shown.items() if uuid not in there}
        return tuple(found)

    def trouble(self) -> str:
        missed = tuple(self._missed)
        if not missed:
            return ""
        return (
            f"{_names(missed)}: not there any more, and it was not Cotenant that removed it; it is "
            "made again with the next change of layout, or when the node is started anew"
        )


def _names(placements: Placements) -> str:
    return ", ".join(f"{p.profile} at {p.start}" for p in placements)
