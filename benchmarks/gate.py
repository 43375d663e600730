"""What an open launch gate costs a call: with the shim and without, in turns, on a driver that does
nothing. Needs a C compiler for Linux on x86-64.

``python benchmarks/gate.py [--rounds N] [--json OUT]``
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cotenant.devices.nvidia.page import ControlPage

HERE = Path(__file__).parent
WHAT = ("launch", "small copy", "small allocation and its end")


def compiled(name: str, target: Path, *flags: str) -> Path:
    """One of the C files beside this one."""
    target.parent.mkdir(exist_ok=True)
    compiler = os.environ.get("CC", "cc").split()
    command = [*compiler, "-O2", *flags, "-o", str(target), str(HERE / name), "-ldl"]
    subprocess.run(command, check=True)
    return target


def measured(loop: Path, env: dict[str, str], page: ControlPage) -> list[float]:
    """ns of each of WHAT."""
    pipe = subprocess.PIPE
    with subprocess.Popen([str(loop)], env={**os.environ, **env}, stdout=pipe, text=True) as run:
        while run.poll() is None:
            page.beat()
            time.sleep(0.05)
        assert run.stdout is not None
        return [float(word) for word in run.stdout.read().split()]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    shared = Path("/dev/shm")
    found: dict[str, list[list[float]]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        folder = Path(name)
        build = HERE.parent / "native/build.py"
        subprocess.run([sys.executable, str(build), str(folder / "shim")], check=True)
        flags = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
        driver = compiled("gate_driver.c", folder / "driver/libcuda.so.1", *flags)
        loop = compiled("gate_loop.c", folder / "loop")
        page = ControlPage(folder / "page")
        page.open()
        shim = folder / "shim"
        arms = {
            "without": {"LD_LIBRARY_PATH": str(driver.parent)},
            "with": {
                "LD_PRELOAD": str(shim / "libcuda.so.1"),
                "LD_LIBRARY_PATH": str(shim),
                **page.env(driver),
            },
        }
        for _ in range(chosen.rounds):
            for arm, env in arms.items():
                found[arm].append(measured(loop, env, page))
        page.close()
    for number, what in enumerate(WHAT):
        row = []
        for arm, values in found.items():
            ns = sorted(value[number] for value in values)
            row.append(f"{arm} {statistics.median(ns):.0f} ns ({ns[0]:.0f} to {ns[-1]:.0f})")
        print(f"{what}: {', '.join(row)}")
    if chosen.json:
        chosen.json.write_text(json.dumps({"what": WHAT, "ns": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
