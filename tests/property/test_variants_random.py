"""Random histories in which variants come, go, are chosen and fail: the laws hold."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.domain import events as e
from cotenant.domain.device import PreemptLevel
from cotenant.domain.plan import Plan
from cotenant.domain.workload import Variant
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.state import DispatcherState
from tests.property.test_dispatcher_random import SERVICES, Bound, Chaos

NAMES = ("original", "int8", "pruned")
KINDS = ("cpu", "npu", "gpu")


class Varied(Chaos):
    """Services whose versions have variants."""

    def random_plan(self) -> Plan:
        return with_variants(self, super().random_plan())

    def spontaneous(self) -> None:
        if self.random.random() < 0.1:
            some_variants(self)
        else:
            super().spontaneous()


class VariedBound(Bound):
    """The same where instances are bound to partitions."""

    def random_plan(self) -> Plan:
        return with_variants(self, super().random_plan())

    def spontaneous(self) -> None:
        if self.random.random() < 0.1:
            some_variants(self)
        else:
            super().spontaneous()


def with_variants(world: Chaos, plan: Plan) -> Plan:
    r = world.random
    chosen = {s: {k: r.choice(NAMES) for k in KINDS if r.random() < 0.6} for s in SERVICES}
    ready = {s: {k: r.choice(NAMES) for k in KINDS if r.random() < 0.4} for s in SERVICES}
    return msgspec.structs.replace(plan, variants=chosen, ready=ready)


def some_variants(world: Chaos) -> None:
    r = world.random
    known = {
        kind: tuple(Variant(name=n) for n in NAMES[1:] if r.random() < 0.6)
        for kind in KINDS
        if r.random() < 0.8
    }
    world.send(e.VariantsKnown(r.choice(SERVICES), r.choice("12"), known))


UNITS = st.sampled_from([1, 2, 4, 5])
LEVELS = st.sampled_from(list(PreemptLevel))
SEEDS = st.integers(0, 2**32)


@settings(max_examples=80, deadline=None)
@given(SEEDS, LEVELS, UNITS, st.booleans())
def test_every_request_is_answered_once(
    seed: int, level: PreemptLevel, units: int, bound: bool
) -> None:
    world = (VariedBound if bound else Varied)(seed, level, units)
    world.run(250)
    missing = world.submitted - set(world.answered) - set(world.d.state.queued)
    assert not missing


@settings(max_examples=40, deadline=None)
@given(SEEDS, UNITS)
def test_a_box_that_falls_idle_serves_each_service_in_one_variant_a_site(
    seed: int, units: int
) -> None:
    world = Varied(seed, PreemptLevel.PRIORITY, units)
    world.noise(150)
    world.settle()
    for service in world.d.state.services.values():
        variants: dict[str, set[str]] = {}
        for worker in world.d.state.workers.values():
            serves = (worker.version, worker.revision) in service.versions.items()
            here = (
                worker.service == service.name
                and worker.up
                and not (worker.retiring or worker.standby)
            )
            if serves and here:
                site = f"{worker.version} {worker.site}"
                variants.setdefault(site, set()).add(worker.variant)
        assert all(len(names) == 1 for names in variants.values()), variants


@settings(max_examples=20, deadline=None)
@given(SEEDS, UNITS)
def test_a_checkpoint_goes_on_as_the_dispatcher_would(seed: int, units: int) -> None:
    world = Varied(seed, PreemptLevel.PRIORITY, units)
    world.noise(100)
    kept = msgspec.msgpack.decode(msgspec.msgpack.encode(world.d.state), type=DispatcherState)
    other, length = Dispatcher(world.d.devices, kept), len(world.history)
    for _ in range(50):
        world.spontaneous()
    for now, event, actions in world.history[length:]:
        assert other.handle(now, event) == actions
