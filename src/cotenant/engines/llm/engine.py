"""Language models behind a worker's contract: a turn is an iteration of all answers under way.

Inputs, all but the first optional:

| input | is |
| --- | --- |
| ``text_input`` BYTES [1] | the prompt; in it ``<|im_start|>`` and such are special tokens |
| ``max_tokens`` INT32 [1] | how many tokens may be said (256) |
| ``temperature`` FP32 [1] | 0 (the default) is greedy |
| ``top_p`` FP32 [1], ``top_k`` INT32 [1] | of which tokens to draw (all) |
| ``seed`` INT64 [1] | of the draws (0) |
| ``stop`` BYTES [-1] | strings that end the answer and are not part of it |
| ``prompt_tokens`` INT64 [-1] | the prompt in place of ``text_input``, which is empty then |
| ``options`` BYTES [1] | all settings in place of those above: ``asking.Options`` as JSON |

Outputs of a turn: ``text_output`` BYTES [1] that is certain by now, ``tokens`` INT64 [-1],
``finish_reason`` BYTES [1] (``stop``, ``length``; "" as long as the answer goes on), ``details``
BYTES [1] (``asking.Details`` as JSON where the request had ``options``, else "").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from cotenant.domain.config import Exactness
from cotenant.domain.errors import InvalidRequest, ModelError, TooLarge
from cotenant.domain.port import TensorMeta
from cotenant.engines.base import Array, EngineMeta, PoolUse, Turn, Turns
from cotenant.engines.llm.asking import Chosen, Details, Options
from cotenant.engines.llm.blocks import BlockPool
from cotenant.engines.llm.checkpoint import open_checkpoint
from cotenant.engines.llm.gate import FLOOR
from cotenant.engines.llm.generator import Generator, Piece, Question
from cotenant.engines.llm.iteration import Iterations, Limits
from cotenant.engines.llm.language import text_of
from cotenant.engines.llm.runner import Runner, Sizes
from cotenant.engines.llm.sampler import Sampling
from cotenant.engines.llm.verdicts import chosen_build

SIZE: Final = 16
"""Tokens of a block."""
CONTEXT: Final = 4096
"""The most tokens of a sequence, where the model has more."""

_SETTINGS: Final = (
    TensorMeta("max_tokens", "INT32", (1,), optional=True),
    TensorMeta("temperature", "FP32", (1,), optional=True),
    TensorMeta("top_p", "FP32", (1,), optional=True),
    TensorMeta("top_k", "INT32", (1,), optional=True),
    TensorMeta("seed", "INT64", (1,), optional=True),
)
"""Fields of ``Options`` that are inputs of their own."""
_INPUTS: Final = (
    TensorMeta("text_input", "BYTES", (1,)),
    *_SETTINGS,
    TensorMeta("stop", "BYTES", (-1,), optional=True),
    TensorMeta("prompt_tokens", "INT64", (-1,), optional=True),
    TensorMeta("options", "BYTES", (1,), optional=True),
)
_OUTPUTS: Final = (
    TensorMeta("text_output", "BYTES", (1,)),
    TensorMeta("tokens", "INT64", (-1,)),
    TensorMeta("finish_reason", "BYTES", (1,)),
    TensorMeta("details", "BYTES", (1,)),
)


class LlmEngine:
    """A ``TurnEngine``; see the module's text. Raises ModelError."""

    def __init__(self, path: Path, units: Sequence[int], kv: int, floor: Exactness = FLOOR) -> None:
        checkpoint = open_checkpoint(path)
        text = text_of(checkpoint, path)
        decoder, limits = checkpoint.decoder, Limits()
        context = min(decoder.context, CONTEXT)
        self._block = decoder.block_bytes(SIZE)
        blocks = min(limits.sequences * -(-context // SIZE), kv // self._block)
        if blocks < 1:
            raise ModelError(
                f"a block of {SIZE} tokens is {self._block} bytes; for keys and values there are"
                f" {kv} (kv.limit)"
            )
        build = chosen_build(checkpoint, text, units, floor)
        runner = Runner(checkpoint, build, Sizes(blocks, SIZE, 0, context), units)
        self._context, self._room = context, blocks * SIZE
        self._generator = Generator(text, runner, Iterations(BlockPool(blocks, SIZE), limits))
        self._said: dict[int, _Said] = {}

    @property
    def meta(self) -> EngineMeta:
        return EngineMeta(
            "cotenant_llm",
            _INPUTS,
            _OUTPUTS,
            batchable=False,
            turns=True,
            context=self._context,
            room=self._room,
            pool=self._room // SIZE * self._block,
        )

    def begin(self, key: int, inputs: dict[str, Array]) -> None:
        try:
            options = _options(inputs)
            self._generator.begin(key, self._question(inputs, options))
        except (InvalidRequest, TooLarge) as error:
            raise ModelError(str(error)) from error
        self._said[key] = _Said(detailed="options" in inputs)

    def _question(self, inputs: dict[str, Array], options: Options) -> Question:
        text = str(inputs["text_input"][0])
        if "prompt_tokens" in inputs:
            if text:
                raise InvalidRequest("the prompt is either text_input or prompt_tokens, not both")
            prompt = inputs["prompt_tokens"].tolist()
        else:
            prompt = self._generator.text.encode(text, special=True, most=self._context)
        return Question(
            prompt=tuple(prompt),
            most=options.max_tokens,
            sampling=Sampling(
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                min_p=options.min_p,
                presence=options.presence_penalty,
                frequency=options.frequency_penalty,
                repetition=options.repetition_penalty,
                seed=options.seed,
                bias=options.logit_bias,
                logprobs=options.logprobs,
            ),
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
        return PoolUse(*(blocks * self._block for blocks in self._generator.blocks()))

    def forget(self, keys: Sequence[int]) -> None:
        self._generator.forget(keys)
        for key in keys:
            self._said.pop(key, None)


def _options(inputs: dict[str, Array]) -> Options:
    """Of a request. Raises InvalidRequest."""
    given = {t.name: inputs[t.name][0].item() for t in _SETTINGS if t.name in inputs}
    if "stop" in inputs:
        given["stop"] = tuple(map(str, inputs["stop"]))
    if "options" not in inputs:
        return Options(**given)
    if given:
        raise InvalidRequest(f"{', '.join(given)}: give them in options, where those are given")
    try:
        return msgspec.json.decode(str(inputs["options"][0]), type=Options)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"options: {error}") from error


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
        details = _details(pieces) if self.detailed else ""
        outputs = [_strings(text), np.array(tokens, np.int64), _strings(reason), _strings(details)]
        return Turn(outputs, self.over, said=len(tokens))


def _strings(text: str) -> Array:
    return np.array([text], np.object_)


def _details(pieces: list[Piece]) -> str:
    last = pieces[-1]
    details = Details(
        said=tuple(
            Chosen(c.token, None if c.logprob != c.logprob else c.logprob, c.top)
            for piece in pieces
            for c in piece.choices
        ),
        cached=last.cached,
        embedding=tuple(last.embedding.tolist()) if last.embedding is not None else (),
    )
    return msgspec.json.encode(details).decode()
