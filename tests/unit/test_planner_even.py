"""Laws of the planner where jobs cannot be: all of the device is the services', in equal parts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cotenant.domain.device import DeviceSpec, PreemptLevel, even_sizes
from cotenant.domain.snapshot import ServiceFacts
from cotenant.domain.units import MS, S
from tests.builders import cpu
from tests.unit.test_planner import Planning, job, service

UNITS = 16


def divided(**changes: Any) -> DeviceSpec:
    """A GPU in subsets, as its device says it is."""
    spec = cpu(UNITS, PreemptLevel.NONE, id="cuda", kind="cuda", trains=False)
    return msgspec.structs.replace(spec, shapes=even_sizes(UNITS), **changes)


def scaling(name: str, rate: float = 0.0, alone: int = 16 * MS, **changes: Any) -> ServiceFacts:
    """Whose requests take 16 ms on one unit, and half of that on twice as many, up to four."""
    sizes = divided().shapes
    times = {f"{u}x{r}": alone * r // min(u, 4) for u in sizes for r in (1, 2, 4, 8)}
    return service(name, rate, exec_ns={"cuda": times}, instances=1, **changes)


class Dividing(Planning):
    """A planner whose device is a GPU in subsets."""

    def __init__(self, **tuning: Any) -> None:
        super().__init__(**tuning)
        self.devices = (divided(),)

    @property
    def sizes(self) -> list[int]:
        return sorted(p.compute for p in self.present.partitions)

    def run(self, seconds: int, *facts: ServiceFacts) -> None:
        for _ in range(seconds):
            self.see(*facts)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 20])
def test_each_instance_starts_with_a_subset_of_its_own(count: int) -> None:
    world = Dividing()
    services = [scaling(f"s{n}") for n in range(count)]
    world.see(*services)
    assert len(world.sizes) == min(count, UNITS) and max(world.sizes) - min(world.sizes) <= 1
    places = list(world.present.services.values())
    assert all(len(where) == 1 for where in places)
    assert len({where[0] for where in places}) == min(count, UNITS)


def test_who_comes_and_goes_is_placed_at_once() -> None:
    world = Dividing()
    world.see()
    assert world.sizes == [16]
    world.see(scaling("a"))
    world.see(scaling("a"), scaling("b"))
    assert world.sizes == [8, 8]
    assert not set(world.present.services["a"]) & set(world.present.services["b"])
    world.see(scaling("b"))
    assert world.sizes == [16]


def test_it_is_divided_anew_where_an_objective_is_missed_and_back_when_that_is_over() -> None:
    world = Dividing()
    calm = [scaling(name) for name in "abcdefgh"]
    world.run(60, *calm)
    assert world.sizes == [2] * 8
    # Twice as fast on four units: then there are four subsets, and three services share with it.
    loud = scaling("a", 100.0, objective=40 * MS)
    world.run(60, loud, *calm[1:])
    assert min(world.sizes) >= 4
    world.run(600, *calm)
    assert world.sizes == [2] * 8


def test_a_moment_of_load_divides_nothing_anew() -> None:
    world = Dividing()
    calm = [scaling(name) for name in "abcdefgh"]
    world.run(60, *calm)
    world.see(scaling("a", 100.0, objective=40 * MS), *calm[1:], after=S // 10)
    world.run(60, *calm)
    assert world.sizes == [2] * 8


def test_what_no_division_helps_changes_nothing() -> None:
    world = Dividing()
    world.run(5, scaling("a", objective=1 * MS), scaling("b"))
    before = world.sizes
    world.run(60, scaling("a", 1000.0, objective=1 * MS), scaling("b"))
    assert world.sizes == before


def test_a_device_of_one_shape_stays_one_partition() -> None:
    world = Dividing()
    world.devices = (msgspec.structs.replace(divided(), shapes=(UNITS,)),)
    world.run(10, *(scaling(f"s{n}", 200.0) for n in range(4)))
    assert world.sizes == [16]


def test_jobs_are_not_there() -> None:
    world = Dividing()
    plan = world.see(scaling("a"), job(kind="cuda"))
    assert plan is not None and not plan.jobs and not plan.lendable
