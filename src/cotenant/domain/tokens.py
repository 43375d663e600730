"""Tokens for the jobs API: who may do what until when. A token itself is kept nowhere: its SHA-256
tells whether one that is shown is it. It is 256 random bits, so there is nothing to guess."""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

import msgspec

from cotenant.domain.errors import ConfigError

PREFIX: Final = "cotenant_"
"""What a token begins with, so that programs which look for secrets know it."""
MOST_NAME: Final = 64


class Scope(enum.Enum):
    """What a token may be for."""

    READ = "read"
    SUBMIT = "submit"
    CONTROL = "control"


class Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of the token file. Times are wall-clock seconds since 1970; ``expires`` None: never.
    ``sha256`` is of the token's text, in hexadecimal."""

    name: str
    sha256: str
    scopes: tuple[Scope, ...]
    created: float
    expires: float | None = None

    def valid(self, now: float) -> bool:
        """Whether it has not expired."""
        return self.expires is None or now < self.expires


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tokens: tuple[Token, ...]
    version: int = 1


def digest(text: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def find(tokens: Sequence[Token], text: str, now: float) -> Token | None:
    """The valid token that a text is. Each is compared, in constant time."""
    given, found = digest(text), None
    for token in tokens:
        if hmac.compare_digest(token.sha256, given) and token.valid(now):
            found = token
    return found


def read_tokens(data: bytes) -> tuple[Token, ...]:
    """The tokens in a file's content; raises ConfigError."""
    try:
        found = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"is no token file as cotenant token add writes it: {error}") from None
    if found.version != 1:
        raise ConfigError(f"is a token file of version {found.version}; this Cotenant knows 1")
    for token in found.tokens:
        if len(token.sha256) != 64 or not token.sha256.isascii():
            raise ConfigError(f"holds no SHA-256 for the token {token.name!r}")
    names = [token.name for token in found.tokens]
    if len(set(names)) < len(names):
        raise ConfigError("has two tokens of one name; revoke one of them")
    return found.tokens


def write_tokens(tokens: Sequence[Token]) -> bytes:
    """The content of a file with these tokens."""
    data = msgspec.json.encode(_File(tuple(tokens)))
    return msgspec.json.format(data, indent=2) + b"\n"


def read_scopes(text: str) -> tuple[Scope, ...]:
    """``read,submit``; raises ValueError."""
    known = {scope.value: scope for scope in Scope}
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise ValueError(f"{word!r} is no scope; choose of {', '.join(known)}")
    return tuple(scope for scope in Scope if scope.value in words)
