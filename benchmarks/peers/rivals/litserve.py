"""LitServe with ONNX Runtime in its worker processes."""

from __future__ import annotations

from pathlib import Path

from model import Model
from procs import Launch, free_port
from rivals.base import ONE_THREAD, SERVED, Arm, missing_venv, venv_python, venv_versions
from wire import Payload, multipart, rest_base64, rest_json

_DEFAULTS: dict[str, float] = {"workers": 1, "api_servers": 1, "fast_queue": 1, "wait_ms": 0}


class LitServe:
    name = "litserve"

    def missing(self) -> str | None:
        return missing_venv(self.name)

    def versions(self) -> dict[str, str]:
        return venv_versions(self.name, ["litserve", "onnxruntime", "numpy", "uvicorn", "fastapi"])

    def arms(self) -> list[Arm]:
        def arm(workload: str, batch: int, wire: str, tried: bool = False, **options: float) -> Arm:
            return Arm(self.name, workload, batch, wire, _DEFAULTS | options, tried)

        return [
            arm("tiny", 1, "json", workers=2, api_servers=2),
            arm("tiny", 8, "json", wait_ms=1),
            arm("image", 1, "multipart"),
            arm("tiny", 1, "json", True),
            arm("tiny", 1, "json", True, fast_queue=0),
            arm("tiny", 1, "json", True, workers=2),
            arm("tiny", 1, "json", True, workers=2, fast_queue=0),
            arm("tiny", 8, "json", True),
            arm("tiny", 8, "json", True, fast_queue=0),
            arm("tiny", 8, "json", True, workers=2, wait_ms=1),
            arm("tiny", 8, "json", True, wait_ms=5),
            arm("image", 1, "multipart", True, fast_queue=0),
            arm("image", 1, "multipart", True, workers=2, api_servers=2),
            arm("image", 1, "base64", True),
        ]

    def launch(self, arm: Arm, model: Model, folder: Path) -> Launch:
        port = free_port()
        argv = [str(venv_python(self.name)), str(SERVED / "litserve_app.py")]
        argv += ["--model", str(model.path), "--port", str(port), "--batch", str(arm.batch)]
        argv += ["--workers", str(arm.options["workers"])]
        argv += ["--api-servers", str(arm.options["api_servers"])]
        argv += ["--wait-ms", str(arm.options["wait_ms"])]
        argv += ["--fast-queue"] if arm.options["fast_queue"] else []
        return Launch(argv, ONE_THREAD, "/health", port)

    def payload(self, arm: Arm, model: Model) -> Payload:
        if arm.wire == "multipart":
            return multipart(model, "/predict")
        return (rest_json if arm.wire == "json" else rest_base64)(model, "/predict")
