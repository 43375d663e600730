"""``cotenant profile``: how long a model takes, by rows and units of a device; it needs no node."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
from rich import progress
from rich.console import Console, Group, RenderableType
from rich.text import Text

from cotenant.cli import options, wiring
from cotenant.cli.devices import CPU, KINDS
from cotenant.cli.output import as_json, command, note, show
from cotenant.cli.views import new_table, plain
from cotenant.domain.config import ModelSettings
from cotenant.domain.device import DeviceSpec
from cotenant.domain.device_config import CpuConfig, CudaConfig, DeviceConfig, NpuConfig
from cotenant.domain.errors import CotenantError, EnvironmentProblem, InvalidRequest
from cotenant.domain.profile import FORMAT, ModelProfile, Profiles
from cotenant.domain.units import MS, S, format_bytes
from cotenant.domain.workload import BatchSpec
from cotenant.runtime.profiling import Ask, Progress, profile, write_profile
from cotenant.runtime.repository import ModelFiles, Repository

MOST_ROWS = 4096
ALL: Final = "all"
USUAL: Final = (CpuConfig(), CudaConfig(), NpuConfig(device="NPU"))
"""What is measured where no configuration says which devices there are."""


@command
def cmd_profile(args: argparse.Namespace) -> int:
    """Measures, shows, and writes what it found into the version's directory."""
    if args.version and not (args.version.isascii() and args.version.isdigit()):
        raise InvalidRequest(f"--version {args.version}: versions are whole numbers")
    repository = Repository(args.models)
    files = (
        repository.files(args.model, args.version)
        if args.version
        else repository.newest(args.model)
    )
    settings = repository.settings(args.model)
    if args.engine:
        settings = msgspec.structs.replace(settings, engine=args.engine)
    rows = _rows(args.max_batch, settings)
    measured = []
    for config in _wanted(args.device, args.config):
        try:
            found = _measured(config, files, settings, rows, args)
        except CotenantError as error:
            if args.device != ALL:
                raise
            note(f"{config.kind} is left out: {error}")
            continue
        measured.append(found)
        if not args.json:
            show(profile_view(found))
        if not args.dry_run:
            note(f"written to {write_profile(found, files.path.parent)}")
    if not measured:
        raise EnvironmentProblem(f"{args.model} was measured on no device")
    return as_json(Profiles(FORMAT, tuple(measured))) if args.json else 0


def _wanted(kind: str, path: Path | None) -> list[DeviceConfig]:
    """A device of the kind, or of each: those of one kind execute a model equally fast."""
    there: Sequence[DeviceConfig] = USUAL if path is None else wiring.read_config(path).devices
    first = {device.kind: device for device in reversed(there) if device.kind in KINDS}
    if kind == ALL:
        return [first[name] for name in KINDS if name in first]
    if kind not in first:
        known = ", ".join(name for name in KINDS if name in first) or "none that can be measured"
        raise InvalidRequest(
            f"--device {kind}: {path} names no device of that kind; it has {known}"
        )
    return [first[kind]]


def _measured(
    config: DeviceConfig,
    files: ModelFiles,
    settings: ModelSettings,
    rows: int,
    args: argparse.Namespace,
) -> ModelProfile:
    with tempfile.TemporaryDirectory(prefix="cotenant-profile-") as state:
        device = wiring.make_bare(config, Path(state))
        try:
            device.open()
        except CotenantError as error:
            raise EnvironmentProblem(f"{error}{_hint(config, args.config)}") from error
        try:
            ask = Ask(_units(args.units, device.spec), rows, args.seconds, tuple(args.shape))
            text = f"{files.name} version {files.version} on {config.kind}"
            with _bar(text) as tell:
                return asyncio.run(profile(files, settings, ask, device, tell))
        finally:
            device.close()


def _hint(config: DeviceConfig, path: Path | None) -> str:
    if config.kind == CPU:
        return ""
    shown = f"; cotenant devices --kind {config.kind} shows what is there"
    if isinstance(config, NpuConfig) and path is None:
        shown += "; one that is emulated is measured with a configuration that names it (--config)"
    return shown


