"""One GPU as a process uses it, through cuda-bindings (NVIDIA's binding of the CUDA driver).

The context is the primary one, which CUDA's runtime, and so ONNX Runtime, uses too. It is current
on the thread that opened the GPU, and only that thread may call what is here. Streams and memory
are plain integers, as other libraries take them.
"""

from __future__ import annotations

from typing import Any, Final

from cotenant.domain.errors import ModelError

NEEDS: Final = "a GPU needs the extra cuda: pip install 'cotenant[cuda]'"


class CudaError(ModelError):
    """The driver refused a call, or lacks it; ``call`` is its name in the driver's API."""

    def __init__(self, call: str, why: str) -> None:
        self.call = call
        super().__init__(f"{call}: {why}")


class Gpu:
    """``which`` is an ordinal among the GPUs that this process sees, or a UUID as NVML writes
    it (``GPU-…``, ``MIG-…``). Nothing but ``open`` may be called before ``open``."""

    def __init__(self, which: str) -> None:
        self._which = which
        self._cuda: Any = None
        self._device: Any = None
        self.ordinal = 0

    def open(self) -> None:
        """Make its context current on this thread; raises ModelError."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise ModelError(f"{NEEDS} ({error})") from error
        self._cuda = driver
        self.call("cuInit", 0)
        self.ordinal = self._find()
        self._device = self.call("cuDeviceGet", self.ordinal)
        context = self.call("cuDevicePrimaryCtxRetain", self._device)
        self.call("cuCtxSetCurrent", context)

    def close(self) -> None:
        """Give its context back."""
        if self._device is not None:
            self.call("cuDevicePrimaryCtxRelease", self._device)
            self._device = None

    @property
    def cuda(self) -> Any:
        """The binding's module, for its types and flags."""
        return self._cuda

    @property
    def device(self) -> Any:
        """The driver's handle of this GPU."""
        return self._device

    def call(self, name: str, *arguments: object) -> Any:
        """What a call of the driver returns besides its status; raises CudaError."""
        try:
            status, *values = getattr(self._cuda, name)(*arguments)
        except Exception as error:  # the bindings raise several kinds where a function is missing
            raise CudaError(name, str(error) or type(error).__name__) from error
        if int(status):
            raise CudaError(name, getattr(status, "name", str(status)))
        return values[0] if len(values) == 1 else tuple(values)

    def _find(self) -> int:
        count = int(self.call("cuDeviceGetCount"))
        if self._which.isdigit():
            if int(self._which) >= count:
                raise ModelError(f"there is no GPU {self._which}: this process sees {count}")
            return int(self._which)
        wanted = _digits(self._which)
        # Bindings of CUDA 12 have both, and the first does not know MIG.
        ask = (
            "cuDeviceGetUuid_v2" if hasattr(self._cuda, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
        )
        for ordinal in range(count):
            device = self.call("cuDeviceGet", ordinal)
            if bytes(self.call(ask, device).bytes).hex() == wanted:
                return ordinal
        raise ModelError(
            f"no GPU that this process sees is {self._which}; see CUDA_VISIBLE_DEVICES"
        )

    # --- memory -----------------------------------------------------------------------------

    def allocate(self, size: int) -> int:
        """The address of so many bytes on the device."""
        return int(self.call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        """What ``allocate`` gave."""
        self.call("cuMemFree", address)

    def pin(self, size: int) -> int:
        """The address of so many bytes of page-locked host memory: only from and to such are
        copies asynchronous."""
        return int(self.call("cuMemHostAlloc", size, 0))

    def unpin(self, address: int) -> None:
        """What ``pin`` gave."""
        self.call("cuMemFreeHost", address)

    def upload(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy to the device, in the order of the stream."""
        self.call("cuMemcpyHtoDAsync", to, source, size, stream)

    def download(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy from the device, in the order of the stream."""
        self.call("cuMemcpyDtoHAsync", to, source, size, stream)

    # --- streams ----------------------------------------------------------------------------

    def highest(self) -> int:
        """The priority that goes first; lower numbers do."""
        _, greatest = self.call("cuCtxGetStreamPriorityRange")
        return int(greatest)

    def stream(self, priority: int) -> int:
        """A stream on all of the device that no other stream waits for."""
        flags = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        return int(self.call("cuStreamCreateWithPriority", flags, priority))

    def synchronize(self, stream: int) -> None:
        """Wait until all that was put on it is done."""
        self.call("cuStreamSynchronize", stream)

    def works(self, stream: int) -> bool:
        """Whether the stream still does: after some errors the process can do nothing more with
        the GPU."""
        try:
            self.synchronize(stream)
        except CudaError:
            return False
        return True

    def destroy(self, stream: int) -> None:
        """Forget a stream."""
        self.call("cuStreamDestroy", stream)


def _digits(uuid: str) -> str:
    return uuid.removeprefix("GPU-").removeprefix("MIG-").replace("-", "").lower()
