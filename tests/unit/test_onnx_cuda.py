"""The engine on a GPU, on stand-ins for the GPU and for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotenant.domain.config import ModelSettings
from cotenant.domain.errors import DeviceError, ModelError
from cotenant.engines.base import Array, InPlace, Opening, Placeable, Target
from cotenant.engines.cuda.driver import Gpu
from cotenant.engines.cuda.session import GRAPHS
from cotenant.engines.onnx_cuda import SESSIONS, OnnxCudaEngine
from tests.builders import open_engine
from tests.cuda_standin import HostGpu, Model, OnCpu, Runtime, doubled

PATH = Path("model.onnx")


def engine(
    runtime: Runtime,
    gpu: HostGpu | None = None,
    units: tuple[int, ...] = (2,),
    partitions: tuple[tuple[int, ...], ...] = (),
    tensorrt: bool = False,
) -> OnnxCudaEngine:
    target = Target("cuda-subsets:0", partitions)
    gpu = gpu or HostGpu()
    return OnnxCudaEngine(PATH, units, target, tensorrt=tensorrt, gpu=gpu, runtime=runtime)


def rows(count: int) -> dict[str, Array]:
    return {"x": np.arange(3 * count, dtype=np.float32).reshape(count, 3)}


def right(made: OnnxCudaEngine, count: int, units: int = 2) -> bool:
    (found,) = made.run(units, rows(count))
    return bool((found == 2 * rows(count)["x"]).all()) and found.shape == (count, 3)


# --- what it answers --------------------------------------------------------------------------


def test_it_answers_as_the_model_does_for_any_number_of_rows() -> None:
    made = engine(Runtime(doubled()))
    assert made.meta.batchable and made.axes["x"] == ("rows", "")
    assert all(right(made, count) for count in (1, 2, 1, 5, 2, 1, 0, 40, 1))
    assert isinstance(made, Placeable)


def test_answers_are_not_overwritten_by_later_ones() -> None:
    made = engine(Runtime(doubled()))
    first = [made.run(2, rows(2))[0] for _ in range(3)]
    made.run(2, {"x": np.zeros((2, 3), np.float32)})
    assert all((found == 2 * rows(2)["x"]).all() for found in first)


class Room:
    """Room for outputs of so many bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.given: list[Array] | None = None

    def take(self, outputs: Any) -> list[Array] | None:
        made = [np.zeros(shape, dtype) for shape, dtype in outputs]
        self.given = made if sum(array.nbytes for array in made) <= self._size else None
        return self.given


@pytest.mark.parametrize("fits", [True, False])
def test_outputs_come_from_pinned_memory_to_where_they_are_wanted(fits: bool) -> None:
    made = engine(Runtime(doubled()))
    assert isinstance(made, InPlace)
    for count in (1, 2, 2, 2, 0):  # the third one of a shape is a graph
        room = Room(12 * count if fits else -1)
        found = made.run_into(2, rows(count), room)
        assert (found is room.given) == fits
        assert np.array_equal(found[0], 2 * rows(count)["x"])


def test_shapes_that_the_inputs_do_not_tell_are_asked_for() -> None:
    model = Model(
        [("x", "tensor(float)", ["rows", 3])],
        [("found", "tensor(int64)", ["found"])],
        lambda inputs: [np.flatnonzero(inputs["x"] > 2).astype(np.int64)],
    )
    runtime = Runtime(model)
    made = engine(runtime)
    for count in (2, 4, 1, 4):
        (found,) = made.run(2, rows(count))
        assert found.tolist() == list(range(3, 3 * count))
    assert not runtime.sessions[0].graphs


def test_names_of_axes_that_lie_are_found_out() -> None:
    model = doubled()
    model.function = lambda inputs: [inputs["x"][:1]]
    made = engine(Runtime(model))
    assert [made.run(2, rows(4))[0].shape for _ in range(4)] == [(1, 3)] * 4


def test_strings_are_executed_from_host_memory() -> None:
    model = Model(
        [("x", "tensor(string)", ["rows"])],
        [("y", "tensor(string)", ["rows"])],
        lambda inputs: [inputs["x"]],
    )
    made = engine(Runtime(model))
    words = np.array(["a", "b"], np.object_)
    assert made.run(2, {"x": words})[0].tolist() == ["a", "b"]


