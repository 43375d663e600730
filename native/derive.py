"""Write symbols.txt from the installed package cuda-bindings; only for a new version of it.

The package asks the driver for every function it knows, by name and by the CUDA version that
brought that form of it, in the order of its declarations, which have the exported names. So a
library that writes down what it is asked for, in place of the driver, and the declarations give
the list.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

RECORDER = r"""
#include <stdio.h>
#include <stdint.h>
int cuGetProcAddress_v2(const char *name, void **fn, int version, uint64_t flags, int *status)
{
    printf("%s %d\n", name, version);
    fflush(stdout);
    *fn = 0;
    if (status) *status = 1;
    return 500;
}
"""
ASK = "from cuda.bindings import driver\ntry: driver.cuInit(0)\nexcept Exception: pass\n"
HEADER = """\
# Functions of the CUDA driver API: exported name, name to ask for, CUDA version that brought it.
# Made by native/derive.py from what cuda-bindings {version} looks up and declares.
# Last column: s, it takes a stream (there is a form ending in _ptsz); d, it uses the default
# stream (_ptds).
"""
STREAM = re.compile(r"\bCUstream \w+")
DEFAULT_STREAM = re.compile(r"cuMem(cpy|set)(?!.*Async)")
WITHOUT_A_SIGN = {"cuLaunchCooperativeKernelMultiDevice": "", "cuLaunchKernelEx": "s"}


def main() -> int:
    """Write symbols.txt beside this file."""
    here = Path(__file__).parent
    package = Path(sysconfig.get_path("purelib")) / "cuda/bindings/_internal/driver.pxd"
    declared = re.findall(r"CUresult _(cu\w+)\((.*)\) except", package.read_text())
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "recorder.c")
        source.write_text(RECORDER)
        library = Path(folder, "libcuda.so.1")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        asked = subprocess.run(
            [sys.executable, "-c", ASK],
            env={"LD_LIBRARY_PATH": folder},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
    pairs = [line.split() for line in asked if line]
    if len(pairs) != len(declared):
        raise SystemExit(f"{len(declared)} functions are declared, {len(pairs)} were looked up")
    rows = []
    for (name, parameters), (base, since) in zip(declared, pairs, strict=True):
        if not re.fullmatch(rf"{base}(_v\d+)?", name):
            raise SystemExit(f"{name} is declared where {base} is looked up")
        streamed = "s" if STREAM.search(parameters) else ""
        kind = WITHOUT_A_SIGN.get(name, "d" if DEFAULT_STREAM.match(name) else streamed)
        rows.append(f"{name} {base} {since} {kind}".rstrip())
    version = importlib.metadata.version("cuda-bindings")
    here.joinpath("symbols.txt").write_text(
        HEADER.format(version=version) + "\n".join(sorted(rows)) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
