"""The kernels of the check: PTX that the driver compiles; nothing else is needed to have them.

The stand-in of the tests does not read PTX. There a function's name says how long it takes
(``spin_250``: 250 us) and whether it counts. A kernel is made for one duration, so both fit.
"""

from __future__ import annotations

import ctypes
import zlib
from typing import Any

from driver import Device, Pinned, Stopwatch, cu

HEAD = ".version 7.0\n.target sm_80\n.address_size 64\n"

SPIN = """
.visible .entry {name}(.param .u64 p_at, .param .u64 p_ns)
{{
    .reg .pred %p<2>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [p_ns];
    mov.u64 %rd2, %globaltimer;
again:
    mov.u64 %rd3, %globaltimer;
    sub.u64 %rd4, %rd3, %rd2;
    setp.lt.u64 %p1, %rd4, %rd1;
    @%p1 bra again;
{then}
    ret;
}}
"""
COUNT = """
    ld.param.u64 %rd5, [p_at];
    cvta.to.global.u64 %rd6, %rd5;
    atom.global.add.u64 %rd7, [%rd6], 1;
"""

WORK = """
.visible .entry work(.param .u64 p_at, .param .u64 p_rounds)
{
    .reg .pred %p<3>;
    .reg .f32 %f<4>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [p_rounds];
    mov.u64 %rd2, 0;
    mov.f32 %f1, 0f3F800000;
    mov.f32 %f2, 0f3F7FFFFF;
    mov.f32 %f3, 0f33D6BF95;
again:
    fma.rn.f32 %f1, %f1, %f2, %f3;
    fma.rn.f32 %f1, %f1, %f2, %f3;
    fma.rn.f32 %f1, %f1, %f2, %f3;
    fma.rn.f32 %f1, %f1, %f2, %f3;
    add.u64 %rd2, %rd2, 1;
    setp.lt.u64 %p1, %rd2, %rd1;
    @%p1 bra again;
    setp.eq.f32 %p2, %f1, 0fBF800000;
    @!%p2 bra over;
    ld.param.u64 %rd3, [p_at];
    cvta.to.global.u64 %rd4, %rd3;
    st.global.f32 [%rd4], %f1;
over:
    ret;
}
"""

EACH_WORD = """
    .reg .pred %p<2>;
    .reg .b32 %r<6>;
    .reg .b64 %rd<16>;
    ld.param.u64 %rd1, [p_at];
    cvta.to.global.u64 %rd1, %rd1;
    ld.param.u64 %rd2, [p_words];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mov.u32 %r4, %nctaid.x;
    mul.wide.u32 %rd3, %r1, %r2;
    cvt.u64.u32 %rd4, %r3;
    add.u64 %rd3, %rd3, %rd4;
    mul.wide.u32 %rd4, %r4, %r2;
    mov.u64 %rd10, 0;
again:
    setp.ge.u64 %p1, %rd3, %rd2;
    @%p1 bra over;
    shl.b64 %rd5, %rd3, 3;
    add.u64 %rd5, %rd1, %rd5;
"""

FILL = (
    """
.visible .entry fill(.param .u64 p_at, .param .u64 p_words, .param .u64 p_seed)
{"""
    + EACH_WORD
    + """
    ld.param.u64 %rd6, [p_seed];
    add.u64 %rd6, %rd6, %rd3;
    mul.lo.u64 %rd6, %rd6, 0x9E3779B97F4A7C15;
    shr.u64 %rd7, %rd6, 29;
    xor.b64 %rd6, %rd6, %rd7;
    st.global.u64 [%rd5], %rd6;
    add.u64 %rd3, %rd3, %rd4;
    bra again;
over:
    ret;
}
"""
)

CHECKSUM = (
    """
.visible .entry checksum(.param .u64 p_at, .param .u64 p_words, .param .u64 p_sum)
{"""
    + EACH_WORD
    + """
    ld.global.u64 %rd6, [%rd5];
    shl.b64 %rd7, %rd3, 1;
    add.u64 %rd7, %rd7, 1;
    mad.lo.u64 %rd10, %rd6, %rd7, %rd10;
    add.u64 %rd3, %rd3, %rd4;
    bra again;
over:
    ld.param.u64 %rd8, [p_sum];
    cvta.to.global.u64 %rd8, %rd8;
    atom.global.add.u64 %rd9, [%rd8], %rd10;
    ret;
}
"""
)

PLACES = """
.visible .entry places(.param .u64 p_at, .param .u64 p_ns)
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [p_ns];
    mov.u64 %rd2, %globaltimer;
again:
    mov.u64 %rd3, %globaltimer;
    sub.u64 %rd4, %rd3, %rd2;
    setp.lt.u64 %p1, %rd4, %rd1;
    @%p1 bra again;
    mov.u32 %r1, %smid;
    mov.u32 %r2, 1;
    ld.param.u64 %rd5, [p_at];
    cvta.to.global.u64 %rd5, %rd5;
    mul.wide.u32 %rd6, %r1, 4;
    add.u64 %rd5, %rd5, %rd6;
    st.global.u32 [%rd5], %r2;
    ret;
}
"""

SOURCE = "".join(
    (
        HEAD,
        SPIN.format(name="spin", then=""),
        SPIN.format(name="count", then=COUNT),
        *(WORK, FILL, CHECKSUM, PLACES),
    )
)
MOST_PLACES = 1024


