"""What a worker measures before it serves, and strings on their way through it."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cotenant.devices import proctree
from cotenant.domain.device import PROCESSOR
from cotenant.domain.port import TensorMeta
from cotenant.engines.base import Array, EngineMeta, Opening, Target
from cotenant.runtime import worker as worker_module
from cotenant.runtime.messages import LENGTH, Done, Item, Open, Opened, Place, Run
from cotenant.runtime.worker import Worker, _packed, _strings, _timed

BURNT_NS = 15_000_000


class Burner:
    """An engine that takes so much CPU time."""

    def __init__(self) -> None:
        self.walls: list[int] = []

    def run(self, _: int, __: Any) -> list[Any]:
        began, until = time.monotonic_ns(), time.thread_time_ns() + BURNT_NS
        while time.thread_time_ns() < until:
            pass
        self.walls.append(time.monotonic_ns() - began)
        return []


@pytest.mark.skipif(not proctree.run_delays(), reason="the kernel does not count run-queue delays")
def test_an_execution_is_timed_without_what_others_have_of_its_core() -> None:
    cores = os.sched_getaffinity(0)
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    engine = Burner()
    try:
        for pid in (0, rival.pid):
            os.sched_setaffinity(pid, {min(cores)})
        times = [_timed(engine, 1, {}) for _ in range(9)]  # type: ignore[arg-type]
    finally:
        rival.kill()
        rival.wait()
        os.sched_setaffinity(0, cores)
    assert statistics.median(engine.walls) > 1.5 * BURNT_NS, "the rival took nothing"
    assert statistics.median(times) < 1.2 * BURNT_NS


def test_strings_pass_byte_for_byte() -> None:
    texts = [b"", b"\0", b"a\0b", b"\0\0", "\u732b\U0001f600\ufffd".encode(), b" \r\n"]
    raw = b"".join(LENGTH.pack(len(text)) + text for text in texts)
    assert bytes(_packed(_strings(memoryview(raw), (len(texts), 1)))) == raw


def test_strings_are_never_mended() -> None:
    with pytest.raises(UnicodeDecodeError):
        _strings(memoryview(LENGTH.pack(1) + b"\xff"), (1,))


class Located:
    """An engine that keeps count of where it is to execute."""

    def __init__(self) -> None:
        tensor = TensorMeta("x", "FP32", (2,))
        self.meta = EngineMeta("located", (tensor,), (tensor,), False)
        self.axes = {"x": ("",)}
        self.log: list[Any] = []
        self.notes = ("slowly",)

    def run(self, units: int, inputs: dict[str, Array]) -> list[Array]:
        self.log.append(units)
        return [inputs["x"]]

    def place(self, units: Sequence[int]) -> None:
        self.log.append(tuple(units))

    def settle(self) -> None:
        self.log.append("settled")


@pytest.mark.parametrize("processor", ["", "cuda:GPU-1"])
def test_an_engine_learns_where_it_is_before_it_executes(
    monkeypatch: pytest.MonkeyPatch, processor: str
) -> None:
    engine, targets = Located(), []

    def opened(opening: Opening) -> Located:
        targets.append(opening.target)
        return engine

    kind = SimpleNamespace(name="located", open=opened)
    monkeypatch.setattr(worker_module, "choose", lambda _: kind)
    monkeypatch.setattr(worker_module.gc, "freeze", lambda: None)
    monkeypatch.setenv(PROCESSOR, processor)
    ours, theirs = socket.socketpair()
    worker = Worker(theirs, memoryview(bytearray(256)))
    order = Open("m.onnx", units=(1, 2), max_batch=1, partitions=((0, 1), (2, 3)))
    answer = worker._open(order)
    assert isinstance(answer, Opened) and answer.notes == ("slowly",)
    assert targets == [Target(processor or "cpu", ((0, 1), (2, 3)))]
    assert set(engine.log) == {1, 2, "settled"} and engine.log[-1] == "settled"
    engine.log.clear()
    item = Item(1, (Place((2,), 0, 8),), 64, 64)
    assert isinstance(worker._run(Run(1, (4, 5), 2, 0, (item,))), Done)
    assert engine.log == [(4, 5), 2]
    ours.close()
    theirs.close()


def test_a_model_whose_input_has_no_axes_is_opened(tmp_path: Path) -> None:
    """Such as a rate beside a signal: there is no first axis whose name could be compared."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "rate"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", kind, ["n", 4]),
            helper.make_tensor_value_info("rate", kind, []),
        ],
        [helper.make_tensor_value_info("y", kind, ["n", 4])],
    )
    path = tmp_path / "model.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        opened = Worker(theirs, memoryview(bytearray(4096)))._open(
            Open(str(path), units=(1,), max_batch=4)
        )
    assert isinstance(opened, Opened), opened
    assert not opened.meta.batchable
