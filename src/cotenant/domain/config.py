"""One configuration object, parsed once, strict.

Unknown keys, wrong units and impossible values are refused with the path of the key and what
would be right. ``parse_config`` takes text; reading files is the caller's business.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from cotenant.domain import reading, shares
from cotenant.domain.address import is_loopback
from cotenant.domain.device_config import DeviceConfig, closed_to_jobs, read_devices
from cotenant.domain.errors import ConfigError
from cotenant.domain.jobs_config import JobsApiConfig, read_jobs_api
from cotenant.domain.units import MS, S, format_bytes
from cotenant.domain.workload import (
    BatchSpec,
    JobSpec,
    Joining,
    KvSpec,
    RestartPolicy,
    ServiceSpec,
    Slo,
)

MEASURES: Final = ("exact", "argmax", "threshold", "r2")
"""Ways to compare check data; ``engines.accuracy`` says what they are."""
AUTO: Final = "auto"
"""The engine is chosen, by the model's file and the device that it is served on."""


class PolicyConfig(msgspec.Struct, frozen=True):
    """Bounds for the planner (times in ns). ``split`` fixes (cores, partition size)."""

    lend: bool = True
    split: tuple[int, int] | None = None
    grow_after: int = 2 * S
    shrink_after: int = 10 * S
    slice_min: int = 2 * MS
    slice_max: int = 200 * MS


class LimitsConfig(msgspec.Struct, frozen=True):
    """Stated limits: request body and a service's tensor memory in bytes, tensors a request,
    jobs running at once, bytes of an answer in pieces that wait for its client."""

    body: int = 64 * 2**20
    tensors: int = 64
    arena: int = 256 * 2**20
    jobs: int = 8
    unread: int = 2**20


class JournalConfig(msgspec.Struct, frozen=True):
    """``segment`` bytes a file, ``keep`` files."""

    enabled: bool = True
    segment: int = 32 * 2**20
    keep: int = 8


class NodeConfig(msgspec.Struct, frozen=True):
    """Everything ``cotenant serve`` reads from its file. ``token_file`` names a file that holds the
    bearer token clients must send; needed when an address is not loopback. With ``open_metrics``
    metrics can be read without it. ``name``: what it is found by on this machine; empty: that of
    the directory which ``state_dir`` is in. ``dashboard``: whether there are pages for people at
    ``/``. ``jobs_api``: jobs over HTTP; None: by the control socket alone."""

    state_dir: str
    models: str
    http: str | None
    grpc: str | None
    token_file: str | None
    plan_every: int
    poll_models_every: int
    journal: JournalConfig
    limits: LimitsConfig
    devices: tuple[DeviceConfig, ...]
    policy: PolicyConfig
    services: tuple[ServiceSpec, ...]
    jobs: tuple[JobSpec, ...]
    open_metrics: bool = False
    name: str = ""
    dashboard: bool = True
    jobs_api: JobsApiConfig | None = None


class CheckSettings(msgspec.Struct, frozen=True):
    """Which output the check data are compared with, and how (of ``MEASURES``); "": what fits."""

    output: str = ""
    measure: str = ""


class Exactness(msgspec.Struct, frozen=True):
    """What a build of a language model must reach (``engines.llm.gate``). ``agreement``: at least
    this share of positions has the reference's most likely token. ``perplexity``: of the check
    text, at most so many times the reference's.

    Both are needed. Perplexity is a mean over all tokens that a text may go on with, and hides a
    greedy answer that turns elsewhere. Agreement hides a build that is less sure throughout.

    The defaults are chosen, not fitted to a model. One position in a hundred may go the other way:
    with some 900 positions that is 9, enough that two tokens that are all but equally likely do
    not decide, and few enough that a build which is worse at two in a hundred is as a rule
    refused. Perplexity may rise by half a per cent, which is small against what 4 bits cost."""

    agreement: float = 0.99
    perplexity: float = 1.005


class Plugin(msgspec.Struct, frozen=True):
    """Of a model for ``onnxruntime-plugin``: the execution provider ("": the only one that there
    is), and what it is told."""

    provider: str = ""
    options: dict[str, str] = {}


