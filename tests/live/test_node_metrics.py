"""What a node under load exposes: all that is documented, and all that dashboards, scalers and
endpoint pickers ask for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

from tests.exposed import Exposed, Query, read
from tests.live.conftest import scale_model
from tests.unit.llm_files import write

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/cotenant.json").read_text())
MANIFESTS = ROOT / "deploy/kubernetes"
X = np.ones((1, 4), np.float32)
BUSY = "import cotenant, itertools\nfor n in itertools.count(): cotenant.report(n)"
VARIABLES = {"$__rate_interval": "1m", "$service": ".*"}
RARE = {
    "cotenant_variant_answers_total": "of models with variants (tests/live/test_node_variants.py)",
    "cotenant_variant_serving": "the same",
}
"""Documented series that this box has not, and why."""


def told(box: Box) -> str:
    return box.ask("GET", "/metrics").body.decode()


@pytest.fixture(scope="module")
def box(module_boxes: Boxes) -> Box:
    """Serves a model, one whose results are kept, one that a single test asks and a language
    model, and trains."""
    box = module_boxes()
    for name, save, file in (
        ("m", scale_model, "model.onnx"),
        ("kept", scale_model, "model.onnx"),
        ("apart", scale_model, "model.onnx"),
        ("says", lambda path: write(path, text=True), "model.gguf"),
    ):
        path = box.models / name / "1" / file
        path.parent.mkdir(parents=True)
        save(path)
    box.configure(
        [{"name": "m"}, {"name": "kept", "cache": "1MiB"}, {"name": "says"}, {"name": "apart"}],
        jobs=[{"name": "busy", "command": ["python3", "-c", BUSY]}],
    )
    return box.start()


@pytest.fixture(scope="module")
def exposed(box: Box) -> Exposed:
    """Once each kind of thing was seen to happen."""
    for _ in range(3):
        assert box.infer("m", x=X).status == 200
        assert box.infer("kept", x=X).status == 200
        box.post("/v2/models/says/generate", b'{"text_input": "hello he said", "max_tokens": 8}')
    hopeless = {
        "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [9, 9, 9, 9]}]
    }
    hopeless["parameters"] = {"timeout": 1}
    assert box.post("/v2/models/m/infer", json.dumps(hopeless).encode()).status >= 400
    with box.under_load("m", 50, x=2 * X):
        for late in ('cotenant_service_load{service="m"}', "cotenant_tenant_memory_bytes{"):
            box.until(lambda late=late: late in told(box))
        return read(told(box))


def queries() -> list[str]:
    found = [t["expr"] for p in DASHBOARD["panels"] for t in p.get("targets", ())]
    for name, value in VARIABLES.items():
        found = [query.replace(name, value) for query in found]
    return found


def scaled_on() -> list[str]:
    manifest = yaml.safe_load((MANIFESTS / "scaledobject.yaml").read_text())
    return [trigger["metadata"]["query"] for trigger in manifest["spec"]["triggers"]]


def picked_by() -> list[str]:
    plugins = yaml.safe_load((MANIFESTS / "picker.yaml").read_text())["plugins"]
    engines = [e for p in plugins for e in p.get("parameters", {}).get("engineConfigs", ())]
    specs = [spec for e in engines for key, spec in e.items() if key.endswith("Spec")]
    assert specs
    return [re.sub(r"=(\w+)", r'="\1"', spec) for spec in specs]


@pytest.mark.parametrize("query", [*queries(), *scaled_on(), *picked_by()])
def test_what_is_asked_for_is_there(exposed: Exposed, query: str) -> None:
    assert Query(query).missing(exposed) == []


@pytest.mark.parametrize(
    "query",
    ["rate(cotenant_request_total[1m])", "sum by (servce) (rate(cotenant_requests_total[1m]))"],
    ids=["a metric", "a label"],
)
def test_a_slip_in_a_query_is_found(exposed: Exposed, query: str) -> None:
    assert len(Query(query).missing(exposed)) == 1


def test_what_is_no_query_is_found() -> None:
    with pytest.raises(ValueError):
        Query("sum by (service) (rate(cotenant_requests_total[1m])")


def documented() -> dict[str, tuple[str, set[str]]]:
    """Kind and labels of each metric in the tables."""
    rows = (ROOT / "docs/metrics.md").read_text().splitlines()
    cells = [[c.strip() for c in r.split("|")[1:5]] for r in rows if r.startswith("| `")]
    return {
        name.strip("`"): (kind, set(re.findall(r"`([^`]+)`", labels)))
        for name, kind, labels, _ in cells
    }


def test_all_that_is_exposed_is_documented(exposed: Exposed) -> None:
    assert exposed.kinds.keys() <= documented().keys()


@pytest.mark.parametrize("name", sorted(documented().keys() - RARE.keys()))
def test_all_that_is_documented_is_exposed(exposed: Exposed, name: str) -> None:
    kind, labels = documented()[name]
    assert exposed.kinds[name] == kind
    series = f"{name}_count" if kind == "histogram" else name
    assert exposed.labels[series] == labels


@pytest.mark.parametrize("name", sorted(RARE))
def test_what_is_rarely_exposed_is_documented_by_its_kind(exposed: Exposed, name: str) -> None:
    assert exposed.kinds[name] == documented()[name][0]


def test_what_an_endpoint_picker_reads_of_vllm_is_there(exposed: Exposed) -> None:
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        assert exposed.kinds[f"vllm:{name}"] == "gauge"
        assert exposed.value(f"vllm:{name}", model_name="says") >= 0
    (blocks,) = [dict(key) for name, key in exposed.values if name == "vllm:cache_config_info"]
    assert int(blocks["block_size"]) > 0
    assert int(blocks["num_gpu_blocks"]) > 0


def test_the_parts_of_a_request_are_within_the_whole(box: Box) -> None:
    def of(exposed: Exposed, name: str, model: str) -> float:
        return exposed.value(f"nv_inference_{name}", model=model, version="1")

    found: dict[str, Any] = {}

    def quiet() -> bool:
        found["now"] = read(told(box))
        return all(of(found["now"], "pending_request_count", model) == 0 for model in ("m", "says"))

    box.until(quiet)
    for model in ("m", "says"):
        parts = [
            of(found["now"], f"{name}_duration_us", model)
            for name in ("queue", "compute_input", "compute_infer", "compute_output")
        ]
        assert parts[2] > 0
        assert sum(parts) <= of(found["now"], "request_duration_us", model)
        assert of(found["now"], "request_success", model) > 0
    assert of(found["now"], "compute_input_duration_us", "m") > 0
    assert of(found["now"], "compute_output_duration_us", "m") > 0


def test_load_rises_with_what_is_asked(box: Box) -> None:
    def load() -> float:
        series = "cotenant_service_load", frozenset({("service", "apart")})
        return read(told(box)).values.get(series, 0.0)  # none while no costs are known

    before = 0.0
    for rate in (5, 200):
        with box.under_load("apart", rate, x=3 * X):
            box.until(lambda before=before: load() > before, load)
            before = load()
