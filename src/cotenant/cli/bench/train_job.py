"""The training job of the benchmark: PyTorch, a small convolutional network, real steps.

Counts its steps into a file of two 8-byte numbers (steps, monotonic ns of the last one), from
which the benchmark computes a rate without asking the job for anything.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import struct
import time
from pathlib import Path

import torch
from torch import nn

import cotenant

BATCH = 32
COUNTER = struct.Struct("<qq")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
KEPT = 32 * 1024 * 1024
"""Bytes; larger than any tensor here, and the most that glibc takes for M_MMAP_THRESHOLD."""


def read_counter(path: Path) -> tuple[int, int]:
    """(steps, ns of the last step); (0, 0) before the first."""
    data = path.read_bytes()
    if len(data) < COUNTER.size:
        return 0, 0
    steps, at = COUNTER.unpack(data[: COUNTER.size])
    return int(steps), int(at)


def keep_memory() -> None:
    """Have glibc keep what is freed. By default it gives large buffers back to the kernel and asks
    for them anew in each step: a fifth of the time, by luck up to 6 % more or less of it from one
    process to another. Then arms would differ by their processes and not by how they share."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT)
        mallopt(M_TRIM_THRESHOLD, 8 * KEPT)


def main() -> None:
    """Train until stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--counter", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # It learns 512 images by heart; without these two its gradients become denormal numbers
    # after a while, which take many times as long, and a job that is ahead looks slow.
    torch.set_flush_denormal(True)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0001)
    loss_of = nn.CrossEntropyLoss()
    images = torch.randn(512, 3, 32, 32)
    labels = torch.randint(0, 10, (512,))
    args.counter.write_bytes(COUNTER.pack(0, 0))
    with args.counter.open("r+b") as file, mmap.mmap(file.fileno(), COUNTER.size) as counter:
        step = 0
        while True:
            at = (step * BATCH) % len(images)
            optimizer.zero_grad()
            loss = loss_of(model(images[at : at + BATCH]), labels[at : at + BATCH])
            loss.backward()
            optimizer.step()
            step += 1
            counter[:] = COUNTER.pack(step, time.monotonic_ns())
            cotenant.report(step=step, loss=loss.item())


if __name__ == "__main__":
    main()
