"""The floor: a raw ASGI application, or gRPC handler, with ONNX Runtime in process."""

from __future__ import annotations

from pathlib import Path

from model import Model
from procs import Launch, free_port
from rivals.base import ONE_THREAD, SERVED, Arm, missing_venv, venv_python, venv_versions
from wire import Payload, grpc_raw, rest_binary, rest_json


class Bare:
    name = "bare"

    def missing(self) -> str | None:
        return missing_venv(self.name)

    def versions(self) -> dict[str, str]:
        return venv_versions(self.name, ["uvicorn", "grpcio", "onnxruntime", "numpy"])

    def arms(self) -> list[Arm]:
        def arm(workload: str, batch: int, threads: int, procs: int, tried: bool = False) -> Arm:
            wire = "json" if workload == "tiny" else "binary"
            options = {"threads": threads, "processes": procs}
            return Arm(self.name, workload, batch, wire, options, tried)

        return [
            arm("tiny", 1, threads=0, procs=2),
            arm("tiny", 8, threads=2, procs=1),
            arm("image", 1, threads=0, procs=2),
            Arm(self.name, "image", wire="grpc"),
            arm("tiny", 1, threads=0, procs=1, tried=True),
            arm("tiny", 1, threads=2, procs=1, tried=True),
            arm("tiny", 8, threads=1, procs=1, tried=True),
            arm("tiny", 8, threads=1, procs=2, tried=True),
            arm("image", 1, threads=0, procs=1, tried=True),
        ]

    def launch(self, arm: Arm, model: Model, folder: Path) -> Launch:
        port = free_port()
        if arm.wire == "grpc":
            argv = [str(venv_python(self.name)), str(SERVED / "bare_grpc.py")]
            env = ONE_THREAD | {"PEERS_MODEL": str(model.path)}
            grpc = free_port()
            return Launch([*argv, str(grpc), str(port)], env, "/ready", port, grpc)
        argv = [str(venv_python(self.name)), "-m", "uvicorn", "bare_app:app"]
        argv += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
        argv += ["--no-access-log", "--loop", "uvloop", "--http", "httptools"]
        argv += ["--workers", str(arm.options["processes"])]
        env = ONE_THREAD | {
            "PEERS_MODEL": str(model.path),
            "PEERS_BATCH": str(arm.batch),
            "PEERS_THREADS": str(arm.options["threads"]),
        }
        return Launch(argv, env, "/ready", port)

    def payload(self, arm: Arm, model: Model) -> Payload:
        return {"json": rest_json, "binary": rest_binary, "grpc": grpc_raw}[arm.wire](model)
