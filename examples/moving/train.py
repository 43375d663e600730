"""A training job that can be moved: it leaves checkpoints, and goes on from one.

    python train.py --checkpoints DIR [--every STEPS] [--steps STEPS]

What makes it movable is all in ``main``: it looks for a checkpoint to go on from, says when one is
complete, and saves its work when it is asked to, or told to leave (SIGTERM). A step depends on
nothing but its number and the weights, so that a run that was moved ends as one that was not.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np

import cotenant

WIDTH = 32


def trained(weights: np.ndarray, step: int) -> tuple[np.ndarray, float]:
    """One step of gradient descent: weights [WIDTH] and the loss before it."""
    rng = np.random.default_rng(step)
    x = rng.standard_normal((64, WIDTH))
    wrong = (x * weights).sum(axis=1) - (x * np.linspace(-1, 1, WIDTH)).sum(axis=1)
    return weights - 0.01 * (x * wrong[:, None]).mean(axis=0), float((wrong**2).mean())


def save(directory: Path, step: int, weights: np.ndarray) -> Path:
    """A checkpoint that is there whole or not at all; those before the last two are removed."""
    path = directory / f"step-{step:09d}.npz"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, step=step, weights=weights)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    for old in sorted(directory.glob("step-*.npz"))[:-2]:
        old.unlink()
    return path


def newest(directory: Path) -> Path | None:
    """The checkpoint to go on from: the one that Cotenant names, or a later one here. Who readmits
    a job elsewhere may know nothing but this directory."""
    found = [*directory.glob("step-*.npz"), Path(os.environ.get("COTENANT_CHECKPOINT", ""))]
    return max((path for path in found if path.is_file()), key=lambda p: p.name, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=1_000_000, help="minutes of them")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that a step rests")
    options = parser.parse_args()
    options.checkpoints.mkdir(parents=True, exist_ok=True)

    leave = False

    def on_term(_number: int, _frame: object) -> None:
        nonlocal leave
        leave = True  # the loop does the rest: a handler may interrupt anything

    signal.signal(signal.SIGTERM, on_term)
    wanted = threading.Event()
    cotenant.on_checkpoint(wanted.set)  # somebody asks for one now

    step, weights = 0, np.zeros(WIDTH)
    if path := newest(options.checkpoints):
        with np.load(path) as kept:
            step, weights = int(kept["step"]), kept["weights"]
    print(f"goes on from step {step}")
    while step < options.steps:
        step += 1
        weights, loss = trained(weights, step)
        print(f"step {step}")
        cotenant.report(step, loss=loss)
        if asked := wanted.is_set():
            wanted.clear()
        if leave or asked or step % options.every == 0 or step == options.steps:
            cotenant.report(step, checkpoint=save(options.checkpoints, step, weights))
        if leave:
            return
        time.sleep(options.pause)


if __name__ == "__main__":
    main()
