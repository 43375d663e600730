"""A GPU whose multiprocessors (SMs) are divided among services: its units are the least groups of
them that the driver separates, and a partition is any of these, which its workers keep to by green
contexts (``cotenant.engines.cuda.subsets``).

* Nothing on the GPU changes with the layout. Which units a batch is to have goes with it.
* A worker is a process, and without MPS the driver lets one process compute at a time. So MPS must
  run; it is never started or changed here.
* A job's kernels would go to all SMs. The device takes none.

Sources: NVIDIA, "Multi-Process Service"; CUDA Driver API, "Green Contexts".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Final

import msgspec

from cotenant.devices.nvidia import mps
from cotenant.devices.nvidia.facts import Driver, Process
from cotenant.devices.nvidia.features import GREEN_CONTEXTS_CUDA
from cotenant.devices.nvidia.nvml import NvmlGpu
from cotenant.devices.nvidia.space import VISIBLE
from cotenant.domain.costs import SUBSET_SESSION
from cotenant.domain.device import (
    CUDA_SUBSETS,
    PROCESSOR,
    DeviceSpec,
    LayoutStep,
    Partition,
    even_sizes,
)
from cotenant.domain.device_config import SERVES_ONLY
from cotenant.domain.errors import DeviceError, EnvironmentProblem

PROBE: Final = "cotenant.engines.cuda"
"""The program that says what a worker could use of a GPU."""
WITHIN_S: Final = 60.0
"""For its answer: a first context takes seconds on a machine with many GPUs."""
PART: Final = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
"""Below 100 a client of MPS has SMs of MPS's choice instead of those of its green contexts."""


class Found(msgspec.Struct, frozen=True):
    """What a worker could use: SMs of the GPU and of a unit, how many units, and why there are
    none."""

    sms: int
    unit_sms: int
    units: int
    refusal: str = ""


class SubsetSpace:
    """``ask`` finds out what a process with these variables could use; raises
    EnvironmentProblem."""

    takes_jobs = False

    def __init__(
        self,
        gpu: NvmlGpu,
        device: str,
        driver: Driver,
        ask: Callable[[str, dict[str, str]], Found] | None = None,
    ) -> None:
        self._gpu = gpu
        self._device = device
        self._driver = driver
        self._ask = ask or probe
        self._uuid = ""
        self._found = Found(0, 0, 0)

    def open(self) -> None:
        if self._driver.cuda < GREEN_CONTEXTS_CUDA:
            raise self._impossible(
                f"driver {self._driver.version} has no green contexts",
                "install driver 550 or newer",
            )
        self._check_mps(mps.look())
        self._uuid = self._gpu.uuid()
        self._found = self._ask(self._uuid, {VISIBLE: self._uuid, **self.worker(self._uuid)})
        if not self._found.units:
            how = "it takes driver 550 or newer and a GPU that this can split"
            raise self._impossible(self._found.refusal, how)

    def _check_mps(self, found: mps.Mps) -> None:
        if not found.runs:
            raise self._impossible(
                "MPS does not run, and without it services would compute by turns, each on its own "
                "part of the GPU",
                f"start it before the node: {mps.CONTROL} -d",
            )
        if found.static:
            raise self._impossible(
                "MPS runs with static partitions, by which it says itself who has which "
                "multiprocessors",
                f"start it without -S: {mps.CONTROL} -d",
            )

    def _impossible(self, what: str, how: str) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"device {self._device}: subsets cannot be had: {what}; {how}, or leave subsets out"
        )

    def close(self) -> None:
        pass

    def fit(self, spec: DeviceSpec) -> DeviceSpec:
        count = self._found.units
        return msgspec.structs.replace(
            spec,
            units=tuple(range(count)),
            shapes=even_sizes(count),
            repartition_ns=SUBSET_SESSION,
            trains=False,
            model=f"{spec.model} in subsets of {self._found.unit_sms} SMs",
            limits=(*spec.limits, SERVES_ONLY),
        )

    def repartition(self, partitions: tuple[Partition, ...]) -> None:
        taken: set[int] = set()
        for partition in partitions:
            self.check("", partition)
            if taken.intersection(partition.units):
                raise DeviceError(f"{partition.id}: another partition has some of its units")
            taken.update(partition.units)

    def preview(self, partitions: tuple[Partition, ...]) -> tuple[LayoutStep, ...]:
        return ()

    def shown(self, tenant: str, partition: Partition | None) -> str:
        return self._uuid

    def worker(self, shown: str) -> dict[str, str]:
        return {PROCESSOR: f"{CUDA_SUBSETS}{shown}", PART: "100"}

    def check(self, tenant: str, partition: Partition) -> None:
        units, known = partition.units, range(self._found.units)
        if not units or len(set(units)) < len(units) or any(u not in known for u in units):
            raise DeviceError(
                f"{partition.id}: units {list(partition.units)} are not of {self._device}, "
                f"which has {self._found.units} from 0 on"
            )

    def forget(self, tenant: str) -> None:
        pass

    def trial(self) -> str:
        return ""

    def processes(self) -> tuple[Process, ...]:
        return self._gpu.processes()

    def trouble(self) -> str:
        return ""


def probe(gpu: str, env: dict[str, str]) -> Found:
    """Asked in a process of its own, as a worker sees the GPU: to ask makes a context, which takes
    memory of it for as long as the process lives. Raises EnvironmentProblem."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", PROBE, gpu],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"subsets of GPU {gpu} could not be tried: {error}") from error
    if done.returncode:
        said = done.stderr.strip()[-300:]
        raise EnvironmentProblem(f"subsets of GPU {gpu} could not be tried: {said}")
    try:
        return msgspec.convert(json.loads(done.stdout), Found)
    except (ValueError, msgspec.ValidationError) as error:
        raise EnvironmentProblem(
            f"subsets of GPU {gpu}: {PROBE} answered what is no answer ({error})"
        ) from error
