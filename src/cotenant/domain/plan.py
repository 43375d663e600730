"""The planner's bounds: which partitions exist, who may use them, and how finely."""

from __future__ import annotations

import msgspec

from cotenant.domain.device import Partition
from cotenant.domain.units import MS


class Plan(msgspec.Struct, frozen=True):
    """Bounds within which the dispatcher chooses.

    ``services`` maps a service to the partitions it may execute on (several services may
    share one). ``jobs`` maps a job to partitions that are its own (several jobs may rotate on
    one). A service partition in ``lendable`` is lent to jobs while its services are idle.
    ``targets``: jobs take turns at what is lent so that what they hold in all comes to be in these
    proportions; those that are not named count by their weight. ``slice_min``/``slice_max`` bound
    a grant, ``linger_max`` the time an idle service partition is held back before it is lent (all
    ns). ``reasons`` says why, a line a change.
    """

    version: int
    partitions: tuple[Partition, ...]
    services: dict[str, tuple[str, ...]]
    jobs: dict[str, tuple[str, ...]]
    lendable: tuple[str, ...]
    targets: dict[str, float] = {}
    slice_min: int = 1 * MS
    slice_max: int = 200 * MS
    linger_max: int = 20 * MS
    reasons: tuple[str, ...] = ()


EMPTY_PLAN = Plan(version=0, partitions=(), services={}, jobs={}, lendable=())
