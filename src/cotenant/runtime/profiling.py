"""A version of a model measured without a node: on a device that launches and binds a worker as it
does for a node, one execution at a time, sizes in turn, so that what disturbs the machine for a
while disturbs all sizes alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec

from cotenant.devices.base import Device
from cotenant.domain.config import ModelSettings
from cotenant.domain.device import (
    CPU,
    CUDA_SUBSETS,
    PROCESSOR,
    DeviceSpec,
    Partition,
    Tenant,
    TenantKind,
)
from cotenant.domain.errors import ConfigError, DeviceError, EnvironmentProblem, ModelError
from cotenant.domain.npu import emulated
from cotenant.domain.profile import (
    PROFILE_FILE,
    Figures,
    ModelProfile,
    read_profiles,
    with_profile,
)
from cotenant.domain.units import S
from cotenant.domain.workload import BatchSpec
from cotenant.engines.base import Opening, Target
from cotenant.engines.placement import told
from cotenant.engines.registry import choose
from cotenant.runtime.arena import Arena
from cotenant.runtime.messages import Failed, FromWorker, Measure, Measured, Open, Opened
from cotenant.runtime.messages import OpenFailed as Refused
from cotenant.runtime.process import WorkerProcess
from cotenant.runtime.repository import ModelFiles, stamp

LEAST_ROUNDS: Final = 2
MOST_ROUNDS: Final = 500
COUNTED: Final = 2
"""Executions of a size in a round that count."""
LIBRARIES: Final = ("cotenant", "numpy", "onnxruntime", "openvino", "torch")
"""Distributions whose versions a profile names, as far as they are installed."""

WORKER: Final = Tenant("profile", TenantKind.WORKER)

Progress = Callable[[float], None]
"""Told how much is done, from 0 to 1."""


class Ask(msgspec.Struct, frozen=True):
    """What to measure: on so many ``units`` each, up to ``max_batch`` rows, for about so many
    ``seconds`` in all while the model is loaded; ``shapes``: beside those of the warm-up, of inputs
    by name."""

    units: tuple[int, ...]
    max_batch: int
    seconds: float
    shapes: tuple[dict[str, tuple[int, ...]], ...] = ()


class _Found(msgspec.Struct):
    """What one worker showed. ``memory`` and ``peak``: see ``ModelProfile``."""

    opened: Opened
    load_ns: int
    memory: int
    peak: int
    host_peak: int
    figures: list[Figures]


class _Place(msgspec.Struct, frozen=True):
    """A device that is open, and what it tells a worker to compute on."""

    device: Device
    processor: str

    @property
    def spec(self) -> DeviceSpec:
        return self.device.spec

    def part(self, units: int) -> Partition:
        """A partition of so many units, the first ones."""
        spec = self.spec
        return Partition(f"{spec.id}:{units}", spec.id, spec.units[:units])

    def target(self, units: Sequence[int]) -> Target:
        """What a model is opened for."""
        return Target(self.processor, tuple(self.part(count).units for count in units))


class _Trial:
    """One worker on a device, while it is needed: ``async with``. What it answers is raised or
    returned."""

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._answers: asyncio.Queue[FromWorker | int] = asyncio.Queue()
        self._folder = tempfile.TemporaryDirectory(prefix="cotenant-profile-")
        self._log = Path(self._folder.name) / "worker.log"
        self._arena = Arena(WORKER.id, 1)
        put = self._answers.put_nowait
        self.process = WorkerProcess(WORKER.id, self._arena, self._log, put, put)
        self._started = False

    async def __aenter__(self) -> _Trial:
        device = self._place.device
        try:
            self.process.start(device.launch(WORKER, None))
            self._started = True
            device.attach(WORKER, self.process.pid)
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        self.process.kill()
        while self._started:
            self._started = not isinstance(await self._answers.get(), int)
        self._place.device.detach(WORKER.id)
        self._arena.close()
        self._folder.cleanup()

    async def ask(self, order: Open | Measure) -> Opened | Measured:
        """Raises ModelError if the worker refuses, or ends."""
        self.process.send(order)
        while True:
            answer = await self._answers.get()
            if isinstance(answer, Refused | Failed):
                raise ModelError(answer.reason)
            if isinstance(answer, int):
                self._started = False
                lines = self._log.read_text(errors="replace").strip().splitlines()
                last = f"; its last words: {lines[-1]}" if lines else ""
                raise ModelError(f"the worker ended with {answer} while it measured{last}")
            if isinstance(answer, Opened | Measured):
                return answer

    def bind(self, units: int) -> None:
        """Have its threads run on so many units."""
        self._place.device.refresh()  # threads that it has started since
        self._place.device.bind(WORKER.id, self._place.part(units))

    def memory(self) -> int:
        """Bytes of the device that it has, as the device says."""
        self._place.device.refresh()
        found = self._place.device.facts().get(WORKER.id)
        return found.memory if found is not None else 0


async def profile(
    files: ModelFiles, settings: ModelSettings, ask: Ask, device: Device, progress: Progress
) -> ModelProfile:
    """Measure one version on a device that is open. Raises ModelError where it cannot be opened or
    executed, is a model that answers in turns, or changes meanwhile; DeviceError, where the device
    cannot carry a worker without a node."""
    if device.spec.pins_workers:
        raise DeviceError(
            f"device {device.spec.id} is divided (MIG is on): what a model takes there depends on "
            "the instance, which a node makes; measured are whole GPUs and subsets of one"
        )
    place = _Place(device, device.launch(WORKER, None).fixed.get(PROCESSOR, CPU))
    choose(Opening(files.path, ask.units, settings, target=place.target(ask.units)))
    parts = 1 + len(ask.shapes)
    each = msgspec.structs.replace(ask, seconds=ask.seconds / parts)
    first = await _trial(files, settings, each, place, lambda done: progress(done / parts))
    further = []
    for number, shapes in enumerate(ask.shapes, 1):
        other = msgspec.structs.replace(settings, shapes=settings.shapes | shapes)
        unchecked = msgspec.structs.replace(files, check=None)

        def tell(done: float, number: int = number) -> None:
            progress((number + done) / parts)

        further.append(await _trial(unchecked, other, each, place, tell))
    if stamp(files.path) != files.stamp:
        raise ModelError(f"{files.path.parent} changed while it was measured; measure again")
    every = [first, *further]
    known = {(f.size, f.units, f.rows): f for found in reversed(every) for f in found.figures}
    return ModelProfile(
        model=files.name,
        version=files.version,
        kind=place.spec.kind,
        device=place.spec.model,
        engine=first.opened.engine,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        units=place.spec.compute,
        libraries=versions(LIBRARIES),
        files=files.stamp.files,
        load_ns=first.load_ns,
        memory_loaded=first.memory,
        memory_peak=max(found.peak for found in every),
        host_peak=max(found.host_peak for found in every),
        unjoined=first.opened.unjoined,
        executed=tuple(told(first.opened.executed)),
        size=first.opened.size,
        figures=tuple(known[key] for key in sorted(known)),
        asked=settings.engine,
        emulated=emulated(place.processor) is not None,
        subsets=place.processor.startswith(CUDA_SUBSETS),
    )


async def _trial(
    files: ModelFiles, settings: ModelSettings, ask: Ask, place: _Place, progress: Progress
) -> _Found:
    """Measure rows of one size; raises ModelError."""
    batch, target = settings.batch or BatchSpec(), place.target(ask.units)
    order = Open(
        path=str(files.path),
        units=ask.units,
        max_batch=ask.max_batch,
        check=str(files.check) if files.check is not None else "",
        settings=settings,
        joining=batch.joining,
        partitions=target.partitions,
        measures=True,
    )
    async with _Trial(place) as trial:
        began = time.monotonic_ns()
        trial.bind(max(ask.units))
        opened = await trial.ask(order)
        load = time.monotonic_ns() - began
        assert isinstance(opened, Opened)
        if opened.meta.turns:
            raise ModelError(
                f"{files.name} answers in turns, as language models do: those cannot be profiled; "
                "a node measures them when it loads them"
            )
        if not opened.profile:
            raise ModelError(f"{files.name} cannot be tried: {opened.unjoined}")
        memory = trial.memory()
        sizes = [1] if opened.unjoined else batches(ask.max_batch)
        times = await _measure(trial, ask, sizes, progress)
        host_peak = max(_peak(trial.process.pid), opened.memory)
        peak = max(memory, trial.memory() if target.on_cuda else host_peak)
    found = [figures(opened.size, *key, taken) for key, taken in sorted(times.items())]
    return _Found(opened, load, memory, peak, host_peak, found)


async def _measure(
    trial: _Trial, ask: Ask, sizes: Sequence[int], progress: Progress
) -> dict[tuple[int, int], list[int]]:
    """Ns of executions by units and rows, warm as a node's own figures are."""
    times: dict[tuple[int, int], list[int]] = {(u, r): [] for u in ask.units for r in sizes}
    began, budget = time.monotonic_ns(), round(ask.seconds * S)
    for number in range(MOST_ROUNDS):
        spent = time.monotonic_ns() - began
        if number >= LEAST_ROUNDS and spent >= budget:
            break
        progress(min(1.0, number / LEAST_ROUNDS, spent / budget))
        for units in ask.units:
            trial.bind(units)
            for rows in sizes:
                await trial.ask(Measure(units, rows))  # uncounted: caches hold another size's
                for _ in range(COUNTED):
                    answer = await trial.ask(Measure(units, rows))
                    assert isinstance(answer, Measured)
                    times[units, rows].append(answer.ns)
    progress(1.0)
    return times


