"""Language models behind a worker's contract: a turn is an iteration of all answers under way.

Inputs and outputs are those of ``contract``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from cotenant.domain.config import Exactness
from cotenant.domain.errors import InvalidRequest, ModelError, TooLarge
from cotenant.engines.base import Array, EngineMeta, Turn, Turns
from cotenant.engines.llm.asking import Chosen, Details, Options
from cotenant.engines.llm.blocks import BlockPool
from cotenant.engines.llm.checkpoint import open_checkpoint
from cotenant.engines.llm.contract import (
    TILES,
    language_meta,
    read_options,
    read_prompt,
    sampling_of,
    write_outputs,
)
from cotenant.engines.llm.drafter import Drafter, draft_build, open_draft
from cotenant.engines.llm.drafting import Drafting
from cotenant.engines.llm.gate import FLOOR
from cotenant.engines.llm.generator import Generator, Piece, Question
from cotenant.engines.llm.iteration import Iterations, Limits
from cotenant.engines.llm.language import text_of
from cotenant.engines.llm.runner import Runner, Sizes
from cotenant.engines.llm.sight import open_sight
from cotenant.engines.llm.verdicts import chosen_build
from cotenant.policy.memory.account import PoolUse

SIZE: Final = 16
"""Tokens of a block; with a draft model it is one of each."""
CONTEXT: Final = 4096
"""The most tokens of a sequence, where the model has more."""


class LlmEngine:
    """A ``TurnEngine``; see the module's text. ``kv``: bytes for keys and values, those of a draft
    model among them. ``draft``: where that lies, seen from the model's directory ("": there is
    none). Raises ModelError."""

    def __init__(
        self,
        path: Path,
        units: Sequence[int],
        kv: int,
        floor: Exactness = FLOOR,
        draft: str = "",
    ) -> None:
        checkpoint = open_checkpoint(path)
        text = text_of(checkpoint, path)
        small = open_draft(path.parent.parent, draft, text) if draft else None
        limits = Limits()
        self._context = context = min(checkpoint.decoder.context, CONTEXT)
        decoders = [each.decoder for each in (checkpoint, small) if each is not None]
        self._block = sum(decoder.block_bytes(SIZE) for decoder in decoders)
        self._blocks = blocks = min(limits.sequences * -(-context // SIZE), kv // self._block)
        if blocks < 1:
            raise ModelError(
                f"a block of {SIZE} tokens is {self._block} bytes; for keys and values there are"
                f" {kv} (kv.limit)"
            )
        build = chosen_build(checkpoint, text, units, floor)
        sizes = Sizes(blocks, SIZE, 0, context)
        runner = Runner(checkpoint, build, sizes, units)
        drafting, drafter = None, None
        if small is not None:
            sizes = sizes._replace(context=min(small.decoder.context, context))
            drafting = Drafting(BlockPool(blocks, SIZE), sizes.context)
            reader = Runner(small, draft_build(small), sizes, units)
            drafter = Drafter(reader, drafting, text.vocabulary)
        core = Iterations(BlockPool(blocks, SIZE), limits, drafting=drafting)
        self._sight = open_sight(checkpoint, path.parent, units)
        self._generator = Generator(text, runner, core, drafter, self._sight)
        self._generator.warm(max(units))
        self._said: dict[int, _Said] = {}

    @property
    def meta(self) -> EngineMeta:
        side = self._sight.vision.side if self._sight is not None else 0
        return language_meta("cotenant_llm", self._context, self._blocks, SIZE, self._block, side)

    def begin(self, key: int, inputs: dict[str, Array], due: int = 0, pace: int = 0) -> None:
        try:
            options = read_options(inputs)
            question = self._question(inputs, options)
            self._generator.begin(key, msgspec.structs.replace(question, due=due, pace=pace))
        except (InvalidRequest, TooLarge) as error:
            raise ModelError(str(error)) from error
        self._said[key] = _Said(detailed="options" in inputs)

    def _question(self, inputs: dict[str, Array], options: Options) -> Question:
        text = self._generator.text
        prompt = read_prompt(inputs, lambda t: text.encode(t, special=True, most=self._context))
        return Question(
            prompt=prompt,
            most=options.max_tokens,
            sampling=sampling_of(options),
            tiles=tuple(inputs.get(TILES, ())),
            stops=options.stop,
            grammar=options.grammar,
            endless=options.ignore_eos,
            embed=options.embed,
            salt=options.salt,
        )

    def turn(self, units: int, keys: Sequence[int], budget: int) -> Turns:
        """What others say in the iteration is kept for their next turn."""
        for piece in self._generator.step(units, budget or None):
            self._said[piece.key].add(piece)
        work = self._generator.work
        return Turns([self._take(key) for key in keys], (work.tokens, work.pairs))

    def _take(self, key: int) -> Turn:
        said = self._said[key]
        self._said[key] = _Said(said.detailed)
        if said.over:
            del self._said[key]
        return said.turn()

    def resize(self, size: int) -> None:
        self._generator.resize(size // self._block)

    def pool_use(self) -> PoolUse:
        return PoolUse(*(blocks * self._block for blocks in self._generator.core.blocks))

    def forget(self, keys: Sequence[int]) -> None:
        self._generator.forget(keys)
        for key in keys:
            self._said.pop(key, None)


class _Said:
    """Of an answer, what was not given out yet."""

    def __init__(self, detailed: bool) -> None:
        self.detailed = detailed
        self.over = False
        self._pieces: list[Piece] = []

    def add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self.over = piece.over

    def turn(self) -> Turn:
        """As one turn."""
        pieces = self._pieces
        if not pieces:
            return Turn(None, self.over)
        last = pieces[-1]
        if last.error:
            return Turn(None, finished=True, error=last.error)
        text = "".join(piece.text for piece in pieces)
        tokens = [choice.token for piece in pieces for choice in piece.choices]
        reason = last.end.value if last.end is not None else ""
        details = _details(pieces) if self.detailed else None
        outputs = write_outputs(text, tokens, reason, details)
        return Turn(outputs, self.over, said=len(tokens))


def _details(pieces: list[Piece]) -> Details:
    last = pieces[-1]
    return Details(
        said=tuple(
            Chosen(c.token, None if c.logprob != c.logprob else c.logprob, c.top)
            for piece in pieces
            for c in piece.choices
        ),
        cached=last.cached,
        embedding=tuple(last.embedding.tolist()) if last.embedding is not None else (),
    )
