"""Build the shim: ``python build.py OUT`` leaves ``libcuda.so.1`` and ``libcuda.so`` in OUT.

Needs a C compiler (``CC``, else ``cc``) for Linux on x86-64, nothing of CUDA.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = (
    "driver.c",
    "gate.c",
    "channel.c",
    "memory.c",
    "move.c",
    "allocate.c",
    "pools.c",
    "kinds.c",
)
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-cast-function-type"]


def why_not() -> str:
    """Why the shim cannot be built here; empty if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the shim is for Linux on x86-64"
    if not has_compiler():
        return f"there is no C compiler ({compiler()[0]})"
    return ""


def has_compiler() -> bool:
    """Whether there is a C compiler."""
    return shutil.which(compiler()[0]) is not None


def compiler() -> list[str]:
    """The command, with what ``CC`` adds to it."""
    return os.environ.get("CC", "cc").split()


def build(out: Path) -> None:
    """Raises CalledProcessError, its output printed, if a file does not compile."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(HERE / "generate.py"), folder], check=True)
        made = [str(Path(folder, name)) for name in ("gated.c", "names.c", "trampolines.S")]
        flags = ["-O2", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"]
        flags += ["-ftls-model=initial-exec"]  # a few bytes: there is room, however it is loaded
        include = [f"-I{HERE}", f"-I{folder}", "-Wl,-soname,libcuda.so.1", "-Wl,-z,defs"]
        sources = [*(str(HERE / name) for name in SOURCES), *made]
        # Built beside and moved: a process that has the old one mapped keeps it.
        library = out / "libcuda.so.1.new"
        command = [*compiler(), *flags, *WARNINGS, *include, "-o", str(library), *sources, "-ldl"]
        subprocess.run(command, check=True)
        library.rename(out / "libcuda.so.1")
    # Whoever opens libcuda.so gets the same library, through one that only needs it.
    only_needs = ["-xc", os.devnull, "-Wl,--no-as-needed", f"-L{out}", "-l:libcuda.so.1"]
    subprocess.run(
        [*compiler(), "-shared", "-o", str(out / "libcuda.so"), *only_needs],
        check=True,
    )


if __name__ == "__main__":
    if reason := why_not():
        raise SystemExit(f"the shim is not built: {reason}")
    build(Path(sys.argv[1]))
