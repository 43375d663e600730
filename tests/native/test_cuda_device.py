"""A GPU as a device, on stand-ins for the driver: the gate of each job, and who is behind it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cotenant.devices import proctree
from cotenant.domain.device import Launch
from tests import gpu_machine, nvml_standin
from tests.gpu_machine import GpuMachine

PATIENCE_S = 30.0
PATH = "answer = str(d._gates._pages['j'].path) if 'j' in d._gates._pages else ''"
SEATS = "answer = [[s.launches, s.waiting] for s in d._gates.page('j').seats()]"


def until(true: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


class Driven:
    """A device in a process of its own."""

    def __init__(self, gpu: GpuMachine, stats: Path, **env: str) -> None:
        stats.write_bytes(bytes(64))
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("gpu_device.py"))],
            env={**os.environ, **gpu.env(), "STANDIN_STATS": str(stats), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def do(self, line: str) -> Any:
        """The value of ``answer``; fails if the line raises."""
        found = self.say(line)
        assert "is" in found, found
        return found["is"]

    def job(self, words: str, name: str = "j", **owned: str) -> int:
        """Start a job; the pid of its program."""
        said = f"r_{name} = start(d, {name!r}, {words!r}, **{owned!r})"
        return int(self.do(f"{said}; answer = r_{name}.stdout.readline().decode()"))

    def end(self) -> None:
        pids = proctree.descendants(self.process.pid)
        self.process.kill()
        self.process.communicate()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def drive(gpu: GpuMachine, tmp_path: Path) -> Iterator[Callable[..., Driven]]:
    made: list[Driven] = []

    def start(opened: bool = True, **env: str) -> Driven:
        made.append(Driven(gpu, tmp_path / "stats", **env))
        made[-1].do("import time; gates.SURE = 50_000_000")
        if opened:
            made[-1].do("d = CudaDevice(CudaConfig(bound=20_000_000), NODE); d.open()")
        return made[-1]

    yield start
    for driven in made:
        driven.end()


def launched(driven: Driven) -> int:
    return sum(seat[0] for seat in driven.do(SEATS))


def level(driven: Driven) -> str:
    """After looks for long enough."""
    line = "d.refresh(); time.sleep(0.1); d.refresh(); answer = d.facts()['j'].level.name"
    return str(driven.do(line))


# --- the level ------------------------------------------------------------------------------


def test_the_level_is_what_was_tried(drive: Callable[..., Driven]) -> None:
    driven = drive()
    assert driven.do("answer = [d.spec.preempt.name, list(d.spec.limits)]") == ["GATE", []]
    assert driven.do("answer = len(os.listdir(d._gates.folder))") == 0, "the trial left its page"


@pytest.mark.parametrize(
    "before",
    [
        "shim.SHIM = shim.SHIM.with_name('nowhere')",
        "selftest.driver = lambda: None",
        "selftest.trial.__file__ = '/dev/null'",
        "os.environ['LD_PRELOAD'] = ''; gates.SHIM = shim.Path('/nowhere/libcuda.so.1')",
    ],
    ids=["not built", "no driver", "the trial ends", "not preloaded"],
)
def test_without_a_gate_that_works_the_level_is_none_and_that_is_said(
    drive: Callable[..., Driven], before: str
) -> None:
    driven = drive(opened=False)
    driven.do(before)
    driven.do("d = CudaDevice(CudaConfig(), NODE); d.open()")
    level, limits = driven.do("answer = [d.spec.preempt.name, list(d.spec.limits)]")
    assert level == "NONE" and limits
    driven.job("sleep 100")
    driven.do("d.grant('j', PART)")
    refused = driven.say("d.revoke('j', PART)")
    assert refused["raised"] == "DeviceError"
    driven.do("d.detach('j')")


STANDS_STILL = """
gates.PATIENCE, selftest.HELD_S = 500_000_000, 1.0
late, tries = time.monotonic() + {seconds}, []
beat, launch = gates.ControlPage.beat, gates.Gates.launch
gates.ControlPage.beat = lambda page: time.monotonic() < late or beat(page)
gates.Gates.launch = lambda self, job: tries.append(job) or launch(self, job)
"""


@pytest.mark.parametrize(("seconds", "found"), [(1.2, "GATE"), (60, "NONE")])
def test_the_gate_is_tried_again_where_the_node_stood_still_meanwhile(
    drive: Callable[..., Driven], seconds: float, found: str
) -> None:
    driven = drive(opened=False)
    driven.do(f"exec({STANDS_STILL.format(seconds=seconds)!r})")
    driven.do("d = CudaDevice(CudaConfig(), NODE); d.open()")
    level, limits, tries = driven.do("answer = [d.spec.preempt.name, list(d.spec.limits), tries]")
    assert (level, bool(limits)) == (found, found == "NONE")
    assert len(tries) > 1


@pytest.mark.parametrize(
    ("config", "box"),
    [
        ("gpu='7'", nvml_standin.Box(gpus=(nvml_standin.h100(),))),
        ("gpu='0'", nvml_standin.Box()),
        ("memory=1 << 50", nvml_standin.Box(gpus=(nvml_standin.h100(),))),
    ],
    ids=["another GPU", "no GPU", "too much memory"],
)
def test_a_gpu_that_is_not_as_it_is_to_be_is_refused(
    drive: Callable[..., Driven], gpu: GpuMachine, config: str, box: nvml_standin.Box
) -> None:
    gpu.write(box)
    driven = drive(opened=False)
    refused = driven.say(f"d = CudaDevice(CudaConfig({config}), NODE); d.open()")
    assert refused["raised"] in ("EnvironmentProblem", "NvmlError")


OPEN_CHANNELS = (
    "from cotenant.domain.device import PreemptLevel;"
    " d = CudaDevice(CudaConfig(bound=20_000_000, preempt=PreemptLevel.PAUSE), NODE); d.open();"
    " (NODE / 'stats').write_bytes(bytes(64))"  # without what trials left undone
)
EXECUTED, RUNNING = 1, 2
STATS = "answer = list(memoryview((NODE / 'stats').read_bytes()).cast('Q'))"


@pytest.mark.parametrize("rm", ["", "nodisable", "old nodisable", "noslice"])
def test_a_kernel_is_stopped_in_its_middle_where_that_was_seen_to_work(
    drive: Callable[..., Driven], gpu: GpuMachine, rm: str
) -> None:
    driven = drive(opened=False, LD_PRELOAD=str(gpu.rm), STANDIN_RM=rm)
    driven.do(OPEN_CHANNELS)
    assert driven.do("answer = [d.spec.preempt.name, list(d.spec.limits)]") == ["PAUSE", []]
    assert driven.do("answer = len(os.listdir(d._gates.folder))") == 0, "trials left their pages"
    driven.job("$COTENANT_JOB run 1 3 700000")
    driven.do("d.grant('j', PART)")
    until(lambda: driven.do(STATS)[RUNNING])
    driven.do("d.revoke('j', PART)")
    before = driven.do(STATS)[EXECUTED]
    time.sleep(1)
    assert driven.do(STATS)[EXECUTED] == before, "it went on"
    driven.do("d.refresh()")
    assert driven.do("answer = d.facts()['j'].level.name") == "PAUSE"
    driven.do("d.grant('j', PART)")
    assert driven.do("answer = r_j.stdout.readline().decode()") == "3\n"


@pytest.mark.parametrize("rm", ["refuse", "inert", None])
def test_where_kernels_cannot_be_stopped_the_gate_holds_and_why_is_said(
    drive: Callable[..., Driven], gpu: GpuMachine, rm: str | None
) -> None:
    env = {} if rm is None else {"LD_PRELOAD": str(gpu.rm), "STANDIN_RM": rm}
    driven = drive(opened=False, **env)
    driven.do(OPEN_CHANNELS)
    level, limits = driven.do("answer = [d.spec.preempt.name, list(d.spec.limits)]")
    assert level == "GATE" and len(limits) == 1
    driven.job("$COTENANT_JOB run 1 3 100000")
    driven.do("d.grant('j', PART)")
    until(lambda: driven.do(STATS)[RUNNING])
    driven.do("d.revoke('j', PART)")
    assert driven.do(STATS)[RUNNING] == 0
    driven.do("d.grant('j', PART)")
    assert driven.do("answer = r_j.stdout.readline().decode()") == "3\n"


def test_a_job_that_is_stopped_ends_its_kernel_before_it_gives_memory(
    drive: Callable[..., Driven], gpu: GpuMachine
) -> None:
    driven = drive(opened=False, LD_PRELOAD=str(gpu.rm))
    driven.do(OPEN_CHANNELS)
    driven.job("$COTENANT_JOB run 1 2 700000")
    driven.do("d.grant('j', PART)")
    until(lambda: driven.do(STATS)[RUNNING])
    driven.do("d.revoke('j', PART)")
    driven.do("d._gates.evictable = lambda job: 1 << 30")  # as if it had anything to give
    driven.do("d.evict('j', 1 << 30)")
    until(lambda: not driven.do(STATS)[RUNNING])
    driven.do("d.grant('j', PART)")
    assert driven.do("answer = r_j.stdout.readline().decode()") == "2\n"


def test_a_gpu_can_be_named_by_its_uuid(drive: Callable[..., Driven]) -> None:
    driven = drive(opened=False)
    uuid = nvml_standin.uuid_of(0)
    driven.do(f"d = CudaDevice(CudaConfig(gpu={uuid!r}), NODE); d.open()")
    driven.job("sleep 100")
    line = "answer = d.launch(Tenant('w', TenantKind.WORKER), None).fixed"
    assert driven.do(line)["CUDA_VISIBLE_DEVICES"] == uuid


# --- one job --------------------------------------------------------------------------------


def test_a_job_computes_while_it_is_granted_the_gpu_and_not_else(
    drive: Callable[..., Driven],
) -> None:
    driven = drive()
    driven.job("$COTENANT_JOB forever 2 1 100")
    until(lambda: [s for s in driven.do(SEATS) if s[1] == 2])
    assert launched(driven) == 0
    for _ in range(3):
        before = launched(driven)
        driven.do("d.grant('j', PART)")
        until(lambda before=before: launched(driven) > before + 10)
        assert driven.do("answer = d.revoke('j', PART)") > 0
        at = launched(driven)
        time.sleep(0.05)
        assert launched(driven) == at
        assert driven.do("answer = d._gates.page('j').drained()")
    assert driven.do("answer = d.revoke('j', PART)") == 0, "what it does not hold is no error"
    assert level(driven) == "GATE"


def test_what_its_owner_preloads_and_names_stands_behind_ours(
    drive: Callable[..., Driven],
) -> None:
    driven = drive()
    script = 'echo "$LD_PRELOAD|$LD_LIBRARY_PATH|$CUDA_VISIBLE_DEVICES|$COTENANT_GATE" >&2; sleep 9'
    owned = {"LD_LIBRARY_PATH": "/mine", "CUDA_VISIBLE_DEVICES": "5", "COTENANT_GATE": "/other"}
    pid = driven.job(f"sh -c '{script}'", **owned)
    # It is empty for a moment while the program is executed.
    text = until(Path(f"/proc/{pid}/environ").read_text)
    env = dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)
    assert env["LD_LIBRARY_PATH"].endswith(":/mine")
    assert env["CUDA_VISIBLE_DEVICES"] == nvml_standin.uuid_of(0)
    assert env["COTENANT_GATE"] != "/other"


def test_fixed_and_first_variables_are_the_devices() -> None:
    launch = Launch({"A": "1", "B": "1"}, fixed={"C": "1"}, prepend={"P": "/x", "Q": "/x"})
    assert launch.applied({"A": "2", "C": "2", "P": "/mine"}) == {
        "A": "2", "B": "1", "C": "1", "P": "/x:/mine", "Q": "/x"
    }  # fmt: skip


def test_a_kernel_that_is_under_way_is_waited_for(drive: Callable[..., Driven]) -> None:
    driven = drive()
    driven.job("$COTENANT_JOB forever 1 1 500000")
    driven.do("d.grant('j', PART)")
    until(lambda: launched(driven))
    assert driven.do("answer = d.revoke('j', PART)") > 0
    assert driven.do("answer = d._gates.page('j').drained()")


def test_a_job_that_is_killed_is_off_at_once(drive: Callable[..., Driven]) -> None:
    driven = drive()
    pid = driven.job("$COTENANT_JOB forever 1 1 100")
    driven.do("d.grant('j', PART)")
    until(lambda: launched(driven))
    os.kill(pid, signal.SIGKILL)
    driven.do("d.revoke('j', PART); d.refresh()")
    driven.do("r_j.wait(); d.detach('j'); d.detach('j')")
    assert driven.do("answer = len(os.listdir(d._gates.folder))") == 0


def test_a_job_outlives_its_node_and_is_taken_over_by_the_next(
    drive: Callable[..., Driven],
) -> None:
    driven = drive()
    driven.job("$COTENANT_JOB forever 1 1 100")
    root = int(driven.do("answer = r_j.pid"))
    until(lambda: [s for s in driven.do(SEATS) if s[1]])
    driven.process.kill()
    driven.process.wait()
    try:
        again = drive()
        line = f"answer = d.attach(Tenant('j', TenantKind.JOB), {root}).name"
        assert again.do(line) == "GATE"
        again.do("d.grant('j', PART)")
        until(lambda: launched(again) > 100)
        assert again.do("answer = d.revoke('j', PART)") > 0
        at = launched(again)
        time.sleep(0.05)
        assert launched(again) == at
        again.do("d.close()")
        driven = again
        assert driven.do("d.open(); answer = len(os.listdir(d._gates.folder))") == 1
    finally:
        proctree.kill(lambda: [*proctree.descendants(root), root])


def test_a_job_whose_page_is_gone_is_of_level_none_and_pages_of_the_dead_go(
    drive: Callable[..., Driven],
) -> None:
    driven = drive()
    driven.job("$COTENANT_JOB forever 1 1 100")
    root = int(driven.do("answer = r_j.pid"))
    folder = Path(driven.do("answer = str(d._gates.folder)"))
    assert len(list(folder.iterdir())) == 1
    driven.process.kill()
    driven.process.wait()
    proctree.kill(lambda: [*proctree.descendants(root), root])
    again = drive()
    assert not list(folder.iterdir())
    line = f"answer = d.attach(Tenant('j', TenantKind.JOB), {root}).name"
    assert again.do(line) == "NONE"
    assert again.say("d.grant('j', PART); d.revoke('j', PART)")["raised"] == "DeviceError"


def test_a_job_that_is_held_keeps_its_page_and_its_gate_closed(
    drive: Callable[..., Driven],
) -> None:
    driven = drive()
    driven.job("$COTENANT_JOB forever 1 1 100")
    driven.do("d.grant('j', PART)")
    until(lambda: launched(driven))
    driven.do("d.detach('j')")
    at = until(lambda: driven.do("answer = d._gates.page('j').drained()") and launched(driven))
    time.sleep(0.05)
    driven.do("d.refresh()")
    assert launched(driven) == at
    line = "answer = d.attach(Tenant('j', TenantKind.JOB), r_j.pid).name; d.grant('j', PART)"
    assert driven.do(line) == "GATE"
    until(lambda: launched(driven) > at)
    driven.do("d.detach('j'); r_j.kill(); r_j.wait()")
    proctree.kill(lambda: proctree.marked("COTENANT_GATE", driven.do(PATH)))
    until(lambda: driven.do("d.refresh(); answer = len(os.listdir(d._gates.folder))") == 0)


def test_a_job_that_ends_is_not_past_its_gate(
    drive: Callable[..., Driven], gpu: GpuMachine
) -> None:
    driven = drive()
    pid = driven.job("$COTENANT_JOB forever 1 1 100")
    driven.do("d.grant('j', PART)")
    until(lambda: launched(driven))
    gpu.show(pid)
    os.kill(pid, signal.SIGKILL)
    assert level(driven) == "GATE"


# --- who is past the gate -------------------------------------------------------------------


def test_a_process_that_never_attached_makes_its_job_level_none(
    drive: Callable[..., Driven], gpu: GpuMachine
) -> None:
    driven = drive()
    pid = driven.job("env -u COTENANT_GATE $COTENANT_JOB forever 1 1 100")
    assert level(driven) == "GATE"
    gpu.show(pid, memory=3 << 30)
    assert driven.do("d.refresh(); answer = d.facts()['j'].level.name") == "GATE", "one look"
    assert level(driven) == "NONE"
    assert driven.do("answer = d.facts()['j'].memory") == 3 << 30
    gpu.show()
    assert level(driven) == "GATE"


def test_a_statically_linked_program_makes_its_job_level_none(
    drive: Callable[..., Driven], gpu: GpuMachine, tmp_path: Path
) -> None:
    """Nothing can be preloaded into it."""
    source = tmp_path / "static.c"
    source.write_text(
        "#include <stdio.h>\n#include <unistd.h>\n"
        'int main(void) { printf("%d\\n", getpid()); fflush(stdout); pause(); }\n'
    )
    try:
        gpu_machine.compile_c(source, tmp_path / "static", ["-static"])
    except subprocess.CalledProcessError:
        pytest.skip("the C library is not here in its static form")
    driven = drive()
    pid = driven.job(str(tmp_path / "static"))
    gpu.show(pid)
    assert level(driven) == "NONE"


@pytest.mark.parametrize(
    "spoil",
    [
        "p = d._gates.page('j'); os.pwrite(p._fd, b'x' * 8192, 4096)",
        "os.truncate(d._gates.page('j').path, 100)",
    ],
    ids=["scribbled over", "cut short"],
)
def test_who_spoils_its_page_is_past_the_gate(
    drive: Callable[..., Driven], gpu: GpuMachine, spoil: str
) -> None:
    driven = drive()
    pid = driven.job("$COTENANT_JOB forever 1 1 100")
    until(lambda: driven.do(SEATS))
    gpu.show(pid)
    assert level(driven) == "GATE"
    driven.do(spoil)
    assert level(driven) == "NONE"
    driven.do("d.detach('j')")


def test_children_of_a_job_are_its_own(drive: Callable[..., Driven], gpu: GpuMachine) -> None:
    driven = drive()
    driven.job("$COTENANT_JOB fork 100000 100")
    driven.do("d.grant('j', PART)")
    until(lambda: launched(driven))
    pids = until(
        lambda: driven.do("d.refresh(); answer = [s.pid for s in d._gates.page('j').seats()]")
    )
    gpu.show(*pids, memory=1 << 20)
    assert level(driven) == "GATE"
    assert 0 < driven.do("answer = d.facts()['j'].memory") < 1 << 20, "what it allocated"


# --- memory ---------------------------------------------------------------------------------


def asks(driven: Driven, words: str) -> str:
    """A command to ``memory_job`` and its answer, which may have to wait."""
    line = f"r_j.stdin.write({(words + chr(10)).encode()!r}); r_j.stdin.flush()"
    return str(driven.do(f"{line}; answer = r_j.stdout.readline().decode().strip()"))


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """What the driver is to do wrong for the keeper's job."""
    (tmp_path / "faults").touch()
    return tmp_path / "faults"


