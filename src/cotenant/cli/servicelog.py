"""``cotenant logs SERVICE``: what the workers of a service print."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from cotenant.cli import finding
from cotenant.cli.joblog import JobLog
from cotenant.domain.errors import NotFound
from cotenant.serving.control_client import ControlClient

PREFIX = "service:"
FOLLOW_S = 0.2


def service_log(client: ControlClient, ref: str) -> Path | None:
    """The log that ``ref`` means if it is that of a service, None for a job's: ``service:NAME``
    always, ``NAME`` where no job is called so. Raises NotFound."""
    no_job: NotFound | None = None
    if not ref.startswith(PREFIX):
        try:
            client.log_path(ref)
            return None
        except NotFound as error:
            no_job = error
    status = client.status()
    services = [str(s["name"]) for s in status.get("services") or ()]
    name = ref.removeprefix(PREFIX)
    if name in services:
        return Path(status["state_dir"]) / "workers" / f"{name}.log"
    raise no_job or NotFound(f"no service {name!r}; there are: {', '.join(services) or 'none'}")


def show_service_log(args: argparse.Namespace, path: Path) -> int:
    """Print it; with ``--follow`` go on while the node runs."""
    log = JobLog(path)
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(log):
        _copy(log, args.lines)
        while args.follow and finding.answers(path.parents[1] / finding.SOCKET):
            time.sleep(FOLLOW_S)
            _copy(log, None)
    return 0


def _copy(log: JobLog, lines: int | None) -> None:
    for data in log.read(lines):
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
