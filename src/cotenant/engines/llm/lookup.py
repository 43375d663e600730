"""Drafts by prompt lookup: what followed last time after the same few tokens (Saxena, 2023).

A model that quotes, edits or repeats says again what was said before. A draft costs nothing to
make; to verify it costs one more token in an iteration (Leviathan, Kalman and Matias, ICML 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

LENGTHS: Final = (3, 2)
"""So many tokens must be the same, the longer match first."""
PRIOR: Final = 0.5
GAIN: Final = 1 / 16
PROBE: Final = 32
"""Where drafts do not pay, one in so many is made to see whether they do by now."""


class Lookup:
    """The drafts of one sequence. It reads the tokens; who appends to them says so (``grew``)."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._ends: dict[tuple[int, ...], tuple[int, int]] = {}
        """Where these tokens ended last, and the time before (0: never)."""
        self._seen = 0
        self.grew()

    def grew(self) -> None:
        """Take up what was appended."""
        tokens = self._tokens
        for end in range(self._seen + 1, len(tokens) + 1):
            for length in LENGTHS:
                if end >= length:
                    key = tuple(tokens[end - length : end])
                    self._ends[key] = (end, self._ends.get(key, (0, 0))[0])
        self._seen = len(tokens)

    def draft(self, most: int) -> tuple[int, ...]:
        """Up to ``most`` tokens that may come next."""
        tokens = self._tokens
        for length in LENGTHS:
            if len(tokens) >= length:
                _, at = self._ends[tuple(tokens[-length:])]
                if at:
                    return tuple(tokens[at : at + most])
        return ()


class Acceptance:
    """How often drafts are right, learned; and how many are worth verifying."""

    def __init__(self) -> None:
        self.chance = PRIOR
        self._passed = 0.0

    def note(self, drafted: int, accepted: int) -> None:
        """So many of a draft were right: all before the first that was not."""
        for index in range(min(drafted, accepted + 1)):
            self.chance += (float(index < accepted) - self.chance) * GAIN

    def worth(
        self, token_ns: float, rate: float, most: int, step_ns: float = 0.0, pace: float = 1.0
    ) -> int:
        """How many tokens of a draft to verify, if one costs ``token_ns`` more, the first
        ``step_ns`` besides, and the iteration makes ``rate`` tokens a ns without. The n-th counts
        only if all before it are right. ``pace``: what the answer "none" counts towards the next
        trial; less where a trial is dear."""
        if token_ns <= 0 or rate <= 0:
            return most
        count, chance, gain = 0, self.chance, -step_ns * rate
        while count < most and chance / token_ns > rate:
            count += 1
            gain += chance - token_ns * rate
            chance *= self.chance
        if count and gain > 0:
            self._passed = 0.0
            return count
        self._passed += pace
        if self._passed >= PROBE:
            self._passed = 0.0
            return min(1, most)
        return 0
