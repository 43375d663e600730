"""What the work that one HTTP/2 client asks for may come to.

Work is counted in units of some 2 µs: a ping is one, a request ``REQUEST``. Two sums are kept:

* the *turn*: after ``TURN`` units the connection lets others go first, and goes on in the next
  turn of the event loop. However much a client asks for, others wait for one turn of it;
* the *credit*: what was asked for and has come to nothing. Frames that are no data cost it, and
  so do small ones that are, and requests that are given up, reset or wrong, once they are. A
  request that is answered gives back as much as it would have cost, bytes that the client takes
  up give back what its window updates cost, and time gives back ``RATE`` units a second. A client
  that has spent ``BURST`` is told to calm down and is disconnected.

So whatever asks for work without a result is bounded by one number, however it is mixed. A client
of whose requests every second one is answered never runs out.
"""

from __future__ import annotations

import asyncio

from cotenant.serving.http2_frames import ErrorCode, Fault

TURN = 400
BURST = 4000
RATE = 2000

REQUEST = 16
"""For taking up a request, and for what a message asks the node for."""
_AROUND = 4
"""What the frames around a message took."""
_WINDOW_SHIFT = 12
"""A unit for every 4 KiB: clients update a window or two for each frame of 16 KiB."""


class Credit:
    """One connection's two sums."""

    __slots__ = ("_left", "_since", "turn")

    def __init__(self) -> None:
        self.turn = TURN
        """What is left of the turn; at 0 or below it is over."""
        self._left = float(BURST)
        self._since = asyncio.get_running_loop().time()

    def begin(self) -> None:
        """A turn begins; what the last one took too much comes off it."""
        self.turn = min(TURN, self.turn + TURN)
        self._left = min(BURST, self._left)

    def work(self, units: int) -> None:
        """Count work, of which is not known yet what comes of it."""
        self.turn -= units

    def charge(self, units: int) -> None:
        """Count work that comes to nothing by itself; raises Fault where that is too much."""
        self.turn -= units
        self._left -= units
        if self._left < 0:
            now = asyncio.get_running_loop().time()
            self._left = min(BURST, self._left + (now - self._since) * RATE)
            self._since = now
            if self._left < 0:
                raise Fault(ErrorCode.ENHANCE_YOUR_CALM, "too much was asked for to no end")

    def wasted(self, cost: int) -> None:
        """A request whose taking up took ``cost`` has come to nothing; the next frame is told."""
        self._left -= cost

    def answered(self, cost: int) -> None:
        """A request whose taking up took ``cost`` was answered."""
        self._left += cost

    def sent(self, nbytes: int) -> None:
        """A message of so many bytes was sent, which frames of the client's led to and follow."""
        self._left += _AROUND + (nbytes >> _WINDOW_SHIFT)

    def taken_up(self, nbytes: int) -> None:
        """The client made room for so much of a message that was held up."""
        self._left += nbytes >> _WINDOW_SHIFT
