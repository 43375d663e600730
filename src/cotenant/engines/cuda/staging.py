"""Where a tensor waits on its way to the GPU and back: pinned host memory, and device memory."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from cotenant.engines.base import Array
from cotenant.engines.cuda.driver import Gpu

LEAST = 256
"""Bytes; an address for an empty tensor too."""


class Staging:
    """As many bytes on both sides as were ever asked for at once. What was written is valid until
    more is asked for."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._host = 0
        self._bytes: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        self.device = 0
        """Its address on the device."""

    def reserve(self, size: int, on_device: bool = True) -> None:
        """Have so many bytes; raises CudaError."""
        if self._host and size <= self._bytes.size and (self.device or not on_device):
            return
        self.close()
        size = max(size, LEAST)
        self._host = self._gpu.pin(size)
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._host))
        if on_device:
            self.device = self._gpu.allocate(size)

    def put(self, tensor: Array, stream: int) -> None:
        """Copy a tensor to the device, in the order of the stream."""
        raw = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        self._bytes[: raw.size] = raw
        if raw.size:
            self._gpu.upload(self.device, self._host, raw.size, stream)

    def fetch(self, size: int, stream: int, source: int = 0) -> None:
        """Copy so many bytes from the device, or from ``source`` on it, in the order of the
        stream."""
        if size:
            self._gpu.download(self._host, source or self.device, size, stream)

    def take(self, place: Array) -> None:
        """Copy what was fetched to a contiguous array; the stream must have been waited for."""
        fetched = self._bytes[: place.nbytes].view(place.dtype)
        np.copyto(place, fetched.reshape(place.shape))

    def close(self) -> None:
        """Give it back; nothing may copy from or to it any more."""
        if self._host:
            self._bytes = np.empty(0, np.uint8)
            self._gpu.unpin(self._host)
            self._host = 0
        if self.device:
            self._gpu.free(self.device)
            self.device = 0
