"""The training job of the demo: a small network that learns a function by SGD, forever.

It needs NumPy and nothing else. A teacher labels random points, and the network learns what the
teacher says. Each core has a thread that makes steps on the same weights without a lock (Hogwild!,
Niu et al., NeurIPS 2011): none waits for another, so a core that is taken away costs its own steps.
"""

from __future__ import annotations

import argparse
import mmap
import os
import struct
import threading
from pathlib import Path

import numpy as np

import cotenant

INPUTS, HIDDEN, CLASSES, BATCH = 64, 512, 10, 256
RATE = 0.1
MOST_THREADS = 16
COUNTER = struct.Struct("<q")
"""What the file of ``--counter`` holds: steps made so far."""


class Training:
    """Weights that several threads learn at."""

    def __init__(self, counter: Path | None = None) -> None:
        self._counter = None if counter is None else _counter(counter)
        rng = np.random.default_rng(0)
        self.teacher = rng.normal(0, 1, (INPUTS, CLASSES)).astype(np.float32)
        self.first = rng.normal(0, INPUTS**-0.5, (INPUTS, HIDDEN)).astype(np.float32)
        self.second = rng.normal(0, HIDDEN**-0.5, (HIDDEN, CLASSES)).astype(np.float32)
        self.steps = [0] * min(os.cpu_count() or 1, MOST_THREADS)
        """Of each thread."""

    def learn(self, thread: int) -> None:
        """Make steps without end."""
        rng, rows = np.random.default_rng(thread), np.arange(BATCH)
        while True:
            points = rng.standard_normal((BATCH, INPUTS), dtype=np.float32)
            labels = (points * abs(points) @ self.teacher).argmax(axis=1)
            hidden = np.maximum(points @ self.first, 0)
            scores = hidden @ self.second
            chances = np.exp(scores - scores.max(axis=1, keepdims=True))
            chances /= chances.sum(axis=1, keepdims=True)
            loss = -np.log(chances[rows, labels] + 1e-9).mean()
            accuracy = (scores.argmax(axis=1) == labels).mean()
            chances[rows, labels] -= 1
            error = chances @ self.second.T * (hidden > 0)
            self.second -= RATE / BATCH * (hidden.T @ chances)
            self.first -= RATE / BATCH * (points.T @ error)
            self.steps[thread] += 1
            if self._counter is not None:
                self._counter[:] = COUNTER.pack(sum(self.steps))
            cotenant.report(step=sum(self.steps), loss=float(loss), accuracy=float(accuracy))


def _counter(path: Path) -> mmap.mmap:
    path.write_bytes(COUNTER.pack(0))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), COUNTER.size)


def read_counter(path: Path) -> int:
    """Steps of the job that counts there; 0 before it began."""
    try:
        return int(COUNTER.unpack(path.read_bytes())[0])
    except (OSError, struct.error):
        return 0


def main() -> None:
    """Train until stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--counter", type=Path, help="count steps into this file")
    training = Training(parser.parse_args().counter)
    for thread in range(1, len(training.steps)):
        threading.Thread(target=training.learn, args=(thread,), daemon=True).start()
    training.learn(0)


if __name__ == "__main__":
    main()
