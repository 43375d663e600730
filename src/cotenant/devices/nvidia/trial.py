"""The job of the self-tests of gate and channels: a program on the driver alone, run by file name.

It says ``ready``, and then for each line that it reads one of these, and ``done`` when that was
reached: ``fill`` fills some memory on a stream, which the gate looks at; ``start`` starts a kernel
of a second, and is done when that is seen to compute; ``steps`` says how many of its steps are
through, ``done`` and the number; ``end`` waits for its end.
"""

from __future__ import annotations

import ctypes
import sys
import time

BYTES = 4 << 20
STEPS = 1000
"""Of a millisecond, which the kernel makes."""
_US = 1000 * STEPS
_PORTABLE_MAPPED = 3
_KERNEL = f"""
.version 6.0
.target sm_50
.address_size 64
.visible .entry steps_{_US}(.param .u64 p_at)
{{
    .reg .pred %p<3>;
    .reg .b32 %r<2>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [p_at];
    cvta.to.global.u64 %rd2, %rd1;
    mov.u32 %r1, 0;
step:
    mov.u64 %rd3, %globaltimer;
wait:
    mov.u64 %rd4, %globaltimer;
    sub.u64 %rd5, %rd4, %rd3;
    setp.lt.u64 %p1, %rd5, 1000000;
    @%p1 bra wait;
    add.u32 %r1, %r1, 1;
    st.volatile.global.u32 [%rd2], %r1;
    membar.sys;
    setp.lt.u32 %p2, %r1, {STEPS};
    @%p2 bra step;
    ret;
}}
"""
"""In steps, since the time goes on while it is stopped."""


class Program:
    """A context, a stream, and the kernel of steps."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._memory, self._shown = ctypes.c_uint64(), ctypes.c_uint64()
        self._function = ctypes.c_void_p()
        self._steps = ctypes.pointer(ctypes.c_uint32())
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), 0)
        self.call("cuCtxSetCurrent", self._context)
        self.call("cuMemAlloc_v2", ctypes.byref(self._memory), ctypes.c_size_t(BYTES))
        self.call("cuStreamCreate", ctypes.byref(self._stream), 1)

    def call(self, name: str, *arguments: object) -> None:
        """Exits with what the driver refused, in words."""
        code = getattr(self._cuda, name)(*arguments)
        if code:
            sys.exit(f"{name} answered {code}")

    def fill(self) -> str:
        size = ctypes.c_size_t(BYTES)
        self.call("cuMemsetD8Async", self._memory, ctypes.c_ubyte(1), size, self._stream)
        return self.end()

    def start(self) -> str:
        if not self._function:
            self._load()
        self._steps[0] = 0
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(self._shown))
        ones = (ctypes.c_uint(1),) * 6
        self.call(
            "cuLaunchKernel", self._function, *ones, 0, self._stream, ctypes.byref(parameters), None
        )
        while not self._steps[0]:
            time.sleep(0.001)
        return ""

    def _load(self) -> None:
        module, at = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), _KERNEL.encode())
        name = f"steps_{_US}".encode()
        self.call("cuModuleGetFunction", ctypes.byref(self._function), module, name)
        size = ctypes.c_size_t(4)
        self.call("cuMemHostAlloc", ctypes.byref(at), size, _PORTABLE_MAPPED)
        self.call("cuMemHostGetDevicePointer_v2", ctypes.byref(self._shown), at, 0)
        self._steps = ctypes.cast(at, ctypes.POINTER(ctypes.c_uint32))

    def steps(self) -> str:
        return f" {self._steps[0]}"

    def end(self) -> str:
        self.call("cuStreamSynchronize", self._stream)
        return ""


def main() -> None:
    """Exits with what the driver refused, in words."""
    program = Program()
    print("ready", flush=True)
    for line in sys.stdin:
        print(f"done{getattr(program, line.strip())()}", flush=True)


if __name__ == "__main__":
    main()
