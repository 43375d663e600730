"""A load generator for answers in pieces (``generate_stream``), run as a process of its own.

``python -m cotenant.cli.bench.llm_load`` reads one JSON order from standard input and writes one
JSON answer. Requests are sent at their times, as ``loadgen`` does it. With ``at_once`` there are
never more under way than that: the next one is sent as one ends. Either ends by itself.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

from cotenant.cli.bench.loadgen import Connection, Generator, prepare

AGAIN_NS = 100_000_000
"""After a refusal, where the next request waits for the end of one."""
TOKENS = range(32, 256)
"""Prompts are drawn from these: each vocabulary has them, and none of them ends an answer in those
that are known."""


class Stream(Connection):
    """A connection, and the pieces of the answer that is read on it."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.begin()

    def begin(self) -> None:
        """Another answer is to be read."""
        self.pieces: list[tuple[int, int]] = []
        """(monotonic ns, tokens) of each."""
        self._within = self._failed = self._ended = False

    def status(self) -> int:
        if not self._within:
            head, found, body = self.buffer.partition(b"\r\n\r\n")
            if not found or b"chunked" not in head.lower():
                return super().status()
            self._within, self.buffer = True, body
        now = time.monotonic_ns()
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                self._piece(json.loads(line[6:]), now)
            elif self._ended and line == b"\r":
                return 500 if self._failed else 200
            self._ended = self._ended or line == b"0\r"
        return 0

    def _piece(self, said: dict[str, Any], now: int) -> None:
        self._failed = self._failed or "error" in said
        tokens = said.get("tokens", [])
        if count := len(tokens) if isinstance(tokens, list) else 1:
            self.pieces.append((now, count))


class Asker(Generator):
    """Sends one request after the other. ``at_once``: at most so many are under way; 0: any."""

    connection = Stream

    def __init__(
        self, port: int, requests: list[bytes], times: list[float], drain_s: float, at_once: int
    ) -> None:
        super().__init__(port, requests, times, drain_s)
        self._at_once = at_once
        self._not_before = 0
        self.samples: list[dict[str, float]] = [{} for _ in times]

    def next_at(self, position: int, start: int, end: int) -> int:
        if self._at_once and len(self._busy) >= self._at_once:
            return end
        return max(super().next_at(position, start, end), self._not_before)

    def answered(self, connection: Connection, start: int) -> None:
        super().answered(connection, start)
        assert isinstance(connection, Stream)
        if self._at_once and self.status[connection.index] != 200:
            self._not_before = time.monotonic_ns() + AGAIN_NS
        self.samples[connection.index] = sample(
            connection.pieces, start + self._due[connection.index]
        )
        connection.begin()

    def unfinished(self) -> int:
        """Tokens of answers that were cut off by the end."""
        return sum(
            tokens
            for connection in self._busy.values()
            if isinstance(connection, Stream)
            for _, tokens in connection.pieces
        )


def sample(pieces: list[tuple[int, int]], due: int) -> dict[str, float]:
    """Of one answer: milliseconds until the first piece; mean milliseconds of each token that came
    with later ones; tokens. Empty without pieces."""
    if not pieces:
        return {}
    (first, head), (last, _) = pieces[0], pieces[-1]
    tokens = sum(count for _, count in pieces)
    found = {"ttft_ms": (first - due) / 1e6, "tokens": float(tokens)}
    if tokens > head:
        found["tpot_ms"] = (last - first) / 1e6 / (tokens - head)
    return found


def requests(port: int, model: str, order: dict[str, Any]) -> list[bytes]:
    """A request for each time of an order: a prompt of random tokens (``prompt``: fewest and most,
    drawn evenly) and an answer of ``answer`` tokens, drawn with a seed of its own."""
    source = random.Random(order["seed"])
    found = []
    for _ in order["times"]:
        prompt = source.choices(TOKENS, k=source.randint(*order["prompt"]))
        options = {
            "max_tokens": order["answer"],
            "ignore_eos": True,
            "temperature": 1.0,
            "seed": source.getrandbits(32),
            # What another arm computed of the same prompt is not to be found again.
            "salt": order["salt"],
        }
        asked = {"text_input": "", "prompt_tokens": prompt, "options": json.dumps(options)}
        body = json.dumps(asked).encode()
        head = (
            f"POST /v2/models/{model}/generate_stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        found.append(head.encode() + body)
    return found


def main() -> None:
    """Entry point: one order in, one answer out."""
    order = json.load(sys.stdin)
    prepare(order["core"])
    asker = Asker(
        order["port"],
        requests(order["port"], "bench", order),
        order["times"],
        order["drain_s"],
        order["at_once"],
    )
    before, began = time.process_time(), time.monotonic()
    asker.run()
    answer = {
        "samples": asker.samples,
        "status": asker.status,
        "lag_ms": asker.lag_ms,
        "unfinished": asker.unfinished(),
        "took_s": time.monotonic() - began,
        "cpu_s": time.process_time() - before,
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
