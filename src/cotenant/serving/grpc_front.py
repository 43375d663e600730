"""The gRPC front end: ``inference.GRPCInferenceService`` on our own HTTP/2 server.

An inference is submitted when its message is complete and answered from the node's callback;
other methods run as tasks. A client that cancels, and a deadline that passes, withdraw the
request from the node.

On a stream, requests run side by side and their answers go out **in the order of the
requests**; one that fails is answered by an ``error_message`` and the stream goes on. At most
``STREAM_WINDOW`` requests of one stream are under way, then its reading pauses.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import NodePort, Outcome, Refused, Withdraw
from cotenant.domain.request import Refusal
from cotenant.serving import grpc_codec, protos
from cotenant.serving.calls import Decoded
from cotenant.serving.grpc_admin import Admin, Method
from cotenant.serving.grpc_wire import (
    HEAD_BLOCK,
    Assembler,
    Code,
    Damaged,
    Head,
    Message,
    Status,
    framed,
    head_problem,
    read_head,
    refusal_status,
    status_block,
    status_of,
    unpack,
)
from cotenant.serving.http2 import Receiver, Server, Stream
from cotenant.serving.http2_frames import Headers
from cotenant.serving.intake import BodyRefused, Intake, authorised
from cotenant.serving.listening import bind
from cotenant.serving.overdue import Overdue

log = logging.getLogger("cotenant.serving")

STREAM_WINDOW = 64

_SERVICE = f"/{protos.SERVICE}/"
_INFER, _STREAM_INFER = "ModelInfer", "ModelStreamInfer"
_OPEN_METHODS = frozenset({"ServerLive", "ServerReady"})

_OK = status_block(Status(Code.OK), first=False)
_STOPPING = refusal_status(Refused(Refusal.SHUTTING_DOWN, 0, ""))
_NO_TOKEN = Status(
    Code.UNAUTHENTICATED,
    "this node needs a token; send the metadata authorization: Bearer TOKEN",
)
_PAST_DEADLINE = Status(Code.DEADLINE_EXCEEDED, "the call's deadline has passed")


class GrpcFront:
    """The gRPC server. Start and stop it on the node's loop.

    ``token``: if set, every method but ServerLive and ServerReady needs it in the metadata,
    as ``authorization: Bearer TOKEN``.
    """

    def __init__(
        self, node: NodePort, intake: Intake, token: str | None, host: str, port: int
    ) -> None:
        self.node = node
        self.intake = intake
        self.late = Overdue(intake.limits.body_timeout_s)
        self.running: set[_Call] = set()
        self._token = token.encode() if token else None
        self._host = host
        self._port = port
        self._server = Server(self)
        admin = Admin(node, intake.regions)
        self._methods = admin.methods()
        self._unsupported = admin.unsupported()

    async def start(self) -> int:
        """Listen and serve; returns the port (useful where 0 was asked for).

        Raises EnvironmentProblem if the address cannot be bound.
        """
        sock = bind(self._host, self._port, "gRPC")
        await self._server.start(sock)
        port: int = sock.getsockname()[1]
        return port

    async def stop(self, grace: float) -> None:
        """Take no new calls, let those in flight finish for ``grace`` seconds, then end them."""
        await self._server.drain(grace)
        for call in tuple(self.running):
            call.finish(_STOPPING)
        await self._server.close()

    def head(self, headers: Headers) -> Head:
        """See ``http2.Application``."""
        return read_head(headers)

    def open(self, stream: Stream, head: Head) -> Receiver | None:
        """See ``http2.Application``."""
        problem = head_problem(head)
        if problem is None:
            method = head.path.removeprefix(_SERVICE) if head.path.startswith(_SERVICE) else ""
            status = self._refusal(method, head)
            if status is None:
                kind = _StreamCall if method == _STREAM_INFER else _UnaryCall
                return kind(self, stream, head, method)
            problem = status_block(status, first=True)
        stream.send(b"", b"", problem)
        return None

    def run(self, method: str) -> Method:
        """The coroutine function behind a method other than inference."""
        return self._methods[method]

    def _refusal(self, method: str, head: Head) -> Status | None:
        token = self._token
        if (
            token is not None
            and method not in _OPEN_METHODS
            and not authorised(head.authorization, token)
        ):
            return _NO_TOKEN
        if method in self._methods or method in (_INFER, _STREAM_INFER):
            return None
        why = self._unsupported.get(method)
        return Status(Code.UNIMPLEMENTED, why or f"there is no method {head.path[:256]}")


class _Call:
    """One call under way: what its client does (``http2.Receiver``) and how it ends."""

    __slots__ = ("_assembler", "_said", "_timer", "front", "head", "method", "over", "stream")

    def __init__(self, front: GrpcFront, stream: Stream, head: Head, method: str) -> None:
        self.front = front
        self.stream = stream
        self.head = head
        self.method = method
        intake = front.intake
        self._assembler = Assembler(intake.limits, intake.budget, head.encoding)
        self.over = False
        self._said = False
        """Whether a message was sent."""
        self._timer: asyncio.TimerHandle | None = None
        if head.timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(head.timeout_s, self.finish, _PAST_DEADLINE)
        front.running.add(self)

    def data(self, pieces: Sequence[memoryview]) -> None:
        """See ``Receiver``."""
        try:
            for message in self._assembler.feed(pieces):
                self.message(message)
                if self.over:
                    return
        except (Damaged, BodyRefused) as exc:
            self.finish(_status(exc, self.method))

    def end(self) -> None:
        """See ``Receiver``."""
        raise NotImplementedError

    def message(self, message: Message) -> None:
        """A message is complete. Its memory is to be given back to the budget."""
        raise NotImplementedError

    def sent(self) -> None:
        """See ``Receiver``."""

    def done(self, work: _Work, said: bytes | Status) -> None:
        """A piece of work is done."""
        raise NotImplementedError

    def withdraw(self) -> None:
        """Take back what is under way, and give back its memory."""
        raise NotImplementedError

    def lost(self) -> None:
        """See ``Receiver``."""
        self._close()
        self.withdraw()

    def say(self, message: bytes) -> None:
        """Send a framed message."""
        head = b"" if self._said else HEAD_BLOCK
        self._said = True
        self.stream.send(head, message, None)

    def answer(self, message: bytes) -> None:
        """Send the only message, and end the call; raises Damaged."""
        data = framed(message)
        self._close()
        self.stream.send(HEAD_BLOCK, data, _OK)

    def finish(self, status: Status) -> None:
        """End the call with a status; what is under way is withdrawn."""
        self._close()
        self.withdraw()
        self.stream.send(b"", b"", status_block(status, first=not self._said))

    def wait(self) -> None:
        """From now on the client owes a message."""
        self.front.late.enter(self, self._slow)

    def _slow(self) -> None:
        seconds = self.front.intake.limits.body_timeout_s
        problem = f"a message did not arrive within {seconds:g} s; send it faster"
        self.finish(Status(Code.DEADLINE_EXCEEDED, problem))

    def _close(self) -> None:
        self.over = True
        self.front.running.discard(self)
        self.front.late.leave(self)
        self._assembler.drop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _UnaryCall(_Call):
    """A call with one message and one answer."""

    __slots__ = ("_message", "_work")

    def __init__(self, front: GrpcFront, stream: Stream, head: Head, method: str) -> None:
        super().__init__(front, stream, head, method)
        self._message: Message | None = None
        self._work: _Inference | _Admin | None = None
        self.wait()

    def message(self, message: Message) -> None:
        """See ``_Call``."""
        if self._message is None:
            self._message = message
            return
        self.front.intake.budget.release(message.held)
        self.finish(Status(Code.INTERNAL, f"{self.method} takes one message, and there are more"))

    def end(self) -> None:
        """See ``Receiver``."""
        message = self._message
        if message is None or self._assembler.midway:
            self.finish(Status(Code.INTERNAL, f"{self.method} takes one message; none came"))
            return
        self.front.late.leave(self)
        self._message = None
        work: _Inference | _Admin
        work = _Inference(self, message) if self.method == _INFER else _Admin(self, message)
        self._work = work
        work.start()

    def done(self, _: _Work, said: bytes | Status) -> None:
        """See ``_Call``."""
        self._work = None
        if isinstance(said, Status):
            self.finish(said)
            return
        try:
            self.answer(said)
        except Damaged as exc:
            self.finish(exc.status)

    def withdraw(self) -> None:
        """See ``_Call``."""
        message, self._message = self._message, None
        if message is not None:
            self.front.intake.budget.release(message.held)
        work, self._work = self._work, None
        if work is not None:
            work.withdraw()


class _StreamCall(_Call):
    """A stream of inferences, answered in their order."""

    __slots__ = ("_ended", "_moving", "_queue", "_running")

    def __init__(self, front: GrpcFront, stream: Stream, head: Head, method: str) -> None:
        super().__init__(front, stream, head, method)
        self._running: deque[_Inference] = deque()
        """In the order of their requests; those whose answer is there wait for earlier ones."""
        self._queue: deque[Message] = deque()
        self._ended = False
        self._moving = False

    def data(self, pieces: Sequence[memoryview]) -> None:
        """See ``Receiver``."""
        super().data(pieces)
        self._watch()

    def message(self, message: Message) -> None:
        """See ``_Call``."""
        self.front.late.leave(self)
        self._queue.append(message)
        self._move()

    def end(self) -> None:
        """See ``Receiver``."""
        self._ended = True
        if self._assembler.midway:
            self.finish(Status(Code.INTERNAL, "the stream ends within a message"))
        else:
            self._move()

    def sent(self) -> None:
        """See ``Receiver``."""
        self._move()

    def done(self, work: _Work, said: bytes | Status) -> None:
        """See ``_Call``."""
        assert isinstance(work, _Inference)
        try:
            if not isinstance(said, Status):
                work.answer = framed(grpc_codec.stream_answer(said))
        except Damaged as exc:
            said = exc.status
        if isinstance(said, Status):
            error = grpc_codec.stream_error(said.details, work.asked, dict(said.metadata))
            work.answer = framed(error)
        self._move()

    def withdraw(self) -> None:
        """See ``_Call``."""
        running, self._running = self._running, deque()
        for work in running:
            work.withdraw()
        queue, self._queue = self._queue, deque()
        self.front.intake.budget.release(sum(message.held for message in queue))

    def _move(self) -> None:
        """Say what is due, start what there is room for; a client that takes up no answers gets
        no new ones."""
        if self.over or self._moving:  # one that fails at once comes here from ``start``
            return
        self._moving = True
        while True:
            while self._running and (answer := self._running[0].answer) is not None:
                self._running.popleft()
                self.say(answer)
            if not self._queue or len(self._running) >= STREAM_WINDOW or self.stream.out:
                break
            work = _Inference(self, self._queue.popleft())
            self._running.append(work)
            work.start()
        self._moving = False
        if self._queue:
            self.stream.pause()
        elif self.stream.paused:
            self.stream.resume()
        self._watch()
        if self._ended and not self._running and not self._queue:
            self.finish(Status(Code.OK))

    def _watch(self) -> None:
        """A message that has begun is owed, unless its client may not send on."""
        owed = self._assembler.midway and not (self.over or self.stream.paused)
        if not owed:
            self.front.late.leave(self)
        elif self not in self.front.late:
            self.wait()


class _Work:
    """What one message asks for. Says ``call.done(self, ...)`` once, unless it is withdrawn."""

    __slots__ = ("_held", "_message", "_task", "call")

    def __init__(self, call: _Call, message: Message) -> None:
        self.call = call
        self._message = message
        self._held = message.held
        """Bytes to be given back to the budget."""
        self._task: asyncio.Task[None] | None = None

    def withdraw(self) -> None:
        """Take it back; there will be no answer."""
        self._release()
        if self._task is not None:
            self._task.cancel()

    def _finish(self, said: bytes | Status) -> None:
        self._release()
        self._task = None
        self.call.done(self, said)

    def _release(self) -> None:
        self.call.front.intake.budget.release(self._held)
        self._held = 0

    async def _unpacked(self) -> bytes | memoryview:
        """The message without its compression; raises what ``unpack`` does, and BodyRefused."""
        message, intake = self._message, self.call.front.intake
        if not message.packed:
            return message.data
        return await unpack(message, self.call.head.encoding, intake.limits, self._hold)

    def _hold(self, nbytes: int) -> None:
        self.call.front.intake.budget.hold(nbytes)
        self._held += nbytes


class _Admin(_Work):
    """A method other than inference."""

    __slots__ = ()

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        method = self.call.method
        try:
            data = await self._unpacked()
            parse = protos.message_class(f"{method}Request").FromString
            said = await self.call.front.run(method)(_parsed(parse, data))
        except Exception as exc:
            self._finish(_status(exc, method))
        else:
            self._finish(said)


class _Inference(_Work):
    """A ModelInferRequest."""

    __slots__ = ("_decoded", "_withdraw", "answer", "asked")

    def __init__(self, call: _Call, message: Message) -> None:
        super().__init__(call, message)
        self.asked: Any = None
        """The message, once it could be read."""
        self.answer: bytes | None = None
        """For its stream: what to say when its turn comes, framed."""
        self._decoded: Decoded
        self._withdraw: Withdraw | None = None

    def start(self) -> None:
        """Begin. The answer may be there when this returns."""
        if self._message.packed:
            self._task = asyncio.get_running_loop().create_task(self._unpack())
        else:
            self._submit(self._message.data)

    def withdraw(self) -> None:
        """See ``_Work``."""
        super().withdraw()
        withdraw, self._withdraw = self._withdraw, None
        if withdraw is not None:
            withdraw()

    async def _unpack(self) -> None:
        try:
            data = await self._unpacked()
        except Exception as exc:
            self._finish(_status(exc, self.call.method))
        else:
            self._task = None
            self._submit(data)

    def _submit(self, data: bytes | memoryview) -> None:
        front = self.call.front
        try:
            message = _parsed(grpc_codec.parse, data)
            self.asked = message.message
            self._decoded = grpc_codec.decode(message, front.intake.limits, front.intake.regions)
            withdraw = front.node.submit(self._decoded.call, self._outcome)
        except Exception as exc:
            self._finish(_status(exc, self.call.method))
            return
        if isinstance(withdraw, Refused):
            self._finish(refusal_status(withdraw))
        else:
            self._withdraw = withdraw

    def _outcome(self, outcome: Outcome) -> None:
        self._withdraw = None  # it refers to the request, and that to this
        if isinstance(outcome, Refused):
            self._finish(refusal_status(outcome))
            return
        try:
            said = grpc_codec.encode(outcome, self._decoded, self.call.front.intake.regions)
        except Exception as exc:
            self._finish(_status(exc, self.call.method))
        else:
            self._finish(said)
        finally:
            outcome.release()


def _parsed(parse: Callable[[bytes | memoryview], Any], data: bytes | memoryview) -> Any:
    """``data`` as a message; damage is the client's error and not ours."""
    try:
        return parse(data)
    except DecodeError as exc:
        raise InvalidRequest(f"the message cannot be read: {exc}") from None


def _status(exc: Exception, method: str) -> Status:
    """The status that tells the client about ``exc``."""
    status = status_of(exc)
    if status is None:
        log.error("%s failed inside the server", method, exc_info=exc)
        return Status(Code.INTERNAL, "the server failed; its log says how")
    return status
