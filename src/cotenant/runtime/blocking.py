"""Calls to a device: at once where it is quick, on one thread of its own where it may block."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cotenant.devices.base import Device
from cotenant.domain.errors import DeviceError

T = TypeVar("T")


class DeviceCaller:
    """Calls in order; the answer comes to ``done`` or, for a DeviceError, to ``failed``, always
    on the loop's thread."""

    def __init__(self, device: Device) -> None:
        self._pool = ThreadPoolExecutor(1, "cotenant-device") if device.blocking else None

    def call(
        self,
        work: Callable[[], T],
        done: Callable[[T], None],
        failed: Callable[[DeviceError], None],
    ) -> None:
        """Do ``work``; see the class."""
        if self._pool is None:
            try:
                result = work()
            except DeviceError as error:
                failed(error)
                return
            done(result)
            return
        loop = asyncio.get_running_loop()

        def run() -> None:
            try:
                result = work()
            except DeviceError as error:
                loop.call_soon_threadsafe(failed, error)
                return
            loop.call_soon_threadsafe(done, result)

        self._pool.submit(run)

    def close(self) -> None:
        """Wait for calls under way."""
        if self._pool is not None:
            self._pool.shutdown()
