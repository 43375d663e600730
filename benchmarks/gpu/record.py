"""What a section of the check is told (``Setting``) and where it writes what it found (``Record``).

A record's file is whole at any moment: a section that is ended leaves what it had measured.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

US, MS, S = 1_000, 1_000_000, 1_000_000_000


class OutOfTime(Exception):
    """The section's time does not allow for what comes next."""


@dataclass(frozen=True)
class Setting:
    """Where things are, and how long the section may take.

    ``driver``: the real libcuda.so.1; empty: the shim finds it. ``folder``: scratch, in a ``tmpfs``
    where there is one. ``most_bytes``: of memory to move about, 0: as the section sees fit.
    """

    name: str
    out: str
    seconds: float
    shim: str
    loop: str
    folder: str
    driver: str = ""
    most_bytes: int = 0
    seed: int = 1

    @staticmethod
    def read(path: Path) -> Setting:
        """Of a file that ``write`` made."""
        return Setting(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        """For the section's process."""
        path.write_text(json.dumps(asdict(self)))


class Record:
    """The figures and raw samples of one section, and why parts of it have none."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path = path
        self._end = time.monotonic() + seconds
        self.figures: dict[str, Any] = {}
        self.samples: dict[str, list[Any]] = {}
        self.why: dict[str, str] = {}

    @property
    def left_s(self) -> float:
        """Of the section's time."""
        return self._end - time.monotonic()

    def need(self, seconds: float) -> None:
        """Raises OutOfTime if less is left."""
        if self.left_s < seconds:
            raise OutOfTime(f"no time: {max(0.0, self.left_s):.0f} s left of the section's")

    def figure(self, name: str, value: Any) -> None:
        """A result; ``gate.cost`` is ``cost`` within ``gate``."""
        *above, last = name.split(".")
        place = self.figures
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
        self.write()

    def sampled(self, name: str, values: list[float]) -> dict[str, float]:
        """Keep the samples and give their summary as the figure of that name."""
        self.samples[name] = values
        found = summary(values)
        self.figure(name, found)
        return found

    def without(self, part: str, why: str) -> None:
        """The part has no figures, for this reason."""
        self.why[part] = why
        self.write()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What fails within costs this part alone."""
        try:
            yield
        except OutOfTime as error:
            self.without(name, str(error))
        except Exception as error:
            traceback.print_exc()
            self.without(name, f"{type(error).__name__}: {error}")

    def write(self) -> None:
        """Replace the file."""
        new = self._path.with_suffix(".new")
        found = {"figures": self.figures, "samples": self.samples, "why": self.why}
        new.write_text(json.dumps(finite(found)))
        new.rename(self._path)


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles, p99 (nearest rank), extremes and count."""
    ordered = sorted(values)
    if not ordered:
        return {"n": 0}
    return {
        "n": len(ordered),
        "median": statistics.median(ordered),
        "p25": rank(ordered, 0.25),
        "p75": rank(ordered, 0.75),
        "p99": rank(ordered, 0.99),
        "least": ordered[0],
        "most": ordered[-1],
    }


def rank(ordered: list[float], share: float) -> float:
    """The nearest-rank quantile of values in order."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def finite(value: Any) -> Any:
    """JSON knows no NaN: such a figure is null."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
