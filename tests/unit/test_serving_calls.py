"""Awaiting an inference: what a cancellation withdraws, and what it gives back."""

from __future__ import annotations

import asyncio

import pytest

from cotenant.domain.port import InferCall, InferResult, OnOutcome, Outcome, Refused, Withdraw
from cotenant.domain.request import Refusal
from cotenant.serving.calls import infer

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
