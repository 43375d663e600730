"""What is known of a service whose answers take turns, for the planner."""

from __future__ import annotations

from cotenant.domain.snapshot import TurnCost, TurnFacts
from cotenant.policy.state import DispatcherState, ServiceState
from cotenant.telemetry.meters import ServiceMeter


def turns_of(
    state: DispatcherState, service: ServiceState, meter: ServiceMeter
) -> TurnFacts | None:
    """None for a service whose answers take no turns."""
    if not service.turns:
        return None
    costs: dict[str, dict[int, TurnCost]] = {}
    for where, seen in service.turn_costs.items():
        kind, _, units = where.rpartition(":")
        if seen.told:
            cost = TurnCost(seen.fixed, seen.token, seen.pair, seen.step)
            costs.setdefault(kind, {})[int(units)] = cost
    return TurnFacts(
        pace=service.pace,
        prompt=meter.prompt.value,
        prompt_dev=meter.prompt.deviation,
        answer=meter.answer.value,
        together=_together(state, service, meter),
        costs=costs,
        warm={kind: known.warm() for kind, known in service.exec.items()},
    )


def _together(state: DispatcherState, service: ServiceState, meter: ServiceMeter) -> int:
    """Sequences of mean length that an instance can have at one time, by its batch and memory."""
    tokens = meter.prompt.value + meter.answer.value
    rooms = [w.most_room for w in state.workers.values() if w.service == service.name and w.up]
    room = min([r for r in rooms if r], default=0)
    if not room or not tokens:
        return service.max_batch
    return max(1, min(service.max_batch, int(room / tokens)))
