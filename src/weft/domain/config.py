"""One configuration object, parsed once, strict.

Unknown keys, wrong units and impossible values are refused with the path of the key and what
would be right. ``parse_config`` takes text; reading files is the caller's business.
"""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec
import yaml

from weft.domain.errors import ConfigError
from weft.domain.units import MS, S, parse_bytes, parse_duration
from weft.domain.workload import BatchSpec, JobSpec, RestartPolicy, ServiceSpec, Slo

T = TypeVar("T")
_MISSING: Any = object()


class DeviceConfig(msgspec.Struct, frozen=True):
    """``kind`` cpu; ``cores`` None = all that this process may use; ``realtime`` auto, never or
    require; ``pin`` false leaves it to the kernel where workers run (to compare with)."""

    kind: str = "cpu"
    id: str = "cpu"
    cores: tuple[int, ...] | None = None
    realtime: str = "auto"
    pin: bool = True


class PolicyConfig(msgspec.Struct, frozen=True):
    """Bounds for the planner (times in ns). ``split`` fixes (cores, partition size)."""

    lend: bool = True
    split: tuple[int, int] | None = None
    grow_after: int = 2 * S
    shrink_after: int = 10 * S
    slice_min: int = 2 * MS
    slice_max: int = 200 * MS
    linger_max: int = 20 * MS


class LimitsConfig(msgspec.Struct, frozen=True):
    """Stated limits: request body and a service's tensor memory in bytes, tensors a request,
    jobs running at once."""

    body: int = 64 * 2**20
    tensors: int = 64
    arena: int = 256 * 2**20
    jobs: int = 8


class JournalConfig(msgspec.Struct, frozen=True):
    """``segment`` bytes a file, ``keep`` files."""

    enabled: bool = True
    segment: int = 32 * 2**20
    keep: int = 8


class NodeConfig(msgspec.Struct, frozen=True):
    """Everything ``weft serve`` reads from its file. ``token_file`` names a file that holds the
    bearer token clients must send; needed when an address is not loopback."""

    state_dir: str
    models: str
    http: str | None
    grpc: str | None
    token_file: str | None
    plan_every: int
    poll_models_every: int
    journal: JournalConfig
    limits: LimitsConfig
    device: DeviceConfig
    policy: PolicyConfig
    services: tuple[ServiceSpec, ...]
    jobs: tuple[JobSpec, ...]


