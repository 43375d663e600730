"""Who looks at the pages, by the token that they have shown, and what they may do there."""

from __future__ import annotations

import hmac
from typing import Protocol

import msgspec

from cotenant.domain.tokens import Scope, Token
from cotenant.serving.tokenfile import Keyring


class Visitor(msgspec.Struct, frozen=True):
    """Who has shown a token, or who needs none. ``infers``: may send requests to models;
    ``controls``: may hold, resume and cancel jobs."""

    token: Token | None = None
    infers: bool = True
    controls: bool = False


class Keys(Protocol):
    """The tokens that a door knows."""

    @property
    def label(self) -> str:
        """What the form asks for."""

    @property
    def chosen(self) -> bool:
        """Whether somebody may have thought of a token, so that it could be guessed."""

    def visitor(self, given: str) -> Visitor | None:
        """Whose token that is."""

    def again(self, visitor: Visitor) -> Visitor | None:
        """The same visitor now; None if the token counts no more."""


class NodeKey:
    """The node's one token: for all that the inference port has."""

    label = "The node's token"
    chosen = True

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def visitor(self, given: str) -> Visitor | None:
        """See Keys."""
        return Visitor() if hmac.compare_digest(given.encode(), self._token) else None

    def again(self, visitor: Visitor) -> Visitor | None:
        """See Keys."""
        return visitor


class JobsKeys:
    """Tokens of the jobs API: those with the scope read see pages, those with control buttons."""

    label = "A token of the jobs API"
    chosen = False

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def visitor(self, given: str) -> Visitor | None:
        """See Keys."""
        return self._of(self._keyring.find(given))

    def again(self, visitor: Visitor) -> Visitor | None:
        """See Keys."""
        return self._of(self._keyring.again(visitor.token) if visitor.token else None)

    @staticmethod
    def _of(token: Token | None) -> Visitor | None:
        if token is None or Scope.READ not in token.scopes:
            return None
        return Visitor(token, infers=False, controls=Scope.CONTROL in token.scopes)