@pytest.fixture
def keeper(drive: Callable[..., Driven], faults: Path) -> Driven:
    """A job that has 64 MiB, of 100 that it may have."""
    driven = drive(STANDIN_FAULT=str(faults))
    driven.do("gates.AWAY = 300_000_000")
    line = "r_j = start(d, 'j', '$COTENANT_MEMORY_JOB', memory=100 << 20); d.grant('j', PART)"
    driven.do(f"{line}; answer = [r_j.stdout.readline(), r_j.stdout.readline()]")
    assert asks(driven, f"alloc a {64 << 20}") == "0"
    assert asks(driven, "fill a 7") == "0"
    return driven


def test_a_job_has_no_more_memory_than_it_may(keeper: Driven) -> None:
    assert asks(keeper, f"alloc b {64 << 20}") != "0"
    assert asks(keeper, f"alloc b {16 << 20}") == "0"
    assert keeper.do("d.refresh(); answer = d.facts()['j'].memory") >= 80 << 20


@pytest.mark.parametrize("granted", [True, False])
def test_what_is_taken_from_a_job_is_back_when_it_goes_on(keeper: Driven, granted: bool) -> None:
    before = asks(keeper, "sum a")
    held = int(keeper.do("d.refresh(); answer = d.facts()['j'].memory"))
    if not granted:
        keeper.do("d.revoke('j', PART)")
    keeper.do("d.evict('j', 32 << 20)")
    left = int(keeper.do("answer = d.facts()['j'].memory"))
    assert left <= held - (32 << 20)
    if not granted:
        keeper.do("d.grant('j', PART)")
    until(lambda: keeper.do("d.refresh(); answer = d.facts()['j'].memory") == held)
    assert asks(keeper, "sum a") == before


