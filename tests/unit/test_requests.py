"""Requests between call and outcome: what is sent, what is kept, and what comes back of memory."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import InferCall, InferResult, Refused, TensorIn, TensorMeta
from cotenant.domain.request import Batch, Refusal
from cotenant.domain.workload import DEFAULT_SLO, ServiceSpec
from cotenant.engines.base import EngineMeta
from cotenant.runtime.arena import Arena
from cotenant.runtime.messages import Done, Failed, Outputs, Place
from cotenant.runtime.requests import Requests

TEXT = TensorMeta("text", "BYTES", (1,))
META = EngineMeta("test", (TEXT,), (TEXT,), batchable=False, turns=True)
UNREAD = 4096


def packed(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


class Rig:
    """Requests of one service ``s`` whose model takes turns. ``fed`` holds the events; ``said``
    what clients were told; ``ends`` who left its worker, and whether that is to forget it."""

    def __init__(self, meta: EngineMeta = META) -> None:
        self.fed: list[e.Event] = []
        self.said: dict[int, list[Any]] = {}
        self.forgotten: list[tuple[str, int]] = []
        self.arena = Arena("test", 2**20)
        self.react: Callable[[e.Event], None] = lambda _: None
        instances = SimpleNamespace(
            arena=self.arena,
            spec=ServiceSpec("s", "s", DEFAULT_SLO),
            forget=lambda worker, key: self.forgotten.append((worker, key)),
        )
        loaded = SimpleNamespace(meta=meta, files=SimpleNamespace(version="1"))
        models = SimpleNamespace(
            version=lambda *_: loaded, services={"s": instances}, leaving=set()
        )
        self.running: dict[int, Any] = {}
        self.service = SimpleNamespace(max_batch=8, variants={}, serving={}, home="cpu")
        worker = SimpleNamespace(variant="original")
        state = SimpleNamespace(
            services={"s": self.service},
            running=self.running,
            workers={"w": worker, "v": worker, "w2": worker, "other": worker},
        )
        self.requests = Requests(
            models,  # type: ignore[arg-type]
            SimpleNamespace(turned_away=lambda *_: None),  # type: ignore[arg-type]
            SimpleNamespace(state=state),  # type: ignore[arg-type]
            self.feed,
            lambda: 0,
            UNREAD,
        )

    def feed(self, event: e.Event) -> None:
        self.fed.append(event)
        self.react(event)

    def ask(self, text: str = "hello", pieces: bool = True) -> tuple[int, Any]:
        """The next request's number, and how to withdraw it."""
        data = packed(text)
        number = len(self.said) + 1
        call = InferCall("s", [TensorIn("text", "BYTES", (1,), len(data), data)], pieces=pieces)
        withdraw = self.requests.accept(call, self.said.setdefault(number, []).append)
        return number, withdraw

    def dispatch(self, batch: int, *requests: int, worker: str = "w") -> None:
        order = Batch(batch, "s", "1", requests, len(requests))
        self.running[batch] = SimpleNamespace(batch=order)
        self.items = self.requests.items(order, worker)

    def turn(self, batch: int, *said: tuple[str, bool]) -> None:
        """The worker's answer: text ("": none) and whether finished, by request; what follows is
        what the dispatcher does."""
        outputs = []
        for item, (text, finished) in zip(self.items, said, strict=True):
            data = packed(text)
            places, spilled = ((Place((1,), -1, len(data)),), (data,)) if text else ((), ())
            outputs.append(Outputs(places, spilled, finished=finished, id=item.id, said=bool(text)))
        self.react = self.decide
        self.requests.on_result(Done(batch, 0, 0, tuple(outputs)))
        self.react = lambda _: None

    def decide(self, event: e.Event) -> None:
        if isinstance(event, e.BatchDone):
            batch = self.running.pop(event.batch).batch
            rest = tuple(r for r in batch.requests if r not in event.unfinished)
            self.requests.on_emit(a.Emit("", event.batch, event.emitted))
            self.requests.on_complete(a.Complete("", event.batch, rest))

    def texts(self, number: int) -> list[str | None]:
        return [
            bytes(result.outputs[0].data)[4:].decode() if result.outputs else None
            for result in self.said[number]
            if isinstance(result, InferResult)
        ]

    def only(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.fed if isinstance(event, kind)]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.arena.close()


def on_loop(test: Callable[[Rig], Any]) -> Callable[[Rig], None]:
    def run(rig: Rig) -> None:
        asyncio.run(test(rig))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@on_loop
