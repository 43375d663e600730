"""From allocations to reservations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.reservation import MOST_ID
from cotenant.domain.units import MS
from cotenant.kube import slices
from cotenant.kube.claims import reservation_ids, reservations
from cotenant.kube.inventory import inventory
from cotenant.kube.ports import Object
from tests.kube_fakes import ask, claim, cpu, gpu_mig, npu, says
from tests.kube_oracle import Oracle

NODE = "n1"
BOX = inventory([cpu(), gpu_mig(), npu()])
POOL = slices.wanted(BOX, slices.Pool(), set())


def any_of(**attributes: str | int) -> Object:
    expressions = [
        f'device.attributes["cotenant.dev"].{name} == {value!r}'.replace("'", '"')
        for name, value in attributes.items()
    ]
    return {"selectors": [{"cel": {"expression": e}} for e in expressions]}


CLASSES = {
    "cores": any_of(mode="space", kind="cpu"),
    "time": any_of(mode="time", kind="cpu"),
    "mig": any_of(mode="mig"),
    "npu": any_of(kind="npu"),
}


def allocated(*requests: Object, config: Sequence[Object] = (), **more: Any) -> Object:
    oracle = Oracle(slices.slices(POOL, NODE, 1, None), CLASSES)
    found = oracle.allocate("c", list(requests), config)
    assert found is not None
    return claim(allocation=found, **more)


def test_the_cores_of_a_claim_are_one_reservation() -> None:
    (found,) = reservations(allocated(ask("a", "cores", 2), ask("b", "cores")), NODE, BOX.parts)
    assert (found.device, found.units, found.share) == ("cpu", 3, 0)


def test_a_share_is_guaranteed_as_far_as_its_claim_says() -> None:
    (whole,) = reservations(allocated(ask("a", "time", share="40")), NODE, BOX.parts)
    assert (whole.share, whole.units, whole.limit) == (pytest.approx(0.4), 0, 1.0)
    config = [says(guarantee=50, limit=60, memory="1Gi", objective="20ms")]
    (half,) = reservations(allocated(ask("a", "time", share="40"), config=config), NODE, BOX.parts)
    assert half.share == pytest.approx(0.2)
    assert (half.limit, half.memory, half.within) == (0.6, 2**30, 20 * MS)


def test_every_share_of_a_claim_is_a_reservation_of_its_own() -> None:
    both = allocated(ask("a", "time", share="40"), ask("b", "time", share="30"))
    found = reservations(both, NODE, BOX.parts)
    assert sorted(r.share for r in found) == pytest.approx([0.3, 0.4])
    assert len({r.id for r in found}) == 2


def test_an_instance_of_mig_has_its_slices_and_its_memory() -> None:
    request = ask("a", "mig", selector='device.attributes["cotenant.dev"].profile == "3g.40gb"')
    (found,) = reservations(allocated(request), NODE, BOX.parts)
    assert (found.device, found.units) == ("gpu1", 3)
    assert found.memory > 30 * 2**30


def test_an_npu_is_had_whole() -> None:
    (found,) = reservations(allocated(ask("a", "npu")), NODE, BOX.parts)
    assert (found.device, found.units) == ("npu", 1)


def test_ids_follow_from_the_claim_alone() -> None:
    held = allocated(ask("a", "cores", 2), ask("m", "mig"))
    ids = [r.id for r in reservations(held, NODE, BOX.parts)]
    assert reservation_ids(held, NODE) == ids
    assert all(id.startswith("k8s:") and held["metadata"]["uid"] in id for id in ids)
    assert all(len(id) <= MOST_ID for id in ids)


def test_ids_are_the_same_wherever_deep_parameters_were_cut_off() -> None:
    def nested(levels: int) -> Object:
        deep: Any = 1
        for _ in range(levels):
            deep = {"a": [deep]}
        return allocated(ask("a", "cores"), config=[says(x=deep)], uid="u")

    assert reservation_ids(nested(40), NODE) == reservation_ids(nested(39), NODE)


def test_another_allocation_of_a_claim_is_another_reservation() -> None:
    one = allocated(ask("a", "cores", 2), uid="u")
    assert reservation_ids(one, NODE) == reservation_ids(
        allocated(ask("a", "cores", 2), uid="u"), NODE
    )
    other = allocated(ask("a", "cores", 3), uid="u")
    assert set(reservation_ids(one, NODE)).isdisjoint(reservation_ids(other, NODE))


def test_what_is_another_nodes_or_drivers_is_left_to_them() -> None:
    held = allocated(ask("a", "cores", 2))
    assert reservations(held, "n2", BOX.parts) == []
    for result in held["status"]["allocation"]["devices"]["results"]:
        result["driver"] = "gpu.example"
    assert reservations(held, NODE, BOX.parts) == []
    assert reservations(claim(), NODE, BOX.parts) == []


@pytest.mark.parametrize(
    ("request_", "config"),
    [
        (ask("a", "cores"), says(guarantee=50)),
        (ask("a", "cores"), says(limit=50)),
        (ask("a", "mig"), says(guarantee=50)),
        (ask("a", "mig"), says(memory="1Ti")),
        (ask("a", "time", share="40"), says(limit=30)),
        (ask("a", "time", share="40"), says(unknown=1)),
    ],
)
def test_contradictions_are_refused(request_: Object, config: Object) -> None:
    with pytest.raises(InvalidRequest):
        reservations(allocated(request_, config=[config]), NODE, BOX.parts)


def test_a_device_that_has_vanished_is_refused_and_still_has_an_id() -> None:
    held = allocated(ask("a", "npu"))
    without = inventory([cpu()])
    with pytest.raises(InvalidRequest):
        reservations(held, NODE, without.parts)
    assert len(reservation_ids(held, NODE)) == 1


@pytest.mark.parametrize("consumed", ["0", "101", "12500m", "", "-3"])
def test_shares_that_no_policy_allows_are_refused(consumed: str) -> None:
    held = allocated(ask("a", "time", share="40"))
    held["status"]["allocation"]["devices"]["results"][0]["consumedCapacity"]["share"] = consumed
    with pytest.raises(InvalidRequest):
        reservations(held, NODE, BOX.parts)


def test_there_is_no_access_as_admin() -> None:
    held = allocated(ask("a", "cores"))
    held["status"]["allocation"]["devices"]["results"][0]["adminAccess"] = True
    with pytest.raises(InvalidRequest):
        reservations(held, NODE, BOX.parts)