def test_what_the_model_refuses_is_said_and_the_next_request_is_answered() -> None:
    model = doubled()
    made = engine(Runtime(model))
    model.fails = "it does not fit"
    with pytest.raises(ModelError, match="it does not fit"):
        made.run(2, rows(1))
    model.fails = ""
    assert right(made, 1)


def test_a_gpu_that_works_no_more_ends_the_worker() -> None:
    gpu = HostGpu()
    made = engine(Runtime(doubled()), gpu)
    gpu.broken = True
    with pytest.raises(DeviceError):
        made.run(2, rows(1))


# --- subsets ----------------------------------------------------------------------------------


def test_each_subset_has_a_session_on_a_stream_of_its_own_that_goes_first() -> None:
    gpu, runtime = HostGpu(), Runtime(doubled())
    made = engine(runtime, gpu, units=(1, 2, 5), partitions=((2, 3),))
    assert [lane.units for lane in made.lanes] == [(2, 3), (0,), (0, 1, 2, 3, 4)]
    assert [lane.sms for lane in made.lanes] == [8, 4, 20]
    assert [lane.whole for lane in made.lanes] == [False, False, True]
    assert [s.stream for s in runtime.sessions] == [lane.stream for lane in made.lanes]
    assert {priority for _, priority in gpu.live["stream"].values()} == {gpu.highest()}


def test_a_batch_executes_on_the_units_of_its_partition() -> None:
    runtime = Runtime(doubled())
    made = engine(runtime, partitions=((0, 1), (2, 3)))
    first, second = runtime.sessions
    made.place((3, 2))
    assert right(made, 1) and (first.executed, second.executed) == (0, 1)
    made.place((2, 3, 4))  # one that was not there; it is to use two of its units
    assert right(made, 1) and second.executed == 2
    assert right(made, 1, units=3) and made.lanes[-1].units == (2, 3, 4)
    assert len(runtime.sessions) == 3


def test_no_more_sessions_are_kept_than_there_may_be() -> None:
    gpu = HostGpu(sms=200)
    made = engine(Runtime(doubled()), gpu, units=(1,))
    for unit in range(2 * SESSIONS):
        made.place((unit,))
        assert right(made, 1, units=1)
    assert [lane.units[0] for lane in made.lanes] == list(range(SESSIONS, 2 * SESSIONS))
    assert len(gpu.live["context"]) == SESSIONS == len(gpu.live["stream"])


def test_without_subsets_all_of_the_gpu_is_used() -> None:
    gpu, runtime = HostGpu(refuses=("cuGreenCtxCreate",)), Runtime(doubled())
    made = engine(runtime, gpu, units=(1, 2, 5), partitions=((2, 3),))
    made.place((7, 8))
    assert right(made, 3) and len(runtime.sessions) == 1
    assert made.lanes[0].whole and made.lanes[0].sms == gpu.sms
    assert any("cuGreenCtxCreate" in note for note in made.notes)


def test_units_that_the_gpu_has_not_are_refused() -> None:
    made = engine(Runtime(doubled()))
    made.place((4, 5))
    with pytest.raises(ModelError):
        made.run(2, rows(1))


def test_everything_is_given_back() -> None:
    gpu, runtime = HostGpu(), Runtime(doubled())
    made = engine(runtime, gpu, units=(1, 2))
    assert all(right(made, count) for count in (1, 1, 1, 2, 2, 7)) and gpu.left
    made.close()
    assert not gpu.left
    with pytest.raises(ModelError):
        engine(Runtime(doubled(), loads=False), gpu)
    assert not gpu.left


# --- graphs -----------------------------------------------------------------------------------


def test_a_shape_that_comes_again_is_captured_and_replayed_with_new_numbers() -> None:
    runtime = Runtime(doubled())
    made = engine(runtime)
    (session,) = runtime.sessions
    for count in (1, 2, 1, 1, 2, 2):
        assert right(made, count)
    assert (len(session.graphs), session.eager, session.replayed) == (2, 2, 2)
    other = -rows(1)["x"]
    assert (made.run(2, {"x": other})[0] == 2 * other).all() and session.replayed == 3