def batches(most: int) -> list[int]:
    """Powers of two below ``most``, and that."""
    found = [1]
    while found[-1] < most:
        found.append(min(most, 2 * found[-1]))
    return found


def figures(size: int, units: int, rows: int, times: Sequence[int]) -> Figures:
    """Of some executions (ns, at least one); the percentile is that of the nearest rank."""
    ordered = sorted(times)
    return Figures(
        units=units,
        rows=rows,
        runs=len(ordered),
        median_ns=round(statistics.median(ordered)),
        p95_ns=ordered[math.ceil(0.95 * len(ordered)) - 1],
        cv=statistics.pstdev(ordered) / statistics.fmean(ordered),
        size=size,
    )


def write_profile(found: ModelProfile, directory: Path) -> Path:
    """Put it into the file in the directory of its version, in place of what was measured on that
    kind of device or of other files; whole or not at all. Raises EnvironmentProblem."""
    path = directory / PROFILE_FILE
    try:
        known = read_profiles(path.read_bytes())
    except (OSError, ConfigError):  # nothing that could be kept
        known = ()
    kept = with_profile(known, found)
    data = msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n"
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=PROFILE_FILE, delete=False) as file:
            temporary = file.name
            file.write(data)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise EnvironmentProblem(
            f"{path} cannot be written: {error.strerror}; --dry-run --json prints the profile"
        ) from error
    return path


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of these distributions, as far as they are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _peak(pid: int) -> int:
    """The most bytes that the process ever had resident (VmHWM of proc(5)); 0 once it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
