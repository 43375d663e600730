"""``cotenant profile`` of a GPU, on stand-ins for the driver, with an engine that executes on the
CPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cotenant.devices import proctree
from cotenant.domain.profile import PROFILE_FILE, ModelProfile, read_profiles
from tests.gpu_machine import GpuMachine
from tests.live.conftest import PATIENCE_S, scale_model, until
from tests.nvml_standin import Box, h100

pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)

ON_GPU = """
import cotenant.engines.onnx_cuda as module
from cuda.bindings import driver
from tests.cuda_standin import OnCpu

class InOrder(OnCpu):
    '''What a stream does by itself: executions wait for the copies before them.'''

    def InferenceSession(self, *given, **named):
        made = super().InferenceSession(*given, **named)
        execute = made.run_with_iobinding

        def in_order(binding, options=None):
            driver.cuCtxSynchronize()
            execute(binding, options)

        made.run_with_iobinding = in_order
        return made

class OnStandIn(module.OnnxCudaEngine):
    def __init__(self, path, units, target, **given):
        super().__init__(path, units, target, runtime=InOrder(), **given)

module.OnnxCudaEngine = OnStandIn
"""
UNITS = 4


class Bench:
    """A machine with a GPU that is not there, and a model."""

    def __init__(self, gpu: GpuMachine, folder: Path) -> None:
        self.folder = folder
        self.directory = folder / "models" / "scale" / "1"
        scale_model(self.directory / "model.onnx")
        (folder / "sitecustomize.py").write_text(ON_GPU)
        (folder / "mps").mkdir()
        root = Path(__file__).parents[2]
        before = filter(None, [os.environ.get("PYTHONPATH")])
        self.env = {
            **os.environ,
            **gpu.env(),
            "PYTHONPATH": os.pathsep.join([str(folder), str(root), *before]),
            "CUDA_MPS_PIPE_DIRECTORY": str(folder / "mps"),
            "STANDIN_SMS": "36",
        }

    def start(self, *words: str, seconds: float = 0.1) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cotenant", "profile", "scale", "--device", "cuda"]
        command += ["--models", str(self.folder / "models"), "--seconds", str(seconds), *words]
        pipe: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.env, **pipe)

    def run(self, *words: str) -> tuple[int, str]:
        running = self.start("--max-batch", "2", *words)
        _, said = running.communicate(timeout=PATIENCE_S)
        return running.returncode, said

    def divided(self) -> tuple[str, str]:
        """Options for a GPU in subsets."""
        config = self.folder / "cotenant.yaml"
        config.write_text("devices: [{kind: cuda, subsets: true}]\n")
        return "--config", str(config)

    @property
    def found(self) -> ModelProfile:
        (found,) = read_profiles((self.directory / PROFILE_FILE).read_bytes())
        return found


@pytest.fixture
def bench(gpu: GpuMachine, tmp_path: Path) -> Bench:
    return Bench(gpu, tmp_path)


def workers(above: int) -> list[int]:
    """Those of its processes that execute models; others look at the machine and end."""
    found = []
    for pid in proctree.descendants(above):
        with contextlib.suppress(OSError):
            if b"cotenant.runtime.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_a_whole_gpu_is_one_unit_and_its_memory_is_what_the_driver_says(
    bench: Bench, gpu: GpuMachine
) -> None:
    running = bench.start("--max-batch", "2", seconds=3)
    (worker,) = until(lambda: workers(running.pid))
    gpu.show(worker, memory=3 << 30)
    _, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, said
    found = bench.found
    assert (found.kind, found.engine, found.subsets) == ("cuda", "onnxruntime", False)
    assert found.device == h100().name
    assert not found.unjoined, found.unjoined
    assert [(f.units, f.rows) for f in found.figures] == [(1, 1), (1, 2)]
    assert found.memory_peak == 3 << 30 > found.host_peak > 0


def test_subsets_of_its_multiprocessors_are_units(bench: Bench) -> None:
    (bench.folder / "mps" / "control").touch()
    code, said = bench.run("--units", "1,2,4", *bench.divided())
    assert code == 0, said
    found = bench.found
    assert found.subsets and found.units == UNITS and found.device != h100().name
    assert sorted({f.units for f in found.figures}) == [1, 2, 4]
    code, _ = bench.run("--units", str(UNITS + 1), *bench.divided())
    assert code == 1 and bench.found == found


def test_where_subsets_cannot_be_had_that_is_said(bench: Bench) -> None:
    code, said = bench.run(*bench.divided())
    assert code == 1 and "MPS" in said and "cotenant devices --kind cuda" in said


def test_a_gpu_in_mig_instances_is_not_measured(bench: Bench, gpu: GpuMachine) -> None:
    gpu.write(Box(gpus=(h100(table="H100-SXM5-80GB", mig=True),)))
    code, said = bench.run()
    assert code == 1 and "MIG" in said
    assert not (bench.directory / PROFILE_FILE).exists()
