"""The configuration: strict, and every refusal names the key and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotenant.domain.address import is_loopback
from cotenant.domain.config import parse_config, parse_model_settings
from cotenant.domain.device import PreemptLevel
from cotenant.domain.device_config import CpuConfig, CudaConfig, NullConfig
from cotenant.domain.errors import ConfigError
from cotenant.domain.units import MS
from cotenant.domain.workload import RestartPolicy

SERVICE = """
services:
  - name: vision
    objective: {latency: 50ms}
"""


def error(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    return caught.value


def in_service(line: str) -> ConfigError:
    return error(f"{SERVICE}    {line}\n")


def test_an_empty_file_is_a_node_with_defaults() -> None:
    config = parse_config("")
    assert config.http == "127.0.0.1:8000"
    assert config.services == config.jobs == ()
    assert config.devices == (CpuConfig(),)


def test_everything_that_can_be_said_is_read() -> None:
    config = parse_config(
        """
node:
  state_dir: /tmp/s
  models: /tmp/m
  http: 127.0.0.1:9000
  grpc: null
  plan_every: 500ms
  poll_models_every: 2s
  journal: {enabled: false, segment: 1MiB, keep: 2}
  limits: {body: 1MiB, tensors: 3, arena: 2MiB, jobs: 4}
devices:
  - {kind: cpu, id: c, cores: [3, 1], realtime: never, pin: false}
  - {kind: "null", id: n, units: 4, memory: 1GiB, preempt: gate, blocking: true}
policy: {lend: false, split: {cores: 2}, grow_after: 1s, slice_min: 1ms}
services:
  - name: vision
    model: net
    objective: {latency: 20ms, percentile: 95}
    batch: {max: 4, preferred: [2, 4], max_queue_delay: 1ms}
    guaranteed: {cpu: 0.25, "null": 0.5}
    memory: 10MiB
    limit: {cpu: 0.5, "null": 1}
    accuracy_floor: 0.9
    max_queue: 7
    strict: true
    refuse_nan: true
    instances: 2
    threads: 1
    exec_timeout: 3s
    idle: unload
jobs:
  - name: train
    command: python -m "my train"
    env: {A: 1}
    weight: 2
    guaranteed: {cpu: 0.5}
    kinds: [cpu, "null"]
    memory: 1GiB
    memory_guaranteed: 1MiB
    restart: always
    grace: 1s
