# ruff: noqa: N802, N815 - the driver's names
"""Stand-ins for a GPU and for ONNX Runtime on it, where a test has neither.

``HostGpu`` is a GPU whose memory is the host's, without a driver. ``Runtime`` is in place of the
module ``onnxruntime``: its sessions read and write what is bound to them at the addresses given,
and hold a caller to what the documentation asks: fixed addresses of a captured execution, and a
session for each stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from cotenant.engines.base import Array
from cotenant.engines.cuda.driver import CudaError, Gpu

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(string)": np.object_}
Function = Callable[[dict[str, Array]], list[Array]]


def _resource(sms: int, least: int = 8) -> SimpleNamespace:
    sm = SimpleNamespace(smCount=sms, minSmPartitionSize=least, smCoscheduledAlignment=least)
    return SimpleNamespace(sm=sm)


class _Anything:
    """Any constant of the bindings."""

    value = 1

    def __getattr__(self, name: str) -> Any:
        return self


class HostGpu(Gpu):
    """``refuses``: calls of the driver that this GPU has not. ``live`` counts what was not given
    back, by kind. ``broken``: nothing works any more."""

    def __init__(self, sms: int = 20, unit: int = 4, refuses: Sequence[str] = ()) -> None:
        super().__init__("0")
        self.sms, self.unit, self.refuses = sms, unit, refuses
        self.live: dict[str, dict[int, Any]] = {"memory": {}, "stream": {}, "context": {}}
        self.broken = False
        self._cuda = _Anything()
        self._next = 1000

    def open(self) -> None:
        self.live["gpu"] = {0: self}

    def close(self) -> None:
        self.live["gpu"].clear()

    @property
    def left(self) -> int:
        """What was not given back."""
        return sum(map(len, self.live.values()))

    def call(self, name: str, *arguments: Any) -> Any:
        if self.broken or name in self.refuses:
            raise CudaError(name, "refused")
        return getattr(self, f"_{name}")(*arguments)

    def _give(self, kind: str, what: Any) -> int:
        self._next += 1
        self.live[kind][self._next] = what
        return self._next

    def _memory(self, size: int) -> int:
        block = ctypes.create_string_buffer(size)
        self.live["memory"][ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _cuCtxGetStreamPriorityRange(self) -> tuple[int, int]:
        return 0, -5

    def _cuDeviceGetAttribute(self, *_: Any) -> int:
        return self.sms

    def _cuDeviceGetDevResource(self, *_: Any) -> Any:
        return _resource(self.sms, self.unit)

    def _cuDevSmResourceSplitByCount(self, groups: int, _: Any, __: int, least: int) -> Any:
        count = groups or self.sms // least
        return [_resource(least) for _ in range(groups)], count, _resource(self.sms % least)

    def _cuDevResourceGenerateDesc(self, groups: list[Any], _: int) -> Any:
        return _resource(sum(group.sm.smCount for group in groups))

    def _cuGreenCtxCreate(self, descriptor: Any, *_: Any) -> int:
        return self._give("context", descriptor)

    def _cuGreenCtxGetDevResource(self, context: int, _: Any) -> Any:
        return self.live["context"][context]

    def _cuGreenCtxStreamCreate(self, context: int, _: int, priority: int) -> int:
        return self._give("stream", (context, priority))

    def _cuStreamCreateWithPriority(self, _: int, priority: int) -> int:
        return self._give("stream", (0, priority))

    def _cuGreenCtxDestroy(self, context: int) -> None:
        del self.live["context"][context]

    def _cuStreamDestroy(self, stream: int) -> None:
        del self.live["stream"][stream]

    def _cuStreamSynchronize(self, stream: int) -> None:
        assert stream in self.live["stream"]

    def _cuMemAlloc(self, size: int) -> int:
        return self._memory(size)

    def _cuMemHostAlloc(self, size: int, _: int) -> int:
        return self._memory(size)

    def _cuMemFree(self, address: int) -> None:
        del self.live["memory"][address]

    def _cuMemFreeHost(self, address: int) -> None:
        del self.live["memory"][address]

    def _cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int) -> None:
        assert stream in self.live["stream"]
        ctypes.memmove(to, source, size)

    _cuMemcpyDtoHAsync = _cuMemcpyHtoDAsync


@dataclass
class Model:
    """What sessions execute. ``refuses_graphs``: none can be made with them. ``breaks``: a
    capture fails. ``on_cpu``: operators that are left on the CPU. ``fails``: every execution."""

    inputs: list[tuple[str, str, list[Any]]]
    outputs: list[tuple[str, str, list[Any]]]
    function: Function
    refuses_graphs: bool = False
    breaks: bool = False
    on_cpu: tuple[str, ...] = ()
    fails: str = ""


@dataclass
class Runtime:
    """``available``: its providers. ``loads``: whether the library of CUDA can be loaded. ``wait``
    waits for a stream, in whose order an execution is. ``sessions`` are those that were made."""

    model: Model
    available: tuple[str, ...] = ("TensorrtExecutionProvider", "CUDAExecutionProvider",
                                  "CPUExecutionProvider")  # fmt: skip
    loads: bool = True
    wait: Callable[[int], Any] = lambda _: None
    sessions: list[Session] = field(default_factory=list)

    SessionOptions = onnxruntime.SessionOptions
    RunOptions = onnxruntime.RunOptions

    def set_default_logger_severity(self, _: int) -> None:
        """As the module."""

    def get_available_providers(self) -> list[str]:
        """As the module."""
        return list(self.available)

    def InferenceSession(
        self, path: str, options: Any, providers: list[tuple[str, dict[str, str]]],
        enable_fallback: int
    ) -> Session:  # fmt: skip
        """As the module's class."""
        assert not enable_fallback, "it would serve from the CPU without a word"
        made = Session(self, dict(providers))
        if self.model.refuses_graphs and made.options["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature")
        self.sessions.append(made)
        return made