class ModelSettings(msgspec.Struct, frozen=True):
    """``model.yaml`` of a model directory: all optional. ``shapes`` fills free axes of inputs
    for the warm-up; ``keep_versions`` newest versions stay loaded."""

    slo: Slo | None = None
    batch: BatchSpec | None = None
    shapes: dict[str, tuple[int, ...]] = {}
    keep_versions: int = 1
    accuracy_floor: float = 0.0


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice (plain YAML silently keeps the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"the key {key!r} stands twice (line {line}); remove one")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Section:
    """One mapping of the document; every key must be taken before ``done``."""

    def __init__(self, value: Any, path: str) -> None:
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise ConfigError(f"expected a mapping of keys, got {_shown(value)}", path)
        self._left = {str(k): v for k, v in value.items()}
        self._known: list[str] = []
        self._path = path

    def at(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def raw(self, key: str, default: Any = _MISSING) -> Any:
        self._known.append(key)
        if key in self._left:
            return self._left.pop(key)
        if default is _MISSING:
            near = difflib.get_close_matches(key, self._left, 1, 0.7)
            hint = f" (is {near[0]!r} a slip?)" if near else ""
            raise ConfigError(f"is required{hint}", self.at(key))
        return default

    def take(self, key: str, read: Callable[[Any], T], default: Any = _MISSING) -> T:
        """The value of a key through ``read`` (which raises ValueError); defaults pass as is."""
        value = self.raw(key, default)
        if value is default and default is not _MISSING:
            return default  # type: ignore[no-any-return]
        try:
            return read(value)
        except ValueError as error:
            raise ConfigError(str(error), self.at(key)) from None

    def names(self) -> list[str]:
        """Keys not taken yet, for mappings whose keys are free."""
        return list(self._left)

    def section(self, key: str, required: bool = False) -> _Section:
        return _Section(self.raw(key, _MISSING if required else None), self.at(key))

    def sections(self, key: str) -> list[_Section]:
        value = self.raw(key, None)
        if value is None:
            return []
        if not isinstance(value, list):
            raise ConfigError(f"expected a list, got {_shown(value)}", self.at(key))
        return [_Section(item, f"{self.at(key)}[{i}]") for i, item in enumerate(value)]

    def done(self) -> None:
        for key in self._left:
            near = difflib.get_close_matches(key, self._known, 1, 0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(self._known)}"
            raise ConfigError(f"unknown key; {hint}", self.at(key))


def parse_config(text: str) -> NodeConfig:
    """The node's configuration; raises ConfigError naming the key."""
    root = _Section(_load(text), "")
    node = root.section("node")
    policy = _policy(root.section("policy"))
    devices = root.sections("devices")
    if len(devices) > 1:
        raise ConfigError("one device a node for now", "devices")
    device = _device(devices[0]) if devices else DeviceConfig()
    services = tuple(_service(s) for s in root.sections("services"))
    jobs = tuple(_job(j) for j in root.sections("jobs"))
    root.done()
    _unique("services", [s.name for s in services])
    _unique("jobs", [j.name for j in jobs])
    _guarantees(services, jobs)
    config = NodeConfig(
        state_dir=node.take("state_dir", _text, "./weft-state"),
        models=node.take("models", _text, "./models"),
        http=node.take("http", _optional(_address), "127.0.0.1:8000"),
        grpc=node.take("grpc", _optional(_address), "127.0.0.1:8001"),
        token_file=node.take("token_file", _optional(_text), None),
        plan_every=node.take("plan_every", _duration, 1 * S),
        poll_models_every=node.take("poll_models_every", _duration, 1 * S),
        journal=_journal(node.section("journal")),
        limits=_limits(node.section("limits")),
        device=device,
        policy=policy,
        services=services,
        jobs=jobs,
    )
    node.done()
    for key, address in (("http", config.http), ("grpc", config.grpc)):
        if address and not is_loopback(address) and not config.token_file:
            raise ConfigError(
                f"{address} can be reached from other machines: set node.token_file to a file "
                "with a bearer token, or use 127.0.0.1",
                f"node.{key}",
            )
    return config


def parse_model_settings(text: str) -> ModelSettings:
    """``model.yaml``; raises ConfigError naming the key."""
    root = _Section(_load(text), "")
    objective = root.raw("objective", None)
    batch = root.raw("batch", None)
    shapes = root.section("warmup_shapes")
    settings = ModelSettings(
        slo=None if objective is None else _slo(_Section(objective, "objective")),
        batch=None if batch is None else _batch(_Section(batch, "batch")),
        shapes={name: shapes.take(name, _shape) for name in shapes.names()},
        keep_versions=root.take("keep_versions", _integer(1, 100), 1),
        accuracy_floor=root.take("accuracy_floor", _share, 0.0),
    )
    root.done()
    return settings


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` can be reached from this machine alone."""
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


# --- sections -------------------------------------------------------------------------------


def _load(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from None


def _device(section: _Section) -> DeviceConfig:
    device = DeviceConfig(
        kind=section.take("kind", _one_of(("cpu",))),
        id=section.take("id", _name, "cpu"),
        cores=section.take("cores", _cores, None),
        realtime=section.take("realtime", _one_of(("auto", "never", "require")), "auto"),
        pin=section.take("pin", _boolean, True),
    )
    section.done()
    return device


def _policy(section: _Section) -> PolicyConfig:
    policy = PolicyConfig(
        lend=section.take("lend", _boolean, True),
        split=section.take("split", _split, None),
        grow_after=section.take("grow_after", _duration, 2 * S),
        shrink_after=section.take("shrink_after", _duration, 10 * S),
        slice_min=section.take("slice_min", _duration, 2 * MS),
        slice_max=section.take("slice_max", _duration, 200 * MS),
        linger_max=section.take("linger_max", _duration_or_zero, 20 * MS),
    )
    if policy.slice_min > policy.slice_max:
        raise ConfigError("is longer than policy.slice_max", "policy.slice_min")
    section.done()
    return policy


def _journal(section: _Section) -> JournalConfig:
    journal = JournalConfig(
        enabled=section.take("enabled", _boolean, True),
        segment=section.take("segment", _bytes, 32 * 2**20),
        keep=section.take("keep", _integer(1, 10_000), 8),
    )
    section.done()
    return journal


def _limits(section: _Section) -> LimitsConfig:
    limits = LimitsConfig(
        body=section.take("body", _bytes, 64 * 2**20),
        tensors=section.take("tensors", _integer(1, 4096), 64),
        arena=section.take("arena", _bytes, 256 * 2**20),
        jobs=section.take("jobs", _integer(1, 1000), 8),
    )
    section.done()
    return limits


def _service(section: _Section) -> ServiceSpec:
    name = section.take("name", _name)
    service = ServiceSpec(
        name=name,
        model=section.take("model", _name, name),
        slo=_slo(section.section("objective", required=True)),
        batch=_batch(section.section("batch")),
        guaranteed=section.take("guaranteed", _share, 0.0),
        limit=section.take("limit", _positive_share, 1.0),
        accuracy_floor=section.take("accuracy_floor", _share, 0.0),
        max_queue=section.take("max_queue", _integer(1, 1_000_000), 1024),
        strict=section.take("strict", _boolean, False),
        refuse_nan=section.take("refuse_nan", _boolean, False),
        instances=section.take("instances", _integer(1, 256), 1),
        threads=section.take("threads", _integer(0, 4096), 0),
        exec_timeout=section.take("exec_timeout", _duration, 30 * S),
    )
    section.done()
    return service


def _slo(section: _Section) -> Slo:
    slo = Slo(
        latency=section.take("latency", _duration),
        percentile=section.take("percentile", _percentile, 99.0),
    )
    section.done()
    return slo


def _batch(section: _Section) -> BatchSpec:
    batch = BatchSpec(
        max=section.take("max", _integer(1, 4096), 8),
        preferred=section.take("preferred", _integers, ()),
        max_queue_delay=section.take("max_queue_delay", _duration_or_zero, 0),
    )
    if any(size > batch.max for size in batch.preferred):
        raise ConfigError(f"a preferred size exceeds max ({batch.max})", section.at("preferred"))
    section.done()
    return batch


def _job(section: _Section) -> JobSpec:
    name = section.take("name", _name)
    job = JobSpec(
        id="",
        name=name,
        command=section.take("command", _command),
        cwd=section.take("cwd", _text, "."),
        env=section.take("env", _environment, {}),
        weight=section.take("weight", _positive, 1.0),
        guaranteed=section.take("guaranteed", _share, 0.0),
        limit=section.take("limit", _positive_share, 1.0),
        memory=section.take("memory", _bytes, 0),
        restart=RestartPolicy(
            section.take("restart", _one_of([p.value for p in RestartPolicy]), "on-failure")
        ),
        max_restarts=section.take("max_restarts", _integer(0, 1_000_000), 5),
        grace=section.take("grace", _duration, 5 * S),
        log_limit=section.take("log_limit", _bytes, 64 * 2**20),
    )
    section.done()
    return job


def _unique(key: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the name {name!r} stands twice; names must differ", key)


def _guarantees(services: Iterable[ServiceSpec], jobs: Iterable[JobSpec]) -> None:
    total = sum(s.guaranteed for s in services) + sum(j.guaranteed for j in jobs)
    if total > 1.0 + 1e-9:
        raise ConfigError(f"guaranteed shares add up to {total:g}; at most 1 can be guaranteed")


# --- values ---------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected text, got {_shown(value)}")
    return value


def _name(value: Any) -> str:
    text = _text(value)
    if not all(c.isalnum() or c in "-_." for c in text) or text.startswith("."):
        raise ValueError(f"{text!r} is no name; use letters, digits, '-', '_' and '.'")
    return text


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {_shown(value)}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a number, got {_shown(value)}")
    return float(value)


def _positive(value: Any) -> float:
    number = _number(value)
    if number <= 0:
        raise ValueError(f"must be above 0, got {number:g}")
    return number


def _share(value: Any) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise ValueError(f"must be a share between 0 and 1, got {number:g}")
    return number


def _positive_share(value: Any) -> float:
    if _share(value) == 0:
        raise ValueError("must be above 0")
    return _share(value)


def _percentile(value: Any) -> float:
    number = _number(value)
    if not 50 <= number < 100:
        raise ValueError(f"must be at least 50 and below 100, got {number:g}")
    return number


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}, got {_shown(value)}")
        return value

    return read


def _integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list of whole numbers, got {_shown(value)}")
    return tuple(_integer(1, 4096)(item) for item in value)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list of lengths, got {_shown(value)}")
    return tuple(_integer(1, 2**31)(item) for item in value)


def _cores(value: Any) -> tuple[int, ...] | None:
    if value == "all":
        return None
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected 'all' or a list of core numbers, got {_shown(value)}")
    return tuple(sorted({_integer(0, 65535)(item) for item in value}))


def _split(value: Any) -> tuple[int, int]:
    section = _Section(value, "policy.split")
    cores = section.take("cores", _integer(1, 65535))
    size = section.take("size", _integer(1, 65535), 1)
    section.done()
    if cores % size:
        raise ValueError(f"{cores} cores cannot be cut into partitions of {size}")
    return cores, size


def _duration(value: Any) -> int:
    ns = _duration_or_zero(value)
    if ns == 0:
        raise ValueError("must be longer than 0")
    return ns


def _duration_or_zero(value: Any) -> int:
    if value == 0 and not isinstance(value, bool):
        return 0
    if not isinstance(value, str):
        raise ValueError(f"needs a unit, such as 20ms or 1.5s; got {_shown(value)}")
    return parse_duration(value)


def _bytes(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    count = parse_bytes(_text(value))
    if count == 0:
        raise ValueError("must be above 0")
    return count


def _address(value: Any) -> str:
    text = _text(value)
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is no address; expected host:port, such as 127.0.0.1:8000")
    return text


def _command(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"cannot be split into words: {error}") from None
    elif isinstance(value, list) and all(isinstance(word, str) for word in value):
        words = value
    else:
        raise ValueError(f"expected a command line or a list of words, got {_shown(value)}")
    if not words:
        raise ValueError("is empty; expected a command")
    return tuple(words)


def _environment(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"expected NAME: value pairs, got {_shown(value)}")
    return {str(k): str(v) for k, v in value.items()}


def _one_of(choices: Iterable[str]) -> Callable[[Any], str]:
    options = list(choices)

    def read(value: Any) -> str:
        if value not in options:
            near = difflib.get_close_matches(str(value), options, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{value!r} is none of {', '.join(options)}{hint}")
        return str(value)

    return read


def _optional(read: Callable[[Any], T]) -> Callable[[Any], T | None]:
    return lambda value: None if value is None else read(value)
