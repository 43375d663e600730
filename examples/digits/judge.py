"""How good the model in service was whenever a request was due: the same question in every arm,
whether the request was answered, late or never."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from arms import Run
from figures import swaps
from numpy.typing import NDArray
from stream import TEST, Digits, Stream

from cotenant.engines.onnx import OnnxEngine

MOST = 1200
"""Requests that are judged, spread over the arm."""
BATCH = 32


def sample(stream: Stream, digits: Digits) -> NDArray[np.int64]:
    """Requests to judge by: of digits that nobody ever learned from."""
    found = np.flatnonzero(digits.groups[stream.digit] == TEST)
    return found[:: max(1, -(-len(found) // MOST))]


def served_right(run: Run, models: Path, stream: Stream, digits: Digits) -> NDArray[np.float32]:
    """For each request: 1 if the version that served when it was due reads it, 0 if not, nan if it
    is not one of the ``sample``."""
    chosen = sample(stream, digits)
    times = {1: 0.0, **swaps(run)}
    versions, begins = np.array(list(times)), np.array(list(times.values()))
    served = versions[np.searchsorted(begins, run.due[chosen], side="right") - 1]
    right = np.full(len(run.due), np.nan, np.float32)
    for version in np.unique(served):
        engine = OnnxEngine(models / str(version) / "model.onnx", (1,))
        mine = chosen[served == version]
        for requests in np.array_split(mine, -(-len(mine) // BATCH)):
            digit = stream.digit[requests]
            (scores,) = engine.run(1, {"image": digits.images[stream.stage[requests], digit]})
            right[requests] = scores.argmax(1) == digits.labels[digit]
    return right
