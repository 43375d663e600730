"""A directory as an archive for the jobs API: the same files give the same bytes."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import tarfile
from pathlib import Path
from typing import IO, Final

from cotenant.domain.errors import EnvironmentProblem, InvalidRequest
from cotenant.serving.jobs_api.unpack import PATH_BYTES

LEFT_OUT: Final = frozenset({".git", "__pycache__"})
"""Directories that are not brought along."""


def pack(directory: Path, into: IO[bytes]) -> str:
    """Write a ``.tar.gz`` of what is in a directory, but for ``LEFT_OUT``; its SHA-256. Raises
    InvalidRequest for what is no directory, or holds what is neither file, directory nor link or is
    too far down; EnvironmentProblem if something cannot be read."""
    if not directory.is_dir():
        raise InvalidRequest(f"{directory} is no directory; files names one")
    try:
        with (
            gzip.GzipFile("", "wb", 6, into, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            _add(archive, directory, "")
        into.seek(0)
        digest = hashlib.sha256()
        while block := into.read(2**20):
            digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise EnvironmentProblem(f"{directory} cannot be packed: {error}") from None


def _add(archive: tarfile.TarFile, directory: Path, above: str) -> None:
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        name, mode = f"{above}{entry.name}", entry.stat(follow_symlinks=False).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
            raise InvalidRequest(f"{entry.path} is neither a file nor a directory; take it away")
        if stat.S_ISDIR(mode) and entry.name in LEFT_OUT:
            continue
        if len(os.fsencode(name)) > PATH_BYTES:
            raise InvalidRequest(f"a path in {directory} is longer than {PATH_BYTES} bytes")
        member = archive.gettarinfo(entry.path, name)
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        if stat.S_ISREG(mode) and member.isreg():
            with Path(entry.path).open("rb") as file:
                archive.addfile(member, file)
        else:
            archive.addfile(member)
        if stat.S_ISDIR(mode):
            _add(archive, Path(entry.path), f"{name}/")
