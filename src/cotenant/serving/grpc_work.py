"""What one gRPC message asks for, from its bytes to its answer."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import InferResult, Outcome, Refused, Withdraw
from cotenant.serving import grpc_codec
from cotenant.serving.calls import Decoded
from cotenant.serving.grpc_wire import (
    Code,
    Damaged,
    Message,
    Status,
    framed,
    refusal_status,
    status_of,
    unpack,
)
from cotenant.serving.http2_credit import REQUEST

if TYPE_CHECKING:
    from cotenant.serving.grpc_calls import Call

log = logging.getLogger("cotenant.serving")

Method = Callable[[Any], bytes | Awaitable[bytes]]
"""From a parsed request to a serialised answer."""

FAILED = Status(Code.INTERNAL, "the server failed; its log says how")

_PARSED_BYTES_PER_UNIT = 256
"""Of a message beside its raw tensors."""
_ANSWER_BYTES_PER_UNIT = 64
"""Of an answer that is put together from what the node knows."""


class Work:
    """One message's work. Says ``call.done(self, ...)`` once, unless it is withdrawn."""

    __slots__ = ("_held", "_message", "_task", "answer", "call")

    def __init__(self, call: Call, message: Message) -> None:
        self.call = call
        self.answer: bytes | None = None
        """For its stream: what to say when its turn comes, framed."""
        self._message = message
        self._held = message.held
        """Bytes to be given back to the budget."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin. The answer may be there when this returns."""
        self.call.stream.work(REQUEST)
        if self._message.packed:
            self._task = asyncio.get_running_loop().create_task(self._unpack())
        else:
            self.run(self._message.data)

    def run(self, data: bytes | memoryview) -> None:
        """Do what the message ``data`` asks for."""
        raise NotImplementedError

    def withdraw(self) -> None:
        """Take it back; there will be no answer."""
        self._release()
        task, self._task = self._task, None  # a cycle with what its frames hold
        if task is not None:
            task.cancel()

    def framed(self, said: bytes | Status) -> bytes:
        """What a stream of such work says; raises Damaged where that ends it."""
        if isinstance(said, Status):
            raise Damaged(said.code, said.details)
        return framed(said)

    async def _unpack(self) -> None:
        call = self.call
        try:
            async with call.stream.share.unpacking:
                data = await unpack(self._message, call.head.encoding, call.limit, self._hold)
        except Exception as exc:
            self.finish(status(exc, call.method))
        else:
            self._task = None
            self.run(data)

    def finish(self, said: bytes | Status) -> None:
        """It is done."""
        self._release()
        self._task = None
        self.call.done(self, said)

    def _hold(self, nbytes: int) -> None:
        self.call.stream.share.hold(nbytes)
        self._held += nbytes

    def _release(self) -> None:
        self.call.stream.share.release(self._held)
        self._held = 0


