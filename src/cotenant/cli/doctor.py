"""``cotenant doctor``: what this machine gives Cotenant, what it lacks, and the command for it.

Each check is a function of what it was told; ``look`` asks the machine. Nothing is changed, but
for a moment of real-time priority, and of listening on the ports.
"""

from __future__ import annotations

import argparse
import enum
import errno
import importlib.util
import os
import resource
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from cotenant.cli.jobs_listener import credentials
from cotenant.cli.output import as_json, command, show
from cotenant.cli.views import plain
from cotenant.cli.wiring import read_config
from cotenant.devices import cpu, npu_look, processor, reclaim
from cotenant.devices.features import GATE, Missing, Standing
from cotenant.devices.npu_look import Npus
from cotenant.devices.nvidia.facts import Cause, Found, Gpu
from cotenant.devices.nvidia.survey import survey
from cotenant.devices.processor import ProcessorFacts
from cotenant.domain.address import split_address
from cotenant.domain.config import NodeConfig, parse_config
from cotenant.domain.device_config import CudaConfig, DeviceConfig, NpuConfig
from cotenant.domain.errors import ConfigError, EnvironmentProblem
from cotenant.domain.jobs_config import JobsApiConfig
from cotenant.domain.units import format_bytes
from cotenant.telemetry.compiled import policy_is_compiled

NEEDED: Final = (
    *("highspy", "hpack", "httptools", "msgspec", "numpy", "onnxruntime", "prometheus_client"),
    *("google.protobuf", "yaml", "rich", "starlette", "uvicorn", "uvloop"),
)
"""What ``pip install cotenant`` brings."""
LEAST_FILES: Final = 1024
SPARE: Final = 256 << 20
"""Bytes on the disk of the state directory below which a node would not get far: its journal alone
may have as many."""
LEAST_SHM: Final = 64 << 20
FIFO_PRIORITY: Final = cpu.WORKER_PRIORITY


