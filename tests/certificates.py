"""Certificates for loopback, made by the machine's openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

OPENSSL = shutil.which("openssl")


class Pair(NamedTuple):
    """A certificate that is its own authority, and its key."""

    certificate: Path
    key: Path


def made(directory: Path, name: str = "localhost") -> Pair:
    """A new pair for ``name`` and 127.0.0.1; skips the test where there is no openssl."""
    if OPENSSL is None:
        pytest.skip("openssl is not installed")
    directory.mkdir(parents=True, exist_ok=True)
    pair = Pair(directory / "certificate.pem", directory / "key.pem")
    words = [
        *(OPENSSL, "req", "-x509", "-nodes", "-days", "2", "-subj", f"/CN={name}"),
        *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"),
        *("-keyout", str(pair.key), "-out", str(pair.certificate)),
    ]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    return pair
