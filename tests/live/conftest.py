"""A real box for tests: models on disk, ``cotenant serve`` as a process, clients that talk to it.

Tests get it through the fixtures ``boxes`` (makes one, ends it, looks for what is left) and
``sabotage`` (lets workers misbehave on purpose, by what stands in the model's directory).
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from cotenant.cli import wiring
from cotenant.cli.bench.loadgen import PRIORITY
from cotenant.devices import proctree
from cotenant.devices.base import Device
from cotenant.domain.device_config import CpuConfig, DeviceConfig
from cotenant.domain.errors import CotenantError
from cotenant.domain.port import JobStatus
from cotenant.domain.workload import JobSpec
from cotenant.runtime.node import Node
from cotenant.serving.control_client import ControlClient
from cotenant.serving.http_front import HttpFront
from cotenant.serving.intake import Intake
from cotenant.serving.rest import build_app
from cotenant.serving.tensors import Limits

PATIENCE_S = 40.0
"""A bound on waiting, never a measure: what takes this long will not happen."""
OPSET = [helper.make_opsetid("", 17)]


def until(true: Callable[[], Any], say: Callable[[], object] = lambda: "") -> Any:
    """Wait until ``true()`` and return it."""
    end = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < end, f"waited in vain: {say()}"
        time.sleep(0.02)
    return found


# --- models ---------------------------------------------------------------------------------


def _save(path: Path, nodes: list[Any], inputs: Any, outputs: Any, weights: Any = ()) -> None:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside and renamed: a poll of the repository never sees half a file.
    temporary = path.with_suffix(".partial")
    onnx.save(helper.make_model(graph, opset_imports=OPSET, ir_version=9), temporary)
    temporary.rename(path)


def scale_model(path: Path, factor: float = 2.0, width: int = 4) -> None:
    """y = factor * x, x FP32 [n, width]."""
    _save(
        path,
        [helper.make_node("Mul", ["x", "k"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(np.array([factor], np.float32), "k")],
    )


def work_model(path: Path, layers: int = 120) -> None:
    """Some milliseconds of matrix products; x and y FP32 [n, 256]."""
    random = np.random.default_rng(1)
    up = random.standard_normal((256, 2048)).astype(np.float32) / 16
    down = random.standard_normal((2048, 256)).astype(np.float32) / 45
    nodes, name = [], "x"
    for i in range(layers):
        nodes += [
            helper.make_node("MatMul", [name, "up"], [f"u{i}"]),
            helper.make_node("Tanh", [f"u{i}"], [f"t{i}"]),
            helper.make_node("MatMul", [f"t{i}", "down"], [f"d{i}"]),
        ]
        name = f"d{i}"
    nodes.append(helper.make_node("Identity", [name], ["y"]))
    _save(
        path,
        nodes,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 256])],
        [numpy_helper.from_array(up, "up"), numpy_helper.from_array(down, "down")],
    )


def count_model(path: Path) -> None:
    """Counts to n in a loop, one by one: execution takes as long as the client says."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["before", "one"], ["after"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.INT64, [1]),
        ],
    )
    _save(
        path,
        [helper.make_node("Loop", ["n", "yes", "zero"], ["counted"], body=body)],
        [helper.make_tensor_value_info("n", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("counted", TensorProto.INT64, [1])],
        [
            numpy_helper.from_array(np.array(True), "yes"),
            numpy_helper.from_array(np.array([0], np.int64), "zero"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
        ],
    )


def pick_model(path: Path) -> None:
    """y = table[x], x INT64 [n, 1]: the model itself fails on an index that is too large."""
    _save(
        path,
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["n", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.arange(10, dtype=np.float32), "table")],
    )


def positive_model(path: Path) -> None:
    """The values of x (FP32 [n]) above 0: as many rows out as there are such values."""
    _save(
        path,
        [
            helper.make_node("Greater", ["x", "zero"], ["above"]),
            helper.make_node("Compress", ["x", "above"], ["y"], axis=0),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])],
        [numpy_helper.from_array(np.array([0], np.float32), "zero")],
    )


def free_model(path: Path) -> None:
    """y = x where that is above 0, else 0; x FP32 [n, m], m as the client likes."""
    _save(
        path,
        [helper.make_node("Relu", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "m"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])],
    )


