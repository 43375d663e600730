"""Which device carries which service: what fits an NPU goes there, and why the rest does not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotenant.domain.device import DeviceSpec, PreemptLevel
from cotenant.domain.snapshot import ServiceFacts
from cotenant.domain.units import MS
from cotenant.domain.workload import Variant
from cotenant.policy.placing import place, why_not
from cotenant.policy.views import Placing
from tests.builders import cpu
from tests.unit.test_planner import Planning, service

MIB = 2**20


def npu(memory: int = 100 * MIB, operators: tuple[str, ...] = ()) -> DeviceSpec:
    found = cpu(1, PreemptLevel.NONE, id="npu", kind="npu", trains=False, operators=operators)
    return msgspec.structs.replace(found, memory=memory)


def model(
    name: str = "s", rate: float = 10.0, on_npu: Variant | None = None, **changes: Any
) -> ServiceFacts:
    """20 ms a request on a core, 5 ms on the NPU."""
    variants = {"cpu": Variant(memory=50 * MIB, accuracy=0.99)}
    times = {"cpu": {"1x1": 20 * MS, "1x8": 110 * MS}}
    if on_npu is not None:
        variants["npu"] = on_npu
        times["npu"] = {"1x1": 5 * MS, "1x8": 30 * MS}
    return service(name, rate, **{"variants": variants, "exec_ns": times, "instances": 1} | changes)


SMALL = Variant(memory=40 * MIB, accuracy=0.97, operators=("conv",))


def placed(*services: ServiceFacts, device: DeviceSpec | None = None, cores: int = 8) -> Placing:
    return place(services, (device or npu(), cpu(cores)), {}, 0.0)


def test_what_fits_goes_to_the_npu_alone() -> None:
    assert placed(model(on_npu=SMALL)).homes() == {"s": {"npu"}}


@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({"on_npu": None}, npu()),
        ({"on_npu": Variant(memory=200 * MIB)}, npu()),
        ({"on_npu": SMALL, "accuracy_floor": 0.98}, npu()),
        ({"on_npu": SMALL}, npu(operators=("gemm",))),
        ({"on_npu": SMALL, "objective": 5 * MS}, npu()),
    ],
    ids=["no build", "memory", "accuracy", "operators", "time"],
)
def test_what_does_not_fit_stays_off_it_and_it_is_said(
    changes: dict[str, Any], device: DeviceSpec
) -> None:
    found = placed(model(**changes), device=device)
    assert found.homes() == {"s": {"cpu"}}
    (reason,) = found.reasons
    assert "npu" in reason


def test_each_kind_of_misfit_has_a_reason_of_its_own() -> None:
    misfits = [
        why_not(model(on_npu=None), npu(), npu().memory),
        why_not(model(on_npu=Variant(memory=200 * MIB)), npu(), npu().memory),
        why_not(model(on_npu=SMALL, accuracy_floor=0.98), npu(), npu().memory),
        why_not(model(on_npu=SMALL), npu(operators=("gemm",)), npu().memory),
    ]
    assert all(misfits)
    assert len(set(misfits)) == len(misfits)


def test_two_models_share_the_npu_until_its_memory_is_used_up() -> None:
    found = placed(*(model(name, 10.0, SMALL) for name in "abc"))
    assert sorted(map(sorted, found.homes().values())) == [["cpu"], ["npu"], ["npu"]]


def test_the_one_that_relieves_the_cores_more_for_its_time_goes_first() -> None:
    slow_there = model("slow", 10.0, SMALL)
    slow_there.exec_ns["npu"]["1x1"] = 19 * MS
    found = placed(slow_there, model("fast", 10.0, SMALL), device=npu(memory=50 * MIB))
    assert found.homes() == {"fast": {"npu"}, "slow": {"cpu"}}


def test_both_at_once_when_the_npu_alone_is_not_enough() -> None:
    found = placed(model(rate=400.0, on_npu=SMALL))
    assert found.homes() == {"s": {"npu", "cpu"}}
    assert 0.1 < found.parts["s"]["npu"] < 0.9
    assert sum(found.parts["s"].values()) == pytest.approx(1.0)
    assert found.reasons


def test_a_model_that_runs_only_there_goes_there_whatever_it_brings() -> None:
    only = service(
        "s", 1000.0, variants={"npu": SMALL}, exec_ns={"npu": {"1x1": 5 * MS}}, instances=1
    )
    assert placed(only).parts == {"s": {"npu": 1.0}}


def test_one_that_can_run_nowhere_has_no_place_and_it_is_said() -> None:
    found = placed(service("s", variants={"tpu": Variant()}))
    assert found.parts == {"s": {}}
    assert found.reasons


def test_services_stay_where_they_are_while_the_load_is_even() -> None:
    boxes = (cpu(4, id="a"), cpu(4, id="b"))
    services = [model(f"s{i}", 20.0) for i in range(4)]
    before = place(services, boxes, {}, 0.0)
    assert sorted(len([h for h in before.homes().values() if h == {d}]) for d in "ab") == [2, 2]
    swapped = {n: {"a" if "b" in p else "b": 1.0} for n, p in before.parts.items()}
    assert place(services, boxes, swapped, 0.0).parts == swapped


@given(
    st.lists(
        st.tuples(st.floats(0, 500), st.booleans(), st.integers(1, 120), st.floats(0.9, 1)),
        min_size=1,
        max_size=8,
    )
)
def test_laws_hold_for_any_services(drawn: list[tuple[float, bool, int, float]]) -> None:
    services = [
        model(f"s{i}", rate, Variant(size * MIB, accuracy) if there else None, accuracy_floor=0.95)
        for i, (rate, there, size, accuracy) in enumerate(drawn)
    ]
    found = placed(*services)
    used = 0
    for each in services:
        assert sum(found.parts[each.name].values()) == pytest.approx(1.0)
        if "npu" in found.parts[each.name]:
            used += each.variants["npu"].memory
            assert not why_not(each, npu(), npu().memory)
    assert used <= npu().memory


def test_one_that_is_not_placed_leaves_the_room_to_others() -> None:
    tight = model("tight", 60.0, SMALL, objective=10 * MS)
    tight.exec_ns["npu"]["1x1"] = tight.exec_ns["cpu"]["1x1"] = 9 * MS
    found = placed(tight, model("easy", 20.0, SMALL, objective=500 * MS))
    assert found.homes()["easy"] == {"npu"}
    assert any("tight" in reason for reason in found.reasons)


def test_two_serving_devices_share_what_one_cannot_carry() -> None:
    second = msgspec.structs.replace(npu(), id="npu2")
    services = [
        model(name, 50.0, SMALL, objective=200 * MS, accuracy_floor=0.95) for name in ("a", "b")
    ]
    for each in services:
        each.exec_ns["npu"] = {"1x1": 9 * MS, "1x8": 72 * MS}
        each.variants["cpu"] = Variant(accuracy=0.5)
    found = place(services, (npu(), second, cpu(4)), {}, 0.0)
    assert {home for homes in found.homes().values() for home in homes} == {"npu", "npu2"}


def planning(**tuning: Any) -> Planning:
    """Two boxes of four cores, and on each of them one of two pairs of services."""
    found = Planning(**tuning)
    found.devices = (cpu(4, id="a"), cpu(4, id="b"))
    return found


def pair(big: float, small: float = 10.0) -> list[ServiceFacts]:
    return [model("big0", big), model("big1", big), model("small0", small), model("small1", small)]


def homes(found: Planning) -> dict[str, frozenset[str]]:
    return Placing(found.planner.state.parts).homes()


def test_a_service_moves_when_its_device_has_had_too_much_for_a_while() -> None:
    found = planning()
    found.see(*pair(10.0))
    first = homes(found)
    a, b = sorted(first, key=lambda name: (sorted(first[name]), name))[:2]  # those on one box
    grown = [s if s.name not in (a, b) else model(s.name, 100.0) for s in pair(10.0)]
    found.see(*grown)
    assert homes(found) == first
    plans = [found.see(*grown) for _ in range(40)]
    moved = homes(found)
    assert moved != first
    assert moved[a] != moved[b]
    reasons = [reason for plan in plans if plan for reason in plan.reasons]
    assert any(a in reason or b in reason for reason in reasons)


def test_services_do_not_move_where_that_is_not_wanted() -> None:
    found = planning(move=False)
    found.see(*pair(10.0))
    first = homes(found)
    for _ in range(40):
        found.see(*pair(100.0))
    assert homes(found) == first


def test_a_burst_moves_nobody() -> None:
    found = planning()
    found.see(*pair(10.0))
    first = homes(found)
    a, b = sorted(first, key=lambda name: (sorted(first[name]), name))[:2]
    for step in range(60):
        high = 60.0 if step % 20 < 5 else 10.0
        found.see(*[s if s.name not in (a, b) else model(s.name, high) for s in pair(10.0)])
    assert homes(found) == first
