"""Which token comes next, of what a model says of all: greedy, or drawn.

Each draw depends on the seed and the position alone. So as long as the model gives the same numbers
an answer with a seed is the same, however it was batched, drafted, put aside or taken up again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
"""One for each token of the vocabulary: natural logarithms, up to a constant."""

Tokens = npt.NDArray[np.int64]
NONE: Final[Tokens] = np.empty(0, np.int64)

MOST_LOGPROBS: Final = 20


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose. ``temperature`` 0 is greedy. Of the tokens those are kept, one step after the
    other, that are among the ``top_k`` likeliest (0: all); that at this temperature are at least
    ``min_p`` times as likely as the likeliest (Nguyen et al., 2024); and of the rest the fewest
    that have ``top_p`` of its probability together.

    ``presence`` is taken from the logit of what was said, ``frequency`` as often as it was said;
    ``repetition`` divides (multiplies, below 0) the logits of prompt and answer (Keskar et al.,
    2019). ``bias`` is added. ``logprobs``: how many alternatives to tell (None: not even the
    chosen one's)."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    seed: int
    bias: dict[int, float] = {}
    logprobs: int | None = None

    def problem(self) -> str:
        """What is out of its range, and what that is; "" if nothing."""
        ranges = {
            "temperature": (0.0, 2.0),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "presence": (-2.0, 2.0),
            "frequency": (-2.0, 2.0),
            "repetition": (0.01, 10.0),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                return f"{name} {getattr(self, name):g} is not from {low:g} to {high:g}"
        if self.top_k < 0:
            return f"top_k {self.top_k} is negative"
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            return f"logprobs {self.logprobs} is not from 0 to {MOST_LOGPROBS}"
        for token, value in self.bias.items():
            if not -100 <= value <= 100:
                return f"the bias {value:g} of token {token} is not from -100 to 100"
        return ""


class Choice(NamedTuple):
    """The next token. ``logprob`` and ``top`` (likeliest first) are the model's own, before
    anything was taken or added; nan and empty unless asked for."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def choose(
    logits: Logits,
    how: Sampling,
    position: int,
    said: Mapping[int, int],
    prompt: Tokens = NONE,
    allowed: npt.NDArray[np.bool_] | None = None,
) -> Choice:
    """The token at ``position``. ``said``: how often each was said so far; ``allowed``: which may
    be said at all (a grammar); ``prompt``: the tokens of the prompt, each once, sorted. All
    are below the size of the vocabulary. Raises ValueError if none may be said, or a logit is NaN.
    """
    scores = _adjusted(logits, how, said, prompt)
    if allowed is not None:
        scores[~allowed] = -np.inf
    best = scores.max()
    if np.isnan(best):
        raise ValueError("the model says NaN: its weights are damaged")
    if best == -np.inf:
        raise ValueError("no token is allowed here")
    token = int(scores.argmax()) if not how.temperature else _draw(scores, how, position)
    if how.logprobs is None:
        return Choice(token, float("nan"), ())
    raw = logits.astype(np.float64)
    raw -= raw.max()
    raw -= np.log(np.exp(raw).sum())
    top = _likeliest(raw, how.logprobs)
    return Choice(token, float(raw[token]), tuple((int(i), float(raw[i])) for i in top))


def _adjusted(logits: Logits, how: Sampling, said: Mapping[int, int], prompt: Tokens) -> Logits:
    scores = logits.astype(np.float32, copy=True)
    if how.repetition != 1:
        seen = np.union1d(prompt, np.fromiter(said.keys(), np.int64))
        there = scores[seen]
        scores[seen] = np.where(there > 0, there / how.repetition, there * how.repetition)
    if said and (how.presence or how.frequency):
        tokens = np.fromiter(said.keys(), np.int64)
        counts = np.fromiter(said.values(), np.float32)
        scores[tokens] -= how.presence + how.frequency * counts
    for token, value in how.bias.items():
        if 0 <= token < len(scores):
            scores[token] += value
    return scores


def _draw(scores: Logits, how: Sampling, position: int) -> int:
    kept: npt.NDArray[Any] = np.flatnonzero(scores > -np.inf)
    if how.top_k and how.top_k < len(kept):
        kept = kept[_likeliest(scores[kept], how.top_k)]
    logs = scores[kept].astype(np.float64) / how.temperature
    weights = np.exp(logs - logs.max())
    if how.min_p:
        likely = weights >= how.min_p
        kept, weights = kept[likely], weights[likely]
    if how.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        kept, weights = kept[order], weights[order]
        total = np.cumsum(weights)
        count = int(np.searchsorted(total, how.top_p * total[-1])) + 1
        kept, total = kept[:count], total[:count]
    else:
        total = np.cumsum(weights)
    seed = how.seed & (2**64 - 1)
    place = np.random.Generator(np.random.Philox(key=seed, counter=position)).random() * total[-1]
    return int(kept[min(int(np.searchsorted(total, place, side="right")), len(kept) - 1)])


def _likeliest(scores: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """Indices of the largest, likeliest first; of equal ones the first."""
    count = min(count, len(scores))
    if not count:
        return np.empty(0, np.int64)
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    found = np.flatnonzero(scores > least)
    same = np.flatnonzero(scores == least)[: count - len(found)]
    found = np.concatenate([found[np.argsort(-scores[found], kind="stable")], same])
    return np.asarray(found, np.int64)
