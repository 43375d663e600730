"""Random MIG layouts on a machine whose calls fail: nothing illegal, nothing leaked, and what is
not ours stays as it is."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotenant.devices.nvidia.mig import MigController
from cotenant.devices.nvidia.migrecord import Entry, MigRecord
from cotenant.devices.nvidia.nvml import Nvml
from cotenant.domain import mig
from cotenant.domain.errors import DeviceError, EnvironmentProblem
from cotenant.domain.mig import Placement, Placements
from tests.nvml_standin import (
    Box,
    Fault,
    Instance,
    a100,
    add,
    environment,
    instances,
    uuid_of,
)

TABLE = mig.table("A100-SXM4-40GB")
LAYOUTS = sorted(TABLE.layouts(media=True))
CHANGES = (
    "nvmlDeviceCreateGpuInstanceWithPlacement",
    "nvmlGpuInstanceCreateComputeInstance",
    "nvmlGpuInstanceDestroy",
    "nvmlComputeInstanceDestroy",
)
READS = (
    "nvmlGpuInstanceGetInfo",
    "nvmlDeviceGetGpuInstances",
    "nvmlGpuInstanceGetComputeInstances",
)
BOOT = "this boot"
Shape = list[tuple[int, int, tuple[int, ...]]]


class Machine:
    """One GPU with MIG on, and nodes on it that come and go."""

    def __init__(self, folder: Path, foreign: tuple[Instance, ...] = ()) -> None:
        self.box, self.record = folder / "box", folder / "mig.json"
        self.record.unlink(missing_ok=True)
        Box((a100(mig=True, instances=foreign),)).write(self.box)
        self.foreign = instances(self.box)

    def reconcile(self, wanted: Placements, *faults: Fault) -> bool:
        """A new node makes the layout; returns whether it could."""
        add(self.box, *faults)
        nvml = Nvml()
        nvml.open()
        try:
            record = MigRecord(self.record, BOOT)
            record.open()
            control = MigController(nvml.gpu(0), record)
            control.open()
            control.reconcile(wanted)
        except DeviceError:
            return False
        finally:
            nvml.close()
            add(self.box)
        return True

    def ours(self) -> Shape:
        """What stands beside the foreign ones: profile, start, compute slices."""
        return [found[1:] for found in instances(self.box) if found not in self.foreign]

    def check(self) -> None:
        """What holds at any time."""
        now = instances(self.box)
        assert [found for found in now if found in self.foreign] == self.foreign
        names = {profile.id: profile.name for profile in TABLE.profiles}
        assert TABLE.why_not([Placement(start, names[p]) for _, p, start, _ in now]) is None
        ours = {Placement(start, names[p]) for p, start, _ in self.ours()}
        assert ours <= self.recorded(), "leaked"

    def recorded(self) -> set[Placement]:
        """What the next node takes for ours."""
        record = MigRecord(self.record, BOOT)
        record.open()
        return {entry.placement for entry in record.entries(uuid_of(0))}


@pytest.fixture
def library(nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``pynvml`` of this process on the stand-in; the folder of the machine's files."""
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(nvml_library / "libnvidia-ml.so.1")))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setenv("COTENANT_NVML_STANDIN", str(tmp_path / "box"))
    yield tmp_path


def shape(layout: Placements) -> Shape:
    """As ``Machine.ours`` has it."""
    found = [(TABLE.profile(p.profile), p.start) for p in layout]
    return sorted((p.id, start, (p.compute,)) for p, start in found)


def beside(foreign: Placements, layout: Placements) -> Placements:
    """As much of a layout as there is room for."""
    kept: list[Placement] = []
    for placement in layout:
        if TABLE.why_not([*foreign, *kept, placement]) is None:
            kept.append(placement)
    return tuple(kept)