def test_graphs_are_bounded_and_none_is_captured_while_it_serves() -> None:
    runtime = Runtime(doubled())
    made = engine(runtime)
    (session,) = runtime.sessions
    counts = range(1, GRAPHS + 4)
    assert all(right(made, count) for _ in range(3) for count in counts)
    assert len(session.graphs) == GRAPHS
    second = engine(Runtime(doubled()))
    assert right(second, 1) and right(second, 1)
    second.settle()
    replayed = [right(second, count) for count in (1, 3, 3, 3)]
    assert all(replayed)
    (session,) = second._runtime.sessions
    assert (len(session.graphs), session.replayed) == (1, 1)


def test_partitions_that_the_trial_did_not_come_by_are_as_ready_when_it_serves() -> None:
    runtime = Runtime(doubled())
    made = engine(runtime, partitions=((0, 1), (2, 3)))
    assert all(right(made, count) for count in (1, 1, 2, 2))
    assert [len(session.graphs) for session in runtime.sessions] == [2, 0]
    made.settle()
    assert [len(session.graphs) for session in runtime.sessions] == [2, 2]
    made.place((2, 3))
    assert right(made, 2) and runtime.sessions[1].replayed


def test_a_refused_request_costs_no_graphs() -> None:
    model = doubled()
    runtime = Runtime(model)
    made = engine(runtime)
    assert right(made, 1) and right(made, 1)
    model.fails = "not these numbers"
    with pytest.raises(ModelError):
        made.run(2, rows(1))
    model.fails = ""
    assert right(made, 1) and len(runtime.sessions) == 1 and not made.notes


@pytest.mark.parametrize("fault", ["refuses_graphs", "breaks"])
def test_a_model_that_cannot_be_captured_runs_without(fault: str) -> None:
    model = doubled()
    setattr(model, fault, True)
    gpu, runtime = HostGpu(), Runtime(model)
    made = engine(runtime, gpu)
    assert all(right(made, 2) for _ in range(4))
    last = runtime.sessions[-1]
    assert last.options["enable_cuda_graph"] == "0" and not last.graphs
    assert len(gpu.live["stream"]) == 1 and made.notes
    made.close()
    assert not gpu.left


# --- providers --------------------------------------------------------------------------------


def test_providers_are_preferred_in_order_and_share_the_stream() -> None:
    runtime = Runtime(doubled())
    made = engine(runtime, tensorrt=True)
    (session,) = runtime.sessions
    assert [name[:4] for name in session.providers] == ["Tens", "CUDA", "CPUE"]
    streams = {options.get("user_compute_stream") for options in session.providers.values()}
    assert streams == {str(made.lanes[0].stream), None}
    assert all(right(made, 2) for _ in range(3)) and not session.graphs
    assert "TensorrtExecutionProvider" not in _first(Runtime(doubled())).providers


def test_what_tensorrt_builds_is_kept_where_there_is_a_place_of_this_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept() -> dict[str, str]:
        runtime = Runtime(doubled())
        engine(runtime, tensorrt=True)
        options: dict[str, str] = runtime.sessions[0].providers["TensorrtExecutionProvider"]
        return {key: value for key, value in options.items() if "cache" in key}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "cotenant" / "tensorrt"
    assert kept()["trt_engine_cache_path"] == str(folder) and folder.is_dir()
    folder.chmod(0o777)
    assert not kept(), "anybody could have put an engine there"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert not kept()


def _first(runtime: Runtime) -> Any:
    engine(runtime)
    return runtime.sessions[0]


