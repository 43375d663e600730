"""Awaiting an inference: what a cancellation withdraws, and what it gives back."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import InferCall, InferResult, OnOutcome, Outcome, Refused, Withdraw
from cotenant.domain.request import Refusal
from cotenant.serving.calls import infer, together

CALL = InferCall("m", [])


class Port:
    """Remembers what it was asked; ``refusal``, if given, is its answer."""

    def __init__(self, refusal: Refused | None = None) -> None:
        self.refusal = refusal
        self.withdrawn = self.released = 0

    def submit(self, call: InferCall, done: OnOutcome) -> Withdraw | Refused:
        self.done = done
        return self.refusal or self.withdraw

    def withdraw(self) -> None:
        self.withdrawn += 1

    def release(self) -> None:
        self.released += 1

    def finish(self) -> None:
        self.done(InferResult("m", "1", [], self.release))


async def begin() -> tuple[Port, asyncio.Task[Outcome]]:
    port = Port()
    task = asyncio.create_task(infer(port, CALL))
    await asyncio.sleep(0)
    return port, task


def test_an_outcome_is_returned() -> None:
    async def run() -> None:
        port, task = await begin()
        port.finish()
        assert isinstance(await task, InferResult)
        assert (port.withdrawn, port.released) == (0, 0)

    asyncio.run(run())


def test_a_refusal_is_returned() -> None:
    refused = Refused(Refusal.OVERLOADED, 5, "")
    assert asyncio.run(infer(Port(refused), CALL)) == refused


@pytest.mark.parametrize("finish_first", [True, False])
def test_what_finishes_as_it_is_cancelled_is_released(finish_first: bool) -> None:
    async def run() -> None:
        port, task = await begin()
        steps = [port.finish, task.cancel]
        for step in steps if finish_first else reversed(steps):
            step()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert port.released == 1

    asyncio.run(run())


def test_a_cancellation_withdraws() -> None:
    async def run() -> None:
        port, task = await begin()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (port.withdrawn, port.released) == (1, 0)

    asyncio.run(run())


# --- several calls together -------------------------------------------------------------------


class Ports:
    """Each call is a port of its own; ``most`` of them are taken, then it raises."""

    def __init__(self, most: int = 99) -> None:
        self.most = most
        self.ports: list[Port] = []

    def submit(self, call: InferCall, done: OnOutcome) -> Withdraw | Refused:
        if len(self.ports) == self.most:
            raise InvalidRequest("no more")
        self.ports.append(Port())
        return self.ports[-1].submit(call, done)


def test_calls_together_take_turns() -> None:
    async def run() -> None:
        node, order = Ports(), []
        async with aclosing(together(node, [CALL] * 3, 2)) as outcomes:
            first = asyncio.ensure_future(anext(outcomes))
            await asyncio.sleep(0)
            assert len(node.ports) == 2
            node.ports[1].finish()
            order.append((await first)[0])
            second = asyncio.ensure_future(anext(outcomes))
            await asyncio.sleep(0)
            assert len(node.ports) == 3
            node.ports[2].finish()
            node.ports[0].finish()
            order.append((await second)[0])
            order += [index async for index, _ in outcomes]
        assert order == [1, 2, 0]
        assert [port.withdrawn for port in node.ports] == [0, 0, 0]

    asyncio.run(run())


def test_who_closes_withdraws_what_runs_and_releases_what_waits() -> None:
    async def run() -> None:
        node = Ports()
        async with aclosing(together(node, [CALL] * 3, 3)) as outcomes:
            first = asyncio.ensure_future(anext(outcomes))
            await asyncio.sleep(0)
            node.ports[0].finish()
            node.ports[1].finish()
            assert (await first)[0] == 0
        assert [port.withdrawn for port in node.ports] == [0, 0, 1]
        assert [port.released for port in node.ports] == [0, 1, 0]

    asyncio.run(run())


def test_a_call_that_is_not_taken_withdraws_those_before() -> None:
    async def run() -> None:
        node = Ports(most=2)
        with pytest.raises(InvalidRequest):
            async with aclosing(together(node, [CALL] * 3, 3)) as outcomes:
                await anext(outcomes)
        assert [port.withdrawn for port in node.ports] == [1, 1]

    asyncio.run(run())