layouts = st.sampled_from(LAYOUTS)
kinds = st.one_of(
    st.tuples(st.sampled_from((10, 15, 19, 23, 999)), st.just(0)),
    st.tuples(st.sampled_from((10, 999)), st.just(1)),  # "no room" is never said of what was made
)
faults = st.builds(
    lambda call, kind, skip, times: Fault(call, kind[0], skip=skip, times=times, late=kind[1]),
    st.sampled_from((*CHANGES, *CHANGES, *READS)),
    kinds,
    st.integers(0, 6),
    st.integers(1, 2),
)
histories = st.lists(st.tuples(layouts, st.lists(faults, max_size=2)), min_size=1, max_size=4)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(foreign=layouts, few=st.integers(0, 2), divided=st.booleans(), history=histories)
def test_whatever_fails_nothing_is_illegal_leaked_or_taken_from_others(
    library: Path,
    foreign: Placements,
    few: int,
    divided: bool,
    history: list[tuple[Placements, list[Fault]]],
) -> None:
    theirs = foreign[:few]
    machine = Machine(
        library,
        tuple(
            Instance(i + 1, p.profile, p.start, (1,) if divided else ())
            for i, p in enumerate(theirs)
        ),
    )
    for layout, failing in history:
        wanted, before = beside(theirs, layout), sorted(machine.ours())
        done = machine.reconcile(wanted, *failing)
        machine.check()
        if done:
            assert sorted(machine.ours()) == shape(wanted)
            assert machine.recorded() == set(wanted)
        elif len(failing) == 1 and failing[0].times == 1 and not failing[0].late:
            assert sorted(machine.ours()) == before, "one failure is undone"
        assert done or failing
    assert machine.reconcile(()), "the next change starts from whatever is left"
    machine.check()
    assert machine.ours() == []


BIG, SMALL = Placement(0, "3g.20gb"), Placement(4, "1g.5gb")


def test_a_place_that_others_have_is_refused_and_nothing_changes(library: Path) -> None:
    machine = Machine(library, (Instance(1, "3g.20gb", 0, (3,)),))
    assert not machine.reconcile((BIG, SMALL))
    assert machine.ours() == []


def test_instances_that_an_earlier_boot_made_are_not_ours(library: Path) -> None:
    machine = Machine(library)
    assert machine.reconcile((BIG,))
    record = MigRecord(machine.record, "the next boot")
    record.open()
    assert record.entries(uuid_of(0)) == ()


def test_what_was_about_to_be_made_and_was_not_is_forgotten(library: Path) -> None:
    machine = Machine(library)
    MigRecord(machine.record, BOOT).put(uuid_of(0), Entry(BIG))
    assert machine.recorded() == {BIG}
    assert machine.reconcile(()) and machine.recorded() == set()


def test_what_others_made_where_one_of_ours_stood_is_theirs(library: Path) -> None:
    machine = Machine(library)
    assert machine.reconcile((BIG,))
    Box((a100(mig=True, instances=(Instance(5, BIG.profile, BIG.start),)),)).write(machine.box)
    assert not machine.reconcile((BIG,)) and machine.reconcile((SMALL,))
    assert [found[0] for found in instances(machine.box) if found[2] == BIG.start] == [5]


def test_a_record_that_cannot_be_read_stops_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "mig.json"
    path.write_text("{")
    with pytest.raises(EnvironmentProblem):
        MigRecord(path, BOOT).open()


def test_steps_are_timed_in_the_order_in_which_they_were_done(library: Path) -> None:
    machine = Machine(library)
    nvml, ticks = Nvml(), iter(range(100))
    nvml.open()
    control = MigController(nvml.gpu(0), MigRecord(machine.record, BOOT), lambda: next(ticks))
    control.open()
    done = control.reconcile((BIG, SMALL))
    nvml.close()
    assert [timed.step.placement for timed in done] == [BIG, BIG, SMALL, SMALL]
    assert [timed.ns for timed in done] == [1] * 4


PROGRAM = """
import sys
from pathlib import Path
from cotenant.devices.nvidia.mig import MigController
from cotenant.devices.nvidia.migrecord import Entry, MigRecord
from cotenant.devices.nvidia.nvml import Nvml
from cotenant.domain.mig import Placement
nvml, record = Nvml(), MigRecord(Path(sys.argv[1]), "this boot")
nvml.open()
record.open()
control = MigController(nvml.gpu(0), record)
control.open()
control.reconcile((Placement(0, "3g.20gb"), Placement(4, "1g.5gb")))
"""


@pytest.mark.parametrize("call", [*CHANGES[:2], "nvmlGpuInstanceGetInfo"])
def test_a_node_that_is_killed_leaks_nothing(library: Path, nvml_library: Path, call: str) -> None:
    machine = Machine(library)
    add(machine.box, Fault(call, ms=60_000, skip=1 if call in CHANGES else 4))
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(machine.record)],
        env=environment(nvml_library, machine.box),
    )
    try:
        assert until(lambda: len(machine.ours()) >= 1)
        time.sleep(0.2)  # it hangs in the call by now; earlier is as good a moment
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    machine.check()
    assert machine.reconcile((SMALL,)) and machine.ours() == shape((SMALL,))


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