@pytest.mark.parametrize(
    ("available", "loads", "tensorrt", "said"),
    [
        (("CPUExecutionProvider",), True, False, "onnxruntime-gpu"),
        (("CUDAExecutionProvider", "CPUExecutionProvider"), True, True, "TensorRT"),
        (("CUDAExecutionProvider", "CPUExecutionProvider"), False, False, "cuDNN"),
    ],
)
def test_what_is_not_installed_is_named(
    available: tuple[str, ...], loads: bool, tensorrt: bool, said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        engine(Runtime(doubled(), available, loads), tensorrt=tensorrt)


def on_the_cpu(made: Any) -> list[str]:
    return [e.kind for e in made.executed() if e.where == "CPUExecutionProvider"]


def test_operators_that_stay_on_the_cpu_are_named() -> None:
    model = doubled()
    model.on_cpu = ("NonZero",)
    made = engine(Runtime(model))
    assert on_the_cpu(made) == ["NonZero"]
    assert any("NonZero" in note for note in made.notes)


def test_the_processor_picks_the_engine() -> None:
    for path, settings, target in (
        (Path("model.onnx"), ModelSettings(), Target("cuda:0")),  # no CUDA provider here
        (Path("model.onnx"), ModelSettings(), Target("abacus")),
        (Path("model.gguf"), ModelSettings(), Target("cuda:0")),
        (Path("model.onnx"), ModelSettings(engine="tensorrt"), Target()),
    ):
        with pytest.raises(ModelError):
            open_engine(Opening(path, (1,), settings, target=target))


def test_without_the_bindings_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(ModelError, match="cotenant\\[cuda\\]"):
        Gpu("0").open()


# --- the real ONNX Runtime, on host memory ----------------------------------------------------


def saved(path: Path, nodes: list[Any], outputs: list[Any], kind: int = 1) -> Path:
    """A model of one input, x, with three columns."""
    make = pytest.importorskip("onnx.helper")
    ins = [make.make_tensor_value_info("x", kind, ["rows", 3])]
    graph = make.make_graph([make.make_node(*node) for node in nodes], "g", ins, outputs)
    opset = [make.make_opsetid("", 17)]
    path.write_bytes(make.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())
    return path


@pytest.mark.parametrize("rows_of_output", ["rows", "others"])
def test_the_real_runtime_takes_what_is_bound_and_gives_the_same_answers(
    tmp_path: Path, rows_of_output: str
) -> None:
    """With shapes that inputs tell, and with those that they do not."""
    make = pytest.importorskip("onnx.helper")
    outputs = [
        make.make_tensor_value_info("y", 1, [rows_of_output, 3]),
        make.make_tensor_value_info("positive", 9, [rows_of_output, 3]),
    ]
    nodes = [("Add", ["x", "x"], ["y"]), ("Greater", ["x", "y"], ["positive"])]
    path = saved(tmp_path / "model.onnx", nodes, outputs)
    gpu = HostGpu()
    made = OnnxCudaEngine(path, (2,), Target("cuda-subsets:0"), gpu=gpu, runtime=OnCpu())
    for count in (1, 4, 4, 4, 0, 2, 9, 1):
        x = -rows(count)["x"]
        y, positive = made.run(2, {"x": x})
        assert np.array_equal(y, 2 * x) and np.array_equal(positive, x > 2 * x)
        assert (y.dtype, positive.dtype) == (np.float32, np.bool_)
    if made.executed():
        assert set(on_the_cpu(made)) == {"Add", "Greater"}
    with pytest.raises(ModelError):
        made.run(2, {"x": np.zeros((2, 4), np.float32)})
    assert made.run(2, rows(1))[0].shape == (1, 3)
    made.close()
    assert not gpu.left


@pytest.mark.parametrize("kind", [2, 3, 5, 6, 7, 9, 10, 11, 12, 13])
def test_tensors_of_every_numeric_type_pass(tmp_path: Path, kind: int) -> None:
    make = pytest.importorskip("onnx.helper")
    outputs = [make.make_tensor_value_info("y", kind, ["rows", 3])]
    path = saved(tmp_path / "model.onnx", [("Identity", ["x"], ["y"])], outputs, kind)
    made = OnnxCudaEngine(path, (2,), Target("cuda-subsets:0"), gpu=HostGpu(), runtime=OnCpu())
    dtype = make.tensor_dtype_to_np_dtype(kind)
    x = (np.arange(6) % 2).reshape(2, 3).astype(dtype)
    for _ in range(3):
        (y,) = made.run(2, {"x": x})
        assert np.array_equal(x, y) and y.dtype == dtype