class ModelSettings(msgspec.Struct, frozen=True):
    """``model.yaml`` of a model directory: all optional. ``shapes`` fills free axes of inputs
    for the warm-up, ``ranges`` says which integers an input may hold (both ends included);
    ``keep_versions`` newest versions stay loaded; ``exactness`` is the floor of a language model's
    builds; ``engine`` is the name of one, or ``AUTO``; ``draft`` is where the draft model of a
    language model lies, seen from the model's directory ("": there is none)."""

    slo: Slo | None = None
    batch: BatchSpec | None = None
    shapes: dict[str, tuple[int, ...]] = {}
    ranges: dict[str, tuple[int, int]] = {}
    check: CheckSettings = CheckSettings()
    keep_versions: int = 1
    accuracy_floor: float = 0.0
    exactness: Exactness = Exactness()
    engine: str = AUTO
    draft: str = ""
    plugin: Plugin = Plugin()


def parse_config(text: str) -> NodeConfig:
    """The node's configuration; raises ConfigError naming the key."""
    root = reading.Section(reading.load(text), "")
    node = root.section("node")
    policy = _policy(root.section("policy"))
    devices = read_devices(root.sections("devices"))
    services = tuple(_service(s) for s in root.sections("services"))
    jobs = tuple(_job(j) for j in root.sections("jobs"))
    root.done()
    _check_kv(devices, services)
    _unique("services", [s.name for s in services])
    _unique("jobs", [j.name for j in jobs])
    kinds = tuple(dict.fromkeys(device.kind for device in devices))
    closed = closed_to_jobs(devices)
    training = tuple(kind for kind in kinds if kind not in closed)
    for service in services:
        if why := shares.problem(service, kinds):
            raise ConfigError(f"{service.name}: {why}", "services")
    for job in jobs:
        if why := shares.problem(job, training, closed):
            raise ConfigError(f"{job.name}: {why}", "jobs")
    for kind in kinds:
        total = shares.promised((*services, *(() if kind in closed else jobs)), kind)
        if total > 1.0 + 1e-9:
            raise ConfigError(
                f"guaranteed shares of {kind} add up to {total:g}; at most 1 can be guaranteed"
            )
    config = NodeConfig(
        state_dir=node.take("state_dir", reading.text, "./cotenant-state"),
        models=node.take("models", reading.text, "./models"),
        http=node.take("http", reading.optional(reading.address), "127.0.0.1:8000"),
        grpc=node.take("grpc", reading.optional(reading.address), "127.0.0.1:8001"),
        token_file=node.take("token_file", reading.optional(reading.text), None),
        plan_every=node.take("plan_every", reading.duration, 1 * S),
        poll_models_every=node.take("poll_models_every", reading.duration, 1 * S),
        journal=_journal(node.section("journal")),
        limits=_limits(node.section("limits")),
        devices=devices,
        policy=policy,
        services=services,
        jobs=jobs,
        open_metrics=node.take("open_metrics", reading.boolean, False),
        name=node.take("name", reading.optional(reading.name), None) or "",
        dashboard=node.take("dashboard", reading.boolean, True),
        jobs_api=read_jobs_api(node.raw("jobs_api", None), node.at("jobs_api")),
    )
    node.done()
    _check_addresses(config)
    return config


def _check_addresses(config: NodeConfig) -> None:
    for key, address in (("http", config.http), ("grpc", config.grpc)):
        if address and not is_loopback(address) and not config.token_file:
            raise ConfigError(
                f"{address} can be reached from other machines: set node.token_file to a file "
                "with a bearer token, or use 127.0.0.1",
                f"node.{key}",
            )
    jobs = config.jobs_api
    if jobs and not jobs.certificate and not is_loopback(jobs.address):
        raise ConfigError(
            f"{jobs.address} can be reached from other machines, where tokens must not be read on "
            "the way: set node.jobs_api.certificate and .key, or use 127.0.0.1",
            "node.jobs_api.address",
        )


