"""Every attack in turn on a node of its own, from one and from eight connections, while a client
that behaves asks for 20 inferences a second over gRPC and as many over REST.

    python -m tests.attack.campaign [--json FILE] [--only TEXT] [--seconds 3] [--connections 1 8]

A row of the table is an attack: how many answers the client that behaves got while it lasted and
in the seconds after it, its slowest answers (p99), the node's memory, and what the attackers were
told. Everything is on loopback and bounded in time. What is aimed at, under every attack: 99 % of
the answers, a p99 below ten times that of an idle node, and memory back to within 50 MB.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.attack.client import PATIENCE_S
from tests.attack.node import Node

MODULES = {
    "tests.attack.http1": "http",
    "tests.attack.http2": "grpc",
    "tests.attack.messages": "grpc",
    "tests.attack.pages": "http",
}
"""Modules of attacks, and which of a node's ports each is for. A module has ``ATTACKS``: name →
function(port, seconds), which blocks, attacks one connection (and another when that is closed) and
stops by itself."""

RATE = 20.0
_ATTACKER_NICE = 19
_MB = 1_000_000
MEMORY_MB = 50
"""What may be held longer than an attack lasts."""


@dataclass
class Result:
    """What one attack did. Times in seconds."""

    attack: str
    connections: int
    kept: float = 0.0
    """Share of the answers that the client got that were due while the attack lasted."""
    kept_after: float = 0.0
    p99_before: float = 0.0
    p99_during: float = 0.0
    p99_after: float = 0.0
    memory_before: float = 0.0
    memory_peak: float = 0.0
    memory_after: float = 0.0
    """MB."""
    recovered: bool = False
    """Whether the client was answered as before in the end."""
    got: dict[str, int] = field(default_factory=dict)
    """What the attackers sent and were told."""


class Behaving:
    """The client that behaves, as a process of its own, and its answers so far."""

    def __init__(self, node: Node) -> None:
        command = [sys.executable, "-m", "tests.attack.client"]
        self._process = subprocess.Popen(
            [*command, str(node.grpc), str(node.http), str(RATE)], stdout=subprocess.PIPE, text=True
        )
        self._answers: list[tuple[float, float, str]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            protocol, due, took, said = line.split()
            self._answers.append((float(due), float(took), f"{protocol} {said}"))

    def between(self, begin: float, end: float) -> tuple[float, float, Counter[str]]:
        """Share answered, p99 of those, and what the others met, of requests due then."""
        asked = [each for each in tuple(self._answers) if begin <= each[0] < end]
        good = sorted(took for _, took, said in asked if said.endswith(" ok"))
        expected = max(len(asked), round((end - begin) * RATE * 2) - 2)
        bad = Counter(said for *_, said in asked if not said.endswith(" ok"))
        p99 = good[int(len(good) * 0.99)] if good else PATIENCE_S
        return len(good) / max(1, expected), p99, bad

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


def attacks() -> Iterator[tuple[str, str, str]]:
    """Module, port and name of each."""
    for module, port in MODULES.items():
        for name in importlib.import_module(module).ATTACKS:
            yield module, port, name


def attack(module: str, name: str, port: int, seconds: float, connections: int) -> dict[str, int]:
    """Run an attack in processes of its own; returns what they report."""
    command = [sys.executable, "-m", "tests.attack.campaign", "--attack", module, name]
    processes = [
        subprocess.Popen(
            [*command, str(port), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=lambda: os.nice(_ATTACKER_NICE),  # noqa: PLW1509 - nothing runs between
        )
        for _ in range(connections)
    ]
    got: Counter[str] = Counter()
    end = time.monotonic() + seconds + 20
    for process in processes:
        try:
            said, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        got.update(json.loads(said.splitlines()[-1]) if said.strip() else {"no report": 1})
    return dict(got)


class Campaign:
    """A node, its client, and the attacks on it one by one. The client is watched for so many
    seconds ``before`` all of them and ``after`` each, which is 1 or more: what counts is due half
    a second before it is counted."""

    def __init__(
        self, node: Node, behaving: Behaving, before: float = 5.0, after: float = 2.0
    ) -> None:
        self._node = node
        self._behaving = behaving
        self._after = after
        begin = time.monotonic()
        time.sleep(before)
        _, self._idle_p99, _ = behaving.between(begin + 1, time.monotonic() - 0.5)

    def run(self, module: str, port: str, name: str, connections: int, seconds: float) -> Result:
        """One attack; returns when the client is answered again, or has given up."""
        node, behaving = self._node, self._behaving
        result = Result(name, connections, p99_before=self._idle_p99)
        result.memory_before = node.memory / _MB
        peak = _Peak(node)
        begin = time.monotonic()
        number = node.grpc if port == "grpc" else node.http
        result.got = attack(module, name, number, seconds, connections)
        end = time.monotonic()
        time.sleep(self._after)
        result.memory_peak = peak.stop() / _MB
        after = time.monotonic()
        waited = after
        while not (result.recovered or waited > after + PATIENCE_S):
            result.recovered = behaving.between(waited - 1, waited - 0.5)[0] >= 0.99
            time.sleep(0.2)
            waited = time.monotonic()
        result.kept, result.p99_during, bad = behaving.between(begin, end)
        result.kept_after, result.p99_after, _ = behaving.between(end + 1, after)
        result.memory_after = node.memory / _MB
        result.got |= {f"client: {what}": count for what, count in bad.items()}
        return result


class _Peak:
    """The most memory that a node is seen to hold."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._most = node.memory
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self._most = max(self._most, self._node.memory)

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self._most


