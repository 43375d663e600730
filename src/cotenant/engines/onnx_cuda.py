"""ONNX Runtime on a GPU: one session for each subset of its multiprocessors that a model is to use.

1. A session's stream is given when it is made, so each subset has a session of its own, and each
   session has the weights once more. At most ``SESSIONS`` are kept; the one not used for longest
   makes way.
2. A request goes through pinned memory, in the order of the session's stream: copies in,
   execution, copies out, one wait. From there outputs are copied to where they are wanted.
3. Where the shapes of inputs say those of outputs, every address is fixed and an execution can be
   captured: a CUDA graph for each of the first ``GRAPHS`` signatures that were seen twice before
   ``settle``, which has every partition see what the trial has executed. Others run without.
4. A model that cannot be captured (control flow, operators left on the CPU) runs without graphs.
   ``notes`` says so, and says which operators are not on the GPU.

Sources: ONNX Runtime's pages "CUDA Execution Provider", "TensorRT Execution Provider" and
"I/O Binding"; keys of run and session options: ``onnxruntime_run_options_config_keys.h`` and
``onnxruntime_session_options_config_keys.h``.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import onnxruntime

from cotenant.domain.device import CUDA_SUBSETS
from cotenant.domain.errors import DeviceError, ModelError
from cotenant.engines.base import Array, EngineMeta, Room, Target, first_line
from cotenant.engines.cuda.driver import Gpu
from cotenant.engines.cuda.session import GRAPHS, NotCaptured, Session, Signature, signature_of
from cotenant.engines.cuda.subsets import Lane, Subsets
from cotenant.engines.onnx import CPU_PROVIDER, axes_of
from cotenant.engines.placement import RECORDS, Executed
from cotenant.engines.usercache import user_cache

CUDA_PROVIDER: Final = "CUDAExecutionProvider"
TENSORRT_PROVIDER: Final = "TensorrtExecutionProvider"
SESSIONS: Final = 8
"""Sessions of a model that are kept at once: bounds what its weights take."""

Inputs = dict[str, Array]


class OnnxCudaEngine:
    """A model on the GPU of ``target``. ``gpu`` and ``runtime``: what stands for the driver and
    for ``onnxruntime`` in tests."""

    def __init__(
        self,
        path: Path,
        units: Sequence[int],
        target: Target,
        *,
        tensorrt: bool = False,
        gpu: Gpu | None = None,
        runtime: Any = onnxruntime,
    ) -> None:
        self._path = path
        self._runtime = runtime
        self._providers = _providers(runtime, tensorrt)
        self._placed: tuple[int, ...] = ()
        self._partitions = target.partitions
        self._sessions: OrderedDict[tuple[int, ...], Session] = OrderedDict()
        self._settled = False
        self._tried: dict[Signature, Inputs] = {}
        """What the trial executes, to warm by it what the trial does not come by."""
        self._graphs = not tensorrt
        self._notes: list[str] = []
        runtime.set_default_logger_severity(4)
        if preload := getattr(runtime, "preload_dlls", None):
            preload()  # of CUDA and cuDNN, where they came as Python packages
        divided = target.processor.startswith(CUDA_SUBSETS)
        self._gpu = gpu or Gpu(target.processor.partition(":")[2])
        self._gpu.open()
        self._subsets = Subsets(self._gpu)
        try:
            self._subsets.open(divided)
            self._note(self._subsets.refusal)
            self._open_first(units)
        except BaseException:
            self.close()
            raise

    def _open_first(self, counts: Sequence[int]) -> None:
        """Sessions of the partitions that there are, and of a subset for each count."""
        partitions = self._partitions if self._subsets.units else ()
        wanted = [*map(_in_order, partitions), *map(self._subset, counts)]
        for subset in list(dict.fromkeys(wanted))[:SESSIONS]:
            self._session(subset)
        first = next(iter(self._sessions.values()))
        self._meta = first.meta
        self._axes = axes_of(first.session)

    @property
    def meta(self) -> EngineMeta:
        return self._meta

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return self._axes

    @property
    def notes(self) -> Sequence[str]:
        return self._notes

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """What its sessions run on: how many multiprocessors is as the driver says."""
        return tuple(session.lane for session in self._sessions.values())

    def executed(self) -> tuple[Executed, ...]:
        """See ``Tells``; ONNX Runtime tells from 1.24 on."""
        return next(iter(self._sessions.values())).executed

    def place(self, units: Sequence[int]) -> None:
        self._placed = tuple(units)

    def settle(self) -> None:
        """Make every partition ready: the trial has come by one of each size."""
        if self._subsets.units:
            for partition in self._partitions[:SESSIONS]:
                self._placed = partition
                for inputs in (*self._tried.values(), *self._tried.values()):
                    self.run(len(partition), inputs)
        self._placed = ()
        self._tried.clear()
        self._settled = True

    def run(self, units: int, inputs: Inputs) -> list[Array]:
        return self._run(units, inputs, None)

    def run_into(self, units: int, inputs: Inputs, room: Room) -> list[Array]:
        return self._run(units, inputs, room)

    def _run(self, units: int, inputs: Inputs, room: Room | None) -> list[Array]:
        if not self._settled and len(self._tried) < GRAPHS:
            self._tried.setdefault(signature_of(inputs), inputs)
        subset = self._subset(units)
        session = self._session(subset)
        try:
            return session.run(inputs, not self._settled, room)
        except Exception as error:  # ONNX Runtime raises a dozen kinds of its own
            if not self._gpu.works(session.lane.stream):
                # Nothing more can be done in this process; the worker is to end.
                raise DeviceError(f"the GPU failed: {first_line(error)}") from error
            if not isinstance(error, NotCaptured):
                raise ModelError(first_line(error)) from error
            self._give_up_graphs(str(error))
        return self._run(units, inputs, room)

    def close(self) -> None:
        """Give everything back, in reverse order."""
        while self._sessions:
            self._drop(next(iter(self._sessions)))
        self._subsets.close()
        self._gpu.close()

    # --- sessions ---------------------------------------------------------------------------

    def _subset(self, count: int) -> tuple[int, ...]:
        """The units of an execution on so many: the first of where it was placed; before that a
        partition of that size, if there is one."""
        if not self._subsets.units:
            return ()
        if self._placed:
            return _in_order(self._placed[:count])
        of_size = (p for p in self._partitions if len(p) == count)
        return _in_order(next(of_size, self._subsets.units[:count]))

    def _session(self, subset: tuple[int, ...]) -> Session:
        if subset in self._sessions:
            self._sessions.move_to_end(subset)
            return self._sessions[subset]
        while len(self._sessions) >= SESSIONS:
            self._drop(next(iter(self._sessions)))
        lane = self._subsets.lane(subset)
        try:
            opened = self._open(lane)
        except BaseException:
            self._subsets.release(subset)
            raise
        self._sessions[subset] = opened
        return opened

    def _open(self, lane: Lane) -> Session:
        opened = self._with_graphs(lane) if self._graphs else self._on(lane, graphs=False)
        if left := [e.kind for e in opened.executed if e.where == CPU_PROVIDER]:
            self._note(f"operators that are not on the GPU: {', '.join(left)}")
        return opened

    def _with_graphs(self, lane: Lane) -> Session:
        try:
            return self._on(lane, graphs=True)
        except ModelError as error:
            why = str(error)
        # If it is not for the graphs that it was refused, it is refused again.
        opened = self._on(lane, graphs=False)
        self._graphs = False
        self._note(f"no CUDA graphs: {why}")
        return opened

    def _on(self, lane: Lane, graphs: bool) -> Session:
        made = self._made(lane, graphs)
        return Session(self._gpu, lane, made, self._runtime.RunOptions if graphs else None)

    def _made(self, lane: Lane, graphs: bool) -> Any:
        runtime = self._runtime
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry(*RECORDS)
        common = {"device_id": str(self._gpu.ordinal), "user_compute_stream": str(lane.stream)}
        cuda = {
            "arena_extend_strategy": "kSameAsRequested",
            # An exhaustive search would run at the first batch of each size.
            "cudnn_conv_algo_search": "HEURISTIC",
            "do_copy_in_default_stream": "1",
            "enable_cuda_graph": "1" if graphs else "0",
        }
        own = {
            TENSORRT_PROVIDER: common | _kept_engines(),
            CUDA_PROVIDER: common | cuda,
            CPU_PROVIDER: {},
        }
        providers = [(name, own[name]) for name in self._providers]
        try:
            # Without enable_fallback=0 a session that cannot be made is made on the CPU.
            made = runtime.InferenceSession(
                str(self._path), options, providers=providers, enable_fallback=0
            )
        except Exception as error:
            raise ModelError(f"{self._path.name} cannot be loaded: {first_line(error)}") from error
        if CUDA_PROVIDER not in made.get_providers():
            raise ModelError(
                "ONNX Runtime could not load its CUDA provider; it needs the CUDA and cuDNN"
                " libraries of the version that onnxruntime-gpu was built for"
            )
        return made

    def _give_up_graphs(self, why: str) -> None:
        """Start again without graphs: a capture that failed may have left its stream unusable."""
        self._graphs = False
        self._note(f"no CUDA graphs: {why}")
        while self._sessions:
            self._drop(next(iter(self._sessions)))

    def _drop(self, subset: tuple[int, ...]) -> None:
        self._sessions.pop(subset).close()
        self._subsets.release(subset)

    def _note(self, text: str) -> None:
        if text and text not in self._notes:
            self._notes.append(text)
            print(f"{self._path.name}: {text}", file=sys.stderr, flush=True)


def _kept_engines() -> dict[str, str]:
    """TensorRT takes minutes to build an engine: for one model, GPU and version it is kept."""
    folder = user_cache("tensorrt")
    if folder is None:
        return {}
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def _in_order(units: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(units))


def _providers(runtime: Any, tensorrt: bool) -> tuple[str, ...]:
    """By preference; raises ModelError for what is not installed."""
    there = runtime.get_available_providers()
    if CUDA_PROVIDER not in there:
        raise ModelError(
            "this ONNX Runtime has no CUDA provider: pip uninstall onnxruntime, then pip install "
            "onnxruntime-gpu (both are the module onnxruntime; one may be installed)"
        )
    if tensorrt and TENSORRT_PROVIDER not in there:
        raise ModelError(
            "engine: tensorrt needs an onnxruntime-gpu with TensorRT; known here: "
            + ", ".join(there)
        )
    return (*([TENSORRT_PROVIDER] if tensorrt else []), CUDA_PROVIDER, CPU_PROVIDER)
