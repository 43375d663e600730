"""A server's certificate: read from PEM files, and again when they change.

A renewal replaces files one after the other, so for a moment they may not fit. Then the pair that
was read before stays, and the next connection looks again.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cotenant.domain.errors import EnvironmentProblem

log = logging.getLogger("cotenant.serving")

LOOK_EVERY_S: Final = 1.0

Signature = tuple[tuple[int, int, int, int], ...]
"""Of each file inode, size, and when (ns) its content and its rights or owner changed."""


class Certificate:
    """A certificate with its chain, and its key. Calling it gives the context for a connection.

    Raises EnvironmentProblem, when it is made, for files that cannot be read or do not fit.
    """

    def __init__(
        self, certificate: Path, key: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._files = certificate, key
        self._clock = clock
        self._signature = self._look()
        self._context = _context(certificate, key)
        self._looked = clock()

    def __call__(self) -> ssl.SSLContext:
        """The context to serve a new connection with."""
        now = self._clock()
        if now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            self._read_again()
        return self._context

    def _read_again(self) -> None:
        found = self._look()
        if found == self._signature:
            return
        self._signature = found
        try:
            self._context = _context(*self._files)
        except EnvironmentProblem as error:
            log.error("the new certificate is not used: %s", error)
        else:
            log.info("the certificate was read again", extra={"file": str(self._files[0])})

    def _look(self) -> Signature:
        found = []
        for path in self._files:
            try:
                stat = path.stat()
            except OSError:
                found.append((0, 0, 0, 0))
            else:
                found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        return tuple(found)


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    for path in (certificate, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise EnvironmentProblem(f"{path} cannot be read: {error.strerror}") from None
    try:
        context.load_cert_chain(certificate, key, password=_encrypted)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = "the key is not that of the certificate"
        else:
            why = "both must be PEM: the certificate with its chain, and its private key"
        raise EnvironmentProblem(f"{certificate} and {key} cannot be used: {why}") from None
    except _KeyIsEncrypted:
        raise EnvironmentProblem(
            f"{key} is encrypted; write it without a passphrase (openssl pkey -in {key})"
        ) from None
    return context


class _KeyIsEncrypted(Exception):
    """OpenSSL wants a passphrase, and would ask at the terminal."""


def _encrypted() -> str:
    raise _KeyIsEncrypted
