"""From a call to a request in tensor memory: what does not fit is refused by name."""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cotenant.domain.errors import InvalidRequest, TooLarge
from cotenant.domain.port import InferCall, InferResult, Outcome, Refused, TensorIn, TensorMeta
from cotenant.domain.request import Refusal
from cotenant.engines.base import EngineMeta
from cotenant.runtime.arena import Arena, ArenaFull
from cotenant.runtime.calls import OutputSizes, Pending, most_elements, place, rows_of, signature
from cotenant.runtime.messages import Item, Outputs, Place


def meta(*inputs: tuple[str, str, tuple[int, ...]], batchable: bool = True) -> EngineMeta:
    outputs = (TensorMeta("y", "FP32", (-1, 2)), TensorMeta("z", "FP32", (-1, 1)))
    return EngineMeta("test", tuple(TensorMeta(*i) for i in inputs), outputs, batchable)


IMAGE = meta(("x", "FP32", (-1, 3)))
PAIR = meta(("x", "FP32", (-1, 3)), ("n", "INT64", (-1, 1)))
TEXT = meta(("t", "BYTES", (-1, 1)))


def tensor(name: str = "x", shape: tuple[int, ...] = (1, 3), **changes: Any) -> TensorIn:
    fields: dict[str, Any] = {"datatype": "FP32", "nbytes": 4 * math.prod(shape)}
    fields |= changes
    fields.setdefault("data", bytes(fields["nbytes"]))
    return TensorIn(name=name, shape=shape, **fields)


def strings(*texts: bytes, shape: tuple[int, ...] | None = None) -> TensorIn:
    data = b"".join(struct.pack("<I", len(t)) + t for t in texts)
    shape = shape or (len(texts), 1)
    return TensorIn("t", "BYTES", shape, len(data), data)


def call(*inputs: TensorIn, outputs: tuple[str, ...] = ()) -> InferCall:
    return InferCall("m", list(inputs), outputs=outputs)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena("test", 2**16)
    yield made
    made.close()


def test_rows_are_the_first_axis() -> None:
    assert rows_of(IMAGE, 8, call(tensor(shape=(5, 3)))) == 5


def test_a_model_without_a_batch_axis_has_one_row() -> None:
    fixed = meta(("x", "FP32", (2, 3)), batchable=False)
    assert rows_of(fixed, 8, call(tensor(shape=(2, 3)))) == 1


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([tensor("q")], "input 'q': the model has no such input; the model's inputs are 'x', 'n'"),
        ([tensor()], "input 'n' is missing"),
        ([tensor(datatype="FP64")], "has the datatype FP64, the model takes FP32"),
        ([tensor(shape=(1, 4))], "has the shape [1, 4], the model takes [-1, 3]"),
        ([tensor(shape=(3,))], "has the shape [3]"),
        ([tensor(shape=(-1, 3), nbytes=12)], "has the shape [-1, 3]"),
        ([tensor(nbytes=11)], "has 11 bytes; shape [1, 3] of FP32 needs 12"),
        ([tensor(shape=(9, 3)), tensor("n", (9, 1), datatype="INT64", nbytes=72)], "1 to 8 rows"),
        ([tensor(shape=(0, 3)), tensor("n", (0, 1), datatype="INT64", nbytes=0)], "1 to 8 rows"),
        (
            [tensor(shape=(2, 3)), tensor("n", (1, 1), datatype="INT64", nbytes=8)],
            "equal first dimensions",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_named(inputs: list[TensorIn], said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        rows_of(PAIR, 8, call(*inputs))
    assert said in str(caught.value)


def test_an_unknown_output_is_named_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match="output 'q': the model's outputs are 'y', 'z'"):
        rows_of(IMAGE, 8, call(tensor(), outputs=("q",)))


def test_requests_batch_together_if_their_free_axes_agree() -> None:
    free = meta(("x", "FP32", (-1, -1)))
    assert signature(IMAGE, call(tensor(shape=(5, 3)))) == ""
    one, two = (signature(free, call(tensor(shape=(n, 7)))) for n in (1, 2))
    assert one == two != signature(free, call(tensor(shape=(1, 8))))


def test_inputs_are_copied_into_tensor_memory(arena: Arena) -> None:
    data = np.arange(3, dtype=np.float32).tobytes()
    _, block, item = place(IMAGE, call(tensor(data=data)), 1, arena, 100, False)
    (where,) = item.inputs
    assert bytes(arena.memory[where.offset : where.offset + where.nbytes]) == data
    assert item.out_offset >= where.offset + where.nbytes
    arena.free(block)
    assert arena.used == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("datatype", "dtype"), [("FP16", "f2"), ("FP32", "f4"), ("FP64", "f8")])
def test_what_is_not_finite_is_refused_and_keeps_no_memory(
    arena: Arena, datatype: str, dtype: str, bad: float
) -> None:
    data = np.array([[1, bad, 3]], dtype).tobytes()
    model = meta(("x", datatype, (-1, 3)))
    request = call(tensor(datatype=datatype, nbytes=len(data), data=data))
    with pytest.raises(InvalidRequest, match="NaN or infinity"):
        place(model, request, 1, arena, 0, True)
    assert arena.used == 0
    place(model, request, 1, arena, 0, False)