class Asking(Work):
    """What asks about the node, or to load or unload a model."""

    __slots__ = ()

    def run(self, data: bytes | memoryview) -> None:
        """See ``Work``."""
        route = self.call.route
        try:
            said = route.run(_parsed(route.request.FromString, data))
        except Exception as exc:
            self.finish(status(exc, self.call.method))
            return
        if isinstance(said, bytes):
            self.call.stream.work(len(said) // _ANSWER_BYTES_PER_UNIT)
            self.finish(said)
        else:
            self._task = asyncio.get_running_loop().create_task(self._wait(said))

    async def _wait(self, said: Awaitable[bytes]) -> None:
        try:
            answer = await said
        except Exception as exc:
            self.finish(status(exc, self.call.method))
        else:
            self.finish(answer)


class Inference(Work):
    """A ModelInferRequest."""

    __slots__ = ("_decoded", "_pieces", "_withdraw", "asked", "over")

    def __init__(self, call: Call, message: Message) -> None:
        super().__init__(call, message)
        self.asked: Any = None
        """The message, once it could be read."""
        self.over = False
        """Of an answer in pieces: whether the last was taken."""
        self._decoded: Decoded
        self._withdraw: Withdraw | None = None
        self._pieces: deque[Outcome] | None = None
        """Outcomes that wait for ``piece``, of an answer that comes in pieces."""

    def withdraw(self) -> None:
        """See ``Work``."""
        super().withdraw()
        withdraw, self._withdraw = self._withdraw, None
        if withdraw is not None:
            withdraw()
        pieces, self._pieces = self._pieces, None
        for outcome in pieces or ():
            if isinstance(outcome, InferResult):
                outcome.release()

    def framed(self, said: bytes | Status) -> bytes:
        """See ``Work``; what went wrong with one is said in its answer."""
        return self._framed(said, final=True)

    def _framed(self, said: bytes | Status, final: bool) -> bytes:
        try:
            if not isinstance(said, Status):
                return framed(grpc_codec.stream_answer(said, final))
        except Damaged as exc:
            said = exc.status
        return framed(grpc_codec.stream_error(said.details, self.asked, dict(said.metadata)))

    def run(self, data: bytes | memoryview) -> None:
        """See ``Work``."""
        front = self.call.front
        limits, regions = front.intake.limits, front.intake.regions
        try:
            message = grpc_codec.parse(data, limits)
            self.asked = message.message
            self.call.stream.work(message.parsed // _PARSED_BYTES_PER_UNIT)
            self._decoded = grpc_codec.decode(message, limits, regions)
            self._decoded.call.pieces = self.call.pieces
            withdraw = front.node.submit(self._decoded.call, self._outcome)
        except Exception as exc:
            self.finish(status(_told(exc), self.call.method))
            return
        if isinstance(withdraw, Refused):
            self.finish(refusal_status(withdraw))
        else:
            self._withdraw = withdraw

    def _outcome(self, outcome: Outcome) -> None:
        more = isinstance(outcome, InferResult) and outcome.more
        if not more:
            self._withdraw = None  # it refers to the request, and that to this
        if more or self._pieces is not None:
            self._told(outcome)
        elif isinstance(outcome, Refused):
            self.finish(refusal_status(outcome))
        else:
            self.finish(self._said(outcome))

    def _told(self, outcome: Outcome) -> None:
        """A piece is there, or what ends them."""
        if self._pieces is None:
            self._pieces = deque()
            self._release()  # what was asked is with the node by now
            self._message = Message(b"", packed=False, held=0)
            self._decoded.call.inputs = []
        self._pieces.append(outcome)
        self.call.told(self)

    def _said(self, result: InferResult) -> bytes | Status:
        try:
            return grpc_codec.encode(result, self._decoded, self.call.front.intake.regions)
        except Exception as exc:
            return status(exc, self.call.method)
        finally:
            result.release()

    @property
    def waiting(self) -> bool:
        """Whether there is something for ``piece`` to take."""
        return bool(self._pieces)

    def piece(self) -> bytes:
        """Take the next piece, framed; empty where nothing is to be said."""
        assert self._pieces
        outcome = self._pieces.popleft()
        if isinstance(outcome, Refused):
            self.over = True
            return self._framed(refusal_status(outcome), final=True)
        self.over = not outcome.more
        if not outcome.outputs and not self._decoded.empty_final:
            outcome.release()
            return b""
        said = self._said(outcome)
        if isinstance(said, Status):
            self.over = True
            self.withdraw()
        return self._framed(said, final=self.over)


def _parsed(parse: Callable[[bytes | memoryview], Any], data: bytes | memoryview) -> Any:
    """``data`` as a message; damage is the client's error and not ours."""
    try:
        return parse(data)
    except (DecodeError, UnicodeDecodeError) as exc:
        raise _told(exc) from None


def _told(exc: Exception) -> Exception:
    """Damage of a message is the client's error and not ours, text that is no UTF-8 too, of which
    some is looked at only when it is used."""
    if isinstance(exc, (DecodeError, UnicodeDecodeError)):
        return InvalidRequest(f"the message cannot be read: {exc}")
    return exc


def status(exc: Exception, method: str) -> Status:
    """The status that tells the client about ``exc``."""
    found = status_of(exc)
    if found is None:
        log.error("%s failed inside the server", method, exc_info=exc)
        return FAILED
    return found
