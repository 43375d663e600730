"""How a stop goes through a job's process tree: parents first.

A trainer whose data loaders are ended under it loses its checkpoint, so a process hears of the
stop only when its parent has ended, which is when it becomes a child of the shim, or when its
parent has had half of the grace that was left: a shell with a trap waits for its child.

The job shim imports this file, so it imports next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class Stop:
    """One stop, asked for at ``now``; ``root`` hears of it at the first ``due``. Seconds."""

    def __init__(self, now: float, grace_s: float, shim: int, root: int) -> None:
        self.ends = now + grace_s
        """When what is left is killed."""
        self._half = now + grace_s / 2
        self._shim = shim
        self._root = root
        self._told: set[int] = set()

    def due(self, now: float, parents: Mapping[int, int]) -> list[int]:
        """Those that hear of it now; ``parents`` of all that lives of the tree."""
        heard = set[int]()
        if self._root not in parents:
            heard.add(self._shim)
        if now >= self._half:
            self._half = (now + self.ends) / 2
            heard |= self._told | {self._shim}
        due = [
            pid
            for pid, parent in parents.items()
            if pid not in self._told and (pid == self._root or parent in heard)
        ]
        self._told.update(due)
        return due
