"""A model instance: a process that executes batches, one at a time, until its socket closes.

Started by the node as ``python -m cotenant.runtime.worker SOCKET_FD ARENA_FD``. Whatever happens
in here, a crash of the engine included, ends this process alone.
"""

from __future__ import annotations

import collections
import gc
import os
import resource
import select
import signal
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from math import prod
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from cotenant.devices import proctree
from cotenant.domain.device import CPU, PROCESSOR, REST_EVERY
from cotenant.domain.errors import ModelError
from cotenant.domain.workload import Joining
from cotenant.engines.accuracy import measure
from cotenant.engines.base import (
    FAILURES,
    NUMPY,
    Array,
    Engine,
    EngineMeta,
    InPlace,
    Noted,
    Opening,
    Placeable,
    Target,
    Tells,
    TurnEngine,
)
from cotenant.engines.checkdata import CheckData, read_check
from cotenant.engines.joining import ONE_ROW, judge, named_alike, same
from cotenant.engines.registry import candidates, choose
from cotenant.engines.samples import Samples, check_samples, make_samples
from cotenant.runtime.arena import map_arena
from cotenant.runtime.messages import (
    LEFT_OUT,
    LENGTH,
    Done,
    Failed,
    Forget,
    FromWorker,
    Item,
    Measure,
    Measured,
    Open,
    Opened,
    OpenFailed,
    Outputs,
    Place,
    Recall,
    Resize,
    Run,
    ToWorker,
    frame,
)
from cotenant.runtime.sequences import PROFILE_BUDGET_NS, PROFILE_RUNS, Sequences

ALIGN = 64
PROBATION, CHECK_EVERY = 8, 512
"""Where names do not say that the first axes of inputs and outputs are one, so many of the first
batches of real requests, and then one in so many, are compared with the requests alone: the rows of
a trial may all be alike in what they let the model find. It takes the time of those executions."""
REST_S = 100e-6
"""How long a worker sleeps where its device wants it to rest (``REST_EVERY``)."""


