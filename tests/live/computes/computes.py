"""An engine of another package: it opens ``model.computes.json`` and has the GPU compute for every
request, through the driver's public bindings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cotenant.domain.errors import DeviceError
from cotenant.domain.port import TensorMeta
from cotenant.engines.base import Array, Engine, EngineMeta, Opening


class Computes:
    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._call("cuInit", 0)
        self._call("cuCtxSetCurrent", self._call("cuDevicePrimaryCtxRetain", 0))
        module = self._call("cuModuleLoadData", b"")
        self._kernel = self._call("cuModuleGetFunction", module, b"spin_200")
        self._stream = self._call("cuStreamCreate", 0)

    def _call(self, name: str, *arguments: object) -> Any:
        code, *found = getattr(self._driver, name)(*arguments)
        if int(code):
            raise DeviceError(f"{name}: {code}")
        return found[0] if found else None

    @property
    def meta(self) -> EngineMeta:
        tensor = TensorMeta("x", "FP32", (-1,))
        return EngineMeta("computes", (tensor,), (tensor,), batchable=True)

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        return {"x": ("rows",)}

    def run(self, units: int, inputs: dict[str, Array]) -> list[Array]:
        self._call("cuLaunchKernel", self._kernel, *[1] * 6, 0, self._stream, 0, 0)
        self._call("cuStreamSynchronize", self._stream)
        return [inputs["x"]]


class Kind:
    name = "computes"
    suffixes = (".computes.json",)
    rank = 1
    drafts = False

    def refuses(self, opening: Opening) -> str:
        return "" if opening.target.on_cuda else "it computes on NVIDIA GPUs alone"

    def open(self, opening: Opening) -> Engine:
        return Computes()


KIND = Kind()
