"""Where the parts meet: a configuration becomes devices, a node and its front ends."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import resource
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from cotenant import __version__
from cotenant.cli.jobs_listener import STOP_GRACE_S, Sources, serve_jobs
from cotenant.cli.notify import ServiceManager
from cotenant.cli.studies import JournalStudies
from cotenant.devices.base import Device
from cotenant.devices.cpu import CpuDevice
from cotenant.devices.npu import NpuDevice
from cotenant.devices.null import NullDevice
from cotenant.devices.nvidia.device import CudaDevice
from cotenant.domain.address import split_address
from cotenant.domain.config import NodeConfig, parse_config
from cotenant.domain.device import PreemptLevel
from cotenant.domain.device_config import (
    CpuConfig,
    CudaConfig,
    DeviceConfig,
    NpuConfig,
    NullConfig,
)
from cotenant.domain.errors import ConfigError, EnvironmentProblem
from cotenant.domain.jobs_config import JobsApiConfig
from cotenant.runtime import nodes
from cotenant.runtime.node import Node
from cotenant.serving.control import ControlServer
from cotenant.serving.grpc_front import GrpcFront
from cotenant.serving.http_front import HttpFront
from cotenant.serving.intake import Intake
from cotenant.serving.rest import build_app
from cotenant.serving.tensors import Limits
from cotenant.serving.web.app import Web
from cotenant.serving.web.session import Door
from cotenant.serving.web.stream import Stream
from cotenant.serving.web.studied import Studied
from cotenant.serving.web.visitors import NodeKey

FRONTS = 3
"""Servers that stop one after the other."""
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def read_config(path: Path) -> NodeConfig:
    """The configuration in a file; relative paths in it are taken from the file's directory.

    Raises ConfigError naming the file and the key.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        config = parse_config(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    base = path.absolute().parent
    return msgspec.structs.replace(
        config,
        jobs_api=_based(base, config.jobs_api),
        state_dir=str(base / config.state_dir),
        models=str(base / config.models),
        token_file=str(base / config.token_file) if config.token_file else None,
        jobs=tuple(msgspec.structs.replace(job, cwd=str(base / job.cwd)) for job in config.jobs),
    )


def _based(base: Path, jobs: JobsApiConfig | None) -> JobsApiConfig | None:
    if jobs is None:
        return None
    given = {name: getattr(jobs, name) for name in ("tokens", "certificate", "key")}
    files = {name: str(base / file) for name, file in given.items() if file}
    return msgspec.structs.replace(jobs, **files)


def make_device(config: DeviceConfig, state: Path) -> Device:
    """A device that the configuration names; ``state``: the node's directory."""
    match config:
        case CpuConfig():
            memory = config.memory, config.kv
            return CpuDevice(config.id, config.cores, config.realtime, config.pin, memory)
        case NullConfig():
            return NullDevice(
                config.id, config.units, config.memory, config.preempt, config.blocking, config.kv
            )
        case CudaConfig():
            return CudaDevice(config, state)
        case NpuConfig():
            return NpuDevice(config)


def make_bare(config: DeviceConfig, state: Path) -> Device:
    """As ``make_device``, for models alone: nothing is prepared for jobs, and nothing is made more
    urgent than what else runs here."""
    match config:
        case CpuConfig():
            memory = config.memory, config.kv
            return CpuDevice(config.id, config.cores, "never", config.pin, memory, reclaims=False)
        case CudaConfig():
            return CudaDevice(msgspec.structs.replace(config, preempt=PreemptLevel.NONE), state)
        case _:
            return make_device(config, state)


async def serve(config: NodeConfig, tell: Callable[[Node], None] | None = None) -> None:
    """Run a node until SIGTERM, SIGINT or ``cotenant`` tells it to stop; then drain and stop it.
    ``tell`` is called once its models are loaded; what it raises stops the node, too."""
    manager = ServiceManager.of(os.environ)
    _tune_process()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    token = _token(config)
    async with AsyncExitStack() as stack:
        devices = [make_device(device, Path(config.state_dir)) for device in config.devices]
        node = await stack.enter_async_context(Node(config, devices))
        control = ControlServer(node, Path(config.state_dir) / "control.sock", stop.set)
        await control.start()
        stack.push_async_callback(control.stop)
        await _open_fronts(config, node, token, stack)
        name = config.name or nodes.default_name(config.state_dir)
        http_address = node.addresses["http"]
        stack.enter_context(nodes.registered(name, config.state_dir, http_address, __version__))
        manager.ready("loads its models")
        stack.callback(asyncio.create_task(manager.beat()).cancel)
        starting = asyncio.create_task(node.start())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            _settle_heap()
            _announce(node)
            manager.status(_serves(node))
            if tell is not None:
                tell(node)
            await stopped
        else:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        manager.stopping("stops its jobs", FRONTS * STOP_GRACE_S + node.stops_within_s)


async def _open_fronts(
    config: NodeConfig, node: Node, token: str | None, stack: AsyncExitStack
) -> None:
    """Listen on all addresses that the configuration names, until the stack unwinds."""
    intake = Intake(Limits(body_bytes=config.limits.body, tensors=config.limits.tensors))
    sources = _sources(config, node, stack)
    if config.http:
        host, port = split_address(config.http)
        door = Door(NodeKey(token) if token else None, host)
        web = Web(node, intake, door, *sources) if sources else None
        app = build_app(node, intake, token, config.open_metrics, web)
        http = HttpFront(app, host, port)
        node.addresses["http"] = f"{host}:{await http.start()}"
        stack.push_async_callback(http.stop, STOP_GRACE_S)
        if web is not None:
            stack.push_async_callback(web.close)
    if config.grpc:
        host, port = split_address(config.grpc)
        grpc = GrpcFront(node, intake, token, host, port)
        node.addresses["grpc"] = f"{host}:{await grpc.start()}"
        stack.push_async_callback(grpc.stop, STOP_GRACE_S)
    if config.jobs_api:
        await serve_jobs(config.jobs_api, node, intake, sources, stack)


def _sources(config: NodeConfig, node: Node, stack: AsyncExitStack) -> Sources | None:
    """What the pages show, if there are to be any."""
    if not config.dashboard or not (config.http or config.jobs_api):
        return None
    journal = Path(config.state_dir) / "journal" if config.journal.enabled else None
    cores = {unit for spec in node.specs if spec.kind == "cpu" for unit in spec.units}
    studies = JournalStudies(journal, cores)
    stack.callback(studies.close)
    return Stream(node), Studied(studies)


def _tune_process() -> None:
    """As many connections as the hard limit allows, and a heap that keeps buffers of some MiB: by
    default the C library returns each request body to the kernel and faults it in again. Those
    that are larger go back, else one burst of them would be the node's size from then on."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 8 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 32 * 2**20)


def _settle_heap() -> None:
    """What is alive now lives as long as the node: the collector need not look at it again, nor
    look as often at the rest, which hardly has cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _serves(node: Node) -> str:
    addresses = [f"{kind} {address}" for kind, address in node.addresses.items() if address]
    return f"serving on {', '.join(addresses) or 'no address'}"


def _announce(node: Node) -> None:
    print(f"cotenant: {_serves(node)}", flush=True)
    for spec in node.specs:
        notes = "".join(f"; {limit}" for limit in spec.limits)
        what = f"{spec.kind} with {len(spec.units)} units, level {spec.preempt.name}"
        print(f"cotenant: device {spec.id}: {what}{notes}", flush=True)
    for entry in node.index():
        if entry.state == "UNAVAILABLE" and entry.name in node.models.declared:
            print(f"cotenant: model {entry.name} is not served: {entry.reason}", flush=True)


def _token(config: NodeConfig) -> str | None:
    if config.token_file is None:
        return None
    try:
        token = Path(config.token_file).read_text().strip()
    except OSError as error:
        raise EnvironmentProblem(f"node.token_file cannot be read: {error}") from error
    if len(token) < 16:
        raise ConfigError("holds fewer than 16 characters", "node.token_file")
    return token