async def test_pieces_come_in_order_and_the_last_has_no_more(rig: Rig) -> None:
    number, _ = rig.ask()
    rig.dispatch(1, number)
    rig.turn(1, ("a", False))
    rig.dispatch(2, number)
    rig.turn(2, ("", False))
    rig.dispatch(3, number)
    rig.turn(3, ("c", True))
    await asyncio.sleep(0)
    assert rig.texts(number) == ["a", "c"]
    assert [result.more for result in rig.said[number]] == [True, False]
    done = [(event.unfinished, event.emitted) for event in rig.only(e.BatchDone)]
    assert done == [((number,), (number,)), ((number,), ()), ((), ())]
    for result in rig.said[number]:
        result.release()
    assert rig.arena.used == 0
    assert not rig.forgotten, "the worker knows that it has ended"
    assert len(rig.requests) == 0


@on_loop
async def test_an_end_may_have_no_outputs(rig: Rig) -> None:
    number, _ = rig.ask()
    rig.dispatch(1, number)
    rig.turn(1, ("", True))
    await asyncio.sleep(0)
    assert rig.texts(number) == [None]


@on_loop
async def test_requests_of_one_turn_end_each_in_its_own(rig: Rig) -> None:
    (first, _), (second, _) = rig.ask("one"), rig.ask("two, longer")
    await asyncio.sleep(0)
    assert [event.more for event in rig.only(e.Arrived)] == [True, False]
    assert {event.request.shape for event in rig.only(e.Arrived)} == {""}
    rig.dispatch(1, first, second)
    assert [item.id for item in rig.items] == [first, second]
    rig.turn(1, ("a", False), ("b", True))
    rig.dispatch(2, first)
    rig.turn(2, ("c", True))
    await asyncio.sleep(0)
    assert (rig.texts(first), rig.texts(second)) == (["a", "c"], ["b"])


@on_loop
async def test_who_is_refused_between_turns_is_forgotten_by_its_worker(rig: Rig) -> None:
    number, withdraw = rig.ask()
    rig.dispatch(1, number)
    rig.turn(1, ("a", False))
    withdraw()
    assert rig.only(e.Cancelled) == [e.Cancelled(number)]
    rig.requests.on_reject(a.Reject("", number, Refusal.CANCELLED))
    await asyncio.sleep(0)
    assert rig.forgotten == [("w", number)]
    assert rig.said[number] == [], "nobody waits for it"
    assert rig.arena.used == 0


@on_loop
async def test_pieces_that_nobody_reads_withdraw_their_request(rig: Rig) -> None:
    number, _ = rig.ask()
    for batch in range(1, 4):
        rig.dispatch(batch, number)
        rig.turn(batch, ("x" * (UNREAD // 2), False))
    assert rig.only(e.Cancelled)[:1] == [e.Cancelled(number)]
    rig.requests.on_reject(a.Reject("", number, Refusal.CANCELLED))
    await asyncio.sleep(0)
    *pieces, refused = rig.said[number]
    assert isinstance(refused, Refused)
    assert refused.refusal is Refusal.UNREAD
    assert sum(p.outputs[0].data.nbytes for p in pieces) <= 1.5 * UNREAD
    assert rig.arena.used == 0


@on_loop
async def test_pieces_that_are_read_may_be_as_many_as_they_like(rig: Rig) -> None:
    number, _ = rig.ask()
    for batch in range(1, 20):
        rig.dispatch(batch, number)
        rig.turn(batch, ("x" * (UNREAD // 2), False))
        await asyncio.sleep(0)
        rig.said[number][-1].release()
    assert not rig.only(e.Cancelled)


@on_loop
async def test_a_request_whose_worker_changes_is_kept_by_the_new_one_alone(rig: Rig) -> None:
    number, _ = rig.ask()
    rig.dispatch(1, number)
    rig.dispatch(2, number, worker="v")
    assert rig.forgotten == [("w", number)]


@on_loop
async def test_a_model_that_answers_in_pieces_needs_a_caller_that_takes_them(rig: Rig) -> None:
    with pytest.raises(InvalidRequest, match="pieces"):
        rig.ask(pieces=False)
    assert rig.arena.used == 0


@on_loop
async def test_a_batch_that_failed_or_was_given_up_sends_nothing(rig: Rig) -> None:
    number, _ = rig.ask()
    rig.dispatch(1, number)
    rig.requests.on_result(Failed(1, "broken"))
    assert rig.only(e.BatchFailed) == [e.BatchFailed(1, "broken")]
    rig.running.clear()
    rig.requests.on_result(Done(1, 0, 0, (Outputs(()),)))
    await asyncio.sleep(0)
    assert rig.said[number] == []
