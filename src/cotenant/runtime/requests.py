"""Requests between a front end's call and its outcome.

A call is accepted in one pass: refused at once where it can be, checked against its model, placed
in tensor memory, and made a ``Request`` for the dispatcher. All that arrive in one turn of the loop
are handed over together, so that they may become one batch. On the node's loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import msgspec

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import InferCall, OnOutcome, Refused, Withdraw
from cotenant.domain.request import Batch, Refusal, Request
from cotenant.domain.units import MS
from cotenant.domain.workload import ORIGINAL, PRIORITY_CLASSES
from cotenant.engines.base import size_of
from cotenant.policy.dispatcher import Dispatcher
from cotenant.runtime import calls
from cotenant.runtime.arena import ArenaFull
from cotenant.runtime.calls import OutputSizes, Pending
from cotenant.runtime.messages import Done, Failed, Item, Outputs
from cotenant.runtime.models import Models
from cotenant.runtime.results import Results
from cotenant.telemetry.monitor import Monitor

RETRY_MEMORY = 50 * MS


class Requests:
    """See the module's text. ``feed`` hands an event to the dispatcher; ``clock`` is the node's;
    ``unread`` is how many bytes of an answer in pieces may wait for its client."""

    def __init__(
        self,
        models: Models,
        monitor: Monitor,
        dispatcher: Dispatcher,
        feed: Callable[[e.Event], None],
        clock: Callable[[], int],
        unread: int,
    ) -> None:
        self.draining = False
        """Whether nothing more is accepted."""
        self._models = models
        self._monitor = monitor
        self._state = dispatcher.state
        self._feed = feed
        self._clock = clock
        self._unread = unread
        self._next = 1
        self._arrivals: list[Request] = []
        self._pending: dict[int, Pending] = {}
        self._results: dict[int, dict[int, Outputs]] = {}
        """Of a batch that is done: what each of its requests gave."""
        self._sizes: dict[tuple[str, str], OutputSizes] = {}
        self._open: dict[str, int] = {}
        """How many are pending, by service."""
        self._drained: dict[str, asyncio.Event] = {}
        self.results = Results(feed)

    def __len__(self) -> int:
        """How many were accepted and not answered yet."""
        return len(self._pending)

    # --- in -----------------------------------------------------------------------------------

    def most_elements(self, name: str, version: str) -> int | None:
        """See NodePort."""
        meta = self._models.version(name, version).meta
        return calls.most_elements(meta, self._state.services[name].max_batch)

    def accept(self, call: InferCall, done: OnOutcome) -> Withdraw | Refused:
        """See ``NodePort.submit``."""
        name = call.model
        if self.draining:
            return self._turn_away(name, Refusal.SHUTTING_DOWN, 0, "")
        loaded = self._models.version(name, call.version)
        if name in self._models.leaving:
            return self._turn_away(name, Refusal.UNAVAILABLE, 0, "the model is being unloaded")
        if not 0 <= call.priority < PRIORITY_CLASSES:
            raise InvalidRequest(f"priority {call.priority}: classes are 0 (high) to 2 (low)")
        instances, meta, version = self._models.services[name], loaded.meta, loaded.files.version
        if meta.turns and not call.pieces:
            raise InvalidRequest(
                f"model {name!r} answers in pieces; use generate, generate_stream (REST) or"
                " ModelStreamInfer (gRPC)"
            )
        spec = instances.spec
        rows = calls.rows_of(meta, self._state.services[name].max_batch, call)
        sizes = self._sizes.get((name, version))
        if sizes is None:
            sizes = self._sizes[name, version] = OutputSizes(meta)
        # What a turn gives comes by the message: the next one may begin before it was read.
        room = 0 if meta.turns else sizes.expect(rows)
        try:
            placed = calls.place(meta, call, rows, instances.arena, room, spec.refuse_nan)
        except ArenaFull as error:
            return self._turn_away(name, Refusal.MEMORY, RETRY_MEMORY, str(error))
        number, now = self._next, self._clock()
        self._next += 1
        deadline = now + (call.timeout_ns or spec.slo.latency)
        pending = Pending(number, call, version, meta, placed, done)
        if meta.turns:
            pending.item = msgspec.structs.replace(
                pending.item, id=number, due=deadline, pace=spec.slo.pace
            )
        if spec.cache and not meta.turns and self._was_kept(pending, call, spec.cache):
            return pending.withdraw
        self._pending[number] = pending
        self._open[name] = self._open.get(name, 0) + 1
        shape = calls.signature(meta, call)
        prompt, most = calls.generation(meta, call)
        request = Request(
            id=number,
            service=name,
            arrived=now,
            deadline=deadline,
            priority=call.priority,
            rows=rows,
            version=call.version,
            shape=shape,
            expires=now + call.timeout_ns if call.timeout_ns else 0,
            size=size_of(meta, {t.name: t.shape for t in call.inputs}) if shape else 1,
            prompt=prompt,
            most=most,
        )
        if not self._arrivals:
            asyncio.get_running_loop().call_soon(self._hand_over)
        self._arrivals.append(request)
        return partial(self._withdraw, pending)

    def _was_kept(self, pending: Pending, call: InferCall, limit: int) -> bool:
        """Answer a request with what the same was answered with before, if that is kept."""
        given: list[bytes | memoryview] = [
            f"{t.name} {t.datatype} {t.shape}".encode() for t in call.inputs
        ]
        places = [p for p in pending.item.inputs if p.offset >= 0]
        memory = pending.arena.memory
        given += [memory[p.offset : p.offset + p.nbytes] for p in places]
        service = self._state.services[pending.service]
        serving = service.serving.get(service.home, ORIGINAL)
        pending.variant = self._variant(pending.service, pending.version, serving)
        of = f"{pending.version} {pending.variant}".encode()
        pending.key = self.results.key(pending.service, limit, [of, *given])
        kept = self.results.find(pending.service, pending.key)
        if kept is not None:
            pending.answer_kept(kept)
        return kept is not None

    def _turn_away(self, name: str, refusal: Refusal, retry_after: int, why: str) -> Refused:
        if name in self._models.services:  # no meters for names that clients make up
            self._monitor.turned_away(name, refusal)
        return Refused(refusal, retry_after, why)

    def _hand_over(self) -> None:
        """Feed the arrivals of this turn of the loop."""
        arrivals, self._arrivals = self._arrivals, []
        left = len(arrivals)
        for request in arrivals:
            left -= 1
            self._feed(e.Arrived(request, more=left > 0))

    def _withdraw(self, pending: Pending) -> None:
        """The caller went away: what is queued goes too; what runs is thrown away when done."""
        pending.withdraw()
        self._hand_over()
        if pending.id in self._pending:
            self._feed(e.Cancelled(pending.id))

    # --- to a worker and back -----------------------------------------------------------------

    def items(self, batch: Batch, worker: str) -> tuple[Item, ...]:
        """What a worker is told of a batch's requests."""
        requests = [self._pending[r] for r in batch.requests]
        variant = self._variant(batch.service, batch.version, self._state.workers[worker].variant)
        for pending in requests:
            pending.version = batch.version  # a swap may have come since it was queued
            if pending.variant != variant:  # what was asked of another is not kept as its answer
                pending.variant, pending.key = variant, None
            if pending.meta.turns and pending.worker != worker:
                self._forget(pending)
                pending.worker = worker
        return tuple([pending.item for pending in requests])

    def _variant(self, service: str, version: str, name: str) -> str:
        """What answers say of the variant that gave them: nothing where there is one alone."""
        several = self._state.services[service].variants.get(version)
        return name if several or name != ORIGINAL else ""

    def on_result(self, message: Done | Failed) -> None:
        """A batch came back from a worker."""
        if isinstance(message, Failed):
            self._feed(e.BatchFailed(message.batch, message.reason))
            return
        running = self._state.running.get(message.batch)
        if running is None:  # late news of a batch that was given up
            self._feed(e.BatchDone(message.batch, message.exec_ns, message.start_ns))
            return
        requests = running.batch.requests
        if message.items and message.items[0].id:  # of a turn: some may have been given up since
            given = {outputs.id: outputs for outputs in message.items}
            results = {number: given[number] for number in requests}
        else:
            results = dict(zip(requests, message.items, strict=True))
        failed, unfinished, emitted, said = [], [], [], []
        for number, outputs in results.items():
            if outputs.said:
                said.append((number, outputs.said))
            if outputs.error:
                failed.append(number)
            elif not outputs.finished:
                unfinished.append(number)
                if outputs.places:
                    emitted.append(number)
        self._results[message.batch] = results
        self._feed(
            e.BatchDone(
                message.batch,
                message.exec_ns,
                message.start_ns,
                tuple(failed),
                tuple(unfinished),
                tuple(emitted),
                tuple(said),
                message.more,
                message.work,
                message.moved,
            )
        )
        del self._results[message.batch]

    # --- out ----------------------------------------------------------------------------------

    def on_emit(self, action: a.Emit) -> None:
        """See Hands."""
        results = self._results[action.batch]
        for number in action.requests:
            pending = self._pending[number]
            pending.emit(results[number])
            if pending.unread > self._unread:
                why = f"more than {self._unread} bytes wait (limits.unread)"
                pending.give_up(Refused(Refusal.UNREAD, 0, why))
                self._feed(e.Cancelled(number))

    def on_complete(self, action: a.Complete) -> None:
        """See Hands."""
        results = self._results[action.batch]
        for number in action.requests:
            pending, outputs = self._close(number, forget=False), results[number]
            if outputs.error:
                pending.refuse(Refused(Refusal.FAILED, 0, outputs.error))
                continue
            sizes = self._sizes.get((pending.service, pending.version))
            if sizes is not None and not pending.meta.turns:
                sizes.learn(pending.item.rows, outputs)
            if pending.key is not None:
                tensors = pending.all_tensors(outputs)
                self.results.keep(pending.service, pending.key, tensors)
            pending.answer(outputs)

    def on_reject(self, action: a.Reject) -> None:
        """See Hands."""
        refused = Refused(action.refusal, action.retry_after, action.detail)
        self._close(action.request, forget=True).refuse(refused)

    def _close(self, number: int, forget: bool) -> Pending:
        pending = self._pending.pop(number)
        left = self._open[pending.service] = self._open[pending.service] - 1
        if left == 0 and pending.service in self._drained:
            self._drained[pending.service].set()
        if forget:
            self._forget(pending)
        return pending

    def _forget(self, pending: Pending) -> None:
        """Tell the worker that has a request between turns that there will be none."""
        instances = self._models.services.get(pending.service)
        if pending.worker and instances is not None:
            instances.forget(pending.worker, pending.id)

    # --- unloading ----------------------------------------------------------------------------

    def drained(self, name: str) -> asyncio.Event | None:
        """An event that is set when no request of a service is open any more; None if none is.
        ``forget`` ends it."""
        if not self._open.get(name):
            return None
        return self._drained.setdefault(name, asyncio.Event())

    def forget(self, name: str) -> None:
        """A service was unloaded, or was to be."""
        self._drained.pop(name, None)
        self.results.forget(name)
        self._sizes = {key: sizes for key, sizes in self._sizes.items() if key[0] != name}