class State(enum.Enum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    """It serves, but something is slower, or not there."""
    FAIL = "fail"
    """Something that serving needs is missing."""


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at: what was ``found``, and the ``fix`` ("": none is needed)."""

    name: str
    state: State
    found: str
    fix: str = ""


# --- checks, pure -----------------------------------------------------------------------------


def check_python(missing: Sequence[str], version: tuple[int, int]) -> Check:
    """The packages that serving needs."""
    found = "Python " + ".".join(map(str, version))
    if missing:
        fix = f"{sys.executable} -m pip install cotenant"
        return Check("packages", State.FAIL, f"{found}; missing: {', '.join(missing)}", fix)
    return Check("packages", State.OK, f"{found}; all that serving needs is installed")


def check_policy(compiled: bool) -> Check:
    """Whether decisions are made by machine code."""
    if compiled:
        return Check("policy", State.OK, "compiled")
    what = "not compiled: a decision takes about three times as long"
    fix = "with a C compiler and Python's headers: pip install --force-reinstall --no-deps cotenant"
    return Check("policy", State.WARN, what, fix)


def check_cores(facts: ProcessorFacts) -> Check:
    """How many cores there are to share."""
    found = f"{len(facts.cores)} of {facts.online} cores, {format_bytes(facts.memory)}"
    if len(facts.cores) > 1:
        return Check("cores", State.OK, found)
    what = f"{found}: a service and a job take turns on it"
    if facts.online > 1:
        return Check("cores", State.WARN, what, f"taskset -c 0-{facts.online - 1} cotenant …")
    return Check("cores", State.WARN, what)


def check_realtime(allowed: bool, limit: int, container: bool) -> Check:
    """Whether a request may start at once on a busy core. ``limit``: RLIMIT_RTPRIO."""
    if allowed:
        return Check("real-time right", State.OK, "a request starts at once on a busy core")
    what = f"none (rtprio limit {limit}): jobs are moved and stopped instead, which takes longer"
    if container:
        fix = f"docker run --cap-add SYS_NICE --ulimit rtprio={FIFO_PRIORITY} …"
    else:
        fix = (
            f"in this shell: sudo prlimit --pid $$ --rtprio={FIFO_PRIORITY}; "
            f"for a unit of systemd: LimitRTPRIO={FIFO_PRIORITY}; "
            f"for good: sudo setcap cap_sys_nice+ep {Path(sys.executable).resolve()}"
        )
    return Check("real-time right", State.WARN, what, fix)


def check_reclaim(way: str, why: str) -> Check:
    """Whether memory can be taken back from jobs, by control groups or page by page."""
    if way:
        return Check("cgroups and swap", State.OK, f"memory of jobs is taken back by {way}")
    fix = "systemd-run --user --scope -p Delegate=yes cotenant serve cotenant.yaml"
    if why == reclaim.NO_SWAP:
        fix = (
            "sudo fallocate -l 4G /swapfile && sudo chmod 600 /swapfile && "
            "sudo mkswap /swapfile && sudo swapon /swapfile"
        )
    return Check("cgroups and swap", State.WARN, f"{why}: jobs give memory only if asked", fix)


def check_files(soft: int, hard: int) -> Check:
    """Open files: a connection is one. A node raises its own limit to the hard one."""
    limit = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,} at most"
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        fix = "sudo prlimit --pid $$ --nofile=65536:65536"
        return Check("open files", State.WARN, f"{limit}, {soft:,} now", fix)
    return Check("open files", State.OK, limit)


def check_shm(size: int | None, container: bool) -> Check:
    """Shared memory, where tensors lie. None: there is none."""
    if size is None:
        fix = "sudo mount -t tmpfs -o size=1G tmpfs /dev/shm"
        return Check("shared memory", State.FAIL, "/dev/shm cannot be written", fix)
    found = f"{format_bytes(size)} free in /dev/shm"
    if size < LEAST_SHM:
        fix = (
            "docker run --shm-size=1g …" if container else "sudo mount -o remount,size=1G /dev/shm"
        )
        return Check("shared memory", State.WARN, found, fix)
    return Check("shared memory", State.OK, found)


def check_gpus(found: Found, wanted: bool) -> list[Check]:
    """NVIDIA GPUs, their driver and MIG. ``wanted``: the configuration names one."""
    bad = State.FAIL if wanted else State.WARN
    if found.trouble is not None:
        quiet = found.trouble.cause is Cause.ABSENT and not wanted
        fix = "" if quiet else found.trouble.how
        return [Check("GPU", State.OK if quiet else bad, found.trouble.what, fix)]
    driver = found.driver
    what = f"driver {driver.version}, CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver else ""
    checks = [Check("GPU driver", State.OK, what)] if driver else []
    checks += [Check("GPU", bad, text, "cotenant devices --kind cuda") for text in found.lost]
    for gpu in found.gpus:
        checks += _check_gpu(gpu)
    return checks


def _check_gpu(gpu: Gpu) -> list[Check]:
    size = f"{format_bytes(gpu.memory)} ({format_bytes(gpu.used)} used)"
    checks = [Check(f"GPU {gpu.index}", State.OK, f"{gpu.name}, {size}")]
    for feature in gpu.features:
        missing: Missing | None = next(iter(feature.missing), None)
        found = feature.standing.value if missing is None else missing.what
        # Without the launch gate jobs cannot be held back; without the others there is less choice.
        lacks = feature.name == GATE and feature.standing is Standing.ABSENT
        state, fix = (State.WARN, missing.how if missing else "") if lacks else (State.OK, "")
        checks.append(Check(f"GPU {gpu.index}, {feature.name}", state, found, fix))
    if gpu.mig is not None:
        found = f"on, {len(gpu.mig.devices)} instances" if gpu.mig.on else "off"
        checks.append(Check(f"GPU {gpu.index}, mode of MIG", State.OK, found))
    return checks


def check_npu(found: Npus, wanted: bool) -> Check:
    """NPUs. ``wanted``: the configuration names one."""
    if found.trouble is None:
        return Check("NPU", State.OK, ", ".join(npu.name or npu.id for npu in found.npus))
    if found.cause is Cause.ABSENT and not wanted:
        return Check("NPU", State.OK, found.trouble.what)
    state = State.FAIL if wanted else State.WARN
    return Check("NPU", state, found.trouble.what, found.trouble.how)


def check_port(key: str, address: str, problem: int) -> Check:
    """Whether an address can be listened on; ``problem``: the error's number, 0 if it can."""
    _, port = split_address(address)
    if not problem:
        return Check(f"port {port}", State.OK, f"{key} can listen on {address}")
    what = f"{key} cannot listen on {address}: {os.strerror(problem)}"
    if problem == errno.EADDRINUSE:
        fix = f"see who has it: ss -ltnp 'sport = :{port}'; or choose another for node.{key}"
    elif problem == errno.EACCES:
        fix = f"sudo sysctl net.ipv4.ip_unprivileged_port_start={port}; or a port above 1023"
    else:
        fix = f"choose an address of this machine for node.{key}, such as 127.0.0.1:8000"
    return Check(f"port {port}", State.FAIL, what, fix)


def check_jobs_api(problem: str, key: str, exposed: bool) -> Check:
    """The files of the jobs API: ``problem`` keeps it from starting, if there is one; ``exposed``:
    other users can read the file ``key``."""
    if problem:
        return Check("jobs API", State.FAIL, problem, "docs/jobs-api.md")
    if exposed:
        what = f"every user of this machine can read the private key {key}"
        return Check("jobs API", State.WARN, what, f"chmod o= {key}")
    return Check("jobs API", State.OK, "its tokens and its certificate can be used")


def check_disk(directory: Path, writable: bool, free: int) -> Check:
    """The state directory, or where it would be made. ``free`` in bytes."""
    if not writable:
        fix = f"sudo chown $(id -un) {directory}; or choose another with node.state_dir"
        return Check("disk", State.FAIL, f"{directory} cannot be written", fix)
    found = f"{format_bytes(free)} free in {directory}"
    if free < SPARE:
        fix = f"df -h {directory}; free {format_bytes(SPARE)}, or set node.journal.keep lower"
        return Check("disk", State.WARN, found, fix)
    return Check("disk", State.OK, found)


def check_models(directory: Path, services: Sequence[str], there: Sequence[str]) -> list[Check]:
    """Whether the models that the configuration names are in their directory."""
    missing = [name for name in services if name not in there]
    if not missing:
        return [Check("models", State.OK, f"{len(there)} in {directory}")]
    fix = f"put each into {directory}/NAME/1/model.onnx"
    return [Check("models", State.WARN, f"not in {directory}: {', '.join(missing)}", fix)]


def exit_code(checks: Sequence[Check]) -> int:
    """1 if something fails that serving needs."""
    return int(any(check.state is State.FAIL for check in checks))


# --- the machine, asked -----------------------------------------------------------------------


def look(config: NodeConfig | None = None) -> list[Check]:
    """All checks of this machine, and of a configuration if there is one."""
    facts = processor.look()
    container = _in_container()
    checks = [
        check_python([n for n in NEEDED if not _there(n)], sys.version_info[:2]),
        check_policy(policy_is_compiled()),
        check_cores(facts),
        check_realtime(
            cpu.try_realtime(), resource.getrlimit(resource.RLIMIT_RTPRIO)[0], container
        ),
        check_reclaim(*reclaim.way()),
        check_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_shm(_free(Path("/dev/shm")), container),
        *check_gpus(survey(), _names(config, lambda d: isinstance(d, CudaConfig))),
        check_npu(
            npu_look.look(), _names(config, lambda d: isinstance(d, NpuConfig) and bool(d.device))
        ),
    ]
    plan = config or parse_config("{}")
    jobs = plan.jobs_api.address if plan.jobs_api else None
    for key, address in (("http", plan.http), ("grpc", plan.grpc), ("jobs_api.address", jobs)):
        if address:
            checks.append(_as_usual(check_port(key, address, _listen(address)), config))
    if plan.jobs_api:
        checks.append(_check_jobs_api(plan.jobs_api))
    checks.append(_check_disk(Path(plan.state_dir)))
    if config is not None:
        names = [service.model for service in config.services]
        there = [n for n in names if (Path(config.models) / n).is_dir()]
        checks += check_models(Path(config.models), names, there)
    return checks


def _as_usual(check: Check, config: NodeConfig | None) -> Check:
    """Without a configuration a port that is taken is only the usual one."""
    if config is None and check.state is State.FAIL:
        return msgspec.structs.replace(check, state=State.WARN)
    return check


def _names(config: NodeConfig | None, wanted: Callable[[DeviceConfig], bool]) -> bool:
    return config is not None and any(map(wanted, config.devices))


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _in_container() -> bool:
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()


def _listen(address: str) -> int:
    """The number of the error that listening there gives; 0 if it can be."""
    host, port = split_address(address)
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            sock.listen(1)
    except socket.gaierror:
        return errno.EADDRNOTAVAIL
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _check_jobs_api(config: JobsApiConfig) -> Check:
    try:
        credentials(config)
    except EnvironmentProblem as error:
        return check_jobs_api(str(error), "", False)
    key = config.key or ""
    return check_jobs_api("", key, bool(key and Path(key).stat().st_mode & stat.S_IROTH))


def _free(directory: Path) -> int | None:
    if not os.access(directory, os.W_OK | os.X_OK):
        return None
    return shutil.disk_usage(directory).free


def _check_disk(directory: Path) -> Check:
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    free = _free(there)
    return check_disk(there, free is not None, free or 0)


# --- the command ------------------------------------------------------------------------------


@command
def cmd_doctor(args: argparse.Namespace) -> int:
    """Exits with 0 if models can be served here, with 1 if something for that is missing."""
    config, first = None, []
    if args.config is not None:
        try:
            config = read_config(args.config)
        except ConfigError as error:
            first = [Check("configuration", State.FAIL, str(error), "docs/configuration.md")]
        else:
            services = f"{len(config.services)} services, {len(config.jobs)} jobs"
            first = [Check("configuration", State.OK, f"{args.config}: {services}")]
    checks = [*first, *look(config)]
    code = exit_code(checks)
    if args.json:
        as_json({"serves": code == 0, "checks": checks})
    else:
        show(doctor_view(checks))
    return code


def doctor_view(checks: Sequence[Check]) -> RenderableType:
    """A line a check, with its fix below."""
    colours = {State.OK: "green", State.WARN: "yellow", State.FAIL: "red"}
    parts: list[RenderableType] = []
    for check in checks:
        line = plain(f"{check.state.value:<5}", colours[check.state])
        line.append_text(plain(f"{check.name}: {check.found}"))
        parts.append(line)
        if check.fix:
            parts.append(Padding(plain(check.fix, "dim"), (0, 0, 0, 5), expand=False))
    failed = sum(check.state is State.FAIL for check in checks)
    warned = sum(check.state is State.WARN for check in checks)
    said = "models can be served here" if not failed else f"{failed} to be mended before serving"
    said += f"; {warned} could be better" if warned else ""
    parts += [Text(), plain(said, "bold")]
    return Group(*parts)


def add_doctor(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``cotenant doctor``."""
    doctor = subparsers.add_parser(
        "doctor",
        help="check this machine, and say how to mend what is missing",
        epilog="Exits with 0 if models can be served here; 1: something for that is missing.",
    )
    doctor.add_argument(
        "config", nargs="?", type=Path, metavar="FILE", help="also check what this YAML file names"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON, for machines")
    doctor.set_defaults(func=cmd_doctor)
