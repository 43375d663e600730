"""A line for the shell that asks a served model, made from what the model says of itself. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Final

import numpy as np

from cotenant.domain.port import ModelMeta, TensorMeta
from cotenant.engines.base import NUMPY

INLINE: Final = 64
"""Values that are written out; more of them are sent as zero bytes, which a program makes."""
PROMPT: Final = "Hello"


def line(
    meta: ModelMeta, address: str, shapes: Mapping[str, Sequence[int]], token_file: str | None
) -> str:
    """A command of ``sh`` and ``curl``; "" for a model that is asked by nobody in one line.

    ``shapes`` fills free axes of inputs; those that it does not name have length 1."""
    head = "curl -sS"
    if token_file:
        head += f' -H "Authorization: Bearer $(cat {shlex.quote(token_file)})"'
    where = f"http://{address}"
    if meta.context:
        asked = {"model": meta.name, "prompt": PROMPT, "max_tokens": 16}
        return f"{head} {where}/v1/completions {_json_type} -d {_quoted(asked)}"
    if meta.pieces:
        return ""
    found = [(tensor, _shape(tensor, shapes)) for tensor in meta.inputs]
    url = f"{where}/v2/models/{meta.name}/infer"
    if sum(prod(shape) for _, shape in found) <= INLINE:
        inputs = [_written(tensor, shape) for tensor, shape in found]
        return f"{head} {url} {_json_type} -d {_quoted({'inputs': inputs})}"
    inputs, size = [], 0
    for tensor, shape in found:
        if tensor.datatype == "BYTES":
            inputs.append(_written(tensor, shape))
            continue
        nbytes = prod(shape) * np.dtype(NUMPY[tensor.datatype]).itemsize
        size += nbytes
        inputs.append({**_named(tensor, shape), "parameters": {"binary_data_size": nbytes}})
    text = json.dumps({"inputs": inputs}, separators=(",", ":"))
    body = f"(printf %s {shlex.quote(text)}; head -c {size} /dev/zero)"
    length = f"-H 'Inference-Header-Content-Length: {len(text.encode())}'"
    return f"{body} | {head} {url} {length} --data-binary @-"


_json_type: Final = "-H 'Content-Type: application/json'"


def _shape(tensor: TensorMeta, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    given = tuple(shapes.get(tensor.name, ()))
    if len(given) == len(tensor.shape):
        return given
    return tuple(1 if length < 0 else length for length in tensor.shape)


def _named(tensor: TensorMeta, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(shape)}


def _written(tensor: TensorMeta, shape: tuple[int, ...]) -> dict[str, Any]:
    value: Any = 0
    if tensor.datatype == "BYTES":
        value = PROMPT
    elif tensor.datatype == "BOOL":
        value = False
    elif tensor.datatype.startswith("FP"):
        value = 0.5
    return {**_named(tensor, shape), "data": [value] * prod(shape)}


def _quoted(asked: object) -> str:
    return shlex.quote(json.dumps(asked, separators=(",", ":"), ensure_ascii=False))
