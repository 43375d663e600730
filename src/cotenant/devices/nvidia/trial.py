"""The job of the gate's self-test: a program on the driver alone, run by file name.

It says ``ready``, and then for each line that it reads fills some memory on a stream, which the
gate looks at, and says ``done`` when that was reached.
"""

from __future__ import annotations

import ctypes
import sys

BYTES = 4 << 20


def main() -> None:
    """Exits with what the driver refused, in words."""
    cuda = ctypes.CDLL("libcuda.so.1")
    context, stream, memory = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()

    def call(name: str, *arguments: object) -> None:
        code = getattr(cuda, name)(*arguments)
        if code:
            sys.exit(f"{name} answered {code}")

    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxSetCurrent", context)
    call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(BYTES))
    call("cuStreamCreate", ctypes.byref(stream), 1)
    print("ready", flush=True)
    for _ in sys.stdin:
        size = ctypes.c_size_t(BYTES)
        call("cuMemsetD8Async", memory, ctypes.c_ubyte(1), size, stream)
        call("cuStreamSynchronize", stream)
        print("done", flush=True)


if __name__ == "__main__":
    main()
