"""What is published of a node, and that a scheduler cannot give away more than there is."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.domain import mig
from cotenant.kube import claims, slices
from cotenant.kube.inventory import BLOCK, Inventory, inventory, label
from cotenant.kube.ports import Object
from tests import kube_schema
from tests.kube_fakes import ask, claim, cpu, gpu_mig, gpu_subsets, npu
from tests.kube_oracle import Oracle, amount, selects

NODE = "n1"
OWNER = {"metadata": {"name": NODE, "uid": "e1b7a1de-0000-4000-8000-000000000000"}}
BOXES = {
    "a CPU": [cpu()],
    "a large CPU": [cpu(cores=192)],
    "subsets": [gpu_subsets()],
    "MIG": [gpu_mig()],
    "an NPU": [npu()],
    "everything": [cpu(70), gpu_subsets(), gpu_mig(), gpu_mig("A100-SXM4-40GB", "gpu2"), npu()],
    "ten devices": [cpu(2, f"null-{n}") for n in range(10)],
    "odd names": [cpu(id="CPU 0/α"), cpu(id="x" * 200), gpu_mig(id="GPU:0")],
    "nothing": [],
}
EVERY: dict[str, Object] = {"all": {}}


def published(devices: list[Object]) -> list[Object]:
    pool = slices.wanted(inventory(devices), slices.Pool(), set())
    return slices.slices(pool, NODE, 1, OWNER)


def whole(devices: list[Object]) -> Oracle:
    return Oracle(published(devices), EVERY)


def of(mode: str, kind: str = "") -> str:
    found = f'device.attributes["cotenant.dev"].mode == "{mode}"'
    return found + (f' && device.attributes["cotenant.dev"].kind == "{kind}"' if kind else "")


ONE_CORE = of("space") + ' && device.attributes["cotenant.dev"].units == 1'


def profile(name: str) -> str:
    return f'device.attributes["cotenant.dev"].profile == "{name}"'


@pytest.mark.parametrize("devices", BOXES.values(), ids=BOXES)
def test_slices_are_what_the_api_takes(devices: list[Object]) -> None:
    found = published(devices)
    for item in found:
        kube_schema.check(item)
    assert len({item["spec"]["pool"]["generation"] for item in found}) == 1
    assert {item["spec"]["pool"]["resourceSliceCount"] for item in found} == {len(found)}
    assert slices.in_order(found, NODE)
    Oracle(found, EVERY)


@pytest.mark.parametrize("devices", BOXES.values(), ids=BOXES)
def test_every_device_has_every_attribute(devices: list[Object]) -> None:
    found = [d for item in published(devices) for d in item["spec"].get("devices", [])]
    kinds = {
        tuple(sorted((name, *value) for name, value in device["attributes"].items()))
        for device in found
    }
    assert len(kinds) <= 1
    assert {tuple(device["capacity"]) for device in found} <= {("share",)}
    for (names,) in [kinds] if kinds else []:
        for name, _ in names:
            for device in found:
                selects(
                    f'device.attributes["cotenant.dev"].{name} == {value(device, name)}',
                    "cotenant.dev",
                    device,
                )


def value(device: Object, name: str) -> str:
    (found,) = device["attributes"][name].values()
    if isinstance(found, bool):
        return str(found).lower()
    return str(found) if isinstance(found, int) else '"' + found.replace('"', "") + '"'


def test_labels_tell_ids_apart() -> None:
    ids = ["cpu", "CPU", "cpu ", "c-p-u", "x" * 200, "x" * 201, "α", "β", "gpu:0", "gpu-0"]
    labels = [label(id) for id in ids]
    assert len(set(labels)) == len(ids)


def test_a_claim_can_take_cores_up_to_all() -> None:
    oracle = whole([cpu(4)])
    assert oracle.allocate("c", [ask("a", "all", 4, selector=of("space"))])
    assert oracle.allocate("d", [ask("a", "all", 1, selector=of("space"))]) is None
    oracle.free("c")
    assert oracle.allocate("d", [ask("a", "all", 1, selector=of("space"))])


def test_more_cores_than_a_claim_has_devices_come_in_blocks() -> None:
    devices = [cpu(48)]
    oracle = whole(devices)
    assert oracle.allocate("c", [ask("a", "all", 33, selector=ONE_CORE)]) is None
    block = f'device.attributes["cotenant.dev"].units == {BLOCK}'
    found = oracle.allocate("c", [ask("a", "all", 6, selector=block)])
    assert found is not None
    held = claim(allocation=found)
    (reservation,) = claims.reservations(held, NODE, inventory(devices).parts)
    assert reservation.units == 48
    assert oracle.allocate("d", [ask("a", "all", 1, selector=ONE_CORE)]) is None


def test_cores_and_shares_of_time_exclude_each_other() -> None:
    oracle = whole([cpu(4)])
    assert oracle.allocate("core", [ask("a", "all", selector=of("space"))])
    assert oracle.allocate("share", [ask("a", "all", share="10", selector=of("time"))]) is None
    oracle.free("core")
    assert oracle.allocate("share", [ask("a", "all", share="10", selector=of("time"))])
    assert oracle.allocate("core", [ask("a", "all", selector=of("space"))]) is None
    assert oracle.allocate("more", [ask("a", "all", share="90", selector=of("time"))])
    assert oracle.allocate("last", [ask("a", "all", share="1", selector=of("time"))]) is None


def test_devices_of_a_node_do_not_exclude_each_other() -> None:
    oracle = whole([cpu(4), gpu_mig()])
    assert oracle.allocate("a", [ask("a", "all", share="100", selector=of("time", "cpu"))])
    assert oracle.allocate("b", [ask("a", "all", share="100", selector=of("time", "cuda"))])


@pytest.mark.parametrize(
    ("asked", "taken"), [("", "100"), ("7", "7"), ("250m", "1"), ("12500m", "13"), ("100", "100")]
)
def test_shares_are_whole_per_cents(asked: str, taken: str) -> None:
    oracle = whole([cpu(4)])
    found = oracle.allocate("c", [ask("a", "all", share=asked, selector=of("time"))])
    assert found is not None
    assert found["devices"]["results"][0]["consumedCapacity"]["share"] == taken


def test_a_share_over_the_whole_is_not_to_be_had() -> None:
    oracle = whole([cpu(4)])
    assert oracle.allocate("c", [ask("a", "all", share="101", selector=of("time"))]) is None


def test_instances_of_mig_lie_as_the_gpu_can_form_them() -> None:
    oracle = whole([gpu_mig()])
    assert oracle.allocate("3", [ask("a", "all", 2, selector=profile("3g.40gb"))])
    assert oracle.allocate("1", [ask("a", "all", selector=profile("1g.10gb"))]) is None
    oracle.free("3")
    assert oracle.allocate("4", [ask("a", "all", selector=profile("4g.40gb"))])
    assert oracle.allocate("3", [ask("a", "all", selector=profile("3g.40gb"))])
    assert oracle.allocate("t", [ask("a", "all", share="1", selector=of("time"))]) is None


def test_what_only_serves_is_had_as_a_whole() -> None:
    for device in (npu(), gpu_subsets(), {**gpu_mig(), "trains": False}):
        (part,) = inventory([device]).parts.values()
        assert (part.mode, part.units) == ("space", device["compute"])


def test_subsets_that_jobs_can_have_are_had_by_the_unit() -> None:
    oracle = whole([{**gpu_subsets(8), "trains": True}])
    assert oracle.allocate("c", [ask("a", "all", 3, selector=of("space"))])
    assert oracle.allocate("d", [ask("a", "all", 6, selector=of("space"))]) is None
    assert oracle.allocate("d", [ask("a", "all", 5, selector=of("space"))])


def test_a_gpu_of_which_others_have_a_part_offers_the_rest() -> None:
    table = mig.table("H100-SXM5-80GB")
    left = table.without([mig.Placement(0, "3g.40gb")])
    device = {**gpu_mig(), "mig": mig.word(left), "units": [4, 5, 6, 7], "compute": 4}
    oracle = whole([device])
    assert oracle.allocate("a", [ask("a", "all", selector=profile("7g.80gb"))]) is None
    assert oracle.allocate("b", [ask("a", "all", selector=profile("3g.40gb"))])
    assert oracle.allocate("c", [ask("a", "all", selector=profile("3g.40gb"))]) is None


SELECTORS = [
    of("space", "cpu"),
    of("space", "cuda"),
    of("space", "npu"),
    of("time", "cpu"),
    of("time", "cuda"),
    *[profile(p.name) for p in mig.table("H100-SXM5-80GB").profiles],
    "true",
]
REQUESTS = st.tuples(
    st.sampled_from(SELECTORS), st.integers(1, 5), st.sampled_from(["", "1", "30", "55", "100"])
)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.lists(REQUESTS, min_size=1, max_size=3), st.booleans()), max_size=12))
def test_whatever_is_allocated_never_exceeds_the_silicon(
    history: list[tuple[list[tuple[str, int, str]], bool]],
) -> None:
    devices = [cpu(5), {**gpu_subsets(3), "trains": True}, gpu_mig(), npu()]
    box, oracle = inventory(devices), whole(devices)
    for number, (wishes, frees) in enumerate(history):
        requests = [
            ask(f"r{n}", "all", count, share, selector)
            for n, (selector, count, share) in enumerate(wishes)
        ]
        oracle.allocate(number, requests)
        if frees and oracle.claims:
            oracle.free(next(iter(oracle.claims)))
        for device in devices:
            _within(device, oracle, box)


def _within(device: Object, oracle: Oracle, box: Inventory) -> None:
    """By what the claims' reservations say, and for MIG by the table of placements."""
    held = []
    for number, results in oracle.claims.items():
        item = claim(str(number), {"devices": {"results": results}})
        held += claims.reservations(item, NODE, box.parts)
    mine = [r for r in held if r.device == device["id"]]
    units, share = sum(r.units for r in mine), sum(Fraction(r.share) for r in mine)
    assert units <= device["compute"]
    assert share <= 1 + Fraction(1, 10**9)
    assert not (units and share)
    if device["mig"]:
        assert mig.table(device["mig"]).why_not(_placements(oracle, box, device)) is None


def _placements(oracle: Oracle, box: Inventory, device: Object) -> list[mig.Placement]:
    parts = [box.parts[result["device"]] for result in oracle.results]
    return [
        mig.Placement(int(p.name.rpartition("-")[2]), str(p.attributes["profile"]))
        for p in parts
        if p.device == device["id"] and p.mode == "mig"
    ]


def test_trouble_keeps_claims_off() -> None:
    oracle = whole([{**cpu(4), "trouble": "it hangs"}])
    assert oracle.allocate("c", [ask("a", "all")]) is None
    tolerant: Any = ask("a", "all")
    tolerant["exactly"]["tolerations"] = [{"operator": "Exists"}]
    assert oracle.allocate("c", [tolerant])


def test_the_oracle_rounds_as_the_policy_says() -> None:
    (device,) = [
        d
        for item in published([cpu(1)])
        for d in item["spec"].get("devices", [])
        if d.get("allowMultipleAllocations")
    ]
    policy = device["capacity"]["share"]["requestPolicy"]["validRange"]
    assert all(amount(policy[key]).denominator == 1 for key in ("min", "max", "step"))