def _units(asked: tuple[int, ...], spec: DeviceSpec) -> tuple[int, ...]:
    most = max(asked, default=0)
    if most > spec.compute:
        what = f"{spec.compute} {'core' if spec.kind == CPU else 'unit'}{'s' * (spec.compute > 1)}"
        raise InvalidRequest(f"--units {most}: device {spec.id} has {what}")
    return tuple(sorted(set(asked or (1, spec.compute))))


def _rows(asked: int, settings: ModelSettings) -> int:
    if asked > MOST_ROWS:
        raise InvalidRequest(f"--max-batch {asked}: at most {MOST_ROWS}")
    return asked or (settings.batch or BatchSpec()).max


@contextlib.contextmanager
def _bar(text: str) -> Iterator[Progress]:
    """How far it is, on stderr, where that is a terminal."""
    screen = Console(stderr=True)
    with progress.Progress(console=screen, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(text, total=1.0)
        yield lambda done: bar.update(task, completed=done)


def profile_view(found: ModelProfile) -> RenderableType:
    """A line on the whole, and a row for each size."""
    columns = ("SIZE", "UNITS", "ROWS", "MEDIAN", "P95", "SPREAD", "ROWS/S", "RUNS")
    made = new_table(*columns, right=columns)
    for f in found.figures:
        made.add_row(
            str(f.size),
            str(f.units),
            str(f.rows),
            f"{f.median_ns / MS:.3g} ms",
            f"{f.p95_ns / MS:.3g} ms",
            f"{f.cv:.1%}",
            f"{f.rows * S / f.median_ns:.4g}",
            str(f.runs),
        )
    head = (
        f"{found.model} version {found.version}, engine {found.engine}: loaded in "
        f"{found.load_ns / S:.2f} s, {format_bytes(found.memory_loaded)} then, "
        f"{format_bytes(found.memory_peak)} at most"
    )
    if found.memory_peak != found.host_peak:
        head += f", on the host {format_bytes(found.host_peak)}"
    where = f"on {found.kind}: {found.device or 'the processor'}"
    parts: list[RenderableType] = [plain(head), plain(where, "yellow" * found.emulated)]
    parts += [plain(f"executed by {line}") for line in found.executed]
    if found.unjoined:
        parts.append(plain(f"rows are not joined: {found.unjoined}", "yellow"))
    return Group(*parts, Text(), made)


def add_profile(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Measure a model in a process of its own, on a device as a node would use it. The figures "
        "are written to .profile.json in the version's directory, beside those of other kinds of "
        "device. A node's planner and cotenant simulate take them from there. Language models "
        "cannot be profiled."
    )
    parser.add_argument("model", metavar="NAME", help="a directory in that of the models")
    parser.add_argument("--models", type=Path, default=Path("models"), metavar="DIR",
                        help="where the models are (./models)")  # fmt: skip
    parser.add_argument("--version", default="", metavar="V", help="default: the newest")
    parser.add_argument("--device", choices=(*KINDS, ALL), default=CPU,
                        help="kind of device; all: each that is there (cpu)")  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="FILE",
                        help="a node's configuration, whose devices are meant; default: all "
                             "cores, GPU 0, the NPU that OpenVINO lists")  # fmt: skip
    parser.add_argument("--units", type=options.units, default=(), metavar="N,N",
                        help="numbers of cores, or of subsets of a GPU (1, all)")  # fmt: skip
    parser.add_argument("--max-batch", type=options.above_zero, default=0, metavar="N",
                        help="most rows; powers of two up to it (batch.max)")  # fmt: skip
    parser.add_argument("--seconds", type=options.positive, default=10.0, metavar="S",
                        help="for measuring; each size runs 6 times even so (10)")  # fmt: skip
    parser.add_argument("--shape", type=options.shapes, action="append", default=[],
                        metavar="NAME=AxB",
                        help="also with an input of this shape; as often as wanted")  # fmt: skip
    parser.add_argument("--engine", default="", metavar="E", help="default: as model.yaml says")
    parser.add_argument("--dry-run", action="store_true", help="write no file")
