"""gRPC calls under way: what their clients do (``http2.Receiver``) and how they end.

On a stream, requests run side by side and their answers go out **in the order of the
requests**; those that come in pieces go out beside them, a piece only when the client has taken up
what was sent before. At most ``STREAM_WINDOW`` of one stream are under way. What its client sends
beyond that stays as it came, counts for the memory of its connection, and stops the client from
sending more; so does what comes after the connection's turn is over (``http2_credit``).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cotenant.serving.grpc_wire import (
    HEAD_BLOCK,
    Assembler,
    Code,
    Damaged,
    Head,
    Message,
    Status,
    framed,
    status_block,
)
from cotenant.serving.grpc_work import FAILED, Inference, Method, Work, status
from cotenant.serving.http2_sending import Stream
from cotenant.serving.intake import BodyRefused

if TYPE_CHECKING:
    from cotenant.serving.grpc_front import GrpcFront

STREAM_WINDOW = 64

_OK = status_block(Status(Code.OK), first=False)
_PAST_DEADLINE = Status(Code.DEADLINE_EXCEEDED, "the call's deadline has passed")
_BLAMED = frozenset(
    (Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED, Code.INTERNAL, Code.UNAUTHENTICATED)
)
"""Statuses of calls that are wrong whenever they come."""


class Route(NamedTuple):
    """How a method is served."""

    method: str
    kind: Callable[[GrpcFront, Stream, Head, Route], Call]
    work: Callable[[Call, Message], Work]
    request: Any
    """The class of its messages."""
    run: Method
    limit: int
    """Bytes of a message."""
    is_open: bool = False
    """Needs no token."""


class Call:
    """One call under way."""

    __slots__ = ("_assembler", "_said", "_timer", "front", "head", "over", "route", "stream")

    pieces = False
    """Whether a request may be answered in pieces."""

    def __init__(self, front: GrpcFront, stream: Stream, head: Head, route: Route) -> None:
        self.front = front
        self.stream = stream
        self.head = head
        self.route = route
        self._assembler = Assembler(route.limit, stream.share, head.encoding)
        self.over = False
        self._said = False
        """Whether a message was sent."""
        self._timer: asyncio.TimerHandle | None = None
        if head.timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(head.timeout_s, self.finish, _PAST_DEADLINE)
        front.running.add(self)

    @property
    def method(self) -> str:
        """Its name."""
        return self.route.method

    @property
    def limit(self) -> int:
        """Bytes of a message, decompressed."""
        return self.route.limit

    def data(self, pieces: Sequence[memoryview]) -> None:
        """See ``Receiver``."""
        raise NotImplementedError

    def end(self) -> None:
        """See ``Receiver``."""
        raise NotImplementedError

    def sent(self) -> None:
        """See ``Receiver``."""

    def again(self) -> None:
        """See ``Receiver``."""

    def done(self, work: Work, said: bytes | Status, /) -> None:
        """A piece of work is done."""
        raise NotImplementedError

    def told(self, work: Inference, /) -> None:
        """A piece of an answer is there."""
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
        self.stream.blamed = status.code in _BLAMED and status is not FAILED
        self.stream.send(b"", b"", status_block(status, first=not self._said))

    def fail(self, exc: Exception) -> None:
        """End the call because of what came."""
        self.finish(status(exc, self.method))

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


class UnaryCall(Call):
    """A call with one message and one answer."""

    __slots__ = ("_message", "_work")

    def __init__(self, front: GrpcFront, stream: Stream, head: Head, route: Route) -> None:
        super().__init__(front, stream, head, route)
        self._message: Message | None = None
        self._work: Work | None = None
        self.wait()

    def data(self, pieces: Sequence[memoryview]) -> None:
        """See ``Receiver``."""
        try:
            for message in self._assembler.feed(pieces):
                if self._message is not None:
                    self.stream.share.release(message.held)
                    problem = f"{self.method} takes one message, and there are more"
                    raise Damaged(Code.INTERNAL, problem)
                self._message = message
        except (Damaged, BodyRefused) as exc:
            self.fail(exc)

    def end(self) -> None:
        """See ``Receiver``."""
        message = self._message
        if message is None or self._assembler.midway:
            self.finish(Status(Code.INTERNAL, f"{self.method} takes one message; none came"))
            return
        self.front.late.leave(self)
        self._message = None
        self._work = self.route.work(self, message)
        self._work.start()

    def done(self, _: Work, said: bytes | Status) -> None:
        """See ``Call``."""
        self._work = None
        if isinstance(said, Status):
            self.finish(said)
            return
        try:
            self.answer(said)
        except Damaged as exc:
            self.finish(exc.status)

    def withdraw(self) -> None:
        """See ``Call``."""
        message, self._message = self._message, None
        if message is not None:
            self.stream.share.release(message.held)
        work, self._work = self._work, None
        if work is not None:
            work.withdraw()


class StreamCall(Call):
    """A stream of messages, each with an answer, in their order. One that comes in pieces holds up
    no other, once its first is there."""

    __slots__ = ("_backlog", "_ended", "_moving", "_running", "_telling")

    pieces = True

    def __init__(self, front: GrpcFront, stream: Stream, head: Head, route: Route) -> None:
        super().__init__(front, stream, head, route)
        self._running: deque[Work] = deque()
        """In the order of their messages; those whose answer is there wait for earlier ones."""
        self._telling: dict[Inference, None] = {}
        """Those that are answered in pieces, the one whose turn is next first."""
        self._backlog: deque[memoryview] = deque()
        """What came and is not looked at yet."""
        self._ended = False
        self._moving = False

    def data(self, pieces: Sequence[memoryview]) -> None:
        """See ``Receiver``."""
        try:
            if not self._backlog:
                pieces = pieces[self._assembler.fill(pieces) :]
            for piece in pieces:
                rest = piece if self._backlog else self._start(piece)
                if rest and not self.over:
                    self.stream.keep(len(rest))
                    self._backlog.append(memoryview(bytes(rest)))
        except (Damaged, BodyRefused) as exc:
            self.fail(exc)
        self._move()

    def end(self) -> None:
        """See ``Receiver``."""
        self._ended = True
        self._move()

    def sent(self) -> None:
        """See ``Receiver``."""
        self._move()

    again = sent

    def done(self, work: Work, said: bytes | Status) -> None:
        """See ``Call``."""
        try:
            work.answer = work.framed(said)
        except Damaged as exc:
            self.finish(exc.status)
        else:
            self._move()

    def told(self, work: Inference) -> None:
        """See ``Call``."""
        if work not in self._telling:
            self._running.remove(work)
            self._telling[work] = None
        self._move()

    def withdraw(self) -> None:
        """See ``Call``."""
        running, self._running = self._running, deque()
        telling, self._telling = self._telling, {}
        for work in (*running, *telling):
            work.withdraw()
        backlog, self._backlog = self._backlog, deque()
        self.stream.keep(-sum(map(len, backlog)))

    def _start(self, piece: memoryview) -> memoryview:
        """Start what the messages in ``piece`` ask for, as far as there is room and time; returns
        what is left of it. Raises Damaged, BodyRefused."""
        while piece and not self.over and self._may_start():
            message, piece = self._assembler.next(piece)
            if message is not None:
                self.front.late.leave(self)
                work = self.route.work(self, message)
                self._running.append(work)
                moving, self._moving = self._moving, True  # one that fails at once is done here
                work.start()
                self._moving = moving
                self._say_due()
        return piece

    def _may_start(self) -> bool:
        """Whether there is room for one more: while answers are not taken up there is none."""
        if len(self._running) + len(self._telling) >= STREAM_WINDOW or self.stream.out:
            return False
        if self.stream.work(0):
            return True
        self.stream.again()
        return False

    def _say_due(self) -> None:
        while self._running and (answer := self._running[0].answer) is not None:
            self._running.popleft()
            self.say(answer)
        if self._telling:
            self._tell()

    def _tell(self) -> None:
        """Say pieces, one of each request by turns, while the client takes them up."""
        while not (self.stream.out or self.over):
            work = next((work for work in self._telling if work.waiting), None)
            if work is None:
                return
            del self._telling[work]
            message = work.piece()
            if not work.over:
                self._telling[work] = None
            if message:
                self.say(message)

    def _move(self) -> None:
        """Say what is due, start what there is room for."""
        if self.over or self._moving:
            return
        self._moving = True
        self._say_due()
        try:
            while self._backlog and not self.over:
                piece = self._backlog[0]
                rest = self._start(piece)
                if self.over:
                    break
                self.stream.keep(len(rest) - len(piece))
                if rest:
                    self._backlog[0] = rest
                    break
                self._backlog.popleft()
        except (Damaged, BodyRefused) as exc:
            self.fail(exc)
        self._moving = False
        if not self.over:
            self._settle()

    def _settle(self) -> None:
        """Have the client send on or wait, and end when it has sent all and is answered all."""
        if self._backlog:
            self.stream.pause()
        elif self.stream.paused:
            self.stream.resume()
        # A message that has begun is owed, unless its client may not send on.
        owed = self._assembler.midway and not self.stream.paused
        if not owed:
            self.front.late.leave(self)
        elif self not in self.front.late:
            self.wait()
        if self._ended and not self._backlog:
            if self._assembler.midway:
                self.finish(Status(Code.INTERNAL, "the stream ends within a message"))
            elif not (self._running or self._telling):
                self.finish(Status(Code.OK))
