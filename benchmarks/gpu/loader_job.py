"""Launches kernels through one library: ``loader_job.py LOOP LIBRARY``. Asked by lines.

``launch``: so many calls that are one kernel each; answers with how many kernels that were.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def bindings(_: str) -> tuple[Callable[[], None], Callable[[], None], str]:
    """cuda-bindings."""
    import importlib.metadata

    from driver import cu, open_device
    from kernels import Kernels

    kernels = Kernels(open_device())
    kernel, stream = kernels.spin(1), cu("cuStreamCreate", 1)
    version = importlib.metadata.version("cuda-bindings")
    return lambda: kernel.launch(stream), lambda: cu("cuStreamSynchronize", stream), version


def plain(loop: str) -> tuple[Callable[[], None], Callable[[], None], str]:
    """A C program that opens the driver with dlopen and asks dlsym."""
    from driver import cu, open_device
    from kernels import Kernels
    from loop import Loop

    kernels = Kernels(open_device())
    opened = Loop(Path(loop))
    kernel, stream = kernels.spin(1), cu("cuStreamCreate", 1)
    return lambda: _ignore(opened.burst(kernel, stream, 1)), lambda: None, ""


def torch(_: str) -> tuple[Callable[[], None], Callable[[], None], str]:
    """PyTorch: an element-wise operation in place is one kernel."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("this PyTorch sees no CUDA device")
    x = torch.zeros(1024, device="cuda")
    return lambda: _ignore(x.add_(1)), torch.cuda.synchronize, str(torch.__version__)


TRITON = """
import triton
import triton.language as tl


@triton.jit
def add_one(at, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(at + place, mask=place < n)
    tl.store(at + place, value + 1, mask=place < n)
"""


def triton(_: str) -> tuple[Callable[[], None], Callable[[], None], str]:
    """Triton: a kernel that it compiles, on memory of PyTorch's."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("this PyTorch, which Triton needs, sees no CUDA device")
    import triton

    # Triton reads a kernel's source from its file.
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    (folder / "gpu_check_triton.py").write_text(TRITON)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    sys.path.insert(0, str(folder))
    made: Any = importlib.import_module("gpu_check_triton")
    x = torch.zeros(1024, device="cuda")
    run = lambda: _ignore(made.add_one[(1,)](x, 1024, BLOCK=1024))  # noqa: E731
    return run, torch.cuda.synchronize, str(triton.__version__)


def cupy(_: str) -> tuple[Callable[[], None], Callable[[], None], str]:
    """CuPy: an element-wise kernel that it compiles."""
    import cupy

    x = cupy.zeros(1024, dtype=cupy.float32)
    add = cupy.ElementwiseKernel("float32 a", "float32 b", "b = a + 1", "gpu_check_add")
    return lambda: _ignore(add(x, x)), cupy.cuda.Device().synchronize, str(cupy.__version__)


def jax(_: str) -> tuple[Callable[[], None], Callable[[], None], str]:
    """JAX: a compiled function that becomes one kernel."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_PLATFORMS", "cuda")
    import jax

    add = jax.jit(lambda a: a + 1)
    held = [jax.block_until_ready(add(jax.numpy.zeros(1024)))]

    def run() -> None:
        held[0] = add(held[0])

    return run, lambda: _ignore(jax.block_until_ready(held[0])), str(jax.__version__)


def _ignore(_: object) -> None:
    pass


LIBRARIES = {
    "plain": plain,
    "bindings": bindings,
    "torch": torch,
    "triton": triton,
    "cupy": cupy,
    "jax": jax,
}


def mapped() -> list[str]:
    """Files of this process whose name begins with libcuda.so."""
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[5:]
        if path and Path(path[0]).name.startswith("libcuda.so"):
            found.add(path[0])
    return sorted(found)


def main() -> None:
    """Open the library, say what was mapped, and answer until nobody asks."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    try:
        launch, wait, version = LIBRARIES[sys.argv[2]](sys.argv[1])
        for _ in range(3):
            launch()
        wait()
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}")
        raise
    say(version=version, mapped=mapped())
    for line in sys.stdin:
        asked = json.loads(line)
        for _ in range(asked["count"]):
            launch()
        wait()
        say(kernels=asked["count"])


if __name__ == "__main__":
    main()
