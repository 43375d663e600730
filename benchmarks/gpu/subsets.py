"""Subsets of the multiprocessors: green contexts of this process."""

from __future__ import annotations

from typing import Any

from driver import DriverError, constant, cu


class Subset:
    """A green context: ``count`` is what the driver says that it has."""

    def __init__(self, resource: Any) -> None:
        kind = constant("CUdevResourceType", "CU_DEV_RESOURCE_TYPE_SM")
        flag = constant("CUgreenCtxCreate_flags", "CU_GREEN_CTX_DEFAULT_STREAM")
        descriptor = cu("cuDevResourceGenerateDesc", [resource], 1)
        self._context = cu("cuGreenCtxCreate", descriptor, 0, flag)
        self.count = int(cu("cuGreenCtxGetDevResource", self._context, kind).sm.smCount)

    def stream(self, priority: int = 0) -> Any:
        """A stream whose kernels run on these multiprocessors."""
        return cu("cuGreenCtxStreamCreate", self._context, 1, priority)

    def close(self) -> None:
        """Once; nothing may run on it."""
        cu("cuGreenCtxDestroy", self._context)


def whole() -> Any:
    """The resource of all multiprocessors. Raises DriverError."""
    kind = constant("CUdevResourceType", "CU_DEV_RESOURCE_TYPE_SM")
    return cu("cuDeviceGetDevResource", 0, kind)


def split(share: float) -> tuple[int, Any, Any]:
    """Ask for a share of the multiprocessors: how many that is, the resource that the driver makes
    of it, and the one of the others. Raises DriverError."""
    everything = whole()
    count = max(1, round(share * everything.sm.smCount))
    groups, made, rest = cu("cuDevSmResourceSplitByCount", 1, everything, 0, count)
    if not made:
        raise DriverError(f"{count} multiprocessors of {everything.sm.smCount} cannot be split")
    return count, groups[0], rest


def priorities() -> tuple[int, int]:
    """Of streams: the least and the greatest (a smaller number)."""
    least, greatest = cu("cuCtxGetStreamPriorityRange")
    return int(least), int(greatest)
