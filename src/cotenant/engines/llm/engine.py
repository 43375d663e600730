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

Outputs of a turn: ``text_output`` BYTES [1] that is certain by now, ``tokens`` INT64 [-1].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from cotenant.domain.errors import InvalidRequest, ModelError, TooLarge
from cotenant.domain.port import TensorMeta
from cotenant.engines.base import Array, EngineMeta, Turn
from cotenant.engines.llm.blocks import BlockPool
from cotenant.engines.llm.checkpoint import GgufCheckpoint, open_checkpoint
from cotenant.engines.llm.generator import Generator, Question
from cotenant.engines.llm.iteration import Iterations, Limits
from cotenant.engines.llm.runner import Runner, Sizes
from cotenant.engines.llm.sampler import Sampling
from cotenant.engines.llm.text import Text
from cotenant.engines.llm.verdicts import chosen_build

SIZE: Final = 16
"""Tokens of a block."""
CONTEXT: Final = 4096
"""The most tokens of a sequence, where the model has more."""
KV_BYTES: Final = 1 << 30
"""The most memory for keys and values."""
MOST_TOKENS: Final = 256
"""Of an answer, where the request does not say."""

_INPUTS: Final = (
    TensorMeta("text_input", "BYTES", (1,)),
    TensorMeta("max_tokens", "INT32", (1,), optional=True),
    TensorMeta("temperature", "FP32", (1,), optional=True),
    TensorMeta("top_p", "FP32", (1,), optional=True),
    TensorMeta("top_k", "INT32", (1,), optional=True),
    TensorMeta("seed", "INT64", (1,), optional=True),
    TensorMeta("stop", "BYTES", (-1,), optional=True),
)
_OUTPUTS: Final = (TensorMeta("text_output", "BYTES", (1,)), TensorMeta("tokens", "INT64", (-1,)))


class LlmEngine:
    """A ``TurnEngine``; see the module's text. Raises ModelError."""

    def __init__(self, path: Path, units: Sequence[int]) -> None:
        checkpoint = open_checkpoint(path)
        if isinstance(checkpoint, GgufCheckpoint):
            text = Text.from_gguf(checkpoint.file.keys)
        else:
            text = Text.from_folder(path.parent)
        decoder, limits = checkpoint.decoder, Limits()
        context = min(decoder.context, CONTEXT)
        blocks = min(limits.sequences * -(-context // SIZE), KV_BYTES // decoder.block_bytes(SIZE))
        if blocks < 1:
            raise ModelError(f"a block of {SIZE} tokens is larger than {KV_BYTES} bytes")
        build = chosen_build(checkpoint, text, units)
        runner = Runner(checkpoint, build, Sizes(blocks, SIZE, 0, context), units)
        self._generator = Generator(text, runner, Iterations(BlockPool(blocks, SIZE), limits))
        self._said: dict[int, _Said] = {}

    @property
    def meta(self) -> EngineMeta:
        return EngineMeta("cotenant_llm", _INPUTS, _OUTPUTS, batchable=False, turns=True)

    def begin(self, key: int, inputs: dict[str, Array]) -> None:
        def of(name: str, default: Any) -> Any:
            return inputs[name][0].item() if name in inputs else default

        generator = self._generator
        try:
            prompt = generator.text.encode(
                str(inputs["text_input"][0]), special=True, most=generator.runner.memory.context
            )
            generator.begin(
                key,
                Question(
                    prompt=tuple(prompt),
                    most=of("max_tokens", MOST_TOKENS),
                    sampling=Sampling(
                        temperature=of("temperature", 0.0),
                        top_p=of("top_p", 1.0),
                        top_k=of("top_k", 0),
                        seed=of("seed", 0),
                    ),
                    stops=tuple(map(str, inputs.get("stop", ()))),
                ),
            )
        except (InvalidRequest, TooLarge) as error:
            raise ModelError(str(error)) from error
        self._said[key] = _Said()

    def turn(self, units: int, keys: Sequence[int]) -> list[Turn]:
        """What others say in the iteration is kept for their next turn."""
        for piece in self._generator.step(units):
            if piece.error:  # no request can bring that about: the model's numbers are none
                raise ModelError(f"the model cannot go on: {piece.error}")
            said = self._said[piece.key]
            said.text += piece.text
            said.tokens += [choice.token for choice in piece.choices]
            said.over = piece.over
        return [self._take(key) for key in keys]

    def _take(self, key: int) -> Turn:
        said = self._said[key]
        self._said[key] = _Said()
        if said.over:
            del self._said[key]
        if not said.tokens and not said.text:
            return Turn(None, said.over)
        text = np.array([said.text], np.object_)
        return Turn([text, np.array(said.tokens, np.int64)], said.over)

    def forget(self, keys: Sequence[int]) -> None:
        self._generator.forget(keys)
        for key in keys:
            self._said.pop(key, None)


class _Said:
    """Of an answer, what was not given out yet."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.over = False
