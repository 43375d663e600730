"""Which build of a model is served: the fastest that says what the model says.

A build may compute otherwise than the file means (``Build.rounded``; types that are rounded to 8
bits). Its laws:

1. The reference is the same file, its weights as FP32.
2. Each candidate, the fastest first, reads a check text and goes on with a few of its passages. It
   is held against the reference at each position. The first that is above the floor is served.
3. Where none is, the reference is served.
4. What cannot be judged is served as stored, with its activations in FP32, and the reason is kept.
5. One set of weights is in memory at a time.

The check text is ``check.txt`` beside the model, or the one that comes with this package. Passages
are parted by lines of ``---``.
"""

from __future__ import annotations

import codecs
import ctypes
import math
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from cotenant.domain.config import Exactness
from cotenant.domain.errors import ModelError
from cotenant.engines.llm.checkpoint import Checkpoint
from cotenant.engines.llm.families.base import Floats
from cotenant.engines.llm.plan import Work
from cotenant.engines.llm.runner import Runner, Sizes
from cotenant.engines.llm.text import Text
from cotenant.engines.llm.weights import Build

CANDIDATES: Final = (Build(rounded=True), Build())
"""Of a quantized file, the fastest first."""
REFERENCE: Final = Build(bits=32)
CHECK: Final = "check.txt"
MOST_BYTES: Final = 1 << 20
"""Of a check text; what is behind them is not read."""
MOST_TOKENS: Final = 2048
"""Of a check text; so many are read."""
WINDOW: Final = 256
"""Tokens that are read in one go; a longer passage is several."""
CHUNK: Final = 64
"""Tokens of a call: so many rows of logits are in memory."""
PROMPTS: Final = 4
"""Passages that are gone on with."""
PROMPT, SAID = 16, 24
"""Tokens of a prompt, and of what is said to it."""
_BLOCK: Final = 16

Tokens = tuple[int, ...]
Choices = npt.NDArray[np.int64]


FLOOR: Final = Exactness()


class Figures(msgspec.Struct, frozen=True):
    """Of a candidate against the reference. ``agreement``: share of positions with the same most
    likely token; ``perplexity``: its own by the reference's; ``answers``: how many of the
    continuations are the same to their end, had it gone on by itself."""

    agreement: float
    perplexity: float
    answers: int


class Verdict(msgspec.Struct, frozen=True):
    """``refused``: why, or "". ``figures``: None where the candidate computed none."""

    build: Build
    figures: Figures | None
    refused: str = ""


class Judgement(msgspec.Struct, frozen=True):
    """``build`` is to be served, for the reason ``why``. ``judged``: it was found good enough, or
    there was nothing to find out. ``perplexity``: the reference's (0: it was not made).
    ``positions`` were compared, those of ``answers`` continuations among them."""

    build: Build
    why: str
    verdicts: tuple[Verdict, ...] = ()
    perplexity: float = 0.0
    positions: int = 0
    answers: int = 0
    judged: bool = True


class Reading(NamedTuple):
    """What a build makes of the passages. ``best``: the most likely token behind each of theirs;
    ``loss``: nats a token; ``said``: what it says to the prompts, [prompts, steps]."""

    best: Choices
    loss: float
    said: Choices


def quantized(checkpoint: Checkpoint) -> bool:
    """Whether there is anything to judge: else the model is served as FP32, as it is."""
    return any(checkpoint.stored(name) is not None for name in checkpoint.decoder.tensors())


def passages(written: str, text: Text, context: int) -> list[Tokens]:
    """A check text as sequences that a model can take, each of two tokens or more."""
    window = min(context, WINDOW)
    begin = (text.begin,) if text.begins and text.begin is not None else ()
    found: list[Tokens] = []
    left = MOST_TOKENS
    for passage in _parts(written):
        tokens = text.encode(passage, special=False, begin=False)
        step = max(1, window - len(begin))
        for at in range(0, len(tokens), step):
            part = (*begin, *tokens[at : at + step][:left])
            left -= len(part)
            if len(part) > 1 and len(part) <= window and left >= 0:
                found.append(part)
    return found


def _parts(written: str) -> Iterator[str]:
    lines: list[str] = []
    for line in [*written.splitlines(), "---"]:
        if line.strip() == "---":
            part = "\n".join(lines).strip()
            if part:
                yield part
            lines = []
        else:
            lines.append(line)


def check_text(folder: Path) -> str:
    """The one beside a model, or the package's. Raises ModelError if it is not text."""
    own = folder / CHECK
    try:
        if own.is_file():
            with own.open("rb") as file:
                return codecs.getincrementaldecoder("utf-8")().decode(file.read(MOST_BYTES))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{CHECK} beside the model cannot be read: {error}") from error
    return resources.files(__package__).joinpath(CHECK).read_text("utf-8")


def judge(
    reader: Reader, floor: Exactness = FLOOR, candidates: Sequence[Build] = CANDIDATES
) -> Judgement:
    """Hold candidates against the reference. Those behind the first that passes are not built."""
    if not reader.script:
        return unjudged("no check text fits the model")
    verdicts: list[Verdict] = []
    chosen, why = REFERENCE, "no candidate passes"
    try:
        expected = reader.read(REFERENCE)
        for build in candidates:
            verdicts.append(_verdict(reader, build, expected, floor))
            if not verdicts[-1].refused:
                chosen, why = build, "the fastest that passes"
                break
    except (ModelError, MemoryError) as error:
        return unjudged(f"FP32 weights of the file cannot be computed with: {error}")
    except _Late:
        return unjudged("it takes too long")
    return Judgement(
        chosen,
        why,
        tuple(verdicts),
        _exp(expected.loss),
        expected.best.size + expected.said.size,
        len(expected.said),
    )


