"""Resource limits of a process that is about to be a tenant's.

The job shim imports this file, so it imports next to nothing.
"""

from __future__ import annotations

import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def limit(limits: Mapping[int, tuple[int, int]], pid: int = 0) -> None:
    """Set resource limits (soft, hard) of a process, 0 being this one. What is above its hard
    limit is cut to that; a process that is gone is left alone. Raises OSError, ValueError."""
    for number, (soft, hard) in limits.items():
        try:
            most = resource.prlimit(pid, number)[1]
            resource.prlimit(pid, number, (lower(soft, most), lower(hard, most)))
        except ProcessLookupError:
            return


def lower(one: int, other: int) -> int:
    """The lower of two limits, one of which may be ``RLIM_INFINITY``."""
    known = [value for value in (one, other) if value != resource.RLIM_INFINITY]
    return min(known, default=resource.RLIM_INFINITY)
