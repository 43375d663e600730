"""Messages put together from the pieces of a body, and the memory they take meanwhile."""

from __future__ import annotations

import struct

from cotenant.domain.errors import NotReady
from cotenant.serving.grpc_wire import Assembler, Code, status_of
from cotenant.serving.intake import Budget, Share

BODY = bytes(range(100))
MESSAGE = memoryview(struct.pack(">BI", 0, len(BODY)) + BODY)


def pieces(data: memoryview, size: int) -> list[memoryview]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_pieces_of_a_message_under_way_take_memory_as_they_come() -> None:
    budget = Budget(1000)
    assembler = Assembler(1000, Share(budget), "")
    assert not list(assembler.feed([MESSAGE[:15]]))
    begun = budget.held
    assert not list(assembler.feed(pieces(MESSAGE[15:75], 7)))
    assert budget.held == begun + 60
    (message,) = assembler.feed(pieces(MESSAGE[75:], 7))
    assert bytes(message.data) == BODY
    assert message.held == budget.held


def test_a_run_of_pieces_ends_one_message_and_begins_the_next() -> None:
    assembler = Assembler(1000, Share(Budget(10_000)), "")
    assert not list(assembler.feed([MESSAGE[:15]]))
    both = memoryview(bytes(MESSAGE[15:]) + bytes(MESSAGE))
    assert [bytes(m.data) for m in assembler.feed(pieces(both, 9))] == [BODY, BODY]


def test_a_model_that_is_being_loaded_is_to_be_asked_for_again() -> None:
    status = status_of(NotReady("it is being loaded"))
    assert status is not None
    assert status.code is Code.UNAVAILABLE
    assert int(dict(status.metadata)["retry-after-ms"]) > 0
