"""The file with tokens for the jobs API: how it is read, and how ``cotenant token`` writes it.

Whoever can write it can run programs as the node's user. So it has to be that user's, or root's,
and no one else may write it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from cotenant.domain.errors import CotenantError, EnvironmentProblem
from cotenant.domain.tokens import Token, find, read_tokens, write_tokens

log = logging.getLogger("cotenant.serving")

LOOK_EVERY_S: Final = 1.0
MOST_BYTES: Final = 2**20


def load(path: Path) -> tuple[Token, ...]:
    """The tokens in a file. Raises EnvironmentProblem if it cannot be read or others can write it,
    ConfigError if it is none."""
    try:
        # Opening a pipe would wait for who writes it.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            found = os.fstat(file.fileno())
            _check(path, found)
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise EnvironmentProblem(
            f"the token file {path} cannot be read: {error.strerror}; make one with: "
            f"cotenant token add NAME --scope read --file {path}"
        ) from None
    if len(data) > MOST_BYTES:
        raise EnvironmentProblem(f"the token file {path} is larger than {MOST_BYTES} bytes")
    try:
        return read_tokens(data)
    except CotenantError as error:
        raise type(error)(f"{path} {error}") from None


def _check(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise EnvironmentProblem(f"the token file {path} is no regular file")
    if found.st_uid not in (0, os.geteuid()):
        raise EnvironmentProblem(
            f"the token file {path} belongs to another user (uid {found.st_uid}), who could give "
            "himself any right here; have it belong to the node's user"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EnvironmentProblem(f"others can write the token file {path}: chmod 600 {path}")


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[Token]]:
    """The tokens in a file, to be changed in place; written, if nothing is raised, with mode 0600
    and in one step. One at a time. No file is an empty one. Raises as ``load``."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise EnvironmentProblem(f"{path.parent} cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        tokens = list(load(path)) if path.exists() else []
        yield tokens
        _write(path, write_tokens(tokens))
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(path: Path, data: bytes) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tokens-", delete=False) as file:
            temporary = Path(file.name)  # mkstemp's mode is 0600
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error.strerror}") from None


class Keyring:
    """The tokens that count now: the file is read again when it changes.

    Where it cannot be used any more, that is logged and nobody has a valid token until it can.
    Raises as ``load`` when it is made.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._clock = clock
        self._wall = wall
        self._signature = self._look()
        self._tokens = load(path)
        self._looked = clock()
        self.usable = True
        """Whether the file can be used."""

    def find(self, text: str) -> Token | None:
        """The token that a text is, if it is valid."""
        self._read_again()
        return find(self._tokens, text, self._wall())

    def again(self, token: Token) -> Token | None:
        """A token as it is now; None if it was revoked or has expired."""
        self._read_again()
        for one in self._tokens:
            if one.sha256 == token.sha256 and one.valid(self._wall()):
                return one
        return None

    def _read_again(self) -> None:
        now = self._clock()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        found = self._look()
        if found == self._signature:
            return
        self._signature = found
        try:
            self._tokens = load(self._path)
        except CotenantError as error:
            self._tokens, self.usable = (), False
            log.error("nobody can use the jobs API: %s", error)
        else:
            self.usable = True
            log.info("the token file was read again", extra={"tokens": len(self._tokens)})

    def _look(self) -> tuple[int, int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0, 0, 0
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
