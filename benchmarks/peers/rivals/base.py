"""What the benchmark asks of a server: which arms it runs, how it is started, what it is sent."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from model import Model
from procs import Launch
from wire import Payload

PEERS = Path(__file__).resolve().parent.parent
SERVED = PEERS / "served"
VENVS = PEERS / ".venvs"

# ONNX Runtime and NumPy must not start threads beyond the instances a server was given.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(SERVED)}

Option = int | float | str | bool


@dataclass(frozen=True)
class Arm:
    """One server in one setting with one kind of request.

    `workload` is ``tiny`` or ``image``; `batch` the largest batch, 1 for none; `wire` how the
    request travels. Arms with `tried` set were measured to choose the setting of the others.
    """

    server: str
    workload: str
    batch: int = 1
    wire: str = "json"
    options: Mapping[str, Option] = field(default_factory=dict)
    tried: bool = False

    @property
    def label(self) -> str:
        """For example ``triton/tiny/batch8/json`` or, for a setting tried, with its options."""
        kind = f"batch{self.batch}" if self.batch > 1 else "single"
        label = f"{self.server}/{self.workload}/{kind}/{self.wire}"
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{label}[{options}]" if self.tried else label


class Rival(Protocol):
    """One model server."""

    name: str

    def missing(self) -> str | None:
        """Why no arm of this server can start here, or None."""

    def versions(self) -> dict[str, str]:
        """Versions of the packages that matter, by name."""

    def arms(self) -> list[Arm]:
        """Its arms: the chosen settings, then those tried."""

    def launch(self, arm: Arm, model: Model, folder: Path) -> Launch:
        """Write the configuration into `folder`, empty before, and say how to start."""

    def payload(self, arm: Arm, model: Model) -> Payload:
        """The request of this arm."""


def venv_python(name: str) -> Path:
    """The interpreter of one rival's virtual environment."""
    return VENVS / name / "bin" / "python"


def missing_venv(name: str) -> str | None:
    """Why a virtual environment cannot be used, or None."""
    if venv_python(name).exists():
        return None
    return f"its virtual environment is missing: run setup.py --only {name}"


def venv_versions(name: str, packages: list[str]) -> dict[str, str]:
    """Installed versions of `packages` in a virtual environment, and its Python's."""
    code = (
        "import sys, json, platform; from importlib.metadata import version as v;"
        "print(json.dumps({p: v(p) for p in sys.argv[1:]} | {'python': platform.python_version()}))"
    )
    done = subprocess.run(
        [str(venv_python(name)), "-c", code, *packages],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found
