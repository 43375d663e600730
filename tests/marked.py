"""Commands that start processes of their own, and what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

PATIENCE_S = 90.0


class Marked:
    """A command as a process of its own, recognisable with all it starts."""

    def __init__(self, directory: Path, *command: str, stdin: int | None = None) -> None:
        self.directory = directory
        self._mark = f"COTENANT_TEST_MARK={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        self._output = (directory / "output").open("w+")
        (directory / "tmp").mkdir()
        ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as by nohup, it is inherited
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=stdin,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, name: value, "TMPDIR": str(directory / "tmp")},
            start_new_session=True,
        )
        signal.signal(signal.SIGHUP, ignored)

    @property
    def said(self) -> str:
        return (self.directory / "output").read_text()

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.05)

    def left_behind(self) -> list[str]:
        """Processes that it (or anything it started) started, and files in its directory. Jobs,
        which do not have the mark, are known by where they run."""
        found, tmp = [], str(self.directory / "tmp")
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit():
                    continue
                marked = self._mark.encode() in (entry / "environ").read_bytes()
                if marked or str((entry / "cwd").readlink()).startswith(tmp):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found + [str(path) for path in (self.directory / "tmp").iterdir()]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)
        self._output.close()
