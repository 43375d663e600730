"""The child's side of requests that live through several turns, around a ``TurnEngine``.

A request is begun when a batch first names it, and has a turn with each batch that does. It is kept
until it is finished, fails or is to be forgotten.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Final

from cotenant.domain.errors import ModelError
from cotenant.engines.base import (
    FAILURES,
    Array,
    EngineMeta,
    Pooled,
    Turn,
    TurnEngine,
    Turns,
)
from cotenant.engines.samples import Samples, make_samples
from cotenant.policy.memory.account import PoolUse
from cotenant.runtime.messages import Held, Item, Open, Opened, Outputs, Run

PROFILE_RUNS: Final = 5
PROFILE_BUDGET_NS: Final = 2_000_000_000
"""Profiling stops here: a slow model learns the rest from traffic."""
Inputs = dict[str, Array]


class Sequences:
    """See the module's text. ``read`` gives a request's inputs, ``store`` puts outputs where they
    belong."""

    def __init__(
        self,
        engine: TurnEngine,
        read: Callable[[EngineMeta, tuple[Item, ...]], Inputs],
        store: Callable[[Item, list[Array]], Outputs],
    ) -> None:
        self._engine = engine
        self._read = read
        self._store = store
        self._begun: set[int] = set()
        self._told: PoolUse | None = None

    def open(self, order: Open) -> Opened:
        """Warm and measure it: the first turn of so many requests. Raises ModelError."""
        if order.check:
            raise ModelError("a model that answers in turns is not checked; remove its check.npz")
        settings = order.settings
        trial = _OneTurn(self._engine)
        samples = make_samples(trial, order.units[0], settings.shapes, settings.ranges)
        return Opened(self._engine.meta, self._profile(order, samples) if samples.rows else ())

    def _profile(self, order: Open, samples: Samples) -> tuple[tuple[int, int, int], ...]:
        measured: list[tuple[int, int, int]] = []
        began = time.monotonic_ns()
        for units in order.units:
            count = 1
            while not measured or time.monotonic_ns() - began < PROFILE_BUDGET_NS:
                rows = [samples.rows[i % len(samples.rows)] for i in range(count)]
                times = [self._first_turn(units, rows) for _ in range(PROFILE_RUNS)]
                measured.append((units, count, round(statistics.median(times))))
                if count >= order.max_batch:
                    break
                count = min(order.max_batch, 2 * count)
        return tuple(measured)

    def _first_turn(self, units: int, rows: list[Inputs]) -> int:
        keys = range(-len(rows), 0)  # no request has such a key
        for key, inputs in zip(keys, rows, strict=True):
            self._engine.begin(key, inputs)
        began = time.monotonic_ns()
        self._engine.turn(units, keys, 0)
        took = time.monotonic_ns() - began
        self._engine.forget(keys)
        return max(1, took)

    def turn(
        self, order: Run, items: tuple[Item, ...]
    ) -> tuple[tuple[Outputs, ...], tuple[int, int]]:
        """A turn of these of a batch, and its work. Raises ModelError where all of it fails."""
        refused: dict[int, str] = {}
        for item in items:
            if item.id not in self._begun:
                try:
                    inputs = self._read(self._engine.meta, (item,))
                    self._engine.begin(item.id, inputs, item.due, item.pace)
                except FAILURES as error:
                    refused[item.id] = str(error) or type(error).__name__
                else:
                    self._begun.add(item.id)
        keys = [item.id for item in items if item.id not in refused]
        done = Turns([])
        if keys:
            done = self._engine.turn(order.threads, keys, order.lease.budget)
        turns = iter(done.turns)
        outputs = tuple(
            Outputs((), error=refused[item.id], id=item.id)
            if item.id in refused
            else self._came_of(item, next(turns))
            for item in items
        )
        return outputs, done.work

    def _came_of(self, item: Item, turn: Turn) -> Outputs:
        if turn.finished:
            self._begun.discard(item.id)
        if turn.error:
            return Outputs((), error=turn.error, id=item.id)
        stored = self._store(item, turn.outputs or [])
        return Outputs(stored.places, stored.spilled, "", turn.finished, id=item.id, said=turn.said)

    def resize(self, size: int) -> None:
        """A pool may have so many bytes."""
        if isinstance(self._engine, Pooled):
            self._engine.resize(size)

    @property
    def held(self) -> int:
        """Bytes that the pool has."""
        return self._engine.pool_use().held if isinstance(self._engine, Pooled) else 0

    def stalled(self, work: tuple[int, int]) -> bool:
        """Whether a turn with this work could do nothing, for want of memory."""
        return work == (0, 0) and isinstance(self._engine, Pooled)

    def news(self) -> Held | None:
        """What the pool has and wants, if that is worth telling."""
        if not isinstance(self._engine, Pooled):
            return None
        use = self._engine.pool_use()
        if not use.tells(self._told, self._engine.meta.pool):
            return None
        self._told = use
        return Held(*use)

    def forget(self, keys: tuple[int, ...]) -> None:
        """Nobody waits for these requests any more."""
        self._begun.difference_update(keys)
        self._engine.forget(keys)


class _OneTurn:
    """A turn engine as what samples are tried with: the first turn alone."""

    axes: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, engine: TurnEngine) -> None:
        self._engine = engine
        self.meta = engine.meta

    def run(self, units: int, inputs: Inputs) -> list[Array]:
        self._engine.begin(-1, inputs)
        (turn,) = self._engine.turn(units, (-1,), 0).turns
        self._engine.forget((-1,))
        return turn.outputs or []
