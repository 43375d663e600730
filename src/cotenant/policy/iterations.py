"""What an iteration costs, and what it costs to put a block aside: learned from what was measured.

An iteration takes ``fixed + token * new tokens + pair * (new tokens x tokens that they look at)``:
weights are read once, multiplied for each token, and each token looks at those before it. More than
one token cost a ``step`` besides: quantized weights are multiplied with one row as they are, for
several they are brought to another form first. The four are fitted by least squares over what was
measured, the newer counting more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

KEEP: Final = 0.98
"""What a sample still counts after the next one."""
FEWEST: Final = 8
"""Samples of which something can be told."""
GAIN: Final = 1 / 8
SCALE: Final = (1.0, 1e-2, 1e-5, 1.0)
"""Brings the four to like size, or the sums would lose what is small."""
RIDGE: Final = 1e-6
"""Keeps the fit defined while all samples are alike."""


@dataclass(frozen=True)
class Load:
    """What an iteration has to do: ``tokens`` that are new, ``pairs`` of those with the ones that
    they look at."""

    tokens: int = 0
    pairs: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.tokens + other.tokens, self.pairs + other.pairs)


def load(start: int, tokens: int) -> Load:
    """Of ``tokens`` new ones behind ``start`` others."""
    return Load(tokens, tokens * start + tokens * (tokens + 1) // 2)


@dataclass
class IterationCosts:
    """See the module's text; ns. Until something was measured everything costs nothing."""

    fixed: float = 0.0
    token: float = 0.0
    pair: float = 0.0
    step: float = 0.0
    offload: float = 0.0
    """Of a block, to the host."""
    restore: float = 0.0
    """Of a block, back."""
    sums: list[float] = field(default_factory=lambda: [0.0] * 14)
    """Of products of the inputs (ten, upper triangle by rows), then of inputs and times (four)."""

    @property
    def told(self) -> bool:
        """Whether it can be told apart what a token costs and what is fixed: of few samples, or
        where all had as many tokens, that is arbitrary."""
        weight, tokens, squares = self.sums[0], self.sums[1], self.sums[4]
        if weight < FEWEST:
            return False
        return squares / weight - (tokens / weight) ** 2 >= SCALE[1] ** 2

    def predict(self, work: Load) -> int:
        """How long (ns) an iteration takes."""
        if not work.tokens:
            return 0
        fixed = self.fixed + self.step_of(work.tokens)
        return round(fixed + self.token * work.tokens + self.pair * work.pairs)

    def step_of(self, tokens: int) -> float:
        """What so many tokens pay (ns) for being more than one: no more than they would one by one.
        While only long prompts and single tokens were seen, the fit may take all that prompts cost
        for the step. Two answers would then look too dear, never be computed together, and the fit
        never be put right."""
        return min(self.step, self.fixed * (tokens - 1))

    def observe(self, work: Load, ns: int) -> None:
        """An iteration took so long."""
        given = (1.0, float(work.tokens), float(work.pairs), float(work.tokens > 1))
        x = [each * scale for each, scale in zip(given, SCALE, strict=True)]
        fresh = [x[i] * x[j] for i in range(4) for j in range(i, 4)] + [each * ns for each in x]
        self.sums = [KEEP * old + new for old, new in zip(self.sums, fresh, strict=True)]
        found = _fit(self.sums)
        self.fixed, self.token, self.pair, self.step = [
            f * s for f, s in zip(found, SCALE, strict=True)
        ]

    def moved(self, blocks: int, ns: int, back: bool) -> None:
        """Copying so many blocks to the host, or ``back``, took so long."""
        if not blocks:
            return
        each, old = ns / blocks, self.restore if back else self.offload
        new = old + (each - old) * GAIN if old else each
        if back:
            self.restore = new
        else:
            self.offload = new

    def within(self, ns: float, start: int) -> int:
        """How many tokens behind ``start`` others fit into ``ns``, the fixed part aside."""
        slope = self.token + self.pair * (start + 0.5)
        half = self.pair / 2
        if ns <= 0:
            return 0
        if slope <= 0:
            return 1 << 30
        return int(2 * ns / (slope + (slope * slope + 4 * half * ns) ** 0.5))

    def again(self, start: int, tokens: int) -> float:
        """What it costs (ns) to compute tokens again beside others, which pay the fixed part."""
        work = load(start, tokens)
        return self.token * work.tokens + self.pair * work.pairs

    def worth_aside(self, start: int, tokens: int, chance: float = 1.0) -> bool:
        """Whether a block of ``tokens`` behind ``start`` others is worth a copy on the host, if it
        comes back with this ``chance``."""
        return self.offload + chance * self.restore < chance * self.again(start, tokens)


def _fit(sums: list[float]) -> list[float]:
    """Least squares where no part is negative: what comes out so is taken as nothing, and the
    others are fitted without it."""
    matrix = [[0.0] * 4 for _ in range(4)]
    at = 0
    for i in range(4):
        for j in range(i, 4):
            matrix[i][j] = matrix[j][i] = sums[at]
            at += 1
    right = sums[at:]
    used = [0, 1, 2, 3]
    while used:
        found = _solve([[matrix[i][j] for j in used] for i in used], [right[i] for i in used])
        worst = min(range(len(used)), key=found.__getitem__)
        if found[worst] >= 0:
            full = dict(zip(used, found, strict=True))
            return [full.get(i, 0.0) for i in range(4)]
        del used[worst]
    return [0.0] * 4


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Of a symmetric, positive system, by Gauss; a trace is added to the diagonal."""
    size = len(right)
    rows = [
        [*row[:i], row[i] + RIDGE * max(row[i], 1e-12), *row[i + 1 :], r]
        for i, (row, r) in enumerate(zip(matrix, right, strict=True))
    ]
    for i in range(size):
        for j in range(i + 1, size):
            part = rows[j][i] / rows[i][i] if rows[i][i] else 0.0
            rows[j] = [x - part * y for x, y in zip(rows[j], rows[i], strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        rest = sum(rows[i][j] * found[j] for j in range(i + 1, size))
        found[i] = (rows[i][size] - rest) / rows[i][i] if rows[i][i] else 0.0
    return found