def test_how_fast_memory_moves_is_measured(keeper: Driven) -> None:
    first = "answer = d.spec.eviction == costs.COPYING"
    assert keeper.do(f"from cotenant.domain import costs; {first}")
    keeper.do("d.evict('j', 32 << 20)")
    assert keeper.do("answer = d.spec.eviction.out != costs.COPYING.out")
    assert keeper.do("d.refresh(); answer = d.facts()['j'].away") >= 32 << 20
    until(lambda: keeper.do("d.refresh(); answer = d.facts()['j'].away") == 0)
    until(lambda: keeper.do("d.refresh(); answer = d.spec.eviction.back != costs.COPYING.back"))


def test_a_request_does_not_wait_for_memory_that_goes(keeper: Driven) -> None:
    keeper.do("d.evict('j', 1 << 20)")
    assert keeper.do("answer = d.revoke('j', PART)") > 0
    keeper.do("import time; time.sleep(0.4); d.refresh()")
    assert keeper.do("answer = d._gates.page('j').closed"), "nobody has granted it anything since"


EVICTABLE = "d.refresh(); answer = d.facts()['j'].evictable"
WORD = "answer = d._gates.page('j')._word"


def test_what_a_job_could_give_is_what_is_evictable_of_it(keeper: Driven) -> None:
    assert keeper.do(EVICTABLE) == 64 << 20
    assert asks(keeper, f"async b {16 << 20}") == "0"
    assert keeper.do(EVICTABLE) == 64 << 20, "what a pool has is the driver's"
    keeper.do("d.evict('j', 32 << 20)")
    assert keeper.do(EVICTABLE) <= 32 << 20, "what is away is given already"


