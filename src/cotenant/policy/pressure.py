"""What measurement says against prediction: how much more a service's load weighs than its rate
says.

Arrivals burst within the second over which their rate is counted, and executions have company
that no model knows of. So while a service misses its objective more often than its percentile
allows, its load is taken ``STEP`` times as high, again and again; as that helps, the correction
fades: additive-increase systems probe for capacity in the same way (Chiu and Jain, 1989), with
the roles of increase and decrease exchanged, because here too little space is what hurts.

Misses that were predicted, while space for them is on its way, contradict no prediction.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cotenant.domain.snapshot import ServiceFacts
from cotenant.domain.units import S

WINDOW: Final = 10 * S
"""Over which misses are counted, fading (ns)."""
EVIDENCE: Final = 5.0
"""Fewer misses than this say nothing."""
STEP: Final = 1.25
MOST: Final = 4.0


class Pressure(msgspec.Struct):
    """One service. ``offered`` and ``pressed`` are recent requests, fading; ``boost`` is what its
    load is multiplied by."""

    at: int = 0
    counted: int = 0
    counted_pressed: int = 0
    offered: float = 0.0
    pressed: float = 0.0
    boost: float = 1.0
    raised_at: int = 0
    foreseen_at: int = 0
    """When misses were last measured that had been predicted (ns)."""


def note_pressure(
    pressure: Pressure,
    service: ServiceFacts,
    now: int,
    patience: int,
    memory: int,
    foreseen: bool = False,
) -> float:
    """Learn from the counts up to ``now`` and return the boost, which is raised at most once in
    ``patience`` and fades with time constant ``memory`` (ns). Misses that were ``foreseen``
    contradict nothing: they are noted and do not raise it."""
    total = service.answered + service.refused
    if pressure.at:
        passed = max(0, now - pressure.at)
        fade = WINDOW / (WINDOW + passed)
        came = max(0, total - pressure.counted)
        late = max(0, service.pressed - pressure.counted_pressed)
        pressure.offered = pressure.offered * fade + came
        pressure.pressed = pressure.pressed * fade + late
        pressure.boost = 1.0 + (pressure.boost - 1.0) * (
            memory / (memory + passed) if memory else 0.0
        )
    pressure.at, pressure.counted, pressure.counted_pressed = now, total, service.pressed
    allowed = pressure.offered * (1.0 - service.percentile / 100.0)
    if pressure.pressed <= max(EVIDENCE, allowed):
        return pressure.boost
    if foreseen:
        pressure.foreseen_at = now
        pressure.offered = pressure.pressed = 0.0
    elif now - pressure.raised_at >= patience:
        pressure.boost = min(MOST, pressure.boost * STEP)
        pressure.raised_at = now
        pressure.offered = pressure.pressed = 0.0
    return pressure.boost
