"""The driver API as the check uses it: cuda-bindings, with errors raised and named."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from dataclasses import dataclass
from typing import Any

STANDIN = "stand-in"
"""What a device is called that is none: a library in the driver's place, for tests."""


class DriverError(Exception):
    """A call was refused, or the driver does not have it."""


def cu(name: str, *args: Any) -> Any:
    """Call a function; what it returns besides its status (nothing, one value or a tuple)."""
    from cuda.bindings import driver

    function = getattr(driver, name, None)
    if function is None:
        raise DriverError(f"{name}: cuda-bindings does not have it")
    try:
        answer = function(*args)
    except RuntimeError as error:  # the library lacks the function
        raise DriverError(f"{name}: not supported by this driver ({error})") from error
    if int(answer[0]):
        raise DriverError(f"{name}: {answer[0].name}")
    return None if len(answer) == 1 else answer[1] if len(answer) == 2 else answer[1:]


def constant(group: str, name: str) -> Any:
    """A value of one of the driver's enumerations."""
    from cuda.bindings import driver

    return getattr(getattr(driver, group), name)


@dataclass(frozen=True)
class Device:
    """The first device, its primary context current in this thread."""

    name: str
    memory: int
    processors: int
    capability: str
    driver: int
    context: int

    @property
    def standin(self) -> bool:
        """Whether this is no GPU: what is measured says nothing about one."""
        return self.name == STANDIN


def open_device() -> Device:
    """Take the first device; raises DriverError."""
    cu("cuInit", 0)
    device = cu("cuDeviceGet", 0)
    context = cu("cuDevicePrimaryCtxRetain", device)
    cu("cuCtxSetCurrent", context)

    def attribute(name: str) -> int:
        which = constant("CUdevice_attribute", f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(cu("cuDeviceGetAttribute", which, device))

    major, minor = (attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
    return Device(
        name=cu("cuDeviceGetName", 64, device).split(b"\0")[0].decode(),
        memory=int(cu("cuDeviceTotalMem", device)),
        processors=attribute("MULTIPROCESSOR_COUNT"),
        capability=f"{major}.{minor}",
        driver=int(cu("cuDriverGetVersion")),
        context=int(context),
    )


def free_bytes() -> int:
    """Of the device's memory."""
    return int(cu("cuMemGetInfo")[0])


class Pinned:
    """Host memory that the device can read; given back by ``close``."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        pointer = ctypes.c_char.from_buffer(self._map)
        self.at = ctypes.addressof(pointer)
        del pointer
        self.size = size
        cu("cuMemHostRegister", self.at, size, 0)

    def close(self) -> None:
        """Once; nothing may be using it."""
        cu("cuMemHostUnregister", self.at)
        self._map.close()


class Stopwatch:
    """Time on a stream between two points, by events."""

    def __init__(self) -> None:
        self._begin, self._end = cu("cuEventCreate", 0), cu("cuEventCreate", 0)

    def begin(self, stream: Any) -> None:
        """From what comes next on the stream."""
        cu("cuEventRecord", self._begin, stream)

    def end(self, stream: Any) -> None:
        """To what was put on it last."""
        cu("cuEventRecord", self._end, stream)

    def ms(self, stream: Any) -> float:
        """Waits for the stream."""
        cu("cuStreamSynchronize", stream)
        return float(cu("cuEventElapsedTime", self._begin, self._end))