def test_data_that_are_not_as_long_as_they_say_are_refused(arena: Arena) -> None:
    with pytest.raises(InvalidRequest, match="do not have 12 bytes"):
        place(IMAGE, call(tensor(data=b"123")), 1, arena, 0, False)
    assert arena.used == 0


def test_a_source_that_fails_keeps_no_memory(arena: Arena) -> None:
    def gone(_: memoryview) -> None:
        raise OSError("the region is gone")

    with pytest.raises(OSError, match="gone"):
        place(IMAGE, call(tensor(data=None, read_into=gone)), 1, arena, 0, False)
    assert arena.used == 0


def test_what_does_not_fit_now_and_what_never_fits_are_told_apart(arena: Arena) -> None:
    arena.alloc(arena.size)
    with pytest.raises(ArenaFull):
        place(IMAGE, call(tensor()), 1, arena, 0, False)
    with pytest.raises(TooLarge, match=r"raise limits\.arena"):
        place(IMAGE, call(tensor()), 1, arena, arena.size, False)


@pytest.mark.parametrize(
    "given",
    [
        strings(b"a", b"b", shape=(3, 1)),
        strings(b"a", b"b", shape=(1, 1)),
        TensorIn("t", "BYTES", (1, 1), 3, b"\x01\x00\x00"),
        TensorIn("t", "BYTES", (1, 1), 8, b"\xff\xff\xff\xff\x00\x00\x00\x00"),
        TensorIn("t", "BYTES", (1, 1), 0, b""),
    ],
)
def test_strings_that_do_not_fill_their_data_are_refused(arena: Arena, given: TensorIn) -> None:
    with pytest.raises(InvalidRequest, match="length-prefixed"):
        place(TEXT, call(given), 1, arena, 0, False)
    assert arena.used == 0


def test_strings_that_do_are_taken(arena: Arena) -> None:
    place(TEXT, call(strings(b"a", b"", "ä".encode())), 3, arena, 0, False)


@pytest.mark.parametrize("raw", [b"\xff", b"ok\x80", b"\xed\xa0\x80", b"\xc3", b"\xc0\x80"])
def test_bytes_that_are_no_text_are_refused_by_name(arena: Arena, raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="input 't': element 1"):
        place(TEXT, call(strings(b"a", raw)), 2, arena, 0, False)
    assert arena.used == 0


@pytest.mark.parametrize(
    ("model", "most"),
    [
        (IMAGE, 8 * 3),
        (PAIR, 8 * 4),
        (TEXT, None),
        (meta(("x", "FP32", (-1, -1))), None),
        (meta(("x", "FP32", (2, 3)), batchable=False), 6),
        (meta(("x", "FP32", (-1, 3)), batchable=False), None),
    ],
)
def test_what_a_models_inputs_can_hold(model: EngineMeta, most: int | None) -> None:
    assert most_elements(model, 8) == most


# --- answers --------------------------------------------------------------------------------


def pending(arena: Arena, *wanted: str) -> tuple[Pending, list[Outcome]]:
    """A request, and the list that its outcome will be added to."""
    block, said = arena.alloc(100), []
    placed = arena, block, Item(1, (), block, 100)
    return Pending(1, call(outputs=wanted), "1", IMAGE, placed, said.append), said


def outputs(arena: Arena, at: int) -> Outputs:
    arena.memory[at : at + 8] = np.array([1, 2], np.float32).tobytes()
    return Outputs((Place((1, 2), at, 8), Place((1, 1), -1, 4)), (b"\x00\x00\x80?",))


def test_an_answer_has_the_outputs_asked_for_in_their_order(arena: Arena) -> None:
    async def answer() -> None:
        waiting, said = pending(arena, "z", "y")
        waiting.answer(outputs(arena, waiting.block))
        assert not said, "never from within"
        await asyncio.sleep(0)
        (result,) = said
        assert isinstance(result, InferResult)
        assert [t.name for t in result.outputs] == ["z", "y"]
        assert np.frombuffer(result.outputs[0].data, np.float32).tolist() == [1.0]
        assert np.frombuffer(result.outputs[1].data, np.float32).tolist() == [1.0, 2.0]
        result.release()
        result.release()
        assert arena.used == 0

    asyncio.run(answer())


def test_memory_comes_back_from_whoever_is_refused_or_went_away(arena: Arena) -> None:
    async def refuse() -> None:
        (refused, refusal), (gone, nothing), (late, neither) = (pending(arena) for _ in range(3))
        refused.refuse(Refused(Refusal.OVERLOADED, 0, ""))
        gone.withdraw()
        gone.answer(outputs(arena, gone.block))
        late.answer(outputs(arena, late.block))
        late.withdraw()
        await asyncio.sleep(0)
        assert refusal == [Refused(Refusal.OVERLOADED, 0, "")]
        assert not nothing
        assert not neither
        assert arena.used == 0

    asyncio.run(refuse())


def test_room_for_outputs_is_known_from_the_model_or_learned() -> None:
    known = OutputSizes(IMAGE)
    assert known.expect(4) == 4 * known.expect(1) >= 4 * 12
    free = OutputSizes(meta(("x", "FP32", (-1, 3))))
    big = Outputs((Place((2, 1000), -1, 10**6),), (bytes(10**6),))
    free.learn(2, big)
    assert free.expect(2) >= 10**6