def unjudged(why: str) -> Judgement:
    """The model is served as stored, with its activations in FP32."""
    return Judgement(Build(), f"unjudged: {why}", judged=False)


def _verdict(reader: Reader, build: Build, expected: Reading, floor: Exactness) -> Verdict:
    try:
        figures = compare(reader.read(build, expected.said), expected)
    except (ModelError, MemoryError) as error:
        return Verdict(build, None, str(error) or "there is not enough memory")
    return Verdict(build, figures, refusal(figures, floor))


def compare(found: Reading, expected: Reading) -> Figures:
    """A candidate's reading, forced along what the reference said, against that."""
    same = found.said == expected.said
    alike = int((found.best == expected.best).sum()) + int(same.sum())
    return Figures(
        alike / (found.best.size + same.size),
        _exp(found.loss - expected.loss),
        int(same.all(axis=1).sum()),
    )


def _exp(value: float) -> float:
    """A model may be so bad that it overflows."""
    return math.exp(min(value, 700.0))


def refusal(figures: Figures, floor: Exactness) -> str:
    """Why a candidate is refused, or ""."""
    problems = []
    if not figures.agreement >= floor.agreement:
        problems.append(f"agreement {figures.agreement:.4f} is below {floor.agreement:g}")
    if not figures.perplexity <= floor.perplexity:
        problems.append(f"perplexity is {figures.perplexity:.4f} times, above {floor.perplexity:g}")
    return "; ".join(problems)


# --- reading ------------------------------------------------------------------------------------


class _Late(Exception):
    """There is no time left."""


class Reader:
    """Reads the passages of ``script`` by one build after the other, and goes on with their
    beginnings; on so many threads, and not beyond ``until`` on the monotonic clock (s)."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: Text,
        script: Sequence[Tokens],
        threads: int,
        until: float = math.inf,
    ) -> None:
        longest = max([PROMPT + SAID, *map(len, script)])
        blocks = max(-(-longest // _BLOCK), PROMPTS * -(-(PROMPT + SAID) // _BLOCK))
        context = min(checkpoint.decoder.context, longest)
        self._checkpoint = checkpoint
        self._vocabulary = text.vocabulary
        self._threads = threads
        self._until = until
        self.script = script
        self._sizes = Sizes(blocks, _BLOCK, 0, context)
        self._blocks = tuple(range(blocks))

    def read(self, build: Build, said: Choices | None = None) -> Reading:
        """What a build makes of it; its weights are let go of. It says its own most likely tokens,
        or is led along ``said``: so positions behind a difference are comparable, and the first
        difference is where its own answer would have turned.

        Raises ModelError, also where logits are not finite numbers."""
        try:
            return self._read(build, said)
        finally:
            _give_back()

    def _read(self, build: Build, said: Choices | None) -> Reading:
        runner = Runner(self._checkpoint, build, self._sizes, (self._threads,))
        best, losses = [], []
        for passage in self.script:
            for at in range(0, len(passage), CHUNK):
                chunk = passage[at : at + CHUNK]
                work = Work(0, at, chunk, self._blocks, len(chunk))
                logits = self._compute(runner, [work])[0]
                best.append(logits.argmax(axis=1))
                losses.append(_losses(logits, passage[at + 1 : at + 1 + CHUNK]))
        length = max(1, min(PROMPT, self._sizes.context // 2))
        steps = max(1, min(SAID, self._sizes.context - length))
        prompts = [passage[:length] for passage in self.script[:PROMPTS]]
        # One alone and the others together: kernels for one row are not those for several.
        answers = [
            self._say(runner, prompts[rows], steps, None if said is None else said[rows])
            for rows in (slice(0, 1), slice(1, None))
            if prompts[rows]
        ]
        loss = float(np.concatenate(losses).mean())
        return Reading(np.concatenate(best), loss, np.concatenate(answers))

    def _say(
        self, runner: Runner, prompts: Sequence[Tokens], steps: int, said: Choices | None
    ) -> Choices:
        """The most likely tokens behind each prompt, [prompts, steps]."""
        each = len(self._blocks) // len(prompts)
        tables = [self._blocks[row * each :][:each] for row in range(len(prompts))]
        found = np.zeros((len(prompts), steps), np.int64)
        tokens, starts = list(prompts), [0] * len(prompts)
        for step in range(steps):
            works = [
                Work(row, start, new, table, 1)
                for row, (start, new, table) in enumerate(zip(starts, tokens, tables, strict=True))
            ]
            found[:, step] = [logits[0].argmax() for logits in self._compute(runner, works)]
            starts = [start + len(new) for start, new in zip(starts, tokens, strict=True)]
            led = found if said is None else said
            tokens = [(int(token),) for token in led[:, step]]
        return found

    def _compute(self, runner: Runner, works: Sequence[Work]) -> list[Floats]:
        if time.monotonic() > self._until:
            raise _Late
        computed = runner.compute(self._threads, works)
        found = [computed[work.key].logits[:, : self._vocabulary] for work in works]
        if not all(np.isfinite(each).all() for each in found):
            raise ModelError("its logits are not finite numbers")
        return found


def _give_back() -> None:
    """Give to the system what was let go of. glibc keeps it otherwise: several hundred MB behind
    the weights of a small model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _losses(logits: Floats, follows: Sequence[int]) -> npt.NDArray[np.float64]:
    """Nats for each token that follows (the last row may have none)."""
    rows = logits[: len(follows)].astype(np.float64)
    peaks = rows.max(axis=1, keepdims=True)
    total = np.log(np.exp(rows - peaks).sum(axis=1)) + peaks[:, 0]
    return np.asarray(total - rows[np.arange(len(follows)), list(follows)], np.float64)