def line(result: Result) -> str:
    """A row of the table."""
    got = ", ".join(f"{what} {count}" for what, count in sorted(result.got.items()))
    return (
        f"{result.attack:36} {result.connections:2} {100 * result.kept:6.1f}"
        f" {100 * result.kept_after:6.1f} {1000 * result.p99_before:7.1f}"
        f" {1000 * result.p99_during:8.1f} {1000 * result.p99_after:8.1f}"
        f" {result.memory_before:7.0f} {result.memory_peak:6.0f} {result.memory_after:6.0f}  {got}"
    )


HEADINGS = (
    f"{'attack':36} {'n':>2} {'kept %':>6} {'after':>6} {'p99 ms':>7} {'during':>8} {'after':>8}"
    f" {'MB':>7} {'peak':>6} {'after':>6}  got"
)


def _campaign(args: argparse.Namespace) -> int:
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as directory, Node(Path(directory)) as node:
        behaving = Behaving(node)
        try:
            campaign = Campaign(node, behaving)
            print(HEADINGS, flush=True)
            for module, port, name in attacks():
                if args.only not in name:
                    continue
                for connections in args.connections:
                    result = campaign.run(module, port, name, connections, args.seconds)
                    results.append(result)
                    print(line(result), flush=True)
        finally:
            behaving.stop()
        errors = node.said.count("Traceback")
        _report(results, errors, node.alive, args.json)
    return 0


def _report(results: list[Result], errors: int, alive: bool, path: Path | None) -> None:
    good = [r for r in results if r.kept >= 0.99 and r.p99_during < 10 * r.p99_before]
    held = [r for r in results if r.memory_after > r.memory_before + MEMORY_MB]
    print(
        f"\n{len(good)} of {len(results)}: 99 % kept and p99 under ten times the idle one;"
        f" {len(held)} held more than {MEMORY_MB} MB; {errors} tracebacks;"
        f" the node is {'alive' if alive else 'dead'}"
    )
    if path is not None:
        told: dict[str, Any] = {"results": [asdict(r) for r in results], "tracebacks": errors}
        path.write_text(json.dumps(told, indent=1))


def main() -> int:
    """The whole campaign; with ``--attack`` one attacker of it."""
    parser = argparse.ArgumentParser(description="attack a node and watch a client that behaves")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="attacks whose name has this in it")
    parser.add_argument("--seconds", type=float, default=2.5)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--attack", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.attack:
        return _campaign(args)
    module, name, port, seconds = args.attack
    found = importlib.import_module(module)
    found.ATTACKS[name](int(port), float(seconds))
    print(json.dumps(getattr(found, "GOT", {})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
