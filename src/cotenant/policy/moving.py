"""What services lose by a change of layout where models are bound to their instances: what is to
serve elsewhere is loaded and warmed there first."""

from __future__ import annotations

from cotenant.policy.views import Layout, Verdict, View


def unanswered(view: View, verdict: Verdict) -> int:
    """For how many ns services answer nothing while the layout becomes one in which they are where
    the verdict has them, summed over services. One of which a part stays where it is answers there
    meanwhile: it counts for the part of its space that goes. 0 where models are not bound.
    """
    device, layout = view.device, verdict.layout
    if not device.pins_workers:
        return 0
    found = 0.0
    there = {p.id: p.compute for p in view.plan.partitions if p.device == device.id}
    stays = {p.id for p in (*layout.mine, *layout.free)}
    for service in view.services:
        before = [p for p in view.plan.services.get(service.name, ()) if p in there]
        if not before or _places(layout, verdict, service.name) <= set(before):
            continue  # nothing of it is loaded
        gone = sum(there[p] for p in before if p not in stays) / sum(there[p] for p in before)
        found += gone * (device.repartition_ns + service.load_ns)
    return round(found)


def _places(layout: Layout, verdict: Verdict, service: str) -> set[str]:
    return {layout.mine[index].id for index in verdict.services.get(service, ())}