def parse_model_settings(text: str) -> ModelSettings:
    """``model.yaml``; raises ConfigError naming the key."""
    root = reading.Section(reading.load(text), "")
    objective = root.raw("objective", None)
    batch = root.raw("batch", None)
    shapes, ranges = root.section("warmup_shapes"), root.section("ranges")
    settings = ModelSettings(
        slo=None if objective is None else _slo(reading.Section(objective, "objective")),
        batch=None if batch is None else _batch(batch, "batch"),
        shapes={name: shapes.take(name, reading.shape) for name in shapes.names()},
        ranges={name: ranges.take(name, reading.integer_range) for name in ranges.names()},
        check=_check(root.section("check")),
        keep_versions=root.take("keep_versions", reading.integer(1, 100), 1),
        accuracy_floor=root.take("accuracy_floor", reading.share, 0.0),
        exactness=_exactness(root.section("exactness")),
        engine=root.take("engine", reading.name, AUTO),
        draft=root.take("draft", reading.text, ""),
        plugin=_plugin(root.section("plugin")),
    )
    root.done()
    return settings


# --- sections -------------------------------------------------------------------------------


def _policy(section: reading.Section) -> PolicyConfig:
    policy = PolicyConfig(
        lend=section.take("lend", reading.boolean, True),
        split=section.take("split", reading.split, None),
        grow_after=section.take("grow_after", reading.duration, 2 * S),
        shrink_after=section.take("shrink_after", reading.duration, 10 * S),
        slice_min=section.take("slice_min", reading.duration, 2 * MS),
        slice_max=section.take("slice_max", reading.duration, 200 * MS),
    )
    if policy.slice_min > policy.slice_max:
        raise ConfigError("is longer than policy.slice_max", "policy.slice_min")
    section.done()
    return policy


def _journal(section: reading.Section) -> JournalConfig:
    journal = JournalConfig(
        enabled=section.take("enabled", reading.boolean, True),
        segment=section.take("segment", reading.size, 32 * 2**20),
        keep=section.take("keep", reading.integer(1, 10_000), 8),
    )
    section.done()
    return journal


def _limits(section: reading.Section) -> LimitsConfig:
    limits = LimitsConfig(
        body=section.take("body", reading.size, 64 * 2**20),
        tensors=section.take("tensors", reading.integer(1, 4096), 64),
        arena=section.take("arena", reading.size, 256 * 2**20),
        jobs=section.take("jobs", reading.integer(1, 1000), 8),
        unread=section.take("unread", reading.size, 2**20),
    )
    section.done()
    return limits


def _service(section: reading.Section) -> ServiceSpec:
    name = section.take("name", reading.name)
    service = ServiceSpec(
        name=name,
        model=section.take("model", reading.name, name),
        slo=_slo(section.section("objective", required=True)),
        batch=_batch(section.raw("batch", None), section.at("batch")),
        guaranteed=section.take("guaranteed", reading.shares, 0.0),
        limit=section.take("limit", reading.positive_shares, 1.0),
        kinds=section.take("kinds", reading.names, ()),
        memory=section.take("memory", reading.size, 0),
        accuracy_floor=section.take("accuracy_floor", reading.share, 0.0),
        kv=_kv(section.section("kv")),
        cache=section.take("cache", reading.size, 0),
        unloads=section.take("idle", reading.one_of(("keep", "unload")), "keep") == "unload",
        max_queue=section.take("max_queue", reading.integer(1, 1_000_000), 1024),
        strict=section.take("strict", reading.boolean, False),
        refuse_nan=section.take("refuse_nan", reading.boolean, False),
        instances=section.take("instances", reading.integer(1, 256), 1),
        threads=section.take("threads", reading.integer(0, 4096), 0),
        exec_timeout=section.take("exec_timeout", reading.duration, 30 * S),
        chooses=section.take("variants", reading.one_of(("auto", "original")), "auto") == "auto",
    )
    section.done()
    return service


