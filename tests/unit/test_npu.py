"""NPUs that are there, by a stand-in: OpenVINO's own CPU behind the names of an NPU. No NPU has run
any of this."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotenant.cli.devices import Exit, devices_view, document, exit_code
from cotenant.devices.features import Missing
from cotenant.devices.npu import NpuDevice
from cotenant.devices.npu_look import Npu, Npus, look, read
from cotenant.devices.nvidia.facts import Cause
from cotenant.domain.config import ModelSettings
from cotenant.domain.device import PROCESSOR, Tenant, TenantKind
from cotenant.domain.device_config import NpuConfig
from cotenant.domain.errors import EnvironmentProblem, ModelError
from cotenant.domain.npu import Present, present
from cotenant.engines.base import Opening, Target
from cotenant.engines.registry import choose
from tests.npu_standin import StandIn
from tests.unit.test_in_place import graph
from tests.unit.test_views import show

onnx = pytest.importorskip("onnx")
node = onnx.helper.make_node
OPENVINO = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the extra openvino is not installed"
)
THERE = Npu("NPU", "Stand-in NPU", "1003", "", 1 << 30, 0, ("FP16",))


def found(*npus: Npu) -> Npus:
    return Npus(npus, ("/dev/accel/accel0",))


def opened(path: Path, there: StandIn, memory: int = 0, **settings: Any) -> Any:
    from cotenant.engines.openvino_npu import OpenVinoNpuEngine

    return OpenVinoNpuEngine(path, ModelSettings(**settings), Present("NPU", memory), there)


def dense(path: Path) -> Path:
    """A product with 64 x 64 weights; x and y FP32 [n, 64]."""
    path = graph(path, ["n", 64], ["n", 64], node("MatMul", ["x", "w"], ["y"]))
    model = onnx.load(path)
    weights = np.eye(64, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(model, path)
    return path


# --- the engine -------------------------------------------------------------------------------


@OPENVINO
def test_free_axes_are_fixed_and_what_was_fixed_is_said(tmp_path: Path) -> None:
    path = graph(tmp_path / "model.onnx", ["n", "w"], ["n", "w"])
    engine = opened(path, StandIn(), shapes={"x": (2, 5)})
    assert [t.shape for t in (*engine.meta.inputs, *engine.meta.outputs)] == [(2, 5)] * 2
    assert not engine.meta.batchable
    x = np.array([[-1, 0, 2, 3, 4]] * 2, np.float32)
    assert np.array_equal(engine.run(1, {"x": x})[0], np.maximum(x, 0))
    assert any("[2, 5]" in note for note in engine.notes)
    assert opened(path, StandIn()).meta.inputs[0].shape == (1, 1)
    with pytest.raises(ModelError, match="axes"):
        opened(path, StandIn(), shapes={"x": (2,)})


@OPENVINO
def test_it_goes_before_others_and_has_one_request_in_flight(tmp_path: Path) -> None:
    there = StandIn()
    opened(dense(tmp_path / "model.onnx"), there)
    assert there.settings["MODEL_PRIORITY"] == "HIGH"
    assert there.settings["PERFORMANCE_HINT_NUM_REQUESTS"] == 1


@OPENVINO
def test_operators_that_the_device_lacks_are_named(tmp_path: Path) -> None:
    nodes = [node("NonZero", ["x"], ["i"]), node("Cast", ["i"], ["y"], to=1)]
    path = graph(tmp_path / "model.onnx", [4], [1, "found"], *nodes)
    with pytest.raises(ModelError, match="NonZero"):
        opened(path, StandIn())


@OPENVINO
@pytest.mark.parametrize("queries", [True, False])
def test_what_only_its_compiler_refuses_is_said_in_its_words(tmp_path: Path, queries: bool) -> None:
    path = graph(tmp_path / "model.onnx", ["n", 4], ["n", 4], node("Tan", ["x"], ["y"]))
    with pytest.raises(ModelError, match="Tan: not legal"):
        opened(path, StandIn(queries=queries))


@OPENVINO
def test_memory_is_bounded_before_and_after_compiling(tmp_path: Path) -> None:
    path = dense(tmp_path / "model.onnx")
    opened(path, StandIn(), memory=1 << 20)
    for memory, grows in ((1 << 13, 0), (1 << 20, (1 << 20) + 1)):
        with pytest.raises(ModelError):
            opened(path, StandIn(grows=grows), memory=memory)


@OPENVINO
def test_the_processor_picks_the_engine_and_no_model_is_tried_on_the_cpu(tmp_path: Path) -> None:
    npu = Present("NPU", 7)
    assert present(npu.processor) == npu
    opening = Opening(dense(tmp_path / "model.onnx"), (1,), target=Target(npu.processor))
    kind = choose(opening)
    assert kind.name == "openvino"
    with pytest.raises(ModelError):  # no NPU is here
        kind.open(opening)


# --- finding ----------------------------------------------------------------------------------


@OPENVINO
def test_what_openvino_says_of_it_is_read_and_what_it_refuses_is_noted() -> None:
    (npu,) = read(StandIn())
    assert (npu.id, npu.name, npu.driver) == ("NPU", "Stand-in NPU", "1003")
    assert npu.memory == 1 << 30
    assert "NPU_COMPILER_VERSION" in npu.unread


def test_openvino_is_asked_only_where_the_kernel_shows_a_device(tmp_path: Path) -> None:
    def asked() -> tuple[Npu, ...]:
        raise AssertionError("it takes a while")

    assert look(asked, tmp_path).cause is Cause.ABSENT
    (tmp_path / "accel0").touch()
    assert look(lambda: (THERE,), tmp_path).npus == (THERE,)
    assert look(lambda: (), tmp_path).cause is Cause.DRIVER


def test_asked_apart_openvino_says_that_none_is_here(tmp_path: Path) -> None:
    (tmp_path / "accel0").touch()
    there = importlib.util.find_spec("openvino") is not None
    assert look(nodes=tmp_path).cause is (Cause.DRIVER if there else Cause.PACKAGE)


def test_devices_shows_npus_and_says_what_is_missing() -> None:
    npus = found(THERE)
    text = show(devices_view(None, None, npus))
    assert "Stand-in NPU" in text and "1GiB" in text and "untested" in text
    (shown,) = document(None, None, npus)["devices"]
    assert (shown["kind"], shown["id"]) == ("npu", "NPU")
    assert exit_code(None, None, npus) is Exit.USABLE
    for cause in Cause:
        missing = Npus((), (), Missing("it broke", "mend it"), cause)
        assert "it broke" in show(devices_view(None, None, missing))
        assert exit_code(None, None, missing) is not Exit.USABLE


# --- the device -------------------------------------------------------------------------------


def test_an_npu_serves_only_and_tells_its_workers_which_it_is() -> None:
    device = NpuDevice(NpuConfig(device="NPU", memory=1 << 20), lambda: found(THERE))
    device.open()
    try:
        spec = device.spec
        assert (spec.kind, spec.units, spec.memory, spec.trains) == ("npu", (0,), 1 << 20, False)
        assert not spec.operators, "its compiler says what it takes"
        assert not any("EMULATED" in limit for limit in spec.limits)
        launch = device.launch(Tenant("a#1", TenantKind.WORKER), None)
        assert present(launch.fixed[PROCESSOR]) == Present("NPU", 1 << 20)
    finally:
        device.close()


@pytest.mark.parametrize(
    ("config", "there"),
    [
        (NpuConfig(device="NPU"), Npus((), (), Missing("none", "buy one"), Cause.ABSENT)),
        (NpuConfig(device="NPU.7"), found(THERE)),
        (NpuConfig(device="NPU", memory=1 << 31), found(THERE)),
    ],
)
def test_an_npu_that_is_not_there_as_it_is_configured_is_refused(
    config: NpuConfig, there: Npus
) -> None:
    with pytest.raises(EnvironmentProblem):
        NpuDevice(config, lambda: there).open()
