"""A worker's leases: turn after turn of a batch, and what ends them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from cotenant.domain.errors import ModelError
from cotenant.domain.port import TensorMeta
from cotenant.domain.request import Lease
from cotenant.engines.base import Array, EngineMeta, PoolUse, Turn, Turns
from cotenant.runtime.messages import (
    LENGTH,
    Done,
    Failed,
    Forget,
    FromWorker,
    Held,
    Item,
    Place,
    Recall,
    Resize,
    Run,
    ToWorker,
    frame,
)
from cotenant.runtime.sequences import Sequences
from cotenant.runtime.worker import Worker

LONG = Lease(turns=100, ns=10**12)


class Counting:
    """An engine whose requests have so many turns; each waits until it is let go on."""

    def __init__(self, turns: int) -> None:
        self.turns = turns
        self.left: dict[int, int] = {}
        self.fails = False
        self.size = 100
        self.go = threading.Semaphore(0)
        text = TensorMeta("text", "BYTES", (1,))
        self.meta = EngineMeta("counting", (text,), (text,), False, turns=True, room=9, pool=100)

    def begin(self, key: int, inputs: dict[str, Array], due: int = 0, pace: int = 0) -> None:
        self.left[key] = self.turns

    def turn(self, units: int, keys: Sequence[int], budget: int) -> Turns:
        assert self.go.acquire(timeout=20)
        if self.fails:
            raise ModelError("its numbers are none")
        for key in keys:
            self.left[key] -= 1
        said = [np.array(["x"], np.object_)]
        work = (len(keys), 1) if self.size else (0, 0)
        return Turns([Turn(said, not self.left[key], said=1) for key in keys], work)

    def forget(self, keys: Sequence[int]) -> None:
        for key in keys:
            self.left.pop(key, None)

    def resize(self, size: int) -> None:
        self.size = size

    def pool_use(self) -> PoolUse:
        return PoolUse(self.size, 10 * len(self.left), 0, 0, 10)


class Rig:
    """A worker in a thread, and the node's end of its socket."""

    def __init__(self, turns: int) -> None:
        self.engine = Counting(turns)
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(20)
        self.theirs = theirs
        arena = bytearray(64)
        arena[:5] = LENGTH.pack(1) + b"a"
        self.worker = Worker(theirs, memoryview(arena))
        self.worker._sequences = Sequences(self.engine, self.worker._gather, self.worker._store)
        self.thread = threading.Thread(target=self.worker.serve, daemon=True)
        self.thread.start()

    def send(self, message: ToWorker) -> None:
        self.sock.sendall(frame(message))

    def run(self, *keys: int, lease: Lease = LONG) -> None:
        items = tuple(Item(1, (Place((1,), 0, 5),), 0, 0, key) for key in keys)
        self.send(Run(1, (0,), 1, 0, items, lease))

    def hear(self, kind: type[Any]) -> Any:
        """The next message of a kind."""
        decoder = msgspec.msgpack.Decoder(FromWorker)
        while True:
            (length,) = LENGTH.unpack(self.sock.recv(LENGTH.size, socket.MSG_WAITALL))
            message = decoder.decode(self.sock.recv(length, socket.MSG_WAITALL))
            if isinstance(message, kind):
                return message

    def turn(self) -> Done:
        self.engine.go.release()
        done: Done = self.hear(Done)
        return done


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(turns=3)
    yield made
    made.engine.go.release(100)
    made.sock.shutdown(socket.SHUT_WR)  # the node is gone; what is still said finds room
    made.thread.join(20)
    made.sock.close()
    made.theirs.close()
    assert not made.thread.is_alive()


def test_a_lease_goes_on_until_all_is_finished(rig: Rig) -> None:
    rig.run(1, 2)
    dones = [rig.turn() for _ in range(3)]
    assert [done.more for done in dones] == [True, True, False]
    assert [[o.id for o in done.items] for done in dones] == [[1, 2]] * 3
    assert all(output.spilled for done in dones for output in done.items)
    assert [o.finished for o in dones[-1].items] == [True, True]


@pytest.mark.parametrize("lease", [Lease(turns=2, ns=10**12), Lease(turns=9, ns=0)])
def test_a_lease_has_so_many_turns_and_so_much_time(rig: Rig, lease: Lease) -> None:
    rig.run(1, lease=lease)
    more = [rig.turn().more]
    while more[-1]:
        more.append(rig.turn().more)
    assert len(more) == (2 if lease.ns else 1)
    assert not rig.engine.go.acquire(blocking=False)


def test_a_recall_ends_it_with_the_turn_under_way_and_only_that_of_its_batch(rig: Rig) -> None:
    rig.run(1)
    rig.send(Recall(7))
    assert rig.turn().more
    rig.send(Recall(1))
    assert not rig.turn().more
    rig.run(1)
    assert [o.finished for o in rig.turn().items] == [True]


def test_who_is_given_up_leaves_the_lease_and_the_last_one_ends_it(rig: Rig) -> None:
    rig.run(1, 2)
    rig.send(Forget((1,)))
    first = rig.turn()
    assert [o.id for o in first.items] == [1, 2] and first.more
    rig.send(Forget((2,)))
    second = rig.turn()
    assert [o.id for o in second.items] == [2] and not second.more


def test_a_turn_that_fails_ends_the_lease_and_the_worker_lives_on(rig: Rig) -> None:
    rig.run(1)
    rig.turn()
    rig.engine.fails = True
    rig.engine.go.release()
    assert rig.hear(Failed).reason == "its numbers are none"
    rig.engine.fails = False
    rig.send(Forget((1,)))
    rig.run(2)
    assert rig.turn().more


def test_a_size_is_taken_up_in_a_lease_and_beside_one(rig: Rig) -> None:
    rig.send(Resize(50))
    assert rig.hear(Held).held == 50
    rig.run(1)
    rig.send(Resize(70))
    rig.engine.go.release()
    held = [rig.hear(Held), rig.hear(Done)][0]
    assert (held.held, held.wanted) == (70, 10)


def test_a_turn_that_finds_no_memory_ends_the_lease(rig: Rig) -> None:
    rig.send(Resize(0))
    assert rig.hear(Held).held == 0
    rig.run(1)
    done = rig.turn()
    assert done.work == (0, 0) and not done.more
