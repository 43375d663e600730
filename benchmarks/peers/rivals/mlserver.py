"""MLServer with a custom runtime around ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

from model import Model
from procs import Launch, free_port
from rivals.base import ONE_THREAD, VENVS, Arm, missing_venv, venv_versions
from wire import Payload, grpc_raw, rest_base64, rest_json


class MLServer:
    name = "mlserver"

    def missing(self) -> str | None:
        return missing_venv(self.name)

    def versions(self) -> dict[str, str]:
        packages = ["mlserver", "onnxruntime", "numpy", "uvicorn", "uvloop", "orjson"]
        return venv_versions(self.name, packages)

    def arms(self) -> list[Arm]:
        def arm(workload: str, batch: int, wire: str, tried: bool = False, **options: float) -> Arm:
            known: dict[str, float] = {"workers": 0, "threads": 0, "wait_ms": 0.1}
            return Arm(self.name, workload, batch, wire, known | options, tried)

        return [
            arm("tiny", 1, "json"),
            arm("tiny", 8, "json", threads=2),
            arm("image", 1, "base64"),
            arm("image", 1, "grpc"),
            arm("tiny", 1, "json", True, threads=2),
            arm("tiny", 1, "json", True, workers=2),
            arm("tiny", 8, "json", True),
            arm("tiny", 8, "json", True, threads=2, wait_ms=1),
            arm("tiny", 8, "json", True, threads=2, wait_ms=5),
            arm("tiny", 8, "json", True, workers=2),
            arm("image", 1, "json", True),
        ]

    def launch(self, arm: Arm, model: Model, folder: Path) -> Launch:
        http, grpc = free_port(), free_port()
        settings = {
            "debug": False,
            "host": "127.0.0.1",
            "http_port": http,
            "grpc_port": grpc,
            "parallel_workers": arm.options["workers"],
            "metrics_endpoint": None,
            "gzip_enabled": False,
        }
        uses = {"uri": str(model.path), "extra": {"threads": arm.options["threads"]}}
        model_settings: dict[str, object] = {
            "name": model.name,
            "implementation": "mlserver_model.OnnxModel",
            "parameters": uses,
        }
        if arm.batch > 1:
            model_settings["max_batch_size"] = arm.batch
            model_settings["max_batch_time"] = float(arm.options["wait_ms"]) / 1000
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "model").mkdir()
        (folder / "model" / "model-settings.json").write_text(json.dumps(model_settings))
        argv = [str(VENVS / self.name / "bin" / "mlserver"), "start", str(folder)]
        return Launch(argv, ONE_THREAD, f"/v2/models/{model.name}/ready", http, grpc)

    def payload(self, arm: Arm, model: Model) -> Payload:
        return {"json": rest_json, "base64": rest_base64, "grpc": grpc_raw}[arm.wire](model)
