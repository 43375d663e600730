"""One bounded burst of load from h2load, and what it measured."""

from __future__ import annotations

import resource
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from wire import Payload


class LoadFailed(Exception):
    """h2load could not run or counted no answer; the message holds what it said."""


@dataclass(frozen=True)
class Burst:
    """What one burst measured. Latencies are of answered requests, first to last byte."""

    seconds: float
    answered: int
    failed: int
    per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    generator_cpu_ms: float

    def as_dict(self) -> dict[str, float | int]:
        return {k: round(v, 4) for k, v in asdict(self).items()}


def burst(payload: Payload, port: int, clients: int, seconds: float, scratch: Path) -> Burst:
    """Post `payload` from `clients` connections, one request in flight on each, for `seconds`.

    h2load ends by itself after `seconds`; should it hang, it is killed ten seconds later.
    """
    log = scratch / "requests.tsv"
    log.unlink(missing_ok=True)
    body = scratch / "body.bin"
    body.write_bytes(payload.body)
    argv = [
        "h2load",
        f"-c{clients}",
        "-t1",
        "-m1",
        f"-D{seconds * 1000:.0f}ms",
        f"--log-file={log}",
    ]
    argv += ["-d", str(body), *([] if payload.grpc else ["--h1"])]
    argv += [f"-H{name}: {value}" for name, value in payload.headers]
    before = _children_cpu_s()
    try:
        done = subprocess.run(
            [*argv, f"http://127.0.0.1:{port}{payload.path}"],
            capture_output=True,
            text=True,
            timeout=seconds + 10,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LoadFailed("h2load did not end in time and was killed") from error
    used_s = _children_cpu_s() - before
    if done.returncode or not log.exists():
        raise LoadFailed(f"h2load: {(done.stderr or done.stdout).strip()[-300:]}")
    return _summary(log, seconds, used_s)


def generator_version() -> str:
    """The version h2load states."""
    return subprocess.check_output(["h2load", "--version"], text=True, timeout=10).strip()


def _summary(log: Path, seconds: float, generator_cpu_s: float) -> Burst:
    """Read h2load's log: start in microseconds, HTTP status, microseconds taken."""
    text = log.read_text()
    if not text.strip():
        raise LoadFailed("no request was answered")
    rows = np.array([line.split("\t")[:3] for line in text.splitlines()], dtype=np.int64)
    good = (rows[:, 1] >= 200) & (rows[:, 1] < 300)
    if not good.any():
        raise LoadFailed(f"every answer was an error, the first with status {rows[0, 1]}")
    p50, p90, p99 = np.percentile(rows[good, 2] / 1000, [50, 90, 99])
    answered = int(good.sum())
    return Burst(
        seconds=seconds,
        answered=answered,
        failed=int((~good).sum()),
        per_s=answered / seconds,
        p50_ms=float(p50),
        p90_ms=float(p90),
        p99_ms=float(p99),
        generator_cpu_ms=generator_cpu_s / answered * 1000,
    )


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
