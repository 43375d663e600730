"""Archives that clients bring for their jobs, each under its SHA-256 until it is no longer used.

They are written to the disk as they come, and share a bound: where one more is too much, those that
were not used for longest go. A job gets a copy, unpacked: it does not need the archive any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Final

from cotenant.domain.errors import EnvironmentProblem, InvalidRequest, NotFound, TooLarge
from cotenant.serving.jobs_api.disk import on_disk
from cotenant.serving.jobs_api.unpack import FULL, REFUSED

log = logging.getLogger("cotenant.serving")

UNUSED_S: Final = 24 * 3600.0
"""An archive that nobody used for so long is removed."""
KEPT: Final = 4
"""So many of the largest that are accepted are kept at most, in bytes."""
UNPACKED: Final = 8
"""What comes out of an archive may be so many times the most that one may have."""
MEMBERS: Final = 50_000
UNPACK_S: Final = 600.0
_ENDING = ".tar.gz"
_PARTIAL = "partial-"


class Uploads:
    """See the module's text. ``most``: bytes of one archive. Raises EnvironmentProblem if the
    directory cannot be made."""

    def __init__(self, directory: Path, most: int) -> None:
        self.most = most
        self._directory = directory
        self._unpacking = asyncio.Lock()
        """One at a time: it is work for the disk and a core."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"{directory} cannot be used: {error.strerror}") from None
        for left in directory.glob(f"{_PARTIAL}*"):
            _remove(left)

    def size(self, sha256: str) -> int:
        """Bytes of an archive that is here, which counts as a use; raises NotFound."""
        path = self._path(sha256)
        try:
            os.utime(path)
            return path.stat().st_size
        except OSError:
            raise NotFound(
                f"there is no archive {sha256}: send it with PUT /api/v1/files/{sha256}"
            ) from None

    async def receive(self, sha256: str, pieces: AsyncIterator[bytes]) -> int:
        """Take an archive in; how many bytes it has. Raises TooLarge, InvalidRequest if it is
        another, EnvironmentProblem if the disk does not take it, and what ``pieces`` raises."""
        partial = self._directory / f"{_PARTIAL}{secrets.token_hex(8)}"
        digest, size = hashlib.sha256(), 0
        try:
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                async for piece in pieces:
                    size += len(piece)
                    if size > self.most:
                        raise TooLarge(f"an archive may have {self.most} bytes at most")
                    await on_disk(_write, file, digest, piece)
            if digest.hexdigest() != sha256:
                raise InvalidRequest(
                    f"the SHA-256 of these {size} bytes is {digest.hexdigest()}, not {sha256}"
                )
            partial.rename(self._path(sha256))
        except OSError as error:
            raise EnvironmentProblem(
                f"the archive cannot be kept: {error.strerror}; make room on the node's disk"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        self.forget_old(keep=sha256)
        return size

    def forget_old(self, keep: str = "") -> None:
        """Remove what was not used for long, and what is too much."""
        found = []
        for path in self._directory.glob(f"*{_ENDING}"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        left = sum(size for _, size, _ in found)
        for used, size, path in sorted(found):
            unused = time.time() - used > UNUSED_S
            if path != self._path(keep) and (unused or left > KEPT * self.most):
                left -= size
                with contextlib.suppress(OSError):
                    path.unlink()

    @contextlib.asynccontextmanager
    async def unpacked(self, sha256: str) -> AsyncIterator[Path]:
        """A new directory with what is in an archive, to be moved elsewhere; what of it is left is
        removed. An empty one for "". Raises NotFound, InvalidRequest, EnvironmentProblem."""
        directory = self._directory / f"{_PARTIAL}{secrets.token_hex(8)}"
        try:
            try:
                directory.mkdir(mode=0o700)
            except OSError as error:
                raise EnvironmentProblem(f"{directory}: {error.strerror}") from None
            if sha256:
                async with self._unpacking:
                    self.size(sha256)
                    await self._unpack(self._path(sha256), directory)
            yield directory
        finally:
            if directory.exists():
                await on_disk(shutil.rmtree, directory, ignore_errors=True)

    async def _unpack(self, archive: Path, directory: Path) -> None:
        words = [str(archive), str(directory), str(UNPACKED * self.most), str(MEMBERS)]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "cotenant.serving.jobs_api.unpack"),
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(UNPACK_S):
                said, complaint = await process.communicate()
        except TimeoutError:
            raise InvalidRequest(f"the archive took more than {UNPACK_S:g} s to unpack") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == REFUSED:
            raise InvalidRequest(f"the archive is refused: {said.decode(errors='replace').strip()}")
        if process.returncode == FULL:
            raise EnvironmentProblem(
                "the archive cannot be unpacked: the node's disk is full; make room on it"
            )
        if process.returncode:
            tail = complaint.decode(errors="replace")[-2000:]
            log.error("unpacking failed", extra={"code": process.returncode, "said": tail})
            raise EnvironmentProblem("the archive could not be unpacked; the node's log says how")

    def _path(self, sha256: str) -> Path:
        return self._directory / f"{sha256}{_ENDING}"


def _remove(left: Path) -> None:
    """Remove what a node that was killed left; what resists is there for the next start."""
    if left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        left.unlink()


def _write(file: IO[bytes], digest: hashlib._Hash, piece: bytes) -> None:
    file.write(piece)
    digest.update(piece)
