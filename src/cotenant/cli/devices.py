"""``cotenant devices``: what this machine has, what of it works, and what is missing for more.

It needs no node, and changes nothing.
"""

from __future__ import annotations

import argparse
import enum
from collections.abc import Iterable
from typing import Any, Final

import msgspec
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from cotenant.cli.output import as_json, command, show
from cotenant.cli.views import plain
from cotenant.devices import npu_look, processor
from cotenant.devices.features import Feature, Missing, Standing
from cotenant.devices.npu_look import Npu, Npus
from cotenant.devices.nvidia.facts import Cause, Found, Gpu, Mig
from cotenant.devices.nvidia.survey import survey
from cotenant.devices.processor import ProcessorFacts
from cotenant.domain.units import format_bytes

CPU: Final = "cpu"
CUDA: Final = "cuda"
NPU: Final = "npu"
KINDS: Final = (CPU, CUDA, NPU)
INDENT: Final = (0, 0, 0, 2)


class Exit(enum.IntEnum):
    """What scripts learn; 1 and 2 mean what they mean for every command."""

    USABLE = 0
    ABSENT = 3
    DRIVER = 4
    ACCESS = 5
    PACKAGE = 6


_EXITS: Final = {
    Cause.ABSENT: Exit.ABSENT,
    Cause.DRIVER: Exit.DRIVER,
    Cause.ACCESS: Exit.ACCESS,
    Cause.PACKAGE: Exit.PACKAGE,
}


@command
def cmd_devices(args: argparse.Namespace) -> int:
    """Exits with ``USABLE`` if any device asked for can be used, else with why GPUs cannot."""
    cpu = processor.look() if args.kind in (None, CPU) else None
    gpus = survey(channels=args.channels) if args.kind in (None, CUDA) else None
    npus = npu_look.look() if args.kind in (None, NPU) else None
    if args.json:
        as_json(document(cpu, gpus, npus))
    else:
        show(devices_view(cpu, gpus, npus))
    return exit_code(cpu, gpus, npus)


def exit_code(cpu: ProcessorFacts | None, gpus: Found | None, npus: Npus | None = None) -> Exit:
    """None: not asked for. A processor can always be used."""
    if cpu is None and gpus is None and npus is not None:
        return Exit.USABLE if npus.cause is None else _EXITS[npus.cause]
    if cpu is not None or gpus is None or gpus.trouble is None:
        return Exit.USABLE
    return _EXITS[gpus.trouble.cause]


def document(
    cpu: ProcessorFacts | None, gpus: Found | None, npus: Npus | None = None
) -> dict[str, Any]:
    """For machines: ``devices``, each with its ``kind``; the ``driver`` of GPUs; ``trouble`` that
    keeps all of them from being used; ``lost``, those that could not be read. ``npu``: what keeps
    NPUs from being used, and what the kernel shows of them."""
    devices = [{"kind": CPU, **_plain(cpu)}] if cpu is not None else []
    found: dict[str, Any] = {"devices": devices}
    if gpus is not None:
        devices += [{"kind": CUDA, **_plain(gpu)} for gpu in gpus.gpus]
        found |= {k: v for k, v in _plain(gpus).items() if k != "gpus"}
    if npus is not None:
        devices += [{"kind": NPU, **_plain(npu)} for npu in npus.npus]
        found["npu"] = {k: v for k, v in _plain(npus).items() if k != "npus"}
    return found


def _plain(facts: msgspec.Struct) -> dict[str, Any]:
    """Builtins, and levels by their names."""
    found: dict[str, Any] = msgspec.to_builtins(facts)
    features = getattr(facts, "features", ())
    for feature, entry in zip(features, found.get("features", ()), strict=True):
        entry["level"] = feature.level.name if feature.level is not None else None
    return found


# --- for people -------------------------------------------------------------------------------


def devices_view(
    cpu: ProcessorFacts | None, gpus: Found | None, npus: Npus | None = None
) -> RenderableType:
    """A paragraph for each device."""
    parts: list[RenderableType] = []
    if cpu is not None:
        parts += [_cpu(cpu), *_features(cpu.features)]
    for gpu in gpus.gpus if gpus is not None else ():
        parts += [Text()] if parts else []
        parts += [_gpu(gpu), *_lines(_details(gpu)), *_features(gpu.features)]
    if gpus is not None:
        parts += _rest(gpus, bool(parts))
    if npus is not None:
        parts += _npus(npus, bool(parts))
    return Group(*parts)


