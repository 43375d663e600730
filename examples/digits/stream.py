"""The data of the demo: handwritten digits whose camera slowly turns.

scikit-learn's 1797 digits (8x8) are drawn into 32x32 images in stages: upright first, then
rotated and sheared further with each stage. Each digit belongs to one of three groups, for good:
``TRAIN`` (the job learns from it), ``CHECK`` (the job and the node judge a new version by it) and
``TEST`` (nobody but the demo ever sees its label; reported accuracies count these alone).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

SIZE = 32
DRAWN = 25.0
"""Width of a digit in its image in pixels: turned corners still fit."""
STAGES = ((0.0, 0.0), (30.0, 0.1), (60.0, 0.15), (90.0, 0.2))
"""Rotation (degrees) and shear of each stage."""
BEGINS = (0.0, 0.13, 0.42, 0.71)
"""When each stage begins, as shares of an arm; upright needs the least time to be seen."""
TRAIN, CHECK, TEST = 0, 1, 2
SHARES = (0.5, 0.15, 0.35)


class Digits(NamedTuple):
    """``images``: (stages, digits, 1, 32, 32) of 0..1; labels and groups are per digit."""

    images: Floats
    labels: Ints
    groups: Ints


class Stream(NamedTuple):
    """Which digit arrives when, as which stage shows it. ``due`` in seconds, ascending."""

    due: list[float]
    digit: Ints
    stage: Ints


def make_digits(seed: int) -> Digits:
    """Draw every digit in every stage, each with a small turn and shift of its own."""
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    images = np.empty((len(STAGES), len(labels), 1, SIZE, SIZE), np.float32)
    for stage, (angle, shear) in enumerate(STAGES):
        for index, pixels in enumerate(small.reshape(-1, 8, 8) / 16.0):
            framed = np.pad(pixels, 1)
            turn = math.radians(angle + random.normal(0.0, 4.0))
            shift = random.normal(0.0, 0.8, 2)
            images[stage, index, 0] = _draw(framed, turn, shear, shift)
    groups = random.choice(3, len(labels), p=SHARES)
    return Digits(images, labels.astype(np.int64), groups.astype(np.int64))


def _draw(pixels: NDArray[np.float64], turn: float, shear: float, shift: Any) -> Any:
    from scipy.ndimage import affine_transform

    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    # Maps places in the image to places in the digit, which is how scipy wants it.
    matrix = np.array([[1.0, shear], [0.0, 1.0]]) @ rotation * (8.0 / DRAWN)
    middle = np.full(2, (SIZE - 1) / 2) + shift
    offset = np.full(2, 4.5) - matrix @ middle
    return affine_transform(pixels, matrix, offset, (SIZE, SIZE), order=1)


def make_stream(due: list[float], seconds: float, digits: Digits, seed: int) -> Stream:
    """A digit for each arrival, in the stage of its time."""
    random = np.random.default_rng(seed)
    begins = np.array(BEGINS) * seconds
    stage = np.searchsorted(begins, np.array(due), side="right") - 1
    return Stream(due, random.integers(len(digits.labels), size=len(due)), stage)


def write_samples(path: Path, digits: Digits, digit: Ints, stage: Ints) -> None:
    """Write labelled images for the training job, at one stroke; test digits are left out."""
    known = digits.groups[digit] != TEST
    digit, stage = digit[known], stage[known]
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        np.savez(
            file,
            images=digits.images[stage, digit],
            labels=digits.labels[digit],
            check=digits.groups[digit] == CHECK,
        )
    os.replace(new, path)  # noqa: PTH105 - the job sees the old file or the new one, whole
