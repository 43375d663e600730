"""What a job takes over from the shell that submits it, and what it does not."""

from __future__ import annotations

import array
import fcntl
import os
import select
import stat
import termios
from collections.abc import Mapping
from pathlib import Path

from cotenant.domain.errors import EnvironmentProblem

OURS = "COTENANT_"
"""Variables that name a node, its secrets, or the job that submits this one."""
INPUT_WITHIN_S = 0.1


def inherited(environ: Mapping[bytes, bytes] | None = None) -> tuple[dict[str, str], list[str]]:
    """The environment that a job takes over, and the names of what cannot be passed on: the
    store and the control socket hold UTF-8 text only."""
    env: dict[str, str] = {}
    left_out: list[str] = []
    for name, value in (os.environb if environ is None else environ).items():
        try:
            env[name.decode()] = value.decode()
        except UnicodeDecodeError:
            left_out.append(name.decode(errors="backslashreplace"))
    return {name: value for name, value in env.items() if not name.startswith(OURS)}, left_out


def directory(given: str) -> str:
    """``given`` from here on, absolute; raises EnvironmentProblem where there is no here."""
    try:
        return str(Path(given).absolute())
    except FileNotFoundError:
        raise EnvironmentProblem(
            "this directory is gone; change to another, or name one with --cwd /PATH"
        ) from None


def has_input(fd: int = 0) -> bool:
    """Whether somebody piped or redirected something into ``fd`` that nobody has read."""
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            return os.lseek(fd, 0, os.SEEK_CUR) < status.st_size
        if not (stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode)):
            return False
        if not select.select([fd], [], [], INPUT_WITHIN_S)[0]:
            return False  # a pipe that is only there, as under cron or ssh
        waiting = array.array("i", [0])
        fcntl.ioctl(fd, termios.FIONREAD, waiting)
        return waiting[0] > 0
    except (OSError, ValueError):
        return False  # closed
