"""Green contexts: how many multiprocessors one gets, and what a neighbour does to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from driver import Stopwatch, cu, open_device
from kernels import Kernel, Kernels
from loop import Talk
from processes import Job
from record import Record, Setting
from subsets import Subset, split

SHARES = (0.06, 0.25, 0.5, 0.75)
KERNEL_US = 500
TIMES = 30


def run(setting: Setting, record: Record) -> None:
    """Counts alone, then the same with a process beside that keeps the device busy."""
    device = open_device()
    kernels = Kernels(device)
    work = kernels.work(KERNEL_US)
    record.figure("processors", device.processors)
    with record.part("alone"):
        _all(record, kernels, work, "alone")
    with record.part("beside"), Job(setting) as neighbour:
        neighbour.answer()
        talk = Talk(Path(setting.folder, "green"), make=True)
        neighbour.ask("drive", us=KERNEL_US, talk=str(talk.path), kind="work")
        try:
            _all(record, kernels, work, "beside")
        finally:
            record.figure("beside.launched", neighbour.ask("halt", 30)["launched"])


def _all(record: Record, kernels: Kernels, work: Kernel, state: str) -> None:
    stream = cu("cuStreamCreate", 1)
    _time(record, work, stream, f"{state}.whole")
    record.figure(f"{state}.whole.runs_on", kernels.places(stream))
    for share in SHARES:
        with record.part(f"{state}.{share:g}"):
            record.need(0.5)
            asked, part, rest = split(share)
            name = f"{state}.asked_{asked}"
            subset, other = Subset(part), Subset(rest)
            try:
                record.figure(f"{name}.count", subset.count)
                record.figure(f"{name}.rest", other.count)
                own = subset.stream()
                record.figure(f"{name}.runs_on", kernels.places(own))
                _time(record, work, own, name)
                _time_both(record, work, (own, other.stream()), name)
            finally:
                subset.close()
                other.close()


def _time(record: Record, work: Kernel, stream: Any, name: str) -> None:
    """A kernel that has twice as many blocks as there are multiprocessors."""
    watch, taken = Stopwatch(), []
    for turn in range(TIMES + 2):
        watch.begin(stream)
        work.launch(stream)
        watch.end(stream)
        took = watch.ms(stream) * 1e3
        if turn > 1:
            taken.append(took)
    record.sampled(f"{name}.kernel_us", taken)


def _time_both(record: Record, work: Kernel, streams: tuple[Any, Any], name: str) -> None:
    """The same while the rest of the multiprocessors is kept busy from this process."""
    own, other = streams
    watch, taken = Stopwatch(), []
    for _ in range(TIMES):
        for _ in range(3):
            work.launch(other)
        watch.begin(own)
        work.launch(own)
        watch.end(own)
        taken.append(watch.ms(own) * 1e3)
        cu("cuStreamSynchronize", other)
    record.sampled(f"{name}.kernel_beside_rest_us", taken)
