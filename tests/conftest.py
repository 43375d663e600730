"""For all tests."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cotenant.runtime import nodes
from tests import gpu_machine, nvml_standin
from tests.gpu_machine import GpuMachine


def pytest_configure() -> None:
    """Ctrl-C ends what tests start, also where the tests themselves were started in the background
    by a script: a shell without job control has such processes ignore it, and children inherit
    that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _nodes_are_found_by_tests_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nodes of tests are not found by who works on this machine, nor theirs by tests."""
    before = os.environ.get(nodes.DIRECTORY)
    os.environ[nodes.DIRECTORY] = str(tmp_path_factory.mktemp("nodes"))
    yield
    del os.environ[nodes.DIRECTORY]
    if before is not None:
        os.environ[nodes.DIRECTORY] = before


@pytest.fixture(scope="session", autouse=True)
def _no_pages_are_left() -> Iterator[None]:
    """Devices that tests kill leave the folder of their control pages, which a node would find
    again. Those of nodes that live are not ours."""
    folders = Path("/dev/shm")
    before = set(folders.glob("cotenant-gates-*"))
    yield
    for folder in set(folders.glob("cotenant-gates-*")) - before:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(BlockingIOError):  # its node lives: other tests run beside these
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a library that stands in for NVIDIA's, for ``nvml_standin.environment``."""
    if importlib.util.find_spec("pynvml") is None:
        pytest.skip("nvidia-ml-py is not installed")
    if nvml_standin.compiler() is None:
        pytest.skip("this machine has no C compiler")
    return nvml_standin.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def gpu_libraries(tmp_path_factory: pytest.TempPathFactory, nvml_library: Path) -> GpuMachine:
    """Built once; see ``gpu``."""
    if reason := gpu_machine.builder().why_not():
        pytest.skip(reason)
    return gpu_machine.make(tmp_path_factory.mktemp("gpu"), nvml_library)


@pytest.fixture
def gpu(gpu_libraries: GpuMachine, tmp_path: Path) -> GpuMachine:
    """A machine with one GPU, which no process uses."""
    found = msgspec.structs.replace(gpu_libraries, machine=tmp_path / "machine")
    found.write(nvml_standin.Box(gpus=(nvml_standin.h100(),)))
    return found
