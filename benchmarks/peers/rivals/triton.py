"""Triton's server from the nvidia-pytriton wheel, with ONNX Runtime in its Python backend.

The wheel carries no ONNX Runtime backend, so each instance is a process of the Python backend
that opens the session itself, and tensors cross shared memory.
"""

from __future__ import annotations

from pathlib import Path

from model import Model
from procs import Launch, free_port
from rivals.base import ONE_THREAD, SERVED, VENVS, Arm, missing_venv, venv_versions
from wire import Payload, grpc_raw, rest_binary, rest_json

# The backend's embedded Python runs isolated: it reads no PYTHONPATH.
_MODEL = """import sys

sys.path[:0] = {paths!r}
from triton_model import TritonPythonModel as TritonPythonModel
"""

_CONFIG = """name: "{name}"
backend: "python"
max_batch_size: 8
input [{{ name: "x", data_type: TYPE_FP32, dims: {input} }}]
output [{{ name: "y", data_type: TYPE_FP32, dims: {output} }}]
instance_group [{{ kind: KIND_CPU, count: {instances} }}]
parameters [{{ key: "path", value: {{ string_value: "{path}" }} }}]
{batching}
"""


class Triton:
    name = "triton"

    def missing(self) -> str | None:
        if (VENVS / self.name).exists() and not (VENVS / self.name / "backends").exists():
            return "its Python backend is missing: run setup.py --only triton"
        return missing_venv(self.name)

    def versions(self) -> dict[str, str]:
        return venv_versions(self.name, ["nvidia-pytriton", "onnxruntime", "numpy"])

    def arms(self) -> list[Arm]:
        def arm(workload: str, batch: int, wire: str, tried: bool = False, **options: int) -> Arm:
            known = {"instances": 2, "http_threads": 2, "wait_us": 0}
            return Arm(self.name, workload, batch, wire, known | options, tried)

        return [
            arm("tiny", 1, "json"),
            arm("tiny", 8, "json"),
            arm("image", 1, "binary"),
            arm("image", 1, "grpc"),
            arm("tiny", 1, "json", True, instances=1),
            arm("tiny", 1, "json", True, http_threads=8),
            arm("tiny", 8, "json", True, instances=1),
            arm("tiny", 8, "json", True, wait_us=500),
            arm("tiny", 8, "json", True, http_threads=8),
            arm("image", 1, "binary", True, instances=1),
            arm("image", 1, "binary", True, http_threads=8),
            arm("image", 1, "grpc", True, instances=1),
        ]

    def launch(self, arm: Arm, model: Model, folder: Path) -> Launch:
        http, grpc = free_port(), free_port()
        self._write_repository(arm, model, folder / "repository")
        site = self._site_packages()
        server = site / "pytriton" / "tritonserver"
        argv = [
            str(server / "bin" / "tritonserver"),
            f"--model-repository={folder / 'repository'}",
            f"--backend-directory={VENVS / self.name / 'backends'}",
            "--disable-auto-complete-config",
            "--http-address=127.0.0.1",
            f"--http-port={http}",
            f"--http-thread-count={arm.options['http_threads']}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={grpc}",
            "--allow-metrics=false",
            "--log-info=false",
            "--log-warning=false",
        ]
        env = ONE_THREAD | {"LD_LIBRARY_PATH": str(site / "nvidia_pytriton.libs")}
        return Launch(argv, env, "/v2/health/ready", http, grpc)

    def payload(self, arm: Arm, model: Model) -> Payload:
        return {"json": rest_json, "binary": rest_binary, "grpc": grpc_raw}[arm.wire](model)

    def _site_packages(self) -> Path:
        return next((VENVS / self.name / "lib").glob("python3*")) / "site-packages"

    def _write_repository(self, arm: Arm, model: Model, repository: Path) -> None:
        wait = arm.options["wait_us"]
        batching = f"dynamic_batching {{ max_queue_delay_microseconds: {wait} }}"
        folder = repository / model.name / "1"
        folder.mkdir(parents=True)
        paths = [str(SERVED), str(self._site_packages())]
        (folder / "model.py").write_text(_MODEL.format(paths=paths))
        config = _CONFIG.format(
            name=model.name,
            input=list(model.input.shape[1:]),
            output=list(model.expected.shape[1:]),
            instances=arm.options["instances"],
            path=model.path,
            batching=batching if arm.batch > 1 else "",
        )
        (folder.parent / "config.pbtxt").write_text(config)
