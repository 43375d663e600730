"""The shim, the stand-in for the driver, and jobs that run on both; all built here."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cotenant.devices.nvidia.page import ControlPage
from cotenant.domain.units import MS, S
from tests import gpu_machine

HERE = Path(__file__).parent
STATS = ("launched", "executed", "running", "memory", "marks", "callbacks", "in_capture", "peak")


@dataclass(frozen=True)
class Built:
    """Directories of the two libraries, and what plays the kernel driver."""

    shim: Path
    driver: Path
    rm: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Shim and stand-in; skips where there is no compiler."""
    build = gpu_machine.builder()
    if reason := build.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("native")
    found = Built(folder / "shim", folder / "driver", gpu_machine.compile_rm(folder))
    build.build(found.shim)
    gpu_machine.compile_driver(found.driver)
    return found


@pytest.fixture(scope="session")
def program(built: Built) -> Path:
    """The job in C, job.c."""
    target = built.driver.parent / "job"
    gpu_machine.compile_c(HERE / "job.c", target, [])
    return target


@dataclass
class Bench:
    """One job on shim and stand-in, and the node's side of its page."""

    built: Built
    program: Path
    page: ControlPage
    stats_file: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def env(self, **more: str) -> dict[str, str]:
        """Of a process behind the gate."""
        return {
            **os.environ,
            "LD_PRELOAD": str(self.built.shim / "libcuda.so.1"),
            "LD_LIBRARY_PATH": str(self.built.shim),
            "STANDIN_STATS": str(self.stats_file),
            **self.page.env(self.built.driver / "libcuda.so.1"),
            **more,
        }

    def job(self, *words: object, **env: str) -> subprocess.Popen[str]:
        """The program in C, see job.c."""
        return self.start([str(self.program), *map(str, words)], self.env(**env))

    def python(self, code: str, **env: str) -> subprocess.Popen[str]:
        """A program on cuda-bindings."""
        return self.start([sys.executable, "-c", code], self.env(**env))

    def start(self, command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
        """Any command; it is ended with the test."""
        pipe = subprocess.PIPE
        self.started.append(subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True))
        return self.started[-1]

    def stats(self) -> dict[str, int]:
        """What the stand-in did."""
        values = struct.unpack("<8Q", self.stats_file.read_bytes())
        return dict(zip(STATS, values, strict=True))

    def until(self, true: Callable[[], object], seconds: float = 20) -> None:
        """Wait for something, beating; fails if it does not come."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it did not happen"
            self.page.beat()
            time.sleep(0.002)

    def finish(self, process: subprocess.Popen[str]) -> str:
        """What the job printed, once it ended well."""
        self.until(lambda: process.poll() is not None, 60)
        assert process.returncode == 0
        assert process.stdout is not None
        return process.stdout.read().strip()


@pytest.fixture
def bench(built: Built, program: Path) -> Iterator[Bench]:
    """A bench of its own for each test."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        folder = Path(name)
        stats = folder / "stats"
        stats.write_bytes(bytes(64))
        page = ControlPage(folder / "page", bound_ns=20 * MS, patience_ns=1 * S)
        page.open()
        found = Bench(built, program, page, stats)
        try:
            yield found
        finally:
            for process in found.started:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
            page.close()


@pytest.fixture
def gpu_python() -> None:
    """Skips where cuda-bindings is missing."""
    pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