def test_the_gate_is_not_shut_for_memory_that_does_not_go(
    drive: Callable[..., Driven],
) -> None:
    driven = drive()
    line = "r_j = start(d, 'j', '$COTENANT_MEMORY_JOB', COTENANT_GATE_MEMORY='plain')"
    driven.do(f"{line}; d.grant('j', PART)")
    driven.do("answer = [r_j.stdout.readline(), r_j.stdout.readline()]")
    assert asks(driven, f"alloc a {64 << 20}") == "0"
    assert driven.do("d.refresh(); answer = d.facts()['j'].memory") >= 64 << 20
    assert driven.do(EVICTABLE) == 0
    word = driven.do(WORD)
    driven.do("d.evict('j', 32 << 20)")
    assert driven.do(WORD) == word


def test_after_an_eviction_that_failed_the_job_is_let_be_for_a_while(
    keeper: Driven, faults: Path
) -> None:
    keeper.do("gates.REST = 300_000_000; gates.EVICT_WITHIN = 100_000_000")
    faults.write_text("stuck 0\n")
    assert keeper.say("d.evict('j', 1 << 20)")["raised"] == "DeviceError"
    assert keeper.do(EVICTABLE) == 0
    word = keeper.do(WORD)
    keeper.do("d.evict('j', 1 << 20)")
    assert keeper.do(WORD) == word
    until(lambda: keeper.do(EVICTABLE) > 0)
    assert keeper.say("d.evict('j', 1 << 20)")["raised"] == "DeviceError"
    assert keeper.do("answer = d._gates._rests['j'][1]") > 300_000_000, "longer each time"


