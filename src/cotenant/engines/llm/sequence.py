"""A sequence: a prompt and what a model has said to it so far."""

from __future__ import annotations

from enum import Enum
from itertools import takewhile

from cotenant.engines.llm.blocks import Claim, Table
from cotenant.engines.llm.lookup import Lookup
from cotenant.engines.llm.tiles import spans


class End(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """It said a token that ends it."""
    LENGTH = "length"
    """It said as many tokens as it may."""
    CANCELLED = "cancelled"


class Sequence:
    """``most``: new tokens that it may say. ``stops``: tokens that end it. ``due`` and ``pace``
    (ns): its first token is due at ``due`` and each further one ``pace`` later; who is due first
    goes first. ``salt``: with another one it shares no blocks."""

    def __init__(  # noqa: PLR0913
        self,
        key: int,
        prompt: tuple[int, ...],
        most: int,
        *,
        stops: frozenset[int] = frozenset(),
        due: int = 0,
        pace: int = 0,
        salt: str = "",
    ) -> None:
        if not prompt or most < 1:
            raise ValueError("a sequence has a prompt and may say at least one token")
        self.key = key
        self.prompt = len(prompt)
        self.tokens = list(prompt)
        self.tiles = spans(prompt)
        """Where in its prompt tiles of images are."""
        self.most = most
        self.stops = stops
        self.salt = salt
        self.end: End | None = None
        self.computed = 0
        """Tokens whose keys and values are in its blocks."""
        self.known: int | None = None
        """Tokens of the prompt that it found computed when it first ran; None before."""
        self.table: Table | None = None
        """Its blocks, while it runs."""
        self.claim: Claim = ()
        self._due = due
        self._pace = pace
        self._lookup: Lookup | None = None

    @property
    def said(self) -> int:
        """Tokens that the model has said."""
        return len(self.tokens) - self.prompt

    @property
    def due(self) -> int:
        """When its next token is due (ns)."""
        return self._due + self.said * self._pace

    @property
    def generates(self) -> bool:
        """Whether all but the newest token are computed, so that the next one can be said."""
        return self.computed == len(self.tokens) - 1

    @property
    def ahead(self) -> int:
        """Tokens that it may say behind the next one: no more are drafted."""
        return self.most - self.said - 1

    def draft(self, most: int) -> tuple[int, ...]:
        """Up to ``most`` tokens that may come next by what was said before; ``ahead`` at most, and
        none that stands for a row of an image."""
        most = min(most, self.ahead)
        if most < 1:
            return ()
        if self._lookup is None:
            self._lookup = Lookup(self.tokens)
        return tuple(takewhile(lambda token: token >= 0, self._lookup.draft(most)))

    def say(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Append tokens, up to one that ends it; those that were."""
        before = len(self.tokens)
        for token in tokens:
            self.tokens.append(token)
            if token in self.stops:
                self.end = End.STOP
            elif self.said >= self.most:
                self.end = End.LENGTH
            if self.end is not None:
                break
        if self._lookup is not None:
            self._lookup.grew()
        return tuple(self.tokens[before:])
