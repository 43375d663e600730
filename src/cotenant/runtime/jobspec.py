"""What a submitted job must look like, and the environment its command gets."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
from collections.abc import Container, Mapping
from pathlib import Path

import msgspec

from cotenant.devices.nvidia.shim import without_gate
from cotenant.domain.device import Launch
from cotenant.domain.errors import InvalidRequest, TooLarge
from cotenant.domain.units import format_bytes
from cotenant.domain.workload import JobSpec

CHECKPOINT = "COTENANT_CHECKPOINT"
"""Names the checkpoint to go on from: the newest that an earlier run reported, else what the job
was submitted with."""
MAX_SPEC_BYTES = 1 << 20
MAX_NAME = 128
MAX_WEIGHT = 1e6
"""Shares are counted in thousandths of it, as whole numbers."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MINIMAL = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR")


def checked(spec: JobSpec, taken: Container[str]) -> JobSpec:
    """The spec with its gaps filled: id, name, absolute working directory.

    Raises ``InvalidRequest`` for what can never run and ``TooLarge`` over ``MAX_SPEC_BYTES``.
    Whether command and directory exist is seen when the job starts: they may yet appear.
    """
    if spec.reservation is None and not (spec.command and spec.command[0]):
        raise InvalidRequest("a job needs a command, such as: cotenant run -- python train.py")
    if spec.id and not _ID.fullmatch(spec.id):
        raise InvalidRequest(f"job id {spec.id!r}: use up to 64 letters, digits, '_' and '-'")
    name = spec.name or Path(*spec.command[:1]).name or "job"
    if len(name) > MAX_NAME or not name.isprintable() or name != name.strip():
        raise InvalidRequest(f"job name: at most {MAX_NAME} printable characters, no outer spaces")
    texts = (*spec.command, spec.cwd, *spec.env, *spec.env.values())
    try:
        size = sum(len(text.encode()) + 1 for text in texts)
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the job's command or environment is not text: {error}") from None
    if size > MAX_SPEC_BYTES:
        raise TooLarge(f"command and environment have {size} bytes; the limit is {MAX_SPEC_BYTES}")
    if any("\0" in text for text in texts):
        raise InvalidRequest("command, directory and environment must not hold NUL characters")
    if any(not key or "=" in key for key in spec.env):
        raise InvalidRequest("names of environment variables must not be empty or hold '='")
    if not 0 < spec.weight <= MAX_WEIGHT:
        raise InvalidRequest(f"weight must be above 0 and at most {MAX_WEIGHT:g}")
    numbers = (spec.memory, spec.grace, spec.log_limit, spec.max_restarts, spec.time_limit)
    if min(numbers) < 0:
        raise InvalidRequest(
            "memory, grace, log_limit, max_restarts and time_limit must not be negative"
        )
    if spec.memory_guaranteed is not None and not 0 <= spec.memory_guaranteed <= spec.memory:
        raise InvalidRequest(
            f"the job is guaranteed {format_bytes(spec.memory_guaranteed)} of memory: that must be"
            f" within its limit, memory, {format_bytes(spec.memory)}"
        )
    id = spec.id
    while not id or (not spec.id and id in taken):
        id = secrets.token_hex(4)
    cwd = str(Path(spec.cwd).absolute())
    return msgspec.structs.replace(spec, id=id, name=name, cwd=cwd)


def environment(spec: JobSpec, launch: Launch) -> dict[str, str]:
    """All that the command gets: the job's own variables, what its devices want (``launch``), and
    where neither says anything ours. A job that submits another does not pass its own launch gate
    on: that is between it and its device."""
    ours = {
        # Into a pipe Python writes blocks of some KiB: a log would show nothing for hours.
        "PYTHONUNBUFFERED": "1",
    }
    return {**ours, **launch.applied({**without_gate(spec.env), "PWD": spec.cwd})}


def minimal(environ: Mapping[str, str]) -> dict[str, str]:
    """What any process needs: for a job that nobody's shell submits, since it is declared.

    From ``environ``, the daemon's, or, as cron does it, from the list of users.
    """
    found: dict[str, str] = {}
    with contextlib.suppress(KeyError):  # a container's user need not be in the list
        user = pwd.getpwuid(os.geteuid())
        found = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}
        found["SHELL"] = user.pw_shell or "/bin/sh"
    found["PATH"] = os.defpath
    for name, value in environ.items():
        if (name in _MINIMAL or name.startswith("LC_")) and _is_text(value):
            found[name] = value
    return found


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