class Worker:
    """Socket, tensor memory and the model."""

    def __init__(self, sock: socket.socket, arena: memoryview) -> None:
        self._sock = sock
        self._arena = arena
        self._engine: Engine | None = None
        self._sequences: Sequences | None = None
        """In place of the engine, where that takes turns."""
        self._placeable: Placeable | None = None
        """The engine, where it matters to it which units it has."""
        self._in_place: InPlace | None = None
        """The engine, where it can write outputs into the arena."""
        self._samples: Samples | None = None
        """What the model was tried with, where more is to be measured."""
        self._unjoined = ""
        """Why no rows are joined; "" if they may be."""
        self._until_check = -1
        """Batches until one whose requests are also run alone, to compare; below 0: none is."""
        self._checked = 0
        self._moved = [0, 0]
        """Ns that a batch took to read its inputs, and to write its outputs."""
        self._ahead: collections.deque[ToWorker] = collections.deque()
        """Messages that came during a lease."""
        self._rest_every = int(os.environ.get(REST_EVERY, "0"))
        self._rested = time.monotonic_ns()
        self._decoder = msgspec.msgpack.Decoder(ToWorker)

    def serve(self) -> None:
        """Answer messages until the node goes away."""
        while (message := self._receive()) is not None:
            if isinstance(message, Open):
                opened = self._open(message)
                if isinstance(opened, Opened):
                    memory = _resident()
                    if self._sequences is not None:  # its pool is counted by itself
                        memory = proctree.resident_bytes([os.getpid()]) - self._sequences.held
                    opened = msgspec.structs.replace(opened, memory=memory)
                self._send(opened)
            elif isinstance(message, Run) and self._sequences is not None:
                self._lease(self._sequences, message)
            elif isinstance(message, Run):
                self._send(self._run(message))
            elif isinstance(message, Measure):
                self._send(self._measure(message))
            elif self._sequences is not None and isinstance(message, Forget | Resize):
                self._change(self._sequences, message)
            self._rest()

    def _change(self, sequences: Sequences, message: Forget | Resize) -> None:
        if isinstance(message, Forget):
            sequences.forget(message.keys)
        else:
            sequences.resize(message.size)
        if (held := sequences.news()) is not None:
            self._send(held)

    def _rest(self) -> None:
        """Leave the core for a moment, now and then, where the device wants that."""
        now = time.monotonic_ns()
        if self._rest_every and now - self._rested > self._rest_every:
            time.sleep(REST_S)
            self._rested = now

    def _receive(self) -> ToWorker | None:
        return self._ahead.popleft() if self._ahead else self._receive_now()

    def _receive_now(self) -> ToWorker | None:
        head = self._read(LENGTH.size)
        if head is None:
            return None
        body = self._read(LENGTH.unpack(head)[0])
        return None if body is None else self._decoder.decode(body)

    def _read(self, count: int) -> bytes | None:
        data = self._sock.recv(count, socket.MSG_WAITALL)
        return data if len(data) == count else None

    def _send(self, message: FromWorker) -> None:
        self._sock.sendall(frame(message))

    # --- loading ----------------------------------------------------------------------------

    def _open(self, order: Open) -> Opened | OpenFailed:
        try:
            target = Target(os.environ.get(PROCESSOR) or CPU, order.partitions)
            opening = Opening(Path(order.path), order.units, order.settings, order.kv, target)
            kind = choose(opening)
            engine = kind.open(opening)
            if isinstance(engine, TurnEngine):
                self._sequences = Sequences(engine, self._gather, self._store)
                opened = self._sequences.open(order)
                return msgspec.structs.replace(
                    opened, engine=kind.name, candidates=candidates(opening)
                )
            self._engine = engine
            self._placeable = engine if isinstance(engine, Placeable) else None
            self._in_place = engine if isinstance(engine, InPlace) else None
            data = None
            if order.check:
                data = read_check(Path(order.check), engine.meta.inputs, order.settings.check)
            samples = _samples(engine, order, data)
            self._samples = samples if order.measures else None
            self._unjoined = _unjoined(engine, order, samples)
            if order.joining is Joining.CHECKED and not named_alike(engine):
                self._until_check = 0
            profile = self._profile(engine, order, samples)
            accuracy = None
            if data is not None:
                step = 1 if self._unjoined else order.max_batch
                accuracy = measure(engine, order.units[0], data, step)
            if self._placeable is not None:
                self._placeable.settle()
            notes = tuple(engine.notes) if isinstance(engine, Noted) else ()
            executed = engine.executed() if isinstance(engine, Tells) else ()
        except ModelError as error:
            return OpenFailed(str(error))
        except Exception as error:  # whatever a model or its check data bring about
            traceback.print_exc()
            return OpenFailed(f"it could not be tried before it serves: {_said(error)}")
        gc.collect()
        gc.freeze()  # a pass over all that the engine's imports brought would delay a batch
        meta = msgspec.structs.replace(engine.meta, batchable=not self._unjoined)
        size = samples.size(meta)
        return Opened(
            meta,
            profile,
            size,
            accuracy,
            self._unjoined,
            notes=notes,
            engine=kind.name,
            executed=executed,
            candidates=candidates(opening),
        )

    def _profile(
        self, engine: Engine, order: Open, samples: Samples
    ) -> tuple[tuple[int, int, int], ...]:
        """Warm every session and measure it: medians over a few runs per size. Where more rows
        than one fail after all, they are not joined."""
        sizes = [1] if samples.rows else []
        while not self._unjoined and sizes and sizes[-1] < order.max_batch:
            sizes.append(min(order.max_batch, 2 * sizes[-1]))
        measured: list[tuple[int, int, int]] = []
        began = time.monotonic_ns()
        for units in order.units:
            for rows in sizes:
                late = time.monotonic_ns() - began > PROFILE_BUDGET_NS
                if (measured and late) or (rows > 1 and self._unjoined):
                    break
                inputs = samples.batch(engine, rows)
                try:
                    engine.run(units, inputs)
                except ModelError as error:
                    if rows == 1 or order.joining is Joining.TRUSTED:
                        raise
                    self._unjoined = f"{ONE_ROW}: of {rows} it says {error}"
                    break
                times = [_timed(engine, units, inputs) for _ in range(PROFILE_RUNS)]
                measured.append((units, rows, round(statistics.median(times))))
        return tuple(m for m in measured if m[1] == 1 or not self._unjoined)

    def _measure(self, order: Measure) -> Measured | Failed:
        assert self._engine is not None and self._samples is not None
        inputs = self._samples.batch(self._engine, order.rows)
        try:
            return Measured(_timed(self._engine, order.units, inputs))
        except FAILURES as error:
            return Failed(0, f"of {order.rows} rows it says {_said(error)}")

    # --- executing --------------------------------------------------------------------------

    def _run(self, order: Run) -> Done | Failed:
        started = time.monotonic_ns()
        was, together = self._unjoined, ""
        self._moved = [0, 0]
        items = None
        if self._placeable is not None:
            self._placeable.place(order.units)
        if len(order.items) == 1 or not self._unjoined:
            try:
                items = self._execute(order.threads, order.items)
            except FAILURES as error:
                if len(order.items) == 1:
                    return Failed(order.batch, self._why(order.items[0], error))
                together = _said(error)
        if items is None:
            # One request's fault, or outputs that are not row by row: nobody else's business.
            items = tuple(self._execute_alone(order.threads, item) for item in order.items)
            if together and not any(item.error for item in items):
                self._unjoined = f"requests that it answers alone failed together: {together}"
        ended = time.monotonic_ns()
        found = self._unjoined if self._unjoined != was else ""
        waited, took = max(0, started - order.sent), ended - started
        moved = self._moved[0], self._moved[1]
        return Done(order.batch, waited, took, items, found, moved=moved)

    def _lease(self, sequences: Sequences, order: Run) -> None:
        """Turn after turn of a batch, each with a message, until its lease ends or nothing is left
        of it."""
        items, lease, turns = order.items, order.lease, 0
        began = started = time.monotonic_ns()
        while True:
            try:
                outputs, work = sequences.turn(order, items)
            except FAILURES as error:
                self._send(Failed(order.batch, _said(error)))
                return
            ended = time.monotonic_ns()
            turns += 1
            gone, recalled = self._news(sequences, order.batch)
            going_on = {o.id for o in outputs if not o.finished and o.id not in gone}
            items = tuple(item for item in items if item.id in going_on)
            more = bool(items) and not recalled and turns < lease.turns
            more = more and ended - began < lease.ns and not sequences.stalled(work)
            if (held := sequences.news()) is not None:
                self._send(held)
            waited = max(0, began - order.sent) if turns == 1 else 0
            took = ended - started
            self._send(Done(order.batch, waited, took, outputs, more=more, work=work))
            if not more:
                return
            self._rest()
            started = time.monotonic_ns()

    def _news(self, sequences: Sequences, batch: int) -> tuple[set[int], bool]:
        """Take up what came during a turn: who is not waited for any more, and whether the lease is
        recalled. All else is for later."""
        gone: set[int] = set()
        recalled = False
        while select.select((self._sock,), (), (), 0)[0]:
            message = self._receive_now()
            if message is None:
                return gone, True
            if isinstance(message, Forget | Resize):
                self._change(sequences, message)
                gone.update(message.keys if isinstance(message, Forget) else ())
            elif isinstance(message, Recall):
                recalled = recalled or message.batch == batch
            else:
                self._ahead.append(message)
        return gone, recalled

    def _execute(self, units: int, items: tuple[Item, ...]) -> tuple[Outputs, ...] | None:
        """Outputs of requests run as one; None, and no joining from then on, if an output is not
        row by row: then whose is whose cannot be told."""
        assert self._engine is not None
        began = time.monotonic_ns()
        inputs, room = self._gather(self._engine.meta, items), None
        self._moved[0] += time.monotonic_ns() - began
        if len(items) == 1 and self._in_place is not None:
            room = Room(self._arena, items[0].out_offset, items[0].out_bytes)
            outputs = self._in_place.run_into(units, inputs, room)
        else:
            outputs = self._engine.run(units, inputs)
        if not self._unjoined:
            rows = sum(item.rows for item in items)
            for meta, output in zip(self._engine.meta.outputs, outputs, strict=True):
                if output.shape[:1] != (rows,):
                    shape = list(output.shape)
                    self._unjoined = f"output {meta.name!r} had the shape {shape} for {rows} rows"
                    break
        if len(items) > 1 and not self._unjoined and self._until_check >= 0:
            if not self._until_check:
                self._compare(units, items, outputs)
                self._checked += 1
                self._until_check = 1 if self._checked < PROBATION else CHECK_EVERY
            self._until_check -= 1
        if len(items) > 1 and self._unjoined:
            return None
        began = time.monotonic_ns()
        if room is not None and outputs is room.given:
            stored: tuple[Outputs, ...] = (self._store(items[0], outputs, placed=True),)
        else:
            stored = self._scatter(items, outputs)
        self._moved[1] += time.monotonic_ns() - began
        return stored

    def _compare(self, units: int, items: tuple[Item, ...], outputs: list[Array]) -> None:
        """End joining if the outputs of a batch are not those of its requests alone."""
        assert self._engine is not None
        for item, parts in zip(items, _split(items, outputs), strict=True):
            alone = self._engine.run(units, self._gather(self._engine.meta, (item,)))
            for meta, part, other in zip(self._engine.meta.outputs, parts, alone, strict=True):
                if not same(part, other):
                    self._unjoined = f"output {meta.name!r} of a request depends on its company"
                    return

    def _execute_alone(self, units: int, item: Item) -> Outputs:
        try:
            outputs = self._execute(units, (item,))
        except FAILURES as error:
            return Outputs((), error=self._why(item, error))
        assert outputs is not None
        return outputs[0]

    def _why(self, item: Item, error: Exception) -> str:
        """Why a request failed."""
        rows = max((place.shape[:1] for place in item.inputs), default=())
        if self._unjoined.startswith(ONE_ROW) and rows > (1,):
            return f"this model takes one row a request; send the {rows[0]} rows one by one"
        return _said(error)

    def _gather(self, model: EngineMeta, items: tuple[Item, ...]) -> dict[str, Array]:
        """One array an input: a view of the arena for one request, else rows joined."""
        inputs: dict[str, Array] = {}
        for index, meta in enumerate(model.inputs):
            if items[0].inputs[index] == LEFT_OUT:
                continue
            parts = [self._view(item.inputs[index], meta.datatype) for item in items]
            inputs[meta.name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return inputs

    def _view(self, place: Place, datatype: str) -> Array:
        raw = self._arena[place.offset : place.offset + place.nbytes]
        if datatype == "BYTES":
            return _strings(raw, place.shape)
        return np.frombuffer(raw, dtype=NUMPY[datatype]).reshape(place.shape)

    def _scatter(self, items: tuple[Item, ...], outputs: list[Array]) -> tuple[Outputs, ...]:
        if len(items) == 1:
            return (self._store(items[0], outputs),)
        pairs = zip(items, _split(items, outputs), strict=True)
        return tuple(self._store(item, parts) for item, parts in pairs)

    def _store(self, item: Item, parts: list[Array], *, placed: bool = False) -> Outputs:
        """``placed``: they lie where they are to be."""
        places: list[Place] = []
        spilled: list[bytes] = []
        offset, end = item.out_offset, item.out_offset + item.out_bytes
        for part in parts:
            data = _packed(part)
            size = len(data)
            if offset + size > end:
                places.append(Place(part.shape, -1, size))
                spilled.append(bytes(data))
                continue
            if not placed:
                self._arena[offset : offset + size] = data
            places.append(Place(part.shape, offset, size))
            offset += _aligned(size)
        return Outputs(tuple(places), tuple(spilled))


class Room:
    """A request's part of the arena for its outputs, laid out as ``_store`` does."""

    def __init__(self, arena: memoryview, offset: int, size: int) -> None:
        self._arena = arena
        self._offset = offset
        self._end = offset + size
        self.given: list[Array] | None = None
        """What was taken last."""

    def take(self, outputs: Sequence[tuple[tuple[int, ...], npt.DTypeLike]]) -> list[Array] | None:
        """See ``engines.base.Room``."""
        found: list[Array] = []
        offset = self._offset
        for shape, dtype in outputs:
            size = prod(shape) * np.dtype(dtype).itemsize
            if offset + size > self._end:
                return None
            found.append(np.ndarray(shape, dtype, self._arena, offset))
            offset += _aligned(size)
        self.given = found
        return found


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _split(items: tuple[Item, ...], outputs: list[Array]) -> list[list[Array]]:
    """Each request's rows of a batch's outputs."""
    found, row = [], 0
    for item in items:
        found.append([output[row : row + item.rows] for output in outputs])
        row += item.rows
    return found


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _packed(array: Array) -> memoryview | bytes:
    """The tensor's bytes, row-major; strings length-prefixed."""
    if array.dtype == np.object_:
        encoded = [str(x).encode() if not isinstance(x, bytes) else x for x in array.ravel()]
        return b"".join(LENGTH.pack(len(x)) + x for x in encoded)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _strings(raw: memoryview, shape: tuple[int, ...]) -> Array:
    """Length-prefixed elements as an array of str (what ONNX Runtime takes)."""
    found: list[str] = []
    position = 0
    while position < len(raw):
        (length,) = LENGTH.unpack_from(raw, position)
        position += LENGTH.size
        found.append(str(raw[position : position + length], "utf-8"))
        position += length
    return np.array(found, dtype=np.object_).reshape(shape)


def _samples(engine: Engine, order: Open, data: CheckData | None) -> Samples:
    if data is not None:
        return check_samples(engine, order.units[0], data)
    return make_samples(engine, order.units[0], order.settings.shapes, order.settings.ranges)


def _unjoined(engine: Engine, order: Open, samples: Samples) -> str:
    """Why rows are not to be joined, on somebody's word or by trial; "" if they are."""
    if order.joining is Joining.NONE:
        return "its settings say so (batch: none)"
    if order.joining is Joining.TRUSTED and engine.meta.batchable:
        return ""
    return judge(engine, order.units[0], samples, order.max_batch)


def _resident() -> int:
    """Bytes that this process has had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _timed(engine: Engine, units: int, inputs: dict[str, Array]) -> int:
    """Ns of one execution, less what it waited for a core: while a version is loaded jobs have
    them, and a batch that looks too long for the objective is never tried."""
    before = proctree.run_delays()
    began = time.monotonic_ns()
    engine.run(units, inputs)
    took = time.monotonic_ns() - began
    waited = (ns - before.get(tid, 0) for tid, ns in proctree.run_delays().items())
    return max(1, took - max(waited, default=0))


def main() -> None:
    """Entry point of the process."""
    parent = os.getppid()
    proctree.end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)
    # Ctrl-C reaches the whole foreground group; ending workers is the node's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    Worker(sock, map_arena(int(sys.argv[2]))).serve()
    # Tidying up takes an interpreter with a model tens of milliseconds, at real-time priority on
    # a core that its successor needs. There is nothing to save.
    os._exit(0)


if __name__ == "__main__":
    main()
