"""What a language model's engine takes and gives, whichever engine it is.

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
| ``image_tiles`` UINT8 [-1, side, side, 3] | of a model that sees: the tiles of its images |

The prompt has an image token for each row of each tile, in order.

Outputs of a turn: ``text_output`` BYTES [1] that is certain by now, ``tokens`` INT64 [-1],
``finish_reason`` BYTES [1] (``stop``, ``length``; "" as long as the answer goes on), ``details``
BYTES [1] (``asking.Details`` as JSON where the request had ``options``, else "").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import TensorMeta
from cotenant.engines.base import Array, EngineMeta
from cotenant.engines.llm.asking import Details, Options
from cotenant.engines.llm.sampler import Sampling

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
TILES: Final = "image_tiles"
"""The input of models that see images."""
_OUTPUTS: Final = (
    TensorMeta("text_output", "BYTES", (1,)),
    TensorMeta("tokens", "INT64", (-1,)),
    TensorMeta("finish_reason", "BYTES", (1,)),
    TensorMeta("details", "BYTES", (1,)),
)


def language_meta(
    platform: str, context: int, blocks: int, tokens: int, nbytes: int, side: int = 0
) -> EngineMeta:
    """Of an engine that keeps this contract, with a pool of so many ``blocks``, each of so many
    ``tokens`` and ``nbytes``. ``side``: pixels of a tile (0: the model sees no images)."""
    seeing = (TensorMeta(TILES, "UINT8", (-1, side, side, 3), optional=True),) if side else ()
    return EngineMeta(
        platform,
        (*_INPUTS, *seeing),
        _OUTPUTS,
        batchable=False,
        turns=True,
        context=context,
        room=blocks * tokens,
        pool=blocks * nbytes,
        block=nbytes,
    )


def read_options(inputs: dict[str, Array]) -> Options:
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


def read_prompt(inputs: dict[str, Array], encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    """The tokens of a request's prompt. Raises InvalidRequest, and what ``encode`` does."""
    text = str(inputs["text_input"][0])
    if "prompt_tokens" not in inputs:
        return tuple(encode(text))
    if text:
        raise InvalidRequest("the prompt is either text_input or prompt_tokens, not both")
    return tuple(inputs["prompt_tokens"].tolist())


def sampling_of(options: Options) -> Sampling:
    """How its tokens are chosen."""
    return Sampling(
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
    )


def write_outputs(
    text: str, tokens: Sequence[int], reason: str, details: Details | None
) -> list[Array]:
    """What a turn says, as outputs."""
    described = "" if details is None else msgspec.json.encode(details).decode()
    return [_strings(text), np.array(tokens, np.int64), _strings(reason), _strings(described)]


def _strings(text: str) -> Array:
    return np.array([text], np.object_)