def _npus(npus: Npus, more: bool) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for npu in npus.npus:
        parts += [Text()] if parts or more else []
        parts += [_npu(npu), *_lines(f"could not be read: {key}" for key in npu.unread)]
        parts += _lines(["a model is compiled for it by OpenVINO; untested on hardware"])
    if npus.trouble is not None:
        parts += [Text()] if more else []
        quiet = npus.cause is Cause.ABSENT
        parts.append(plain(f"{NPU}: {npus.trouble.what}", "" if quiet else "red"))
        parts += [] if quiet else [plain(f"  {npus.trouble.how}")]
    return parts


def _npu(npu: Npu) -> Text:
    parts = [npu.name or npu.id]
    if npu.memory:
        parts.append(f"{format_bytes(npu.memory)} ({format_bytes(npu.used)} used)")
    parts += [f"driver {npu.driver}"] if npu.driver else []
    parts += [", ".join(npu.computes)] if npu.computes else []
    return _title(f"{NPU} {npu.id}", ", ".join(parts))


def _rest(gpus: Found, more: bool) -> list[RenderableType]:
    """What is said of all GPUs together."""
    lines = []
    if gpus.driver is not None:
        lines.append(plain(f"driver {gpus.driver.version}, CUDA {_dotted(gpus.driver.cuda)}"))
    lines += [plain(f"not shown: {text}", "yellow") for text in gpus.lost]
    if gpus.trouble is not None:
        quiet = gpus.trouble.cause is Cause.ABSENT
        lines.append(plain(f"{CUDA}: {gpus.trouble.what}", "" if quiet else "red"))
        lines += [] if quiet else [plain(f"  {gpus.trouble.how}")]
    return [Text(), *lines] if more and lines else [*lines]


def _cpu(cpu: ProcessorFacts) -> Text:
    cores = f"{len(cpu.cores)} of {cpu.online} cores"
    parts = [cpu.name or "processor", cores, format_bytes(cpu.memory)]
    return _title(CPU, ", ".join(parts))


def _gpu(gpu: Gpu) -> Text:
    parts = [gpu.name, f"{format_bytes(gpu.memory)} ({format_bytes(gpu.used)} used)"]
    parts += [f"{gpu.sms} SMs"] if gpu.sms is not None else []
    parts.append(f"compute capability {_dotted(gpu.capability)}")
    if gpu.links is not None:
        parts.append(f"{gpu.links.up} of {gpu.links.count} NVLinks up")
    return _title(f"{CUDA} {gpu.index}", ", ".join(parts))


def _title(name: str, text: str) -> Text:
    line = plain(name, "bold")
    line.append_text(plain(f": {text}"))
    return line


def _details(gpu: Gpu) -> list[str]:
    lines = [f"{gpu.uuid}, at {gpu.pci}" if gpu.pci else gpu.uuid]
    if gpu.mig is not None:
        lines += _mig(gpu.mig)
    if gpu.processes:
        pids = ", ".join(str(process.pid) for process in gpu.processes)
        lines.append(f"in use by processes {pids}")
    return lines + [f"could not be read: {text}" for text in gpu.unread.values()]


def _mig(mig: Mig) -> list[str]:
    state = "on" if mig.on else "off"
    if mig.pending != mig.on:
        state += f" ({'on' if mig.pending else 'off'} after the next reset)"
    lines = [f"MIG {state}"]
    if mig.instances is None:
        lines.append("instances are listed to root only; these have compute instances:")
    for instance in mig.instances or ():
        last = instance.start + instance.size - 1
        where = f"memory slice {instance.start}" + (f" to {last}" if instance.size > 1 else "")
        size = f"{format_bytes(instance.memory)}, {instance.sms} SMs"
        lines.append(f"  instance {instance.id}: {instance.profile}, {where}, {size}")
    for device in mig.devices:
        numbers = f"{device.gpu_instance}/{device.compute_instance}"
        size = f"{format_bytes(device.memory)}, {device.sms} SMs"
        lines.append(f"  device {numbers}: {device.uuid}, {size}")
    return lines


def _features(features: Iterable[Feature]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for feature in features:
        level = feature.level.name if feature.level is not None else ""
        stands = f"{level} ({feature.standing.value})" if level else feature.standing.value
        by = f", by {feature.way}" if feature.way else ""
        colour = {Standing.TESTED: "green", Standing.ABSENT: "yellow"}.get(feature.standing, "")
        line = plain(f"{feature.name}: ")
        line.append_text(plain(stands, colour))
        line.append_text(plain(by))
        lines.append(line)
        lines += [Padding(_missing(m), INDENT, expand=False) for m in feature.missing]
    return [Padding(line, INDENT, expand=False) for line in lines]


def _missing(missing: Missing) -> Text:
    how = f"; to change that: {missing.how}" if missing.how else ""
    return plain(f"{missing.what}{how}", "dim")


def _lines(lines: Iterable[str]) -> list[RenderableType]:
    return [Padding(plain(line), INDENT, expand=False) for line in lines]


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
