"""A draft model on the CPU: opens it, and proposes the tokens that ``drafting`` asks for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cotenant.domain.errors import ModelError
from cotenant.engines.llm.checkpoint import Checkpoint, open_checkpoint
from cotenant.engines.llm.drafting import Ask, Drafting
from cotenant.engines.llm.gate import CANDIDATES, quantized
from cotenant.engines.llm.language import text_of
from cotenant.engines.llm.plan import Work
from cotenant.engines.llm.runner import Runner
from cotenant.engines.llm.text import Text
from cotenant.engines.llm.weights import Build
from cotenant.policy.iterations import Load, load

FILES: Final = ("model.gguf", "model.safetensors", "model.safetensors.index.json")
"""What is looked for in a directory, by preference."""


def open_draft(folder: Path, draft: str, text: Text) -> Checkpoint:
    """The draft model that ``draft`` of the ``model.yaml`` in ``folder`` names: a file of weights,
    or a directory with one. Raises ModelError, also where its tokens are not those of ``text``."""
    path = folder / draft
    found = next((path / name for name in FILES if (path / name).is_file()), path)
    try:
        if not found.is_file() or not (found.suffix == ".gguf" or ".safetensors" in found.suffixes):
            raise ModelError(
                f"expected a GGUF or safetensors file, or a directory with {' or '.join(FILES)}, "
                f"seen from {folder}"
            )
        checkpoint = open_checkpoint(found)
        differs = text.differs(text_of(checkpoint, found))
        if differs:
            raise ModelError(f"{differs}; a draft model has the vocabulary of its model")
    except ModelError as error:
        raise ModelError(f"model.yaml: draft: {draft}: {error}") from error
    return checkpoint


def draft_build(checkpoint: Checkpoint) -> Build:
    """The fastest: a draft that is wrong costs time, never an answer, so nothing is judged."""
    return CANDIDATES[0] if quantized(checkpoint) else Build()


class Drafter:
    """A draft model that is ready, its blocks as many as those of the pool of ``drafting``. It
    proposes the likeliest of the first ``vocabulary`` tokens."""

    def __init__(self, runner: Runner, drafting: Drafting, vocabulary: int) -> None:
        self._runner = runner
        self._drafting = drafting
        self._vocabulary = vocabulary

    def propose(self, units: int, asks: Sequence[Ask]) -> dict[int, list[int]]:
        """On so many threads; by key, as many tokens as were asked for. What each round took is
        noted. Raises ModelError."""
        drafts: dict[int, list[int]] = {ask.key: [] for ask in asks}
        wanted = {ask.key: ask.wanted for ask in asks}
        works = [Work(a.key, a.start, a.tokens, a.blocks, min(1, a.wanted)) for a in asks]
        while works:
            began = time.monotonic_ns()
            computed = self._runner.compute(units, works)
            took = time.monotonic_ns() - began
            total = sum((load(w.start, len(w.tokens)) for w in works), Load())
            self._drafting.costs.observe(total, took)
            for work in works:
                for row in computed[work.key].logits[:, : self._vocabulary]:
                    drafts[work.key].append(int(row.argmax()))
            works = [
                work._replace(start=work.start + len(work.tokens), tokens=(drafts[work.key][-1],))
                for work in works
                if len(drafts[work.key]) < wanted[work.key]
            ]
        return drafts

    def resize(self, blocks: int) -> None:
        """Have so many blocks; who has more loses drafts."""
        self._drafting.resize(blocks)
        self._runner.move(self._drafting.pool.moves())