def running_sum_model(path: Path) -> None:
    """Sums over the first axis, which is time: each entry holds all before it."""
    _save(
        path,
        [helper.make_node("CumSum", ["x", "axis"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.array(0, np.int64), "axis")],
    )


def finding_model(path: Path) -> None:
    """The rows of x; not those that begin below minus a million, and those above it twice."""
    _save(
        path,
        [
            helper.make_node("Gather", ["x", "column"], ["first"], axis=1),
            helper.make_node("Greater", ["first", "million"], ["large"]),
            helper.make_node("Less", ["first", "minus"], ["small"]),
            helper.make_node("Not", ["small"], ["kept"]),
            helper.make_node("Compress", ["x", "kept"], ["once"], axis=0),
            helper.make_node("Compress", ["x", "large"], ["again"], axis=0),
            helper.make_node("Concat", ["once", "again"], ["y"], axis=0),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 4])],
        [
            numpy_helper.from_array(np.array(0, np.int64), "column"),
            numpy_helper.from_array(np.array(1e6, np.float32), "million"),
            numpy_helper.from_array(np.array(-1e6, np.float32), "minus"),
        ],
    )


def repeating_model(path: Path) -> None:
    """x itself, and behind it once more the rows that begin with more than a million."""
    _save(
        path,
        [
            helper.make_node("Gather", ["x", "column"], ["first"], axis=1),
            helper.make_node("Greater", ["first", "million"], ["large"]),
            helper.make_node("Compress", ["x", "large"], ["again"], axis=0),
            helper.make_node("Concat", ["x", "again"], ["y"], axis=0),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 4])],
        [
            numpy_helper.from_array(np.array(0, np.int64), "column"),
            numpy_helper.from_array(np.array(1e6, np.float32), "million"),
        ],
    )


MODELS: dict[str, Callable[..., None]] = {
    "running_sum": running_sum_model,
    "repeating": repeating_model,
    "finding": finding_model,
    "scale": scale_model,
    "work": work_model,
    "count": count_model,
    "pick": pick_model,
    "positive": positive_model,
}


# --- clients --------------------------------------------------------------------------------


class Answer(NamedTuple):
    """One HTTP response. ``took`` in seconds."""

    status: int
    headers: dict[str, str]
    body: bytes
    took: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])

    @property
    def values(self) -> list[float]:
        """Data of the only output."""
        (output,) = self.json["outputs"]
        return list(output["data"])


def infer_body(**inputs: Any) -> bytes:
    """JSON of an inference; arrays become tensors of their type."""
    names = {"float32": "FP32", "int64": "INT64", "float64": "FP64"}
    tensors = [
        {
            "name": name,
            "datatype": names[str(array.dtype)],
            "shape": list(array.shape),
            "data": array.ravel().tolist(),
        }
        for name, array in inputs.items()
    ]
    return json.dumps({"inputs": tensors}).encode()


