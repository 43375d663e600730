"""``loop.c`` for Python: building it, and calling it."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

from driver import DriverError
from kernels import Kernel

HERE = Path(__file__).resolve().parent
FIELDS = ("stop", "launched", "watching", "asked", "answered", "recorded_ns", "over_ns")


def build(target: Path) -> None:
    """Needs a C compiler (``CC``, else ``cc``); raises CalledProcessError or OSError."""
    command = [*os.environ.get("CC", "cc").split(), "-O2", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, "-o", str(target), str(HERE / "loop.c"), "-ldl"], check=True)


class Talk:
    """The file that a loop and its watcher share (``struct talk``)."""

    def __init__(self, path: Path, make: bool = False) -> None:
        if make:
            path.write_bytes(bytes(mmap.PAGESIZE))
        self.path = path
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def __getitem__(self, name: str) -> int:
        return int(struct.unpack_from("<Q", self.map, 8 * FIELDS.index(name))[0])

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("<Q", self.map, 8 * FIELDS.index(name), value)


class Loop:
    """The library in this process; the driver must be open."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        if self._library.loop_open():
            raise DriverError("no libcuda.so.1 with what the loops call")

    def burst(self, kernel: Kernel, stream: Any, count: int) -> tuple[int, int]:
        """Ns that so many launches took, and until all was done."""
        took = (ctypes.c_uint64 * 2)()
        _check(
            self._library.loop_burst(
                ctypes.c_void_p(kernel.function),
                *(ctypes.c_uint(kernel.grid), ctypes.c_uint(kernel.block)),
                ctypes.c_void_p(int(stream)),
                *(kernel.params, ctypes.c_long(count), took),
            )
        )
        return took[0], took[1]

    def drive(self, kernel: Kernel, context: int, stream: Any, talk: Talk, depth: int) -> Drive:
        """Launch until ``talk`` says stop, in a thread; so many may be on their way."""
        return Drive(self._library, kernel, (context, int(stream), depth), talk)


class Drive:
    """Launches that go on."""

    def __init__(
        self, library: ctypes.CDLL, kernel: Kernel, where: tuple[int, int, int], talk: Talk
    ) -> None:
        self._talk = talk
        self._result = 0
        shared = ctypes.c_char.from_buffer(talk.map)
        context, stream, depth = where
        places = (ctypes.c_void_p(context), ctypes.c_void_p(stream))

        def run() -> None:
            self._result = library.loop_drive(
                ctypes.c_void_p(kernel.function),
                *(ctypes.c_uint(kernel.grid), ctypes.c_uint(kernel.block)),
                *(*places, kernel.params, ctypes.c_long(depth), ctypes.byref(shared)),
            )

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def halt(self) -> int:
        """Ends it; how many launches there were. Raises DriverError if one was refused."""
        self._talk["stop"] = 1
        self._thread.join()
        _check(self._result)
        return self._talk["launched"]


def _check(result: int) -> None:
    if result:
        raise DriverError(f"a launch was refused: error {result}")
