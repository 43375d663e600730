"""What is worked out of the journal for the pages, somewhere else than in the node's process.

``cotenant.cli.studies`` does it; this says what the pages may ask and what they get.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from cotenant.telemetry.explain import Explanation


class StudyFailed(Exception):
    """A study came to nothing; the text says why, in a sentence for people."""


class Figures(msgspec.Struct, frozen=True):
    """One service. ``in_time``: share (0..1) of its requests; ``p95_ms`` of those answered."""

    requests: int
    in_time: float
    p95_ms: float | None


class Told(msgspec.Struct, frozen=True):
    """What a policy made of the same minutes: ``services`` by name, progress per second of
    ``jobs`` by id."""

    what: str
    services: dict[str, Figures]
    jobs: dict[str, float]


class Comparison(msgspec.Struct, frozen=True):
    """The same ``seconds`` of the journal told several times: first as they were measured."""

    policy: str
    seconds: float
    told: list[Told]
    notes: list[str] = []


class Studies(Protocol):
    """Who works it out, one of each kind at a time."""

    @property
    def policies(self) -> Mapping[str, str]:
        """Those to compare with, by name, each in a few words."""

    async def explain(self, last: int) -> Explanation:
        """Why the node did what it did, with so many of each kind. Raises StudyFailed."""

    async def compare(self, policy: str, seconds: int) -> Comparison:
        """The last ``seconds`` under another policy. Raises StudyFailed."""
