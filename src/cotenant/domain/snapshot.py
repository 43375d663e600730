"""The facts that the planner decides on; no opinions."""

from __future__ import annotations

from typing import Final

import msgspec

from cotenant.domain.device import DeviceSpec
from cotenant.domain.plan import Plan
from cotenant.domain.units import S
from cotenant.domain.workload import Share, Variant

SEASON_AHEAD: Final = 30 * S
"""How far ahead the season of a rate is looked up (ns)."""


class TurnCost(msgspec.Struct, frozen=True):
    """What a turn takes (ns): ``fixed``, each new ``token``, each ``pair`` of one and a token that
    it looks at, and a ``step`` if there is more than one new token."""

    fixed: float
    token: float = 0.0
    pair: float = 0.0
    step: float = 0.0


class TurnFacts(msgspec.Struct, frozen=True):
    """Of a service whose answers take a turn for each token.

    ``pace``: after how long (ns) each further token is due; 0: as the first. ``prompt`` and
    ``answer``: tokens that they have on average, 0 if none was seen; ``prompt_dev``: the standard
    deviation of the former. ``together``: sequences that an instance can have at one time.
    ``costs``: what turns were seen to take, by kind of device and units. ``warm``: what a warm-up
    took there (ns), also of units on which it has not served.
    """

    pace: int = 0
    prompt: float = 0.0
    prompt_dev: float = 0.0
    answer: float = 0.0
    together: int = 1
    costs: dict[str, dict[int, TurnCost]] = {}
    warm: dict[str, dict[int, int]] = {}


class ServiceFacts(msgspec.Struct, frozen=True):
    """One service over the last observation window. Times in ns, rates in rows per second.

    ``exec_ns`` maps a kind of device, and there units and rows (``"2x8"``), to the measured
    execution time. ``rate_trend`` is the change of the arrival rate per second. ``refused`` and
    what follows it count from the node's start; ``pressed`` are answers after the deadline and
    refusals for want of capacity. ``rate_season`` is how many times the present rate is usual
    ``SEASON_AHEAD`` later. ``instances`` are those on each device that carries it.
    ``variants`` says what the model is on kinds of device; empty: it runs anywhere, or on any of
    ``kinds``. ``others``: variants that may take the place of that, by kind; ``serving``: the one
    that ``exec_ns`` was measured of, the original where none is named. ``memory``: bytes that an
    instance occupies, by kind of device, as far as is known.
    ``unfit``: devices that could not load it, and why. ``offer``: the revision that waits to be
    loaded, 0 if none does. ``unloads``: others may have their memory while they idle. ``load_ns``:
    what loading and warming an instance took last, 0 if none was. ``turns``: of a service whose
    answers take many turns; ``objective`` is then that of the first token.
    """

    name: str
    objective: int
    percentile: float
    guaranteed: Share
    limit: Share
    max_batch: int
    rate: float
    rate_trend: float
    p95: int
    refused: int
    answered: int
    exec_ns: dict[str, dict[str, int]]
    instances: int = 1
    pressed: int = 0
    rate_season: float = 1.0
    accuracy_floor: float = 0.0
    variants: dict[str, Variant] = {}
    others: dict[str, tuple[Variant, ...]] = {}
    serving: dict[str, str] = {}
    kinds: tuple[str, ...] = ()
    memory: dict[str, int] = {}
    unfit: dict[str, str] = {}
    offer: int = 0
    unloads: bool = False
    load_ns: int = 0
    turns: TurnFacts | None = None


RATE_WINDOW: Final = 60 * S
"""Over which the progress rate of a job is taken (ns)."""


class JobFacts(msgspec.Struct, frozen=True):
    """One job, on a ``kind`` of device, of whose compute the shares are; ``memory``: bytes
    that it cannot be made to give. On devices of ``apart`` it runs only where no service does.

    One that stands for a reservation is on its ``device`` alone (the shares are then of that), and
    has ``own`` units there for itself.

    ``rate`` is its progress per second over ``RATE_WINDOW``, in which it held so many units for the
    shares of the time that ``units`` tells; ``grants`` is how often per second it was given space,
    each time counted as the part that it was of what the job then held. ``held_ns``:
    unit-nanoseconds granted in all.
    """

    id: str
    weight: float
    guaranteed: float
    limit: float
    rate: float
    held_ns: int
    kind: str = ""
    memory: int = 0
    units: dict[int, float] = {}
    grants: float = 0.0
    apart: tuple[str, ...] = ()
    device: str = ""
    own: int = 0


class Snapshot(msgspec.Struct, frozen=True):
    """Everything the planner may know at ``now`` (ns, monotonic)."""

    now: int
    devices: tuple[DeviceSpec, ...]
    plan: Plan
    services: tuple[ServiceFacts, ...]
    jobs: tuple[JobFacts, ...]
    changing: tuple[str, ...] = ()
    """Devices whose layout is on its way to that of an earlier plan."""
