"""The manifests that we ship: what Kubernetes takes, what our parameters are, what they select."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cotenant.kube import claims, slices
from cotenant.kube.inventory import inventory
from cotenant.kube.ports import Object
from tests import kube_schema
from tests.kube_fakes import FakeNode, claim, cpu, gpu_mig, gpu_subsets, npu
from tests.kube_oracle import Oracle

FOLDER = Path(__file__).parents[3] / "deploy" / "kubernetes" / "dra"
BOX = inventory([cpu(), gpu_subsets(), gpu_mig(), npu()])


def documents() -> list[Object]:
    found = [yaml.safe_load_all(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))]
    return [item for items in found for item in items]


CLASSES = {d["metadata"]["name"]: d["spec"] for d in documents() if d["kind"] == "DeviceClass"}
TEMPLATES = {
    d["metadata"]["name"]: d["spec"]["spec"]["devices"]
    for d in documents()
    if d["kind"] == "ResourceClaimTemplate"
}


def oracle() -> Oracle:
    pool = slices.wanted(BOX, slices.Pool(), set())
    return Oracle(slices.slices(pool, "n1", 1, None), CLASSES)


def test_they_are_what_the_api_takes() -> None:
    for item in documents():
        kube_schema.check(item)


@pytest.mark.parametrize("name", TEMPLATES)
def test_their_claims_can_be_allocated_and_planned(name: str) -> None:
    wish = TEMPLATES[name]
    config = [{"source": "FromClaim", **entry} for entry in wish.get("config", [])]
    found = oracle().allocate("c", wish["requests"], config)
    assert found is not None
    node = FakeNode(cpu(), gpu_subsets(), gpu_mig(), npu())
    for reservation in claims.reservations(claim(allocation=found), "n1", BOX.parts):
        assert node.reserve(reservation).made


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_selects_something_and_aborts_nowhere(name: str) -> None:
    request = {"name": "a", "exactly": {"deviceClassName": name}}
    assert oracle().allocate("c", [request]) is not None
    others = {"name": "a", "exactly": {"deviceClassName": name, "count": 30}}
    oracle().allocate("c", [others])


def test_pods_name_templates_that_there_are() -> None:
    for pod in (d for d in documents() if d["kind"] == "Pod"):
        names = {c["resourceClaimTemplateName"] for c in pod["spec"]["resourceClaims"]}
        assert names <= TEMPLATES.keys()