def binary_body(name: str, array: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an inference with one FP32 tensor in binary form."""
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": name,
                    "datatype": "FP32",
                    "shape": list(array.shape),
                    "parameters": {"binary_data_size": array.nbytes},
                }
            ]
        }
    ).encode()
    return head + array.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


@contextlib.contextmanager
def _before_the_box() -> Iterator[None]:
    """This thread runs before the box's, where that is allowed: clients are other machines, and
    do not starve because the box is busy."""
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


class Load:
    """Requests sent at their times, whether or not earlier ones were answered."""

    def __init__(self, port: int, path: str, body: bytes) -> None:
        self.port = port
        self.answers: list[Answer | None] = []
        """In order of their times; None: the connection broke without an answer."""
        self._request = (
            f"POST {path} HTTP/1.1\r\nHost: box\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    def run(self, rate: float, seconds: float, stop: threading.Event | None = None) -> None:
        """``rate`` requests a second for ``seconds``, or until ``stop`` is set."""
        with _before_the_box():
            asyncio.run(self._run(rate, seconds, stop or threading.Event()))

    async def _run(self, rate: float, seconds: float, stop: threading.Event) -> None:
        loop = asyncio.get_running_loop()
        began, count, tasks = loop.time(), 0, []
        while count < rate * seconds and not stop.is_set():
            due = began + count / rate
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            tasks.append(asyncio.create_task(self.one()))
            count += 1
        self.answers += await asyncio.gather(*tasks)
        for _, writer in self._idle:
            writer.close()

    async def one(self) -> Answer | None:
        """One request on an idle connection, or a new one."""
        began = time.monotonic()
        try:
            if self._idle:
                reader, writer = self._idle.pop()
            else:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(self._request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:])}
            body = await reader.readexactly(int(headers["content-length"]))
        except (OSError, asyncio.IncompleteReadError):
            return None
        self._idle.append((reader, writer))
        return Answer(int(head[0].split()[1]), headers, body, time.monotonic() - began)

    def count(self, status: int) -> int:
        """How many answers had this status."""
        return sum(a is not None and a.status == status for a in self.answers)


# --- the box --------------------------------------------------------------------------------


class Box:
    """One ``cotenant serve`` process with its models and state in ``directory``."""

    def __init__(self, directory: Path, env: dict[str, str]) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.models = directory / "models"
        self.models.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.mark = secrets.token_hex(8)
        self._env = env | {"COTENANT_TEST_BOX": self.mark}

    # life

    def configure(self, services: list[dict[str, Any]], **sections: Any) -> Box:
        """Write the configuration; defaults are quick polling and free ports."""
        node = {
            "state_dir": "./state",
            "models": "./models",
            "http": "127.0.0.1:0",
            "grpc": None,
            "plan_every": "200ms",
            "poll_models_every": "100ms",
            **sections.pop("node", {}),
        }
        services = [{"objective": {"latency": "2s"}, **service} for service in services]
        config = {"node": node, "services": services, **sections}
        (self.directory / "cotenant.yaml").write_text(yaml.safe_dump(config))
        return self

    def start(self, ready: bool = True) -> Box:
        """Start it and wait until it serves (and, unless told otherwise, all models do)."""
        self.spawn()
        until(lambda: self._serves(ready), lambda: f"not ready: {self.log()}")
        self.port = int(self.status()["http"].rpartition(":")[2])
        return self

    def spawn(self) -> subprocess.Popen[bytes]:
        """Only start the process."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cotenant.cli.main", "serve", "cotenant.yaml"],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._env},
                start_new_session=True,
            )
        return self.process

    def _serves(self, ready: bool) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"it ended: {self.log()}"
        with contextlib.suppress(CotenantError):
            status = self.status()
            return bool(status["http"]) and (status["ready"] or not ready)
        return False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the daemon with a signal; its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def processes(self) -> list[int]:
        """Everything that was started for this box and lives."""
        return proctree.marked("COTENANT_TEST_BOX", self.mark)

    def close(self) -> None:
        """End it and whatever it left."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        left = self.processes()
        proctree.kill(self.processes)
        assert not left, f"left behind: {left}; {self.log()}"

    # looking at it

    @property
    def control(self) -> ControlClient:
        return ControlClient(self.state / "control.sock")

    def status(self) -> dict[str, Any]:
        return self.control.status()

    def service(self, name: str) -> dict[str, Any]:
        """One service's status."""
        return next(dict(s) for s in self.status()["services"] if s["name"] == name)

    def job(self, ref: str) -> JobStatus:
        return next(j for j in self.control.jobs() if ref in (j.id, j.name))

    def job_spec(self, *command: str, **fields: Any) -> JobSpec:
        fields = {"name": "job", "cwd": str(self.directory), **fields}
        return JobSpec(id="", command=command, **fields)

    def submit(self, *command: str, **fields: Any) -> str:
        return self.control.submit(self.job_spec(*command, **fields))

    def index(self) -> dict[tuple[str, str], dict[str, str]]:
        """The model index by (name, version)."""
        entries = self.post("/v2/repository/index", b"{}").json
        return {(e["name"], e.get("version", "")): e for e in entries}

    def workers(self, service: str = "") -> list[int]:
        """Pids of model instances, oldest first."""
        assert self.process is not None
        found = []
        for pid in proctree.descendants(self.process.pid):
            with contextlib.suppress(OSError):
                if b"cotenant.runtime.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return sorted(found)

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-3000:]

    # talking to it

    def model(self, kind: str, name: str, version: int = 1, **kwargs: Any) -> Path:
        """Write a model; see MODELS for kinds."""
        path = self.models / name / str(version) / "model.onnx"
        MODELS[kind](path, **kwargs)
        return path

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One HTTP request on a connection of its own."""
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            found = {k.lower(): v for k, v in response.getheaders()}
            return Answer(response.status, found, response.read(), time.monotonic() - began)
        finally:
            connection.close()

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> Answer:
        return self.ask("POST", path, body, headers)

    def infer(self, model: str, version: str = "", **inputs: Any) -> Answer:
        """One inference with JSON tensors."""
        middle = f"/versions/{version}" if version else ""
        return self.post(f"/v2/models/{model}{middle}/infer", infer_body(**inputs))

    def infer_binary(self, model: str, name: str, array: Any) -> Answer:
        """One inference with a binary tensor."""
        return self.post(f"/v2/models/{model}/infer", *binary_body(name, array))

    def load(self, model: str, **inputs: Any) -> Load:
        """Load on one model; call its ``run``."""
        return Load(self.port, f"/v2/models/{model}/infer", infer_body(**inputs))

    @contextlib.contextmanager
    def under_load(self, model: str, rate: float, **inputs: Any) -> Iterator[Load]:
        """Continuous load while the block runs; all of it is answered at the end."""
        load, stop = self.load(model, **inputs), threading.Event()
        thread = threading.Thread(target=load.run, args=(rate, PATIENCE_S, stop))
        thread.start()
        try:
            yield load
        finally:
            stop.set()
            thread.join()

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def hang_up_on(self, model: str, **inputs: Any) -> socket.socket:
        """Send an inference and return its connection, the answer not awaited."""
        body = infer_body(**inputs)
        sock = self.connect()
        head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: b\r\nContent-Length: {len(body)}"
        sock.sendall(f"{head}\r\n\r\n".encode() + body)
        return sock

    until = staticmethod(until)

    @contextlib.asynccontextmanager
    async def here(
        self,
        clock: Callable[[], int] = time.monotonic_ns,
        devices: Sequence[Device] = (),
    ) -> AsyncIterator[Node]:
        """The node within this process, to look inside, with its HTTP front end; on ``devices`` in
        place of those that the configuration names."""
        config = wiring.read_config(self.directory / "cotenant.yaml")
        if not devices:
            devices = [_gentle(device, Path(config.state_dir)) for device in config.devices]
        limits = Limits(body_bytes=config.limits.body)
        async with Node(config, devices, clock) as node:
            app = build_app(node, Intake(limits), None)
            http = HttpFront(app, "127.0.0.1", 0)
            self.port = await http.start()
            try:
                await node.start()
                yield node
            finally:
                await http.stop(5.0)


def _gentle(config: DeviceConfig, state: Path) -> Device:
    """A device that leaves this process its ordinary priority."""
    if isinstance(config, CpuConfig):
        config = msgspec.structs.replace(config, realtime="never")
    return wiring.make_device(config, state)


Boxes = Callable[..., Box]

SABOTAGE = """
import os, signal, sys, threading, time

