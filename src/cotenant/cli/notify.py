"""What the node says to the service manager that started it, in systemd's protocol (sd_notify(3)).

A message is a datagram of ``NAME=value`` lines to the socket that ``$NOTIFY_SOCKET`` names. Who
was started by hand has no such socket, and says nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import MutableMapping

log = logging.getLogger("cotenant.node")

SOCKET = "NOTIFY_SOCKET"
WATCHDOG = ("WATCHDOG_USEC", "WATCHDOG_PID")
SEND_WITHIN_S = 1.0
US_PER_S = 1_000_000


class ServiceManager:
    """``address``: a path, or a name that begins with ``@`` (an abstract socket); "": there is
    nobody to tell. ``watchdog_s``: it wants to hear at least that often; 0: it does not ask."""

    def __init__(self, address: str, watchdog_s: float = 0.0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_s = watchdog_s if address else 0.0

    @classmethod
    def of(cls, environ: MutableMapping[str, str]) -> ServiceManager:
        """The one that the environment names. Its variables are taken out: workers and jobs are
        not to speak for the node."""
        address = environ.pop(SOCKET, "")
        asked, pid = (environ.pop(name, "") for name in WATCHDOG)
        if address and address[0] not in "/@":
            log.warning(
                "the service manager is not told anything: its socket is no path and no @name",
                extra={SOCKET: address},
            )
            address = ""
        watched = asked.isdecimal() and pid in ("", str(os.getpid()))
        return cls(address, int(asked) / US_PER_S if watched else 0.0)

    def ready(self, status: str) -> None:
        """The node answers."""
        self._send("READY=1", f"MAINPID={os.getpid()}", f"STATUS={status}")

    def status(self, text: str) -> None:
        """What it does now, in a line."""
        self._send(f"STATUS={text}")

    def stopping(self, status: str, within_s: float) -> None:
        """It ends, and may take so many seconds: it is not to be killed before."""
        extend = f"EXTEND_TIMEOUT_USEC={round(within_s * US_PER_S)}"
        self._send("STOPPING=1", extend, f"STATUS={status}")

    async def beat(self) -> None:
        """Say at half of the time that it asks for that the loop, which this runs on, turns."""
        while self._watchdog_s:
            self._send("WATCHDOG=1", within_s=0.0)  # the loop is not to wait for who is to watch it
            await asyncio.sleep(self._watchdog_s / 2)

    def _send(self, *lines: str, within_s: float = SEND_WITHIN_S) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(within_s)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.warning("the service manager does not listen", extra={"why": str(error)})
