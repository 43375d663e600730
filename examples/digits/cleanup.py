"""Ctrl-C at any moment leaves nothing behind: neither a process nor a file."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from cotenant.devices import proctree

_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
REAP_S = 5.0


@contextlib.contextmanager
def nothing_left() -> Iterator[Path]:
    """A temporary directory; when the block is left, everything started in it is ended.

    SIGTERM is taken for Ctrl-C. What is stopped politely must have been stopped by then: what
    is still found below this process is killed, whoever started it.
    """
    # Orphans of our children become ours, so that they are found.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, _interrupt)
    with _held_back():
        directory = Path(tempfile.mkdtemp(prefix="cotenant-demo-"))
    # What the libraries of our children like to keep (torch does) goes with the rest.
    os.environ["TMPDIR"] = str(directory)
    try:
        yield directory
    finally:
        ignore_signals()
        _sweep()
        shutil.rmtree(directory, ignore_errors=True)


def ignore_signals() -> None:
    """From here on only tidying up is left, and it is not to be interrupted."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _sweep() -> None:
    end = time.monotonic() + REAP_S
    while (left := proctree.descendants(os.getpid())) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)
