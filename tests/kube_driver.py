"""The kubelet's half of the driver as a process of its own, which kills itself where it is told.

    python -m tests.kube_driver FOLDER

``FOLDER`` is laid out by ``paths``. With ``KILL_AT`` in the environment, the process sends itself
SIGKILL at that step: steps are what reaches the disk or the node, counted before and after. How far
it came is in ``FOLDER/steps``.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cotenant.kube.paths import Paths
from cotenant.kube.plugin import Plugin
from cotenant.serving.control_client import ControlClient
from tests.kube_standins import POOL, StandinClaims


def paths(folder: Path) -> Paths:
    """Where everything is."""
    return Paths(
        control=folder / "control.sock",
        registry=folder / "registry",
        plugin=folder / "plugin",
        cdi=folder / "cdi",
        boot_id=folder / "boot",
    )


def main(folder: Path) -> None:
    kill_at = int(os.environ.get("KILL_AT", "0"))
    numbers = itertools.count(1)
    steps = folder / "steps"

    def step(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            count()
            result = call(*args, **kwargs)
            count()
            return result

        return counted

    def count() -> None:
        if not folder.joinpath("armed").exists():
            return
        number = next(numbers)
        steps.write_text(str(number))
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = step(os.fsync)
    Path.replace = step(Path.replace)  # type: ignore[method-assign]
    Path.unlink = step(Path.unlink)  # type: ignore[method-assign]
    node = ControlClient(folder / "control.sock")
    for name in ("reserve", "release"):
        setattr(node, name, step(getattr(node, name)))
    plugin = Plugin(node, StandinClaims(folder / "claims"), paths(folder), POOL, period_s=0.1)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    plugin.start()
    stop.wait()
    plugin.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
