"""How patient the planner is, and what it remembers between snapshots."""

from __future__ import annotations

import msgspec

from cotenant.domain.units import MS, S
from cotenant.policy.pressure import Pressure
from cotenant.policy.trials import Trials
from cotenant.policy.utility import Curve
from cotenant.policy.views import Layout, Parts

Members = tuple[tuple[str, ...], tuple[str, ...]]
"""Services, with their instances, and jobs."""


class Tuning(msgspec.Struct, frozen=True):
    """How patient the planner is. Times in ns."""

    grow_after: int = 2 * S
    shrink_after: int = 10 * S
    horizon: int = 10 * S
    """How far ahead loads are predicted."""
    payback: int = 300 * S
    """In what time a change must have paid for itself."""
    memory: int = 300 * S
    """Space is taken from services only if the rest would do at the recent peak rate, which
    fades with this time constant. 0: only the present rate counts."""
    lend: bool = True
    split: tuple[int, int] | None = None
    """(units, partition size) for services, never changed: a static split."""
    instances: tuple[str, ...] | None = None
    """The same for MIG: the profiles of services' instances."""
    feedback: bool = True
    """Whether measured misses correct what is predicted."""
    trend: bool = True
    """Whether the trend of a rate counts, or its present level alone."""
    season: bool = True
    """Whether what usually comes next counts, where that is more."""
    learn: bool = True
    """Whether jobs' speed-ups are learned, or every unit is taken to be worth as much."""
    offload: bool = True
    """Whether devices that only serve are used."""
    move: bool = True
    """Whether services that have a place move between devices that train."""
    vary: bool = True
    """Whether variants take each other's place, or the most accurate always serves."""
    slice_min: int = 2 * MS
    slice_max: int = 200 * MS


class DeviceMemory(msgspec.Struct):
    """What the planner remembers of one device."""

    layout: Layout | None = None
    wish: Layout | None = None
    wished_since: int = 0
    guests: tuple[str, ...] = ()
    """Services that were there at the last look, where jobs cannot be."""
    restless: dict[str, int] = {}
    """Since when services, and jobs, should change places, and lending begin or end (ns)."""
    shares: dict[str, int] = {}
    """Units of jobs that can move."""
    targets: dict[str, float] = {}
    """And those that each is to hold in all."""
    lends: bool = True
    """Whether idle service partitions are lent."""
    lending_since: int = 0
    """When lending last began or ended, or services or jobs came or went (ns)."""
    paused: float = 1.0
    """Pauses per request that could cause one, when they last were."""


class Steps(msgspec.Struct):
    """Of one service with several variants, on a kind of device: since when a step has been wished
    for (ns; 0: it is not)."""

    down_since: int = 0
    up_since: int = 0


class PlannerState(msgspec.Struct):
    """What the planner remembers between snapshots."""

    devices: dict[str, DeviceMemory] = {}
    members: Members = ((), ())
    version: int = 0
    parts: Parts = {}
    """Where services are."""
    nowhere: dict[str, str] = {}
    """Services that are not, and why."""
    asked: dict[str, tuple[int, tuple[str, ...]]] = {}
    """What was offered of services without a place, when they were last looked at."""
    closed: tuple[str, ...] = ()
    """Devices that are closed to services, since a reservation has all of them."""
    elsewhere_since: int = 0
    """Since when they should be somewhere else (ns)."""
    uneven_since: int = 0
    """Since when the devices that train have had uneven loads (ns); later than now once that was
    looked into."""
    bound: dict[str, str] = {}
    """The partition of each job that cannot move."""
    peaks: dict[str, float] = {}
    """Recent peak rate of each service, per second, as of ``peaks_at``."""
    peaks_at: int = 0
    usual: dict[str, float] = {}
    """Rate of each service without its bursts, per second."""
    variants: dict[str, dict[str, str]] = {}
    """The variant that is to serve, by service and kind of device, of those that have several."""
    ready: dict[str, dict[str, str]] = {}
    """And those that are to be loaded beside them."""
    steps: dict[str, dict[str, Steps]] = {}
    """Of those services: which they wish to take."""
    pressure: dict[str, Pressure] = {}
    foreseen: dict[str, str] = {}
    """Services whose answers take turns that were predicted to miss their objectives, and why."""
    curves: dict[str, Curve] = {}
    """What was learned of each job's speed."""
    learned_at: int = 0
    trials: Trials = msgspec.field(default_factory=Trials)