def test_others_go_on_while_memory_is_taken(keeper: Driven, faults: Path) -> None:
    keeper.job("$COTENANT_JOB forever 1 1 100", "k")
    faults.write_text("stuck 0\n")
    keeper.do("import threading; t = threading.Thread(target=d.evict, args=('j', 1 << 20))")
    keeper.do("t.daemon = True; t.start()")
    until(lambda: keeper.do("answer = d._gates.page('j').closed"))
    count = "answer = sum(s.launches for s in d._gates.page('k').seats())"
    for _ in range(3):
        before = keeper.do(count)
        keeper.do("d.refresh(); d.facts(); d.grant('k', PART)")
        until(lambda before=before: keeper.do(count) > before)
        assert keeper.do("answer = d.revoke('k', PART)") > 0
    assert keeper.do("answer = t.is_alive()")


# --- a driver in trouble --------------------------------------------------------------------


def test_gates_work_while_the_driver_does_not_say_who_is_there(
    drive: Callable[..., Driven], gpu: GpuMachine
) -> None:
    driven = drive()
    driven.job("$COTENANT_JOB forever 1 1 100")
    driven.do("d.grant('j', PART)")
    until(lambda: launched(driven))
    gpu.show(faults=(nvml_standin.Fault("nvmlDeviceGetComputeRunningProcesses_v3", 15),))
    assert driven.say("d.refresh()")["raised"] == "NvmlError"
    assert driven.do("answer = d.facts()['j'].level.name") == "GATE"
    driven.do("d.revoke('j', PART)")
    gpu.show()
    driven.do("d.refresh()")
