"""Which MIG instances are ours: a file in the state directory.

An instance is written down before it is made and crossed out after it is gone, so that a node that
dies between two calls finds all of its own again. Instances do not outlive a restart of the
machine, and their numbers are given again: so the file is of one boot.

It cannot tell an instance of ours that somebody removed and made again at the same place.

Beside that it keeps how long steps took here, whatever the boot.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from cotenant.domain.errors import EnvironmentProblem
from cotenant.domain.mig import Placement

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SMOOTHING: Final = 4
"""The last time that a step took counts for one part in so many."""


class Entry(msgspec.Struct, frozen=True):
    """An instance of ours. ``id`` None: it was about to be made."""

    placement: Placement
    id: int | None = None


class _File(msgspec.Struct):
    boot: str
    gpus: dict[str, list[Entry]] = {}
    took: dict[str, dict[str, int]] = {}


class MigRecord:
    """Ours by GPU. ``boot``: what is the same until the machine is restarted. Raises
    EnvironmentProblem where the file cannot be read, OSError where it cannot be written."""

    def __init__(self, path: Path, boot: str | None = None) -> None:
        self._path = path
        self._boot = BOOT_ID.read_text().strip() if boot is None else boot
        self._gpus: dict[str, list[Entry]] = {}
        self._took: dict[str, dict[str, int]] = {}

    def open(self) -> None:
        """Read what an earlier node left."""
        if not self._path.exists():
            return
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except (OSError, msgspec.DecodeError) as error:
            raise EnvironmentProblem(
                f"{self._path} cannot be read ({error}); it says which MIG instances Cotenant "
                "made. Without it they are left as they are: remove them by nvidia-smi, and the "
                "file"
            ) from None
        self._took = found.took
        if found.boot == self._boot:
            self._gpus = found.gpus

    def entries(self, gpu: str) -> tuple[Entry, ...]:
        """Those of a GPU, by its UUID."""
        return tuple(self._gpus.get(gpu, ()))

    def put(self, gpu: str, entry: Entry) -> None:
        """Write an instance down, in place of what was known of its place."""
        others = [e for e in self.entries(gpu) if e.placement != entry.placement]
        self._write(gpu, [*others, entry])

    def drop(self, gpu: str, placement: Placement) -> None:
        """Cross an instance out."""
        self._write(gpu, [e for e in self.entries(gpu) if e.placement != placement])

    def _write(self, gpu: str, entries: list[Entry]) -> None:
        gpus = {**self._gpus, gpu: sorted(entries, key=lambda e: e.placement)}
        self._put(gpus)
        self._gpus = gpus

    def _put(self, gpus: dict[str, list[Entry]]) -> None:
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as file:
            file.write(msgspec.json.encode(_File(self._boot, gpus, self._took)))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)

    # --- how long steps took ----------------------------------------------------------------

    def took(self, gpu: str) -> dict[str, int]:
        """What steps took on a GPU lately, ns by name."""
        return self._took.get(gpu, {})

    def learn(self, gpu: str, step: str, ns: int) -> None:
        """A step took so long; kept for good by ``save``, or whatever is written next."""
        known = self.took(gpu)
        before = known.get(step, ns)
        self._took = {**self._took, gpu: {**known, step: before + (ns - before) // SMOOTHING}}

    def save(self) -> None:
        """Write it all down."""
        self._put(self._gpus)
