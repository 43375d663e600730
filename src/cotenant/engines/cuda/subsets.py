"""Subsets of a GPU's multiprocessors (SMs) within one process: green contexts.

1. A *unit* is the least group of SMs that the driver separates. Its size is read from the driver.
2. The SMs are split into units once. Unit ``n`` is the driver's ``n``-th group, in every process.
3. A subset is a set of units, and has one green context and one stream of the highest priority.
4. How many SMs a subset has is asked of the driver afterwards, not computed.
5. SMs that fill no unit are in the subset of all units alone, which is the GPU itself.
6. Where green contexts cannot be had, ``refusal`` says why. Every subset is the whole GPU then.

Source: CUDA Driver API, "Green Contexts".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from cotenant.domain.errors import ModelError
from cotenant.engines.cuda.driver import CudaError, Gpu


class Lane(msgspec.Struct, frozen=True):
    """A stream and what it runs on. ``sms`` is what the driver says; ``whole``: that is the
    GPU."""

    units: tuple[int, ...]
    sms: int
    stream: int
    priority: int
    whole: bool


class Subsets:
    """The subsets of an open GPU. They are made when first asked for, and kept."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._groups: list[Any] = []
        self._lanes: dict[frozenset[int], tuple[Lane, Any]] = {}
        self._priority = 0
        self.sms = 0
        """Of the whole GPU."""
        self.unit_sms = 0
        """Of one unit; 0 where there are none."""
        self.refusal = ""
        """Why there are no subsets; "" if there are."""

    @property
    def units(self) -> tuple[int, ...]:
        """The numbers of all units; none where there are no subsets."""
        return tuple(range(len(self._groups)))

    def open(self, divided: bool = True) -> None:
        """Split the GPU, and try one unit; what stands against that is ``refusal``. If it is not
        to be ``divided`` it has no units, and all of it is the only subset."""
        self._priority = self._gpu.highest()
        count = self._gpu.cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        self.sms = int(self._gpu.call("cuDeviceGetAttribute", count, self._gpu.device))
        if not divided:
            return
        try:
            resource = self._gpu.call("cuDeviceGetDevResource", self._gpu.device, self._kind)
            self.sms = int(resource.sm.smCount)
            self._groups = self._split(resource)
            self.unit_sms = int(self._groups[0].sm.smCount)
            self._drop(self._make((0,)))
        except CudaError as error:
            self._groups, self.unit_sms = [], 0
            self.refusal = f"no subsets of multiprocessors: {error}"

    def close(self) -> None:
        """Give every stream and context back."""
        for made in self._lanes.values():
            self._drop(made)
        self._lanes.clear()
        self._groups = []

    def lane(self, units: Sequence[int]) -> Lane:
        """The stream of a subset; raises ModelError for units that the GPU has not."""
        key = self._key(units)
        if key not in self._lanes:
            self._lanes[key] = self._make(tuple(sorted(key)))
        return self._lanes[key][0]

    def release(self, units: Sequence[int]) -> None:
        """Give a subset back; nothing may run on its stream."""
        made = self._lanes.pop(self._key(units), None)
        if made is not None:
            self._drop(made)

    def _key(self, units: Sequence[int]) -> frozenset[int]:
        if not self._groups:
            return frozenset()
        key = frozenset(units)
        if not key or not key <= set(self.units):
            raise ModelError(
                f"units {sorted(key)} are not of this GPU, which has {len(self.units)} from 0 on"
            )
        return key

    @property
    def _kind(self) -> Any:
        return self._gpu.cuda.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM

    def _split(self, resource: Any) -> list[Any]:
        least = max(resource.sm.minSmPartitionSize, resource.sm.smCoscheduledAlignment)
        split = "cuDevSmResourceSplitByCount"
        _, count, _ = self._gpu.call(split, 0, resource, 0, least)
        if not count:
            raise CudaError(split, f"{self.sms} multiprocessors are too few to be split")
        groups, count, _ = self._gpu.call(split, count, resource, 0, least)
        return list(groups[:count])

    def _make(self, units: tuple[int, ...]) -> tuple[Lane, Any]:
        gpu, cuda, priority = self._gpu, self._gpu.cuda, self._priority
        if len(units) == len(self._groups):
            return Lane(units, self.sms, gpu.stream(priority), priority, whole=True), None
        groups = [self._groups[unit] for unit in units]
        descriptor = gpu.call("cuDevResourceGenerateDesc", groups, len(groups))
        flags = cuda.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM.value
        context = gpu.call("cuGreenCtxCreate", descriptor, gpu.device, flags)
        try:
            had = gpu.call("cuGreenCtxGetDevResource", context, self._kind)
            flags = cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value
            stream = gpu.call("cuGreenCtxStreamCreate", context, flags, priority)
        except CudaError:
            gpu.call("cuGreenCtxDestroy", context)
            raise
        return Lane(units, int(had.sm.smCount), int(stream), priority, whole=False), context

    def _drop(self, made: tuple[Lane, Any]) -> None:
        lane, context = made
        self._gpu.destroy(lane.stream)
        if context is not None:
            self._gpu.call("cuGreenCtxDestroy", context)
