"""The MIG instances of one GPU: read from the driver, and brought to a wanted layout.

``migplan`` says which steps that takes and ``migrecord`` which instances are ours. A step that
fails has those before it undone. Where that fails too, the record still says what is ours, and
the next ``reconcile`` starts from what is found.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import msgspec

from cotenant.devices.nvidia.migplan import Act, Seen, Step, steps
from cotenant.devices.nvidia.migrecord import Entry, MigRecord
from cotenant.devices.nvidia.nvml import MIG_NAME, Code, NvmlError, NvmlGpu
from cotenant.domain.errors import DeviceError
from cotenant.domain.mig import Placement, Placements, Profile, Table


class Timed(msgspec.Struct, frozen=True):
    """A step that was done, and the ns that it took."""

    step: Step
    ns: int


class _ComputeProfile(msgspec.Struct, frozen=True):
    id: int
    slices: int
    count: int


class MigController:
    """One GPU whose MIG mode is on; takes the right to administer it. Not for several threads.

    ``table`` and all else raise NvmlError where the driver refuses. ``now``: a clock in ns.
    """

    def __init__(
        self, gpu: NvmlGpu, record: MigRecord, now: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._gpu, self._record, self._now = gpu, record, now
        self._uuid = ""
        self._table: Table | None = None
        self._profiles: dict[str, Any] = {}

    def open(self) -> None:
        """Read what the GPU can be divided into."""
        self._uuid = self._gpu.uuid()
        described = self._gpu.profiles()
        self._profiles = {_name(profile): profile for profile in described}
        profiles = tuple(self._profile(profile) for profile in described)
        self._table = Table(
            gpu=self._gpu.name(),
            memory_slices=max(start + p.size for p in profiles for start in p.starts),
            compute_slices=max(p.compute for p in profiles),
            evidence="read from the driver",
            profiles=profiles,
        )

    @property
    def table(self) -> Table:
        """Profiles and places, as the driver has them; valid after ``open``."""
        assert self._table is not None
        return self._table

    def _profile(self, described: Any) -> Profile:
        places = self._places(described.id)
        name = _name(described)
        return Profile(
            name=name,
            id=int(described.id),
            max_instances=int(described.instanceCount),
            size=places[0][1],
            starts=tuple(sorted(start for start, _ in places)),
            sms=int(described.multiprocessorCount),
            memory_mib=int(described.memorySizeMB),
            media_extensions="+" in name or "-" in name,
        )

    def _places(self, profile: int) -> list[tuple[int, int]]:
        ask = "nvmlDeviceGetGpuInstancePossiblePlacements"
        count = ctypes.c_uint(0)
        self._gpu.ask(ask, profile, None, ctypes.byref(count))
        places = (self._gpu.nvml.lib.c_nvmlGpuInstancePlacement_t * count.value)()
        self._gpu.ask(ask, profile, places, ctypes.byref(count))
        return [(int(place.start), int(place.size)) for place in places[: count.value]]

    # --- what there is ----------------------------------------------------------------------

    def seen(self) -> tuple[Seen, ...]:
        """Every GPU instance, by its place, and whether it is ours."""
        ours = {(e.placement, e.id) for e in self._record.entries(self._uuid)}
        found = []
        for name, profile in self._profiles.items():
            for handle in self._gpu.handles(profile):
                info = self._call("nvmlGpuInstanceGetInfo", handle)
                placement = Placement(int(info.placement.start), name)
                known = {(placement, int(info.id)), (placement, None)} & ours
                kinds = self._compute_profiles(handle)
                compute = [kind for kind in kinds for _ in self._compute(handle, kind)]
                found.append(
                    Seen(
                        placement,
                        int(info.id),
                        bool(known),
                        tuple(kind.id for kind in compute),
                        [kind.slices for kind in compute] == [int(profile.sliceCount)],
                    )
                )
        return tuple(sorted(found, key=lambda s: s.placement))

    def _compute_profiles(self, handle: Any) -> list[_ComputeProfile]:
        """Those that a GPU instance can be divided into, smallest first."""
        found = []
        for index in range(self._gpu.nvml.lib.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
            try:
                info = self._call("nvmlGpuInstanceGetComputeInstanceProfileInfo", handle, index, 0)
            except NvmlError as error:
                if error.code not in (Code.NOT_SUPPORTED, Code.INVALID_ARGUMENT):
                    raise
            else:
                found.append(
                    _ComputeProfile(int(info.id), int(info.sliceCount), int(info.instanceCount))
                )
        return sorted(found, key=lambda kind: kind.slices)

    def _compute(self, handle: Any, kind: _ComputeProfile) -> list[Any]:
        """Handles of the compute instances of one profile."""
        found = (self._gpu.nvml.lib.c_nvmlComputeInstance_t * kind.count)()
        count = ctypes.c_uint(0)
        reference = ctypes.byref(count)
        self._call("nvmlGpuInstanceGetComputeInstances", handle, kind.id, found, reference)
        return list(found[: count.value])

    def _at(self, placement: Placement) -> Any:
        """The handle of the GPU instance at a place."""
        for handle in self._gpu.handles(self._profiles[placement.profile]):
            info = self._call("nvmlGpuInstanceGetInfo", handle)
            if info.placement.start == placement.start:
                return handle
        raise DeviceError(
            f"{self._gpu.where}: {placement.profile} at {placement.start} is gone; somebody else "
            "removed it"
        )

    # --- what is wanted ---------------------------------------------------------------------

    def reconcile(self, wanted: Placements) -> tuple[Timed, ...]:
        """Make ours those that are wanted, each with one compute instance; idle ones only are
        removed by the driver. Raises DeviceError: then they are as they were, or it says that they
        could not be put back."""
        seen = self.seen()
        for entry in self._record.entries(self._uuid):
            if not any(s.ours and s.placement == entry.placement for s in seen):
                self._record.drop(self._uuid, entry.placement)
        done: list[Timed] = []
        for step in steps(seen, wanted, self.table):
            try:
                self._do(step, done)
            except (DeviceError, OSError) as error:
                left = self._undo(done, seen) or "the layout is as it was"
                raise DeviceError(f"{error} (to {step}); {left}") from None
        return tuple(done)

    def _undo(self, done: list[Timed], before: tuple[Seen, ...]) -> str:
        """Go back; returns what of it failed, in words, or ""."""
        try:
            for timed in reversed(done):
                self._do(timed.step.opposite, [])
            after = self.seen()
        except (DeviceError, OSError) as error:
            return f"going back failed too: {error}; the next change starts from what is left"
        if [(s.placement, s.compute) for s in after] == [(s.placement, s.compute) for s in before]:
            return ""
        return "the layout is another now, and the next change starts from it"

    def _do(self, step: Step, done: list[Timed]) -> None:
        """Do a step, and note it as soon as the GPU has changed."""
        started = self._now()

        def changed() -> None:
            done.append(Timed(step, self._now() - started))

        match step.act:
            case Act.MAKE:
                self._make(step.placement, changed)
            case Act.REMOVE:
                self._call("nvmlGpuInstanceDestroy", self._at(step.placement))
                changed()
                self._record.drop(self._uuid, step.placement)
            case Act.MAKE_COMPUTE:
                handle = self._at(step.placement)
                kind = self._wanted_compute(handle, step)
                self._call("nvmlGpuInstanceCreateComputeInstance", handle, kind.id)
                changed()
            case Act.REMOVE_COMPUTE:
                handle = self._at(step.placement)
                kind = self._wanted_compute(handle, step)
                self._call("nvmlComputeInstanceDestroy", self._compute(handle, kind)[-1])
                changed()

    def _make(self, placement: Placement, changed: Callable[[], None]) -> None:
        profile = self.table.profile(placement.profile)
        where = self._gpu.nvml.lib.c_nvmlGpuInstancePlacement_t(placement.start, profile.size)
        create = "nvmlDeviceCreateGpuInstanceWithPlacement"
        self._record.put(self._uuid, Entry(placement))
        try:
            handle = self._gpu.ask(create, profile.id, ctypes.byref(where))
        except NvmlError as error:
            if error.code is Code.INSUFFICIENT_RESOURCES or not self._stands(placement):
                self._record.drop(self._uuid, placement)
            else:
                changed()
            raise
        changed()
        number = int(self._call("nvmlGpuInstanceGetInfo", handle).id)
        self._record.put(self._uuid, Entry(placement, number))

    def _stands(self, placement: Placement) -> bool:
        """Whether a call that failed made the instance all the same. Raises NvmlError where that
        cannot be seen: it then stays in the record."""
        return any(s.placement == placement for s in self.seen())

    def _wanted_compute(self, handle: Any, step: Step) -> _ComputeProfile:
        kinds = self._compute_profiles(handle)
        whole = int(self._profiles[step.placement.profile].sliceCount)
        for kind in kinds:
            if kind.id == step.compute or (step.compute is None and kind.slices == whole):
                return kind
        raise DeviceError(
            f"{self._gpu.where}: {step.placement.profile} has no compute instance of all of it"
        )

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._gpu.nvml.call(name, *arguments, where=self._gpu.where)


def _name(described: Any) -> str:
    return str(described.name).removeprefix(MIG_NAME)