def _slo(section: reading.Section) -> Slo:
    pieces = "ttft" in section.names()
    slo = Slo(
        latency=section.take("ttft" if pieces else "latency", reading.duration),
        percentile=section.take("percentile", reading.percentile, 99.0),
        pace=section.take("tpot", reading.duration, 0) if pieces else 0,
    )
    section.done()
    return slo


def _exactness(section: reading.Section) -> Exactness:
    usual = Exactness()
    floor = Exactness(
        agreement=section.take("agreement", reading.share, usual.agreement),
        perplexity=section.take("perplexity", reading.positive, usual.perplexity),
    )
    section.done()
    return floor


def _plugin(section: reading.Section) -> Plugin:
    options = section.section("options")
    found = Plugin(
        provider=section.take("provider", reading.name, ""),
        options={name: options.take(name, reading.text) for name in options.names()},
    )
    section.done()
    return found


def _kv(section: reading.Section) -> KvSpec:
    kv = KvSpec(
        guaranteed=section.take("guaranteed", reading.size, 0),
        limit=section.take("limit", reading.size, KvSpec().limit),
    )
    if kv.guaranteed > kv.limit:
        raise ConfigError(
            f"{format_bytes(kv.guaranteed)} are guaranteed, the limit is {format_bytes(kv.limit)}",
            section.at("guaranteed"),
        )
    section.done()
    return kv


def _check_kv(devices: tuple[DeviceConfig, ...], services: tuple[ServiceSpec, ...]) -> None:
    """What is guaranteed fits into the budget of each device that has one."""
    total = sum(service.instances * service.kv.guaranteed for service in services)
    for device in devices:
        if 0 < device.kv < total:
            raise ConfigError(
                f"the services are guaranteed {format_bytes(total)} for keys and values; device"
                f" {device.id} has {format_bytes(device.kv)}",
                "services",
            )


def _batch(value: Any, path: str) -> BatchSpec:
    if value == "none":
        return BatchSpec(max=1, joining=Joining.NONE)
    if isinstance(value, str):
        raise ConfigError(f"{value!r} is no batch setting; use none, or max, preferred, ...", path)
    section = reading.Section(value, path)
    words = (Joining.CHECKED.value, Joining.TRUSTED.value)
    batch = BatchSpec(
        max=section.take("max", reading.integer(1, 4096), 8),
        preferred=section.take("preferred", reading.integers, ()),
        max_queue_delay=section.take("max_queue_delay", reading.duration_or_zero, 0),
        joining=Joining(section.take("joining", reading.one_of(words), Joining.CHECKED.value)),
    )
    if any(size > batch.max for size in batch.preferred):
        raise ConfigError(f"a preferred size exceeds max ({batch.max})", section.at("preferred"))
    section.done()
    return batch


def _check(section: reading.Section) -> CheckSettings:
    check = CheckSettings(
        output=section.take("output", reading.text, ""),
        measure=section.take("measure", reading.one_of(MEASURES), ""),
    )
    section.done()
    return check


def _job(section: reading.Section) -> JobSpec:
    name = section.take("name", reading.name)
    job = JobSpec(
        id="",
        name=name,
        command=section.take("command", reading.command),
        cwd=section.take("cwd", reading.text, "."),
        env=section.take("env", reading.environment, {}),
        weight=section.take("weight", reading.positive, 1.0),
        guaranteed=section.take("guaranteed", reading.shares, 0.0),
        limit=section.take("limit", reading.positive_shares, 1.0),
        kinds=section.take("kinds", reading.names, ()),
        memory=section.take("memory", reading.size, 0),
        memory_guaranteed=section.take("memory_guaranteed", reading.size, None),
        restart=RestartPolicy(
            section.take("restart", reading.one_of([p.value for p in RestartPolicy]), "on-failure")
        ),
        max_restarts=section.take("max_restarts", reading.integer(0, 1_000_000), 5),
        grace=section.take("grace", reading.duration, 5 * S),
        log_limit=section.take("log_limit", reading.size, 64 * 2**20),
        time_limit=section.take("time_limit", reading.duration, 0),
    )
    section.done()
    return job


def _unique(key: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the name {name!r} stands twice; names must differ", key)
