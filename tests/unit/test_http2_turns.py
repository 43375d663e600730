"""A connection leaves the loop to others, whatever is sent on it, and goes on by itself."""

from __future__ import annotations

import asyncio

import pytest

from cotenant.serving.http2_credit import TURN
from cotenant.serving.http2_frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    RST_STREAM,
    WINDOW_UPDATE,
    frame,
    word_frame,
)
from tests.property.test_http2 import Play, block, message

PINGS = frame(PING, 0, 0, bytes(8)) * (3 * TURN)
CALLS = b"".join(
    frame(HEADERS, END_HEADERS, n, block("ModelInfer")) + frame(DATA, END_STREAM, n, message())
    for n in range(1, 200, 2)
)
STREAM = frame(HEADERS, END_HEADERS, 1, block("ModelStreamInfer"))


async def turns(data: bytes) -> int:
    """In how many turns of the loop a connection goes through ``data``."""
    the = Play()
    the.connection.data_received(data)
    count = 1
    while the.connection._later:
        assert not the.transport.reading
        await asyncio.sleep(0)
        count += 1
    assert the.transport.reading
    assert not the.transport.closed
    the.end()
    return count


@pytest.mark.parametrize(
    ("data", "least"),
    [
        (frame(PING, 0, 0, bytes(8)), 1),
        (PINGS, 3),
        (CALLS, 4),
        (STREAM + frame(DATA, 0, 1, bytes(5) * 200), 4),
    ],
)
def test_much_takes_many_turns(data: bytes, least: int) -> None:
    assert least <= asyncio.run(turns(data)) <= 40 * least


def test_a_request_given_up_in_a_later_turn_is_withdrawn() -> None:
    async def play() -> None:
        the = Play()
        the.connection.data_received(CALLS + word_frame(RST_STREAM, 1, 8))
        while the.connection._later:
            await asyncio.sleep(0)
        assert 1 not in the.connection.streams
        the.end()

    asyncio.run(play())


def test_windows_that_reopen_are_used_though_the_turn_is_over() -> None:
    async def play() -> None:
        the = Play(high=100)
        the.connection.data_received(CALLS)
        for _ in range(1000):
            the.node.answer()
            the.transport.taken()
            the.connection.data_received(word_frame(WINDOW_UPDATE, 0, 10_000))
            await asyncio.sleep(0)
        assert not the.connection.streams
        the.end()

    asyncio.run(play())