class Session:
    """One session, which counts what it does."""

    def __init__(self, runtime: Runtime, providers: dict[str, dict[str, str]]) -> None:
        self._model, self._loads, self._wait = runtime.model, runtime.loads, runtime.wait
        self.providers = providers
        self.options = providers["CUDAExecutionProvider"]
        self.stream = int(self.options["user_compute_stream"])
        self.graphs: dict[str, Binding] = {}
        self.replayed = self.eager = self.plain = 0

    @property
    def executed(self) -> int:
        """How often it was, in any way."""
        return self.eager + self.replayed + self.plain + len(self.graphs)

    def get_providers(self) -> list[str]:
        return list(self.providers) if self._loads else ["CPUExecutionProvider"]

    def _nodes(self, tensors: list[tuple[str, str, list[Any]]]) -> list[Any]:
        return [SimpleNamespace(name=n, type=t, shape=s) for n, t, s in tensors]

    def get_inputs(self) -> list[Any]:
        return self._nodes(self._model.inputs)

    def get_outputs(self) -> list[Any]:
        return self._nodes(self._model.outputs)

    def get_provider_graph_assignment_info(self) -> list[Any]:
        parts = {"CUDAExecutionProvider": ("MatMul",), "CPUExecutionProvider": self._model.on_cpu}
        nodes = {n: [SimpleNamespace(op_type=k) for k in kinds] for n, kinds in parts.items()}
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda have=have: have)
            for name, have in nodes.items()
            if have
        ]

    def io_binding(self) -> Binding:
        return Binding()

    def run(self, names: list[str], inputs: dict[str, Array], _: Any = None) -> list[Array]:
        self.plain += 1
        return self._model.function(inputs)

    def run_with_iobinding(self, binding: Binding, options: Any = None) -> None:
        self._wait(self.stream)
        graph = options.get_run_config_entry("gpu_graph_id") if options else "-1"
        assert graph != "0", "that one is the runtime's own"
        if graph == "-1":
            self.eager += 1
        elif graph in self.graphs:
            binding = self.graphs[graph]  # the addresses are those of the capture
            self.replayed += 1
        else:
            assert self.options["enable_cuda_graph"] == "1"
            assert None not in (address for *_, address in binding.outputs.values())
            if self._model.breaks:
                raise RuntimeError("CUDA failure 900: operation not permitted when capturing")
            self.graphs[graph] = binding
        if self._model.fails:
            raise RuntimeError(self._model.fails)
        inputs = {
            name: _at(address, dtype, shape).copy()
            for name, (dtype, shape, address) in binding.inputs.items()
        }
        binding.results = []
        for (name, bound), result in zip(
            binding.outputs.items(), self._model.function(inputs), strict=True
        ):
            _, shape, address = bound
            if address is None:
                binding.results.append(result)
                continue
            if tuple(shape) != result.shape:
                raise RuntimeError(f"the shape of {name} is {result.shape}, not {shape}")
            _at(address, result.dtype, result.shape)[...] = result


