"""Every limit of the HTTP/2 server on a client.

* ``STREAMS`` requests at one time on a connection, ``CONNECTIONS`` connections of a server. When
  there are as many, one gives way to the next: one that has not been answered anything yet, or
  else the one whose last answer is longest ago. So connections that do nothing lock nobody out,
  also where all clients share an address and counting per address would tell nothing;
* ``HEADER_BYTES`` of headers, compressed and not; ``FRAME_BYTES`` in a frame;
* ``STREAM_WINDOW`` bytes of a stream and ``CONNECTION_WINDOW`` of a connection on their way here;
* ``HEAD_S`` seconds for the greeting, for headers and for any other frame that is no data;
* ``IDLE_S`` to twice as many seconds without a request, then a connection is told to go;
* ``UNREAD_S`` seconds in which a client that has answers to take up takes none of them, and as
  many bytes of answers not taken up as its share of the memory for bodies (``intake.Share``):
  beyond either its connection is closed;
* work per turn of the event loop, and work that comes to nothing: see ``http2_credit``;
* nothing is read from a client while it does not read what it was sent, so that frames which
  ask for an answer cannot pile answers up.
"""

from __future__ import annotations

STREAMS = 256
CONNECTIONS = 4096
HEADER_BYTES = 16 * 1024
FRAME_BYTES = 2**20
STREAM_WINDOW = 2**20
CONNECTION_WINDOW = 16 * 2**20
HEAD_S = 30.0
IDLE_S = 300.0
