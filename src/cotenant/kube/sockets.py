"""gRPC servers on Unix sockets, and why one cannot listen."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc

from cotenant.domain.errors import EnvironmentProblem
from cotenant.kube import files

_OPTIONS: Final = (("grpc.so_reuseport", 0),)


class Listener:
    """Serves handlers at ``path`` from ``open`` until ``close``, ``threads`` calls at a time."""

    def __init__(self, path: Path, handlers: Sequence[Any], threads: int) -> None:
        self.path = path
        self._handlers = tuple(handlers)
        self._threads = threads
        self._server: Any = None
        self._inode = 0

    def open(self) -> None:
        """Take the place of whatever socket is there. Raises EnvironmentProblem."""
        files.make_folder(self.path.parent)
        _try(self.path)
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix=self.path.name)
        server = grpc.server(pool, handlers=self._handlers, options=_OPTIONS)
        try:
            server.add_insecure_port(f"unix:{self.path}")
            self.path.chmod(0o600)
            self._inode = self.path.stat().st_ino
        except (OSError, RuntimeError) as exc:
            raise EnvironmentProblem(f"cannot listen on {self.path}: {exc}") from None
        server.start()
        self._server = server

    @property
    def there(self) -> bool:
        """Whether the socket that clients find is this one."""
        try:
            return self._server is not None and self.path.stat().st_ino == self._inode
        except OSError:
            return False

    def close(self, grace_s: float = 0.0) -> None:
        """Let calls end within ``grace_s``, then remove the socket."""
        server, self._server = self._server, None
        if server is None:
            return
        there = self.path if self._is_ours() else None
        server.stop(grace_s).wait()
        if there is not None:
            with contextlib.suppress(OSError):
                there.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        with contextlib.suppress(OSError):
            return self.path.stat().st_ino == self._inode
        return False


def _try(path: Path) -> None:
    """gRPC does not say what is wrong with a place; the operating system does. The kubelet looks
    at no name that starts with a dot."""
    trial = path.with_name(".try")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            trial.unlink(missing_ok=True)
            sock.bind(str(trial))
            trial.unlink()
            path.unlink(missing_ok=True)
        except OSError as exc:
            raise files.problem(path, exc) from None
