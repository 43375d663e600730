"""Which nodes run on this machine: each leaves a small file while it runs, to be found by.

The files are ``NAME.json`` in ``$XDG_RUNTIME_DIR/cotenant/nodes``. A node of root's, or of a user
without that variable, is in ``/run/cotenant/nodes``. ``$COTENANT_NODES`` is looked at alone.

A file is believed if it is root's, one's own, or in the system's directory that of whom root gave
``/run/cotenant`` to: the user that a service runs as.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cotenant.devices import proctree

log = logging.getLogger("cotenant.node")

DIRECTORY = "COTENANT_NODES"
SYSTEM = Path("/run/cotenant/nodes")
MOST_NAMES = 1000
"""How many nodes of one name are told apart by a number behind it."""


class NodeEntry(msgspec.Struct, frozen=True):
    """A node that runs. ``start``: of its process, in clock ticks after boot."""

    name: str
    pid: int
    start: int
    state_dir: str
    http: str | None
    version: str

    @property
    def lives(self) -> bool:
        """Whether its process is there, and not another one under its pid."""
        return proctree.start_time(self.pid) == self.start != 0


def own_directory() -> Path:
    """Where a node of this user leaves its file."""
    if given := os.environ.get(DIRECTORY):
        return Path(given)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "cotenant" / "nodes" if runtime and os.geteuid() else SYSTEM


def directories() -> tuple[Path, ...]:
    """Where nodes are looked for: this user's first, then the system's."""
    own = own_directory()
    return (own,) if own == SYSTEM or os.environ.get(DIRECTORY) else (own, SYSTEM)


def default_name(state_dir: str | Path) -> str:
    """A node that was given no name has that of the directory which its state directory is in."""
    name = Path(state_dir).absolute().parent.name
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip(".") or "node"


@contextlib.contextmanager
def registered(name: str, state_dir: str, http: str | None, version: str) -> Iterator[str]:
    """Be found as ``name``, or as ``name-2`` and so on where that is taken; yields which. Where the
    file cannot be written that is logged: the node runs all the same."""
    pid = os.getpid()
    path: Path | None = None
    entry = NodeEntry(name, pid, proctree.start_time(pid), state_dir, http, version)
    try:
        path, entry = _write(own_directory(), entry)
    except OSError as error:
        log.warning(
            "the node cannot be found by others: name its state directory",
            extra={"directory": str(own_directory()), "why": str(error)},
        )
    try:
        yield entry.name
    finally:
        if path is not None and _read(path) == entry:
            with contextlib.suppress(OSError):
                path.unlink()


def running() -> list[NodeEntry]:
    """All nodes that are found, by name. Files of nodes that are gone are removed, where we may."""
    found: dict[str, NodeEntry] = {}
    for directory in directories():
        for path in sorted(directory.glob("*.json")):
            entry = _read(path)
            if entry is None:
                continue
            if entry.lives:
                found.setdefault(entry.name, entry)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()
    return [found[name] for name in sorted(found)]


def _write(directory: Path, entry: NodeEntry) -> tuple[Path, NodeEntry]:
    _make(directory)
    for number in range(1, MOST_NAMES):
        name = entry.name if number == 1 else f"{entry.name}-{number}"
        named = msgspec.structs.replace(entry, name=name)
        path = directory / f"{name}.json"
        there = _read(path) if path.exists() else None
        if there is not None and there.lives:
            continue
        if path.exists():
            path.unlink()
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".", delete=False) as file:
            file.write(msgspec.json.encode(named))
            temporary = Path(file.name)
        try:
            temporary.chmod(0o644)
            os.link(temporary, path)  # unlike a rename it fails if another node was quicker
            return path, named
        except FileExistsError:
            continue
        finally:
            temporary.unlink()
    raise FileExistsError(f"{MOST_NAMES} nodes are called {entry.name}")


def _make(directory: Path) -> None:
    """Create a directory that others can look into, whatever the umask."""
    missing = [d for d in (directory, directory.parent) if not d.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for made in missing:
        made.chmod(0o755)


def _read(path: Path) -> NodeEntry | None:
    """What a file says, None if that is nothing, or somebody else's who is not to be believed."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid not in _believed(path.parent):
                return None
            return msgspec.json.decode(file.read(65536), type=NodeEntry)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _believed(directory: Path) -> set[int]:
    """Whose files in a directory are."""
    known = {0, os.geteuid()}
    return known | {SYSTEM.parent.stat().st_uid} if directory == SYSTEM else known
