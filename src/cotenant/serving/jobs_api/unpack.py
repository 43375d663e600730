"""Unpacks an archive that somebody brought, as a process of its own:

    python -m cotenant.serving.jobs_api.unpack ARCHIVE DIRECTORY MOST_BYTES MOST_MEMBERS

It gives way to everything else, and its memory and processor time end: headers of a few bytes may
ask for much. Where the archive is refused it writes why, in one line, and exits with 3; where the
disk is full, with 4. What it has unpacked by then stays for its caller to remove. It ends with its
caller: a node that starts again removes what it finds.
"""

from __future__ import annotations

import errno
import gzip
import os
import resource
import sys
import tarfile
import zlib
from typing import Final

MEMORY_BYTES: Final = 2**29
CPU_S: Final = 600
REFUSED: Final = 3
"""Exit code for an archive that is refused."""
FULL: Final = 4
"""Exit code for a disk that is full."""
PATH_BYTES: Final = 1024
"""Of a member's path below the directory, links followed. Python before 3.13 cannot remove a tree
of a thousand levels, and ``realpath``, on which the filter relies, ends at the system's 4096."""
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (tarfile.TarError, zlib.error, EOFError, LookupError, OSError, OverflowError, ValueError)
"""What ``tarfile`` and ``gzip`` raise for what they cannot make sense of."""


class Refused(Exception):
    """What is wrong with an archive, in words for who sent it."""


class _Bounded:
    """What gzip makes of a file, up to so many bytes, and as long as our caller lives."""

    def __init__(self, file: gzip.GzipFile, most: int) -> None:
        self._file = file
        self._left = most
        self._caller = os.getppid()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise Refused("it unpacks to more than the node accepts")
        if os.getppid() != self._caller:
            raise Refused("nobody waits for it any more")
        return data


def unpack(archive: str, directory: str, most_bytes: int, most_members: int) -> None:
    """Unpack a ``.tar.gz`` below a directory; raises Refused, and OSError for a full disk."""
    if not hasattr(tarfile, "data_filter"):
        raise Refused("the node's Python has no filters for archives; it needs 3.11.4 or newer")
    try:
        with gzip.open(archive) as packed:
            # Headers and padding count as well: a member has about a block of 512 bytes each.
            stream = _Bounded(packed, most_bytes + 4096 * most_members)
            with tarfile.open(fileobj=stream, mode="r|") as members:  # type: ignore[call-overload]
                _extract(members, directory, most_bytes, most_members)
    except _REFUSED as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        why = str(error) or type(error).__name__
        raise Refused(f"it cannot be unpacked: {why}") from None


def _extract(members: tarfile.TarFile, directory: str, most_bytes: int, most_members: int) -> None:
    size = 0
    for count, member in enumerate(members, 1):
        size += member.size
        if count > most_members:
            raise Refused(f"it has more than {most_members} members")
        if size > most_bytes:
            raise Refused(f"it unpacks to more than {most_bytes} bytes")
        _check_path(member.name, directory)
        members.extract(member, directory, filter="data")
        members.members.clear()  # type: ignore[attr-defined]  # else it keeps all of them


def _check_path(name: str, directory: str) -> None:
    top = os.path.realpath(directory)
    path = os.path.realpath(os.path.join(top, name))  # noqa: PTH118 - names may be anything
    if len(os.fsencode(path)) - len(os.fsencode(top)) > PATH_BYTES:
        raise Refused(f"a path in it is longer than {PATH_BYTES} bytes, or leads on to one")


def main() -> int:
    """See the module's text."""
    archive, directory, most_bytes, most_members = sys.argv[1:]
    os.nice(19)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        unpack(archive, directory, int(most_bytes), int(most_members))
    except Refused as error:
        print(error)
        return REFUSED
    except OSError:
        return FULL
    except MemoryError:
        print("its headers ask for more memory than there is for them")
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
