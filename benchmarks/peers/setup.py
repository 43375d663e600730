"""Make one virtual environment per rival under ``.venvs``: ``python setup.py [--only NAME]``.

``llama.cpp`` is made only if it is named: it is built from source for this processor, which takes a
C++ compiler and a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

VENVS = Path(__file__).resolve().parent / ".venvs"
ROOT = VENVS.parent.parent.parent
ONNXRUNTIME = "onnxruntime==1.31.1"

PACKAGES = {
    "bare": [
        "uvicorn==0.54.0",
        "grpcio==1.85.1",
        "httptools",
        "uvloop",
        "orjson",
        "numpy",
        ONNXRUNTIME,
    ],
    "triton": ["nvidia-pytriton==0.7.0", ONNXRUNTIME],
    # Parallel workers, one of the settings tried, do not start with a later uvloop.
    "mlserver": ["mlserver==1.7.1", "uvloop==0.21.0", ONNXRUNTIME],
    "litserve": ["litserve==0.2.19", "python-multipart", "numpy", ONNXRUNTIME],
}

BUILT = {"llama.cpp": ["llama-cpp-python==0.3.36"]}
"""What ``benchmarks/llm.py`` is measured against; not a server here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", choices=(*PACKAGES, *BUILT), action="append", help="may be repeated"
    )
    parser.add_argument(
        "--triton-python",
        default="/usr/bin/python3",
        help="Triton's stub is linked against the distribution's libpython: use its Python",
    )
    args = parser.parse_args()
    for name in args.only or PACKAGES:
        if name in BUILT:
            build(name)
        else:
            make(name, args.triton_python if name == "triton" else sys.executable)
    print("ready:", ", ".join(sorted(path.name for path in VENVS.iterdir())))


def make(name: str, python: str) -> None:
    """Create or complete one environment."""
    folder = VENVS / name
    if not (folder / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *PACKAGES[name]], check=True)
    if name == "triton":
        assemble_triton_backend(folder)


def build(name: str) -> None:
    """Create one environment from source."""
    folder = VENVS / name
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    source = ["--no-binary", "llama-cpp-python", *BUILT[name]]
    subprocess.run(
        [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *source],
        env=os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
        check=True,
    )


def assemble_triton_backend(venv: Path) -> None:
    """Put the wheel's Python backend beside the stub for this Python, as Triton expects them."""
    site = next((venv / "lib").glob("python3*")) / "site-packages"
    server = site / "pytriton" / "tritonserver"
    target = venv / "backends" / "python"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    version = (venv / "lib").glob("python3*")
    stub = server / "python_backend_stubs" / next(version).name.removeprefix("python")
    for source in [*(server / "backends" / "python").iterdir(), *stub.iterdir()]:
        if source.is_file():
            (target / source.name).symlink_to(source)


if __name__ == "__main__":
    main()
