"""Cotenant, from the interpreter that runs the benchmark: as it is installed, and compiled."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from model import Model
from procs import Launch, free_port
from rivals.base import VENVS, Arm
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
        compiled = "yes" if _is_compiled(_installed()) else "no"
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


class CotenantCompiled(Cotenant):
    """The copy of the source that ``setup.py`` compiled."""

    name = "cotenant-compiled"
    _folder = VENVS / name

    def missing(self) -> str | None:
        if not _is_compiled(self._folder / "cotenant"):
            return "there is no compiled copy: run setup.py --only cotenant-compiled"
        if _source(self._folder / "cotenant") != _source(_installed()):
            return "its copy is of another version: run setup.py --only cotenant-compiled"
        return super().missing()

    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self._folder)}

    def versions(self) -> dict[str, str]:
        return super().versions() | {"compiled": "yes"}


def _installed() -> Path:
    spec = importlib.util.find_spec("cotenant")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _is_compiled(package: Path) -> bool:
    return any((package / "policy").glob("*.so"))


def _source(package: Path) -> dict[Path, bytes]:
    return {p.relative_to(package): p.read_bytes() for p in package.rglob("*.py")}
