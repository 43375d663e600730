"""Addresses, ``host:port``."""

from __future__ import annotations


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port`` (brackets around IPv6 addresses are removed)."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` can be reached from this machine alone. A name that a name server can
    be asked for, such as ``127.evil.example``, is not."""
    host = address.rpartition(":")[0].strip("[]").lower()
    numbers = host.split(".")
    return host in ("localhost", "::1") or (
        numbers[0] == "127" and all(part.isascii() and part.isdigit() for part in numbers)
    )
