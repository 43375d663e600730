"""The manifests under deploy/: as the schema of each kind allows, and naming what is there."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cotenant.domain.config import parse_config

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = DEPLOY / "kubernetes"
FILES = ("inferencepool", "podmonitor", "scaledobject", "servingruntime")
KEDA = {
    *("serverAddress", "query", "queryParameters", "threshold", "activationThreshold"),
    *("namespace", "customHeaders", "ignoreNullValues", "unsafeSsl", "awsRegion", "timeout"),
    *("identityOwner", "authModes"),
}
"""What KEDA's scaler `prometheus` knows (pkg/scalers/prometheus_scaler.go, v2.20.2)."""


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((MANIFESTS / f"{name}.yaml").read_text())
    return found


def strict(schema: Any) -> Any:
    """The schema with unknown fields refused wherever it names fields and does not keep others: an
    API server would drop them without a word."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


SCHEMAS = {
    (f"{each['group']}/{each['version']}", each["kind"]): Draft202012Validator(
        strict(each["openAPIV3Schema"])
    )
    for each in (json.loads(path.read_text()) for path in (DEPLOY / "schemas").glob("*.json"))
    if "openAPIV3Schema" in each
}


def faults(manifest: dict[str, Any]) -> list[str]:
    """What its schema does not allow."""
    schema = SCHEMAS[manifest["apiVersion"], manifest["kind"]]
    return [error.message for error in schema.iter_errors(manifest)]


@pytest.mark.parametrize("name", FILES)
def test_a_manifest_is_what_its_schema_allows(name: str) -> None:
    assert faults(load(name)) == []


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all keys, but those of free maps (labels, annotations, a trigger's metadata)."""
    if isinstance(node, list):
        return [p for i, each in enumerate(node) for p in places(each, (*at, i))]
    if not isinstance(node, dict):
        return []
    free = at[-1:] in (("metadata",), ("labels",), ("annotations",), ("matchLabels",))
    below = [p for key, each in node.items() for p in places(each, (*at, key))]
    free = free or at[-1:] in (("requests",), ("limits",))
    return below if free else [*((*at, key) for key in node), *below]


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name in FILES for place in places(load(name)["spec"])]
)
def test_a_slip_in_the_name_of_any_field_is_found(name: str, place: tuple[Any, ...]) -> None:
    manifest = copy.deepcopy(load(name))
    *way, last = place
    node = manifest["spec"]
    for step in way:
        node = node[step]
    node[last + "x"] = node.pop(last)
    assert faults(manifest)


def spoil(change: Callable[[dict[str, Any]], object], name: str) -> list[str]:
    manifest = load(name)
    change(manifest["spec"])
    return faults(manifest)


def test_a_value_of_another_kind_is_found() -> None:
    assert spoil(lambda s: s["targetPorts"][0].update(number="8000"), "inferencepool")
    assert spoil(lambda s: s["targetPorts"][0].update(number=80000), "inferencepool")
    assert spoil(lambda s: s.update(maxReplicaCount="many"), "scaledobject")
    assert spoil(lambda s: s["triggers"][0]["metadata"].update(threshold=0.9), "scaledobject")
    assert spoil(lambda s: s["podMetricsEndpoints"][0].update(interval="often"), "podmonitor")


def test_the_scaler_knows_what_it_is_told() -> None:
    for trigger in load("scaledobject")["spec"]["triggers"]:
        assert trigger["type"] == "prometheus"
        assert trigger["metadata"].keys() <= KEDA
        assert {"serverAddress", "query", "threshold"} <= trigger["metadata"].keys()


def test_the_node_of_a_pod_is_configured_as_others_expect_it() -> None:
    config = parse_config((MANIFESTS / "node.yaml").read_text())
    assert config.http is not None
    port = int(config.http.rpartition(":")[2])
    assert config.open_metrics
    assert [p["number"] for p in load("inferencepool")["spec"]["targetPorts"]] == [port]
    assert [p["portNumber"] for p in load("podmonitor")["spec"]["podMetricsEndpoints"]] == [port]
    rules = load("scrape")["relabel_configs"]
    (address,) = [rule for rule in rules if rule.get("target_label") == "__address__"]
    assert address["replacement"].endswith(f":{port}")


def test_all_choose_the_same_pods() -> None:
    pool, monitor = (load(n)["spec"]["selector"]["matchLabels"] for n in FILES[:2])
    assert pool == monitor
    ((label, value),) = pool.items()
    (rule,) = [r for r in load("scrape")["relabel_configs"] if r.get("action") == "keep"]
    plain = re.sub(r"[^a-zA-Z0-9]", "_", label)
    assert rule["source_labels"] == [f"__meta_kubernetes_pod_label_{plain}"]
    assert rule["regex"] == value


def test_the_picker_refers_to_plugins_that_it_has() -> None:
    config = load("picker")
    names = {p.get("name", p["type"]) for p in config["plugins"]}
    assert set(re.findall(r"'pluginRef': '([^']+)'", str(config))) <= names
