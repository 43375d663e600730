"""A node for front ends to talk to: y = 2x in numpy, and whatever a test tells it to do."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvloop

from cotenant.domain.errors import InvalidRequest, ModelError, NotFound
from cotenant.domain.port import (
    Held,
    IndexEntry,
    InferCall,
    InferResult,
    JobStatus,
    Language,
    ModelMeta,
    OnOutcome,
    Refused,
    TensorMeta,
    TensorOut,
    Withdraw,
)
from cotenant.domain.workload import JobSpec
from cotenant.serving.grpc_front import GrpcFront
from cotenant.serving.http_front import HttpFront
from cotenant.serving.intake import Intake
from cotenant.serving.rest import build_app
from cotenant.serving.tensors import Limits
from cotenant.serving.web.app import Web

NUMPY = {"FP32": np.float32, "INT32": np.int32, "INT8": np.int8, "FP64": np.float64}


class FakeNode:
    """Models ``double`` (y = 2x), ``echo`` (any tensors, as they came), ``sleepy`` (waits until
    ``gate`` is set) and ``talk`` (text BYTES [1], n INT64 [-1]; says each of ``script``, which may
    end with a refusal or with None: an end without outputs; where it is "" it waits for ``gate``).
    ``refuse`` or ``fail``, if set, is every inference's outcome."""

    def __init__(self) -> None:
        self.refuse: Refused | None = None
        self.most: int | None = None
        self.fail: Exception | None = None
        self.gate = asyncio.Event()
        self.waiting = threading.Semaphore(0)
        self.withdrawn = threading.Semaphore(0)
        self.unreleased = 0
        self.calls: list[InferCall] = []
        self.loaded = {"double", "echo", "sleepy", "talk"}
        self.submitted: list[JobSpec] = []
        self.script: list[str | Refused | None] = []

    def plan(self, dry_run: bool) -> dict[str, Any]:
        return {"dry_run": dry_run}

    def is_ready(self) -> bool:
        return "double" in self.loaded

    def model_ready(self, name: str, version: str = "") -> bool:
        return name in self.loaded and version in ("", "1")

    def metadata(self, name: str, version: str = "") -> ModelMeta:
        if not self.model_ready(name, version):
            raise NotFound(f"model {name} {version} is not loaded")
        if name == "talk":
            text, n = TensorMeta("text", "BYTES", (1,)), TensorMeta("n", "INT64", (-1,))
            return ModelMeta(name, ("1",), "talk", (text, n), (text, n), pieces=True)
        x, y = (TensorMeta(n, "FP32", (-1, 4)) for n in "xy")
        return ModelMeta(name, ("1",), "onnx", (x,), (y,))

    async def language(self, name: str, version: str = "") -> Language:
        self.metadata(name, version)
        raise InvalidRequest(f"model {name} is no language model")

    def index(self) -> list[IndexEntry]:
        return [
            IndexEntry(name, "1", "READY" if name in self.loaded else "UNAVAILABLE", "")
            for name in ("double", "echo", "sleepy", "talk")
        ]

    async def load(self, name: str) -> None:
        if name == "broken":
            raise ModelError("model broken: model.onnx is damaged; export it again")
        if name not in ("double", "echo", "sleepy", "talk"):
            raise NotFound(f"no model {name} in the repository")
        self.loaded.add(name)

    async def unload(self, name: str) -> None:
        if name not in self.loaded:
            raise NotFound(f"model {name} is not loaded")
        self.loaded.discard(name)

    def most_elements(self, name: str, version: str = "") -> int | None:
        self.metadata(name, version)
        return self.most

    def submit(self, call: InferCall, done: OnOutcome) -> Withdraw | Refused:
        self.calls.append(call)
        if self.fail is not None:
            raise self.fail
        if self.refuse is not None:
            return self.refuse
        self.metadata(call.model, call.version)
        if call.model == "talk":
            return self._talk(call, done)
        result = self._result(call)

        async def answer() -> None:
            if call.model == "sleepy":
                self.waiting.release()
                await self.gate.wait()
            done(result)

        def withdraw() -> None:
            task.cancel()
            self.unreleased -= 1
            self.withdrawn.release()

        task = asyncio.create_task(answer())
        return withdraw

    def _talk(self, call: InferCall, done: OnOutcome) -> Withdraw:
        if not call.pieces:
            raise InvalidRequest("it answers in pieces")

        async def answer() -> None:
            for number, said in enumerate(self.script):
                await asyncio.sleep(0)
                if said == "":
                    self.waiting.release()
                    await self.gate.wait()
                elif isinstance(said, Refused):
                    done(said)
                else:
                    self.unreleased += 1
                    outputs = [] if said is None else self._piece(said, number)
                    more = number + 1 < len(self.script)
                    done(InferResult(call.model, "1", outputs, self._release, more))

        def withdraw() -> None:
            task.cancel()
            self.withdrawn.release()

        task = asyncio.create_task(answer())
        return withdraw

    def _piece(self, said: str, number: int) -> list[TensorOut]:
        data = struct.pack("<I", len(said.encode())) + said.encode()
        return [
            TensorOut("text", "BYTES", (1,), memoryview(data)),
            TensorOut("n", "INT64", (1,), memoryview(struct.pack("<q", number))),
        ]

    def _result(self, call: InferCall) -> InferResult:
        outputs = [self._output(call, item) for item in call.inputs]
        wanted = [out for out in outputs if not call.outputs or out.name in call.outputs]
        if len(wanted) < len(call.outputs):
            raise InvalidRequest(f"model {call.model} has no such output")
        self.unreleased += 1
        return InferResult(call.model, "1", wanted, self._release)

    def _release(self) -> None:
        self.unreleased -= 1

    def _output(self, call: InferCall, item: Any) -> TensorOut:
        buffer = bytearray(item.nbytes)
        if item.read_into is not None:
            item.read_into(memoryview(buffer))
        else:
            buffer[:] = item.data
        if call.model != "echo" and item.datatype in NUMPY:
            array = np.frombuffer(buffer, NUMPY[item.datatype])
            array *= 2
        name = item.name if call.model == "echo" else "y"
        return TensorOut(name, item.datatype, item.shape, memoryview(buffer))

    def statistics(self, name: str, version: str = "") -> dict[str, Any]:
        self.metadata(name, version)
        return {
            "version": "1",
            "last_inference_ms": 5,
            "inference_count": len(self.calls),
            "execution_count": 1,
            "success_count": 3,
            "success_ns": 900,
            "fail_count": 0,
            "fail_ns": 0,
            "queue_count": 3,
            "queue_ns": 100,
            "compute_input_ns": 1,
            "compute_infer_ns": 2,
            "compute_output_ns": 3,
        }

    def metrics(self) -> bytes:
        return b"# TYPE cotenant_requests counter\ncotenant_requests 1\n"

    def status(self) -> dict[str, Any]:
        return {"node": "fake"}

    def timeline(self) -> list[Held]:
        return []

    def submit_job(self, spec: JobSpec) -> str:
        self.submitted.append(spec)
        return "j1"

    def jobs(self) -> list[JobStatus]:
        return [JobStatus("j1", "train", "running", ("python", "t.py"), 1.0, 0.0, 12.5, 0)]

    def cancel_job(self, ref: str) -> str:
        if ref not in ("j1", "train"):
            raise NotFound(f"no job {ref!r}; see cotenant jobs")
        return "j1"

    hold_job = resume_job = cancel_job

    async def rollback(self, name: str) -> str:
        self.metadata(name)
        return "1"

    async def checkpoint_job(self, ref: str, within_s: float) -> str:
        self.cancel_job(ref)
        await asyncio.sleep(min(within_s, 0.05))
        return "/checkpoints/step-9"

    def job_log_path(self, ref: str) -> str:
        self.cancel_job(ref)
        return "/state/jobs/j1/log"


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` comes true, for what a server does after its client has gone."""
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@contextmanager
def serving(
    limits: Limits | None = None,
    token: str | None = None,
    connections: int = 4096,
    make: Callable[[], FakeNode] | None = None,
    open_metrics: bool = False,
    web: Callable[[FakeNode, Intake, str | None], Web] | None = None,
) -> Iterator[Any]:
    """Both front ends over a FakeNode (or what ``make`` makes), in a thread with a loop of its own.

    Yields ``node``, ``http`` and ``grpc`` (host:port), ``intake``, and ``call``, which runs
    a function on the loop.
    """
    limits = limits or Limits()
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    async def start() -> Any:
        node, intake = (make or FakeNode)(), Intake(limits)
        pages = web(node, intake, token) if web else None
        app = build_app(node, intake, token, open_metrics, pages)
        http = HttpFront(app, "127.0.0.1", 0, connections)
        rpc = GrpcFront(node, intake, token, "127.0.0.1", 0)
        ports = await http.start(), await rpc.start()
        return SimpleNamespace(
            node=node,
            intake=intake,
            http=f"127.0.0.1:{ports[0]}",
            port=ports[0],
            grpc=f"127.0.0.1:{ports[1]}",
            fronts=(http, rpc),
            web=pages,
            run=run,
            call=call,
        )

    def call(function: Callable[[], Any]) -> Any:
        async def on_loop() -> Any:
            return function()

        return run(on_loop())

    served = run(start())
    try:
        yield served
    finally:
        if served.web is not None:
            run(served.web.close())
        for front in served.fronts:
            run(front.stop(1.0))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