class Binding:
    """Names with types, shapes and addresses."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Any, Sequence[int], int]] = {}
        self.outputs: dict[str, tuple[Any, Sequence[int], int | None]] = {}
        self.results: list[Array] = []

    def bind_input(self, name: str, device: str, number: int, *rest: Any) -> None:
        assert device == "cuda"
        self.inputs[name] = rest  # type: ignore[assignment]

    def bind_output(self, name: str, device: str, number: int, *rest: Any) -> None:
        assert device == "cuda"
        self.outputs[name] = rest or (None, (), None)  # type: ignore[assignment]

    def get_outputs(self) -> list[Any]:
        return [
            SimpleNamespace(shape=lambda r=r: list(r.shape), data_ptr=lambda r=r: r.ctypes.data)
            for r in self.results
        ]


def _at(address: int, dtype: Any, shape: Sequence[int]) -> Array:
    kind = np.dtype(dtype)
    size = max(1, kind.itemsize * int(np.prod(shape, dtype=np.int64)))
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    used = raw[: kind.itemsize * int(np.prod(shape, dtype=np.int64))]
    return used.view(kind).reshape(tuple(shape))


def doubled() -> Model:
    """Twice its rows."""
    return Model(
        [("x", "tensor(float)", ["rows", 3])],
        [("y", "tensor(float)", ["rows", 3])],
        lambda inputs: [2 * inputs["x"]],
    )


class OnCpu:
    """The real ONNX Runtime, of which this hides that it executes on the CPU: the calls of a
    session and its bindings are its own, what is bound to ``cuda`` lies in host memory."""

    SessionOptions = onnxruntime.SessionOptions
    RunOptions = onnxruntime.RunOptions
    set_default_logger_severity = staticmethod(onnxruntime.set_default_logger_severity)

    def get_available_providers(self) -> list[str]:
        """As the module."""
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(
        self, path: str, options: Any, providers: list[tuple[str, dict[str, str]]],
        enable_fallback: int
    ) -> Any:  # fmt: skip
        """As the module's class."""
        made = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], enable_fallback=enable_fallback
        )
        return _CpuSession(made, [name for name, _ in providers])


class _CpuSession:
    def __init__(self, session: Any, providers: list[str]) -> None:
        self._session, self._providers = session, providers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return self._providers

    def io_binding(self) -> Any:
        return _CpuBinding(self._session.io_binding())

    def run_with_iobinding(self, binding: _CpuBinding, options: Any = None) -> None:
        self._session.run_with_iobinding(binding.real, options)


class _CpuBinding:
    def __init__(self, real: Any) -> None:
        self.real = real

    def bind_input(self, name: str, device: str, *rest: Any) -> None:
        assert device == "cuda"
        self.real.bind_input(name, "cpu", *rest)

    def bind_output(self, name: str, device: str, *rest: Any) -> None:
        assert device == "cuda"
        self.real.bind_output(name, "cpu", *rest)

    def get_outputs(self) -> Any:
        return self.real.get_outputs()
