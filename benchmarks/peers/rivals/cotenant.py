"""Cotenant, from the interpreter that runs the benchmark: as it is installed."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from model import Model
from procs import Launch, free_port
from rivals.base import Arm
from wire import Payload, grpc_raw, rest_binary, rest_json

_CONFIG = """node: {{state_dir: ./state, models: {models}, http: 127.0.0.1:{http}, grpc: {grpc}}}
devices: [{{kind: cpu, cores: all, realtime: never}}]
services:
  - name: {name}
    model: {name}
    objective: {{percentile: 99, latency: 5s}}
    batch: {{max: {batch}}}
    instances: 2
    guaranteed: 1.0
"""


class Cotenant:
    name = "cotenant"

    def missing(self) -> str | None:
        if importlib.util.find_spec("cotenant") is None:
            return "the package cotenant is not installed in the interpreter running the benchmark"
        return None

    def env(self) -> dict[str, str]:
        """Environment variables that the server needs."""
        return {}

    def versions(self) -> dict[str, str]:
        from cotenant.telemetry.compiled import policy_is_compiled

        compiled = "yes" if policy_is_compiled() else "no"
        found = {"python": platform.python_version(), "compiled": compiled}
        for package in ("cotenant", "onnxruntime", "numpy"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "not installed"
        return found

    def arms(self) -> list[Arm]:
        return [
            Arm(self.name, "tiny"),
            Arm(self.name, "tiny", batch=8),
            Arm(self.name, "image", wire="binary"),
            Arm(self.name, "image", wire="grpc"),
        ]

    def launch(self, arm: Arm, model: Model, folder: Path) -> Launch:
        http = free_port()
        grpc = free_port() if arm.wire == "grpc" else None
        config = _CONFIG.format(
            models=model.path.parent.parent.parent,
            http=http,
            grpc=f"127.0.0.1:{grpc}" if grpc else "null",
            name=model.name,
            batch=arm.batch,
        )
        (folder / "cotenant.yaml").write_text(config)
        argv = [sys.executable, "-m", "cotenant", "serve", "cotenant.yaml"]
        return Launch(argv, self.env(), "/v2/health/ready", http, grpc)

    def payload(self, arm: Arm, model: Model) -> Payload:
        return {"json": rest_json, "binary": rest_binary, "grpc": grpc_raw}[arm.wire](model)
