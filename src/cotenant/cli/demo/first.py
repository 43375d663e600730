"""``cotenant demo``: a small model is served, a job trains beside it, and scheduling can be
switched off to see the difference. The base installation is all that it needs."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Iterator
from typing import Any, Final

from cotenant.cli.demo import picture
from cotenant.cli.demo.ending import Ended, Signals
from cotenant.cli.demo.node import Gone
from cotenant.cli.demo.pair import OBJECTIVE_MS, Pair
from cotenant.cli.demo.screen import Screen
from cotenant.cli.demo.tally import Moment, Tally, lent
from cotenant.domain.errors import EnvironmentProblem

LOOK_S: Final = 1.0
"""Between two looks; the node counts whose its cores were by the second."""
LINE_S: Final = 2.0
PIPE_S: Final = 24.0
"""How long it lasts where nobody sits before it."""
KEYS_S: Final = 0.1


def cmd_first(args: argparse.Namespace) -> int:
    """Show it until the user has seen enough, or for ``--seconds``."""
    pair = Pair(args.port, on=not args.off)
    show = Show(pair, args.seconds)
    signals = Signals(pair.look)
    with signals:
        try:
            with signals.held():
                pair.open()
            pair.begin(show.screen.progress)
            show.screen.reached()
            with contextlib.suppress(KeyboardInterrupt):
                show.run()
            signals.hold()  # it is over, whoever says so
            show.end(args.plot)
            return 0
        except KeyboardInterrupt:
            return 130
        except Ended as ended:
            return 128 + ended.number
        except Gone as gone:
            raise EnvironmentProblem(str(gone)) from None
        finally:
            signals.hold()
            pair.close()


class Show:
    """The run itself: a picture in a terminal, lines in a pipe. ``seconds``: None, as usual."""

    def __init__(self, pair: Pair, seconds: float | None) -> None:
        self.screen = Screen()
        self._pair = pair
        self._live = sys.stdout.isatty()
        self._asks = self._live and sys.stdin is not None and sys.stdin.isatty()
        self._seconds = seconds or (math.inf if self._asks else PIPE_S)
        self._tallies = {True: Tally(), False: Tally()}
        self._moments: list[Moment] = []
        self._began = time.monotonic()
        self._looked, self._steps = self._began, 0
        self._said = -math.inf

    def run(self) -> None:
        """Until it is over. Without a keyboard scheduling is switched in the middle."""
        self._began = self._looked = time.monotonic()
        self._steps = self._pair.steps()
        address = f"127.0.0.1:{self._pair.port}"
        if not self._live:
            self.screen.say(f"dashboard: http://{address}/")
        middle = math.inf if self._asks else self._seconds / 2
        with _keys(self._asks), self._panel() as panel:
            while (now := time.monotonic() - self._began) < self._seconds:
                key = self._key()
                if key == "q":
                    return
                if key == "s" or now >= middle:
                    middle = math.inf if now >= middle else middle
                    self._switch()
                if time.monotonic() - self._looked >= LOOK_S:
                    self._look()
                    self._tell(panel, address)

    def end(self, plot: Any) -> None:
        """The summary, and a picture in a file if one is wanted."""
        if not self._moments:
            return
        self.screen.show(picture.summary(self._tallies))
        if plot is None:
            return
        try:
            picture.plot(plot, self._moments)
            self.screen.say(f"see {plot}")
        except ImportError:
            self.screen.say(f"{plot} is not written: that needs matplotlib")
        except (OSError, ValueError) as error:
            self.screen.say(f"{plot} cannot be written: {error}")

    def _key(self) -> str:
        """What was pressed within the next moment."""
        if not self._asks:
            time.sleep(KEYS_S)
            return ""
        if not select.select([sys.stdin], [], [], KEYS_S)[0]:
            return ""
        return os.read(sys.stdin.fileno(), 64).decode(errors="replace")[-1:].lower() or "q"

    def _look(self) -> None:
        now, on = time.monotonic(), self._pair.on
        tally, span = self._tallies[on], now - self._looked
        tally.add(self._pair.answers(), now)
        steps = self._pair.steps()
        made, self._steps, self._looked = steps - self._steps, steps, now
        tally.steps += made
        tally.seconds += span
        partitions = self._pair.partitions()
        shares = None if partitions is None else lent(partitions)
        found = tally.recent(OBJECTIVE_MS)
        self._moments.append(Moment(now - self._began, on, found, made / span, shares))

    def _switch(self) -> None:
        self._look()
        self._pair.switch()
        self._tallies[self._pair.on].forget_recent()
        self._looked, self._steps = time.monotonic(), self._pair.steps()

    def _tell(self, panel: Any, address: str) -> None:
        last = self._moments[-1]
        if panel is not None:
            width = shutil.get_terminal_size().columns
            panel.update(picture.picture(self._moments, address, width), refresh=True)
        elif last.at - self._said >= LINE_S - LOOK_S / 2:
            self._said = last.at
            self.screen.say(picture.line(last, last.at))

    @contextlib.contextmanager
    def _panel(self) -> Iterator[Any]:
        if not self._live:
            yield None
            return
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            yield live


@contextlib.contextmanager
def _keys(wanted: bool) -> Iterator[None]:
    """Keys come one by one, and are not shown, until this is left."""
    if not wanted:
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
