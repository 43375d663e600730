"""A machine with a GPU that is not there: stand-ins for both of the driver's libraries, the shim,
and the job of the gate's tests (``tests/native/job.c``).

The shim is built where Cotenant looks for it, as ``make native`` does.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import msgspec

from cotenant.devices.nvidia.shim import SHIM
from tests import nvml_standin

NATIVE = Path(__file__).parents[1] / "native"
HERE = Path(__file__).parent / "native"


class GpuMachine(msgspec.Struct):
    """``job`` is the program; ``machine`` the file that says which GPUs there are; ``rm`` what
    plays the kernel driver where it is preloaded."""

    libraries: tuple[Path, Path]
    job: Path
    machine: Path
    rm: Path

    def write(self, box: nvml_standin.Box) -> None:
        """Let the machine be another."""
        box.write(self.machine)

    def show(
        self, *pids: int, memory: int = 1 << 30, faults: tuple[nvml_standin.Fault, ...] = ()
    ) -> None:
        """Let the driver show these processes, and no others, from now on."""
        shown = [nvml_standin.Process(pid, memory) for pid in pids]
        nvml_standin.meanwhile(self.machine, shown, faults)

    def env(self) -> Mapping[str, str]:
        """What a process needs to see the machine."""
        nvml, cuda = self.libraries
        return {
            "LD_LIBRARY_PATH": f"{nvml}:{cuda}",
            "COTENANT_NVML_STANDIN": str(self.machine),
            "COTENANT_JOB": str(self.job),
            "COTENANT_MEMORY_JOB": str(self.job.with_name("memory_job")),
        }


def builder() -> ModuleType:
    """native/build.py."""
    spec = importlib.util.spec_from_file_location("native_build", NATIVE / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build


def compile_c(source: Path, target: Path, flags: list[str]) -> None:
    """With the system's compiler."""
    command = [os.environ.get("CC", "cc"), "-O1", "-pthread", f"-I{NATIVE}"]
    subprocess.run([*command, *flags, "-o", target, source, "-ldl"], check=True)


def compile_driver(folder: Path) -> None:
    """The stand-in for ``libcuda.so.1``."""
    folder.mkdir()
    flags = ["-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-Bsymbolic,-soname,libcuda.so.1"]
    compile_c(HERE / "standin.c", folder / "libcuda.so.1", flags)


def compile_rm(folder: Path) -> Path:
    """The stand-in for the kernel driver's channels, to be preloaded."""
    target = folder / "libstandin_rm.so"
    compile_c(HERE / "standin_rm.c", target, ["-shared", "-fPIC", "-fvisibility=hidden"])
    return target


def make(folder: Path, nvml: Path) -> GpuMachine:
    """Build all of it into ``folder``."""
    compile_driver(folder / "cuda")
    for name in ("job", "memory_job"):
        compile_c(HERE / f"{name}.c", folder / name, [])
    builder().build(SHIM.parent)
    rm = compile_rm(folder)
    return GpuMachine((nvml, folder / "cuda"), folder / "job", folder / "machine", rm)