class Kernel:
    """A function with its arguments: ready to be launched any number of times."""

    def __init__(self, function: Any, args: tuple[int, ...], grid: int = 1, block: int = 1) -> None:
        self.function = int(function)
        self.grid, self.block = grid, block
        self._values = [ctypes.c_uint64(value) for value in args]
        pointers = (ctypes.addressof(value) for value in self._values)
        self.params = (ctypes.c_void_p * len(args))(*pointers)

    def launch(self, stream: Any) -> None:
        """Put it on the stream."""
        from cuda.bindings import driver

        at = ctypes.addressof(self.params)
        function = driver.CUfunction(self.function)
        shape = (self.grid, 1, 1, self.block, 1, 1, 0)
        cu("cuLaunchKernel", function, *shape, stream, at, 0)


class Kernels:
    """The module, in this process's context."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._module = cu("cuModuleLoadData", SOURCE.encode() + b"\0")
        self._scratch = int(cu("cuMemAlloc", 4 * MOST_PLACES))
        self._rounds_per_us = 0.0

    def _function(self, name: str, us: float) -> Any:
        if self.device.standin:
            kind = "count" if name == "count" else "spin"
            name = f"{kind}_{round(us)}"
        return cu("cuModuleGetFunction", self._module, name.encode())

    def spin(self, us: float) -> Kernel:
        """One thread that looks at the clock for so long."""
        return Kernel(self._function("spin", us), (self._scratch, round(us * 1e3)))

    def count(self, at: int, us: float) -> Kernel:
        """The same, and adds one to the uint64 at this place."""
        return Kernel(self._function("count", us), (at, round(us * 1e3)))

    def work(self, us: float, processors: int = 0) -> Kernel:
        """Arithmetic on so many multiprocessors (0: all) that takes so long if it has them for
        itself. What is a neighbour's is missing here; looking at a clock would not show that."""
        count = processors or self.device.processors
        if not self._rounds_per_us and not self.device.standin:
            self._rounds_per_us = self._calibrate()
        rounds = max(1, round(us * self._rounds_per_us))
        return Kernel(self._function("work", us), (self._scratch, rounds), 2 * count, 256)

    def _calibrate(self) -> float:
        stream, watch, rounds = cu("cuStreamCreate", 1), Stopwatch(), 100_000
        kernel = Kernel(
            self._function("work", 0), (self._scratch, rounds), 2 * self.device.processors, 256
        )
        taken = []
        for _ in range(5):
            watch.begin(stream)
            kernel.launch(stream)
            watch.end(stream)
            taken.append(watch.ms(stream))
        cu("cuStreamDestroy", stream)
        return rounds / (min(taken) * 1e3)

    def fill(self, at: int, size: int, seed: int, stream: Any) -> None:
        """Words that depend on place and seed."""
        if self.device.standin:
            data = (ctypes.c_char * size).from_buffer_copy(seed.to_bytes(8, "little") * (size // 8))
            cu("cuMemcpyHtoD", at, ctypes.addressof(data), size)
            return
        shape = (8 * self.device.processors, 256)
        Kernel(self._function("fill", 0), (at, size // 8, seed), *shape).launch(stream)
        cu("cuStreamSynchronize", stream)

    def checksum(self, at: int, size: int, stream: Any) -> int:
        """Of all words and their places."""
        if self.device.standin:
            data = ctypes.create_string_buffer(size)
            cu("cuMemcpyDtoH", ctypes.addressof(data), at, size)
            return zlib.crc32(data)
        cu("cuMemsetD8Async", self._scratch, 0, 8, stream)
        shape = (8 * self.device.processors, 256)
        Kernel(self._function("checksum", 0), (at, size // 8, self._scratch), *shape).launch(stream)
        cu("cuStreamSynchronize", stream)
        found = ctypes.c_uint64()
        cu("cuMemcpyDtoH", ctypes.addressof(found), self._scratch, 8)
        return found.value

    def places(self, stream: Any) -> int:
        """How many multiprocessors a kernel on this stream really runs on. 0 on the stand-in,
        which has none."""
        size = 4 * MOST_PLACES
        cu("cuMemsetD8Async", self._scratch, 0, size, stream)
        shape = (16 * self.device.processors, 64)
        Kernel(self._function("places", 0), (self._scratch, 50_000), *shape).launch(stream)
        cu("cuStreamSynchronize", stream)
        found = (ctypes.c_uint32 * MOST_PLACES)()
        cu("cuMemcpyDtoH", ctypes.addressof(found), self._scratch, size)
        return sum(found)


def copy_rate(at: int, pinned: Pinned, stream: Any, times: int) -> dict[str, list[float]]:
    """GB/s (1e9) of copies of the whole of ``pinned``, to the device and back, in turns."""
    watch = Stopwatch()
    found: dict[str, list[float]] = {"to_device": [], "to_host": []}
    for turn in range(times + 1):
        watch.begin(stream)
        cu("cuMemcpyHtoDAsync", at, pinned.at, pinned.size, stream)
        watch.end(stream)
        to_device = watch.ms(stream)
        watch.begin(stream)
        cu("cuMemcpyDtoHAsync", pinned.at, at, pinned.size, stream)
        watch.end(stream)
        to_host = watch.ms(stream)
        if turn:  # the first is to warm up
            found["to_device"].append(pinned.size / max(to_device, 1e-6) / 1e6)
            found["to_host"].append(pinned.size / max(to_host, 1e-6) / 1e6)
    return found
