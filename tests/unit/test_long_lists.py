"""Long JSON lists are taken in pieces, and give what they would give at once."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest

from cotenant.domain.errors import InvalidRequest
from cotenant.serving.long_lists import PIECE_BYTES, long_to_bytes
from cotenant.serving.tensors import json_to_bytes

RANDOM = np.random.default_rng(0)


def both(shape: tuple[int, ...], text: str, datatype: str = "FP32") -> tuple[Any, Any]:
    """What each way makes of a list: its bytes, or that it is refused."""
    raw = text.encode()
    made: list[Any] = []
    for work in (
        lambda: long_to_bytes("x", datatype, shape, memoryview(raw)),
        lambda: json_to_bytes("x", datatype, shape, math.prod(shape), msgspec.Raw(raw)),
    ):
        try:
            made.append(work())
        except InvalidRequest:
            made.append("refused")
    return made[0], made[1]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "shape",
    [
        (1,),
        (0,),
        (3, 0),
        (50000,),
        (50000, 1),
        (1, 50000),
        (2, 3, 7000),
        (300, 20, 5),
        (1, 1, 20000),
    ],
)
def test_nested_and_flat_lists_are_as_at_once(shape: tuple[int, ...], indent: int | None) -> None:
    array = RANDOM.random(shape).astype(np.float32)
    for data in (array.tolist(), array.ravel().tolist()):
        long, short = both(shape, json.dumps(data, indent=indent))
        assert long == short
        if indent is None:
            assert long in (array.tobytes(), "refused")


NUMBERS = ",".join(["1"] * PIECE_BYTES)
WRONG = {
    "a comma too many at the end": f"[{NUMBERS},]",
    "a comma too many at the start": f"[,{NUMBERS}]",
    "two commas": f"[{NUMBERS},,{NUMBERS}]",
    "no list": NUMBERS,
    "no end": f"[{NUMBERS}",
    "a list within": f"[{NUMBERS},[1]]",
    "two lists": f"[{NUMBERS}],[{NUMBERS}]",
    "a string": f'[{NUMBERS},"1"]',
    "null": f"[{NUMBERS},null]",
    "more after it": f"[{NUMBERS}]1",
    "an object": f'[{NUMBERS},{{"a":1}}]',
    "only commas": "[" + "," * PIECE_BYTES + "]",
    "only lists": "[" + "[]," * PIECE_BYTES + "[]]",
    "deep": "[" * PIECE_BYTES,
    "not text": "[" + NUMBERS + ",\udcff]",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_what_is_no_list_of_numbers_is_refused(text: str) -> None:
    raw = text.encode(errors="surrogateescape")
    for shape in ((len(text),), (raw.count(b",") + 1,), (2, (raw.count(b",") + 1) // 2)):
        with pytest.raises(InvalidRequest):
            long_to_bytes("x", "FP32", shape, memoryview(raw))


@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 4), (2, 1, 2)])
def test_lists_nested_otherwise_than_the_shape_are_refused(shape: tuple[int, ...]) -> None:
    for text in ("[[1,2,3],[4]]", "[[1,2],3,4]", "[[1],[2,3],[4]]", "[[[1,2],[3,4]]]"):
        long, short = both(shape, text)
        assert long == short == "refused"
