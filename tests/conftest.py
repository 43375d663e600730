"""For all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Ctrl-C ends what tests start, also where the tests themselves were started in the background
    by a script: a shell without job control has such processes ignore it, and children inherit
    that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
