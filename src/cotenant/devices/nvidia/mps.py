"""What there is of MPS, NVIDIA's service through which processes compute on a GPU at once.

It is looked for, and never started: it changes how every process on the GPU runs, and to end it
ends them. Source: NVIDIA, "Multi-Process Service" (interfaces of the control daemon).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

import msgspec

CONTROL: Final = "nvidia-cuda-mps-control"
SERVER: Final = "nvidia-cuda-mps-server"
PIPES: Final = "CUDA_MPS_PIPE_DIRECTORY"
USUAL_PIPES: Final = "/tmp/nvidia-mps"
STATIC: Final = frozenset({b"-S", b"--static-partitioning"})
"""With these the daemon gives clients multiprocessors of their own."""


class Mps(msgspec.Struct, frozen=True):
    """``control``: where the control program is ("" if nowhere). ``runs``: whether its daemon
    does. ``static``: whether it was started to give clients multiprocessors of their own.
    ``server``: the process that clients share, 0 if there is none or it cannot be seen."""

    control: str = ""
    runs: bool = False
    static: bool = False
    server: int = 0


def look(proc: Path = Path("/proc")) -> Mps:
    """What this process sees of it."""
    pipes = Path(os.environ.get(PIPES) or USUAL_PIPES)
    command = _command(proc, _number(pipes / f"{CONTROL}.pid"))
    # Its socket outlives a daemon that was killed; without the file nothing is known of that.
    known = (pipes / f"{CONTROL}.pid").exists()
    return Mps(
        control=shutil.which(CONTROL) or "",
        runs=(pipes / "control").exists() and (bool(command) or not known),
        static=bool(STATIC & set(command)),
        server=_server(proc),
    )


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _command(proc: Path, pid: int) -> list[bytes]:
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return words[:-1]


def _server(proc: Path) -> int:
    try:
        pids = sorted(int(name) for name in os.listdir(proc) if name.isdigit())
    except OSError:
        return 0
    for pid in pids:
        command = _command(proc, pid)
        if command and command[0].rsplit(b"/", 1)[-1] == SERVER.encode():
            return pid
    return 0