"""
    )
    (service,), (job,) = config.services, config.jobs
    assert service.model == "net"
    assert service.slo.latency == 20 * MS
    assert service.batch.preferred == (2, 4)
    assert job.command == ("python", "-m", "my train")
    assert job.env == {"A": "1"}
    assert job.restart is RestartPolicy.ALWAYS
    assert (job.memory, job.memory_guaranteed) == (2**30, 2**20)
    assert service.unloads
    assert config.devices == (
        CpuConfig("c", (1, 3), "never", pin=False),
        NullConfig("n", 4, 2**30, PreemptLevel.GATE, blocking=True, kv=2**30),
    )
    assert service.guaranteed == {"cpu": 0.25, "null": 0.5}
    assert (job.guaranteed, job.kinds) == ({"cpu": 0.5}, ("cpu", "null"))
    assert config.policy.split == (2, 1)
    assert config.grpc is None


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        ("servces: []", "servces", "did you mean 'services'?"),
        ("node: {state-dir: x}", "node.state-dir", "did you mean 'state_dir'?"),
        ("policy: {slice: 1ms}", "policy.slice", "did you mean 'slice_min'?"),
        ("node: {zzz: 1}", "node.zzz", "known here: state_dir"),
        ("devices: [{kind: gpu}]", "devices[0].kind", "is none of cpu"),
        ("devices: [{kind: cpu, realtime: allways}]", "devices[0].realtime", "none of auto"),
        ("devices: [{id: x}]", "devices[0].kind", "is required"),
        ("devices: [{kind: null}]", "devices[0].kind", "in quotes"),
        ("devices: [{kind: cpu, units: 2}]", "devices[0].units", "known here: kind, id, cores"),
        (
            "devices: [{kind: 'null', cores: [1]}]",
            "devices[0].cores",
            "known here: kind, id, units",
        ),
        ("devices: [{kind: 'null', blockin: true}]", "devices[0].blockin", "'blocking'?"),
        ("devices: [{kind: 'null', preempt: stop}]", "devices[0].preempt", "none of none, gate"),
        ("devices: [{kind: cpu}, {kind: cpu}]", "devices", "'cpu' stands twice"),
        ("devices: [{kind: cpu, id: a}, {kind: cpu}]", "devices", "name the cores of each"),
        (
            "devices: [{kind: cpu, id: a, cores: [0, 1]}, {kind: cpu, id: b, cores: [1]}]",
            "devices",
            "share core 1",
        ),
        ("devices: [{kind: cpu, memory: 1GiB, kv: 2GiB}]", "devices[0].kv", "more than"),
        ("devices: [{kind: npu}]", "devices[0].emulate", "is required"),
        ("devices: [{kind: npu, device: CPU}]", "devices[0].device", "such as NPU"),
        (
            "devices: [{kind: npu, device: NPU, emulate: [1]}]",
            "devices[0].emulate",
            "leave one out",
        ),
        ("devices: [{kind: npu, emulate: all}]", "devices[0].emulate", "such as [3]"),
        ("devices: [{kind: cpu}, {kind: npu, emulate: [1]}]", "devices", "name the cores of each"),
        (
            "devices: [{kind: cpu, cores: [0, 1]}, {kind: npu, emulate: [1]}]",
            "devices",
            "cpu and npu share core 1",
        ),
        ("services: {}", "services", "expected a list"),
        ("node: []", "node", "expected a mapping"),
        ("services: [7]", "services[0]", "expected a mapping"),
        ("services: [{name: a}]", "services[0].objective", "is required"),
        ("services: [{nme: a}]", "services[0].name", "is 'nme' a slip?"),
        ("jobs: [{name: a}]", "jobs[0].command", "is required"),
        ("jobs: [{name: a, command: []}]", "jobs[0].command", "is empty"),
        ("jobs: [{name: a, command: 'x \"y'}]", "jobs[0].command", "cannot be split"),
        ("policy: {slice_min: 1s}", "policy.slice_min", "longer than policy.slice_max"),
        ("policy: {split: {cores: 3, size: 2}}", "policy.split", "cannot be cut"),
        ("node: {http: 8000}", "node.http", "expected text"),
        ("node: {http: '127.0.0.1:99999'}", "node.http", "expected host:port"),
        ("node: {limits: {body: 0KiB}}", "node.limits.body", "above 0"),
        ("devices: [{kind: cpu, cores: 3}]", "devices[0].cores", "'all' or a list"),
    ],
)
def test_what_is_wrong_is_refused_by_its_path(text: str, path: str, said: str) -> None:
    refused = error(text)
    assert refused.path == path
    assert said in str(refused)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("limt: 0.5", "did you mean 'limit'?"),
        ("guaranteed: 1.5", "between 0 and 1"),
        ("limit: 0", "above 0"),
        ("instances: 0", "from 1 to 256"),
        ("instances: true", "whole number"),
        ("strict: maybe", "true or false"),
        ("batch: {max: 2, preferred: [4]}", "a preferred size exceeds max"),
        ("exec_timeout: 30", "needs a unit"),
        ("exec_timeout: 0s", "longer than 0"),
        ("exec_timeout: 3 parsecs", "is not a duration"),
        ("accuracy_floor: .nan", "expected a number"),
    ],
)
def test_a_wrong_value_of_a_service_is_refused(line: str, said: str) -> None:
    refused = in_service(line)
    assert refused.path.startswith("services[0].")
    assert said in str(refused)


@pytest.mark.parametrize("percentile", ["100", "49", "many"])
def test_a_percentile_is_at_least_50_and_below_100(percentile: str) -> None:
    text = f"services: [{{name: a, objective: {{latency: 1s, percentile: {percentile}}}}}]"
    assert error(text).path == "services[0].objective.percentile"


def test_names_must_differ() -> None:
    assert "stands twice" in str(error(SERVICE + SERVICE.replace("services:\n", "", 1)))


def test_a_key_written_twice_is_refused() -> None:
    assert "stands twice (line 3)" in str(error("node:\n  models: a\n  models: b\n"))


@pytest.mark.parametrize("name", ["../x", "a b", ".hidden", "a/b", ""])
def test_names_cannot_lead_elsewhere(name: str) -> None:
    assert error(f"services: [{{name: '{name}', objective: {{latency: 1s}}}}]").path


def test_no_more_than_the_whole_device_can_be_guaranteed() -> None:
    jobs = "jobs: [{name: j, command: x, guaranteed: 0.6}]"
    assert "add up to 1.1" in str(error(f"{SERVICE}    guaranteed: 0.5\n{jobs}"))


@pytest.mark.parametrize("address", ["0.0.0.0:8000", "10.1.2.3:8000", "[::]:8000", "box:8000"])
def test_an_address_that_others_reach_needs_a_token(address: str) -> None:
    refused = error(f"node: {{http: '{address}'}}")
    assert refused.path == "node.http"
    assert "token_file" in str(refused)
    assert parse_config(f"node: {{http: '{address}', token_file: t}}").http == address


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.8.9.1:1"])
def test_loopback_addresses_need_none(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["127.evil.example:1", "box:1", "[::]:1", "0.0.0.0:1", ":1"])
def test_names_that_others_may_answer_for_are_not_loopback(address: str) -> None:
    assert not is_loopback(address)


# --- jobs from elsewhere ----------------------------------------------------------------------


def jobs_api(text: str) -> str:
    return f"node: {{jobs_api: {{{text}}}}}"


def test_jobs_are_not_submitted_from_elsewhere_unless_that_is_said() -> None:
    assert parse_config("").jobs_api is None
    found = parse_config(jobs_api("address: '127.0.0.1:1', tokens: t")).jobs_api
    assert found is not None and found.certificate is None and found.upload > 0
    tls = "address: '0.0.0.0:1', tokens: t, certificate: c, key: k, upload: 1MiB"
    found = parse_config(jobs_api(tls)).jobs_api
    assert found is not None and (found.certificate, found.key) == ("c", "k")
    assert found.upload == 2**20


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("tokens: t", "address"),
        ("address: '127.0.0.1:1'", "tokens"),
        ("address: box, tokens: t", "address"),
        ("address: '0.0.0.0:1', tokens: t", "address"),
        ("address: '127.0.0.1:1', tokens: t, key: k", "certificate"),
        ("address: '127.0.0.1:1', tokens: t, certificate: c", "key"),
        ("address: '127.0.0.1:1', tokens: t, token: t", "token"),
        ("address: '127.0.0.1:1', tokens: t, upload: much", "upload"),
    ],
)
def test_what_the_jobs_api_lacks_is_named(text: str, key: str) -> None:
    assert error(jobs_api(text)).path == f"node.jobs_api.{key}"


@pytest.mark.parametrize("text", ["{", "a: b: c", "\t", "!!python/object:os.system {}"])
def test_what_is_no_yaml_is_said_in_one_line(text: str) -> None:
    assert "\n" not in str(error(text))


@pytest.mark.parametrize("text", ["7", "[]", "x"])
def test_a_document_that_is_no_mapping_is_refused(text: str) -> None:
    assert "expected a mapping" in str(error(text))


def test_model_settings_are_read_as_strictly() -> None:
    settings = parse_model_settings(
        "objective: {latency: 5ms}\nbatch: {max: 2}\nwarmup_shapes: {x: [1, 8]}\nkeep_versions: 3\n"
    )
    assert settings.slo is not None
    assert settings.shapes == {"x": (1, 8)}
    assert settings.keep_versions == 3
    assert parse_model_settings("").slo is None
    assert parse_model_settings("").engine == "auto"
    assert parse_model_settings("engine: vllm").engine == "vllm"
    with pytest.raises(ConfigError, match="did you mean 'keep_versions'"):
        parse_model_settings("keep_version: 3")
    with pytest.raises(ConfigError, match=r"warmup_shapes\.x"):
        parse_model_settings("warmup_shapes: {x: wide}")


@pytest.mark.parametrize("path", sorted(Path("examples").glob("**/cotenant*.yaml")), ids=str)
def test_the_examples_are_in_order(path: Path) -> None:
    parse_config(path.read_text())


TWO_KINDS = 'devices: [{kind: cpu}, {kind: "null"}]\n'


@pytest.mark.parametrize(
    "shares",
    [
        "guaranteed: 0.2",  # of which?
        "limit: 0.5",
        "guaranteed: {gpu: 0.2}",
        "guaranteed: {}",
        "guaranteed: {cpu: 1.5}",
        "limit: {cpu: 0}",
        'kinds: [cpu]\n    guaranteed: {"null": 0.2}',
        "kinds: [gpu]",
        "guaranteed: {cpu: 0.5}\n    limit: {cpu: 0.2}",
    ],
)
def test_a_share_says_of_which_kind_it_is_where_there_are_several(shares: str) -> None:
    job = f"jobs:\n  - name: train\n    command: true\n    {shares}\n"
    with pytest.raises(ConfigError, match="jobs"):
        parse_config(TWO_KINDS + job)


def test_a_number_will_do_where_there_is_one_kind_or_one_is_named() -> None:
    job = "jobs:\n  - {name: train, command: 'true', guaranteed: 0.2%s}\n"
    assert parse_config(job % "").jobs[0].guaranteed == 0.2
    assert parse_config(TWO_KINDS + job % ", kinds: cpu").jobs[0].kinds == ("cpu",)


def test_what_is_guaranteed_is_added_up_by_kind() -> None:
    job = "  - {name: %s, command: 'true', guaranteed: {%s}}\n"
    both = job % ("a", "cpu: 0.7") + job % ("b", '"null": 0.7')
    assert len(parse_config(TWO_KINDS + "jobs:\n" + both).jobs) == 2
    with pytest.raises(ConfigError):
        parse_config(TWO_KINDS + "jobs:\n" + both + job % ("c", "cpu: 0.4"))


SUBSETS = "devices: [{kind: cpu}, {kind: cuda, subsets: true}]"


def test_a_gpu_in_subsets_takes_no_jobs() -> None:
    config = parse_config(f"{SUBSETS}\njobs: [{{name: j, command: x, guaranteed: 0.5}}]")
    assert CudaConfig(subsets=True) in config.devices
    alone = "devices: [{kind: cuda, subsets: true}]"
    for only in (
        f"{SUBSETS}\njobs: [{{name: j, command: x, kinds: cuda}}]",
        f"{alone}\njobs: [{{name: j, command: x}}]",
    ):
        refused = error(only)
        assert refused.path == "jobs" and "MIG" in str(refused)


@pytest.mark.parametrize(("key", "value"), [("preempt", "gate"), ("bound", "5ms")])
def test_what_is_about_jobs_is_no_key_of_a_gpu_in_subsets(key: str, value: str) -> None:
    refused = error(f"devices: [{{kind: cuda, subsets: true, {key}: {value}}}]")
    assert refused.path == f"devices[0].{key}"


def test_gpus_of_a_node_have_subsets_or_none() -> None:
    refused = error("devices: [{kind: cuda, subsets: true}, {kind: cuda, id: b, gpu: 1}]")
    assert refused.path == "devices"