if "cotenant.runtime.worker" in sys.orig_argv:
    from cotenant.engines import onnx

    class Sabotaged(onnx.OnnxEngine):
        def __init__(self, path, units):
            if path.with_name(".crash_at_load").exists():
                os.kill(os.getpid(), signal.SIGSEGV)
            try:
                path.with_name(".die_once").unlink()
            except FileNotFoundError:
                while path.with_name(".hold").exists():
                    time.sleep(0.01)
            else:
                threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
            super().__init__(path, units)
            self._crashes = path.with_name(".crash_at_run")

        def run(self, units, inputs):
            if self._crashes.exists() and any((x == 666).any() for x in inputs.values()):
                os.kill(os.getpid(), signal.SIGSEGV)
            return super().run(units, inputs)

    onnx.OnnxEngine = Sabotaged
"""


@pytest.fixture(scope="session")
def sabotage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which an engine crashes or hangs where a file in the model's directory
    says so: ``.hold`` (while it is there, loading waits), ``.crash_at_load``, ``.crash_at_run``
    (on an input that holds 666), ``.die_once`` (who finds it loads at once and dies later)."""
    directory = tmp_path_factory.mktemp("sabotage")
    (directory / "sitecustomize.py").write_text(SABOTAGE)
    return {"PYTHONPATH": str(directory)}


def _boxes(new: Callable[[], Path]) -> Iterator[Boxes]:
    with contextlib.ExitStack() as stack:

        def make(env: dict[str, str] | None = None, directory: Path | None = None) -> Box:
            box = Box(directory or new(), env or {})
            stack.callback(box.close)
            return box

        yield make


@pytest.fixture
def directory() -> Iterator[Path]:
    """One whose path is short, as that of a Unix socket in it must be."""
    path = Path(tempfile.mkdtemp(prefix="cotenant-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boxes]:
    """Makes boxes that end with the test."""
    yield from _boxes(lambda: tmp_path_factory.mktemp("b"))


@pytest.fixture(scope="module")
def module_boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boxes]:
    """Makes boxes that all tests of a file share."""
    yield from _boxes(lambda: tmp_path_factory.mktemp("b"))
