"""What a submitted job must look like, and the environment its command gets."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Container, Mapping
from pathlib import Path

import msgspec

from cotenant.domain.errors import InvalidRequest, TooLarge
from cotenant.domain.workload import JobSpec

MAX_SPEC_BYTES = 1 << 20
MAX_NAME = 128
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_NOT_FOR_JOBS = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID")
"""The service manager's words to the daemon."""


def checked(spec: JobSpec, taken: Container[str]) -> JobSpec:
    """The spec with its gaps filled: id, name, absolute working directory.

    Raises ``InvalidRequest`` for what can never run and ``TooLarge`` over ``MAX_SPEC_BYTES``.
    Whether command and directory exist is seen when the job starts: they may yet appear.
    """
    if not spec.command or not spec.command[0]:
        raise InvalidRequest("a job needs a command, such as: cotenant run -- python train.py")
    if spec.id and not _ID.fullmatch(spec.id):
        raise InvalidRequest(f"job id {spec.id!r}: use up to 64 letters, digits, '_' and '-'")
    name = spec.name or Path(spec.command[0]).name or "job"
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
    if min(spec.memory, spec.grace, spec.log_limit, spec.max_restarts) < 0:
        raise InvalidRequest("memory, grace, log_limit and max_restarts must not be negative")
    id = spec.id
    while not id or (not spec.id and id in taken):
        id = secrets.token_hex(4)
    cwd = str(Path(spec.cwd).absolute())
    return msgspec.structs.replace(spec, id=id, name=name, cwd=cwd)


def environment(spec: JobSpec, defaults: Mapping[str, str]) -> dict[str, str]:
    """The daemon's environment without what is meant for it alone, ours, then the user's."""
    own = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("COTENANT_") and key not in _NOT_FOR_JOBS
    }
    ours = {
        # GNU OpenMP threads spin at a barrier for milliseconds by default. When a job's gang is
        # squeezed onto fewer cores than it has threads, the spinners burn the very core that the
        # thread they wait for needs. This many turns are a few microseconds, then they sleep.
        "GOMP_SPINCOUNT": "1000",
        **defaults,
    }
    return {**ours, **own, **spec.env}
