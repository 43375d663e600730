"""Device memory behind the gate, on a stand-in for the driver: what goes out comes back."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotenant.devices.nvidia import page as layout
from cotenant.devices.nvidia.page import Evicted, Memory
from cotenant.domain.errors import DeviceError
from cotenant.domain.units import S
from tests.gpu_machine import compile_c

from .conftest import HERE, Bench

MB = 1 << 20
OUT_OF_MEMORY = "2"


class Job:
    """memory_job.c, told what to do."""

    def __init__(self, bench: Bench, program: Path, **env: str) -> None:
        self.bench = bench
        self.process = bench.start([str(program)], bench.env(**env))
        assert self.hear() == "0"

    def say(self, *words: object) -> None:
        """Without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def answered(self) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def hear(self) -> str:
        assert self.process.stdout is not None
        self.bench.until(self.answered, 60)
        return self.process.stdout.readline().strip()

    def do(self, *words: object) -> str:
        self.say(*words)
        return self.hear()

    def did(self, *words: object) -> None:
        assert self.do(*words) == "0", words

    @property
    def memory(self) -> Memory:
        return next(s for s in self.bench.page.seats() if s.pid == self.process.pid).memory

    @property
    def rows(self) -> list[layout.Allocation]:
        return self.bench.page.allocations(self.process.pid)


Start = Callable[..., Job]


@pytest.fixture(scope="session")
def memory_program(built: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("memory") / "job"
    compile_c(HERE / "memory_job.c", target, [])
    return target


@pytest.fixture
def start(bench: Bench, memory_program: Path) -> Start:
    return lambda **env: Job(bench, memory_program, **env)


def shut(bench: Bench) -> None:
    bench.page.close_gate()
    assert bench.page.wait_drained(20 * S)


def evict(bench: Bench, wanted: int) -> Evicted:
    found = bench.page.wait_evicted(bench.page.evict(wanted), 20 * S)
    assert found is not None
    return found


# --- every byte comes back --------------------------------------------------------------------


def test_what_is_evicted_leaves_the_device_and_comes_back_as_it_was(
    bench: Bench, start: Start
) -> None:
    job = start()
    job.did("alloc", "a", 100 * MB)
    job.did("alloc", "b", 8 * MB)
    job.did("fill", "a", 1)
    job.did("fill", "b", 2)
    before = [job.do("sum", name) for name in "ab"]
    on_device = bench.stats()["memory"]
    shut(bench)
    assert evict(bench, 1 << 40) == Evicted(108 * MB, job.memory.moved_ns, ()), (
        "all that could go went"
    )
    assert bench.stats()["memory"] == on_device - 108 * MB
    assert job.memory.evicted == 108 * MB
    assert job.memory.resident == 0
    bench.page.open_gate()
    assert [job.do("sum", name) for name in "ab"] == before
    assert bench.stats()["memory"] == on_device
    assert job.memory.evicted == 0


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("alloc"), st.sampled_from("abcdef"), st.integers(1, 12 * MB)),
        st.tuples(st.just("free"), st.sampled_from("abcdef"), st.just(0)),
        st.tuples(st.just("fill"), st.sampled_from("abcdef"), st.integers(1, 99)),
        st.tuples(st.just("evict"), st.just(""), st.integers(1, 30 * MB)),
        st.tuples(st.just("restore"), st.just(""), st.just(0)),
        st.tuples(st.just("open"), st.just(""), st.just(0)),
        st.tuples(st.just("launch"), st.just("2"), st.just(0)),
    ),
    min_size=4,
    max_size=25,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS)
def test_random_histories_keep_every_byte(bench: Bench, start: Start, steps: object) -> None:
    bench.page.open_gate()
    job = start(STANDIN_MEMORY=str(1 << 30))
    sums: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for verb, name, value in steps:  # type: ignore[attr-defined]
        if verb in ("evict", "restore"):
            shut(bench)
            before = job.memory
            if verb == "restore":
                number = bench.page.restore()
                assert bench.page.wait_restored(number, 20 * S) is not None
                assert job.memory.evicted == 0
            else:
                evict(bench, value)
                wanted = min(value, before.evictable)
                assert job.memory.evicted >= before.evicted + wanted
            assert job.memory.held == before.held
        elif verb == "free" and name in sizes:
            job.did("free", name)  # passes a closed gate
            del sizes[name], sums[name]
        elif verb != "free":
            bench.page.open_gate()
            if verb == "alloc" and name not in sizes:
                job.did("alloc", name, value)
                sizes[name], sums[name] = value, ""
            elif verb == "fill" and name in sizes:
                job.did("fill", name, value)
                sums[name] = job.do("sum", name)
            elif verb == "launch":
                job.did("launch", name)
    bench.page.open_gate()
    for name, expected in sums.items():
        assert not expected or job.do("sum", name) == expected
    for name in sums:
        job.did("free", name)
    assert job.memory.held == job.memory.evictable == job.memory.evicted == 0
    assert job.rows == []
    job.process.kill()
    job.process.wait()


def test_a_caller_that_comes_meanwhile_waits_and_sees_its_data(bench: Bench, start: Start) -> None:
    """Large calls and small ones, launches, and questions about addresses."""
    job = start()
    job.did("alloc", "a", 4 * MB)
    job.did("fill", "a", 7)
    expected = job.do("sum", "a")
    for words in (["sum", "a"], ["poke", "a", 5], ["launch", 3], ["ask", "a"], ["alloc", "b", 9]):
        shut(bench)
        evict(bench, 4 * MB)
        job.say(*words)
        bench.until(lambda: bench.page.seats()[0].waiting == 1)
        assert not job.answered()
        bench.page.open_gate()
        answer = job.hear()
        assert answer.split()[0] == "0"
        if words[0] == "sum":
            assert answer == expected
    assert job.memory.evicted == 0


def test_an_evicted_allocation_can_be_freed_behind_the_closed_gate(
    bench: Bench, start: Start
) -> None:
    job = start()
    job.did("alloc", "a", 4 * MB)
    shut(bench)
    evict(bench, 4 * MB)
    job.did("free", "a")
    assert job.memory.held == job.memory.evicted == 0
    bench.page.open_gate()
    job.did("launch", 2)


def test_the_node_may_ask_for_it_back_before_it_opens(bench: Bench, start: Start) -> None:
    job = start()
    job.did("alloc", "a", 6 * MB)
    shut(bench)
    evict(bench, 6 * MB)
    back = bench.page.wait_restored(bench.page.restore(), 20 * S)
    assert back is not None and back.moved == 6 * MB and not back.errors
    assert job.memory.evicted == 0
    assert bench.page.closed


def test_only_behind_a_closed_gate(bench: Bench, start: Start) -> None:
    start().did("alloc", "a", 4 * MB)
    with pytest.raises(DeviceError):
        bench.page.evict(MB)


def test_an_opened_gate_takes_the_order_back(bench: Bench, start: Start) -> None:
    job = start()
    job.did("alloc", "a", 4 * MB)
    for _ in range(20):
        bench.page.close_gate()
        bench.page.evict(4 * MB)
        bench.page.open_gate()
        job.did("launch", 1)
        job.did("poke", "a", 1)
    bench.until(lambda: job.memory.evicted == 0)


# --- what goes --------------------------------------------------------------------------------


def test_the_untouched_goes_first_then_the_largest(bench: Bench, start: Start) -> None:
    job = start()
    job.did("alloc", "a", 16 * MB)
    job.did("alloc", "b", 32 * MB)
    job.did("launch", 3)
    job.did("alloc", "c", 4 * MB)
    shut(bench)
    gone = []
    for _ in range(3):
        evict(bench, 1)
        gone.append({row.bytes // MB for row in job.rows if row.evicted})
    assert gone == [{4}, {4, 32}, {4, 32, 16}]
    assert {row.bytes // MB: row.last_launch is None for row in job.rows} == {
        4: True,
        16: False,
        32: False,
    }


def test_the_table_says_what_cannot_go_and_why(bench: Bench, start: Start) -> None:
    job = start()
    for name, kind in zip(
        "abcdef", ["alloc", "managed", "async", "own", "array", "pitch"], strict=True
    ):
        job.did(kind, name, 4 * MB)
    job.did("alloc", "s", 1000)
    job.did("alloc", "r", 6 * MB)
    job.did("retain", "r")
    job.did("alloc", "x", 6 * MB)
    job.did("dmabuf", "x")
    assert sorted(row.reason for row in job.rows) == [
        "",
        "array",
        "managed",
        "own",
        "plain",
        "pooled",
        "registered",
        "registered",
    ]
    memory = job.memory
    assert memory.evictable == 4 * MB
    assert memory.small == 1000
    assert memory.pinned == 32 * MB
    assert memory.held == 36 * MB + 1000
    shut(bench)
    assert evict(bench, 1 << 40).moved == 4 * MB
    bench.page.open_gate()
    for name in "abcdefsx":
        job.did("free", name)
    assert job.memory.held == 6 * MB


def test_a_job_that_exports_memory_gets_the_drivers_own_kind_from_then_on(
    bench: Bench, start: Start
) -> None:
    job = start()
    job.did("alloc", "a", 4 * MB)
    assert job.do("ipc", "a") != "0"
    job.did("alloc", "b", 4 * MB)
    assert sorted(row.reason for row in job.rows) == ["", "plain"]
    job.did("ipc", "b")
    assert sorted(row.reason for row in job.rows) == ["", "exported"]


def test_a_job_can_be_told_to_keep_the_drivers_own_kind(bench: Bench, start: Start) -> None:
    job = start(COTENANT_GATE_MEMORY="plain")
    job.did("alloc", "a", 4 * MB)
    assert [row.reason for row in job.rows] == ["plain"]
    shut(bench)
    assert evict(bench, MB).moved == 0


def test_beyond_the_tables_rows_memory_is_counted_and_stays(bench: Bench, start: Start) -> None:
    job = start(STANDIN_MEMORY=str(1 << 40))
    for _ in range(layout.ROWS + 5):
        job.did("alloc", "a", 2 * MB)
    memory = job.memory
    assert memory.held == (layout.ROWS + 5) * 2 * MB
    assert memory.unlisted == 10 * MB
    assert memory.evictable == layout.ROWS * 2 * MB
    assert len(job.rows) == layout.ROWS


def test_answers_about_addresses_are_those_of_plain_memory(start: Start) -> None:
    job = start()
    job.did("alloc", "a", 5 * MB + 3)
    size = 5 * MB + 3
    assert job.do("ask", "a") == f"0 0 {size} {size} 1"


def test_a_peer_keeps_its_access(bench: Bench, start: Start) -> None:
    job = start()
    job.did("context", 1)
    job.did("alloc", "a", 4 * MB)
    assert job.do("access", "a") == "0"
    job.did("peer")
    assert job.do("access", "a") == "3"
    shut(bench)
    assert evict(bench, MB).moved == 4 * MB
    bench.page.open_gate()
    assert job.do("access", "a") == "3"


def test_a_full_pool_keeps_the_rest_on_the_device(
    bench: Bench, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.page.close()
    bench.page = layout.ControlPage(bench.page.path, patience_ns=1 * S, pool_bytes=20 * MB)
    bench.page.open()
    job = start()
    sums = []
    for name in "abc":
        job.did("alloc", name, 8 * MB)
        job.did("fill", name, 3)
        sums.append(job.do("sum", name))
    shut(bench)
    assert evict(bench, 24 * MB).moved == 16 * MB
    assert job.memory.evictable == 8 * MB
    bench.page.open_gate()
    assert [job.do("sum", name) for name in "abc"] == sums


# --- the quota --------------------------------------------------------------------------------


def test_the_quota_refuses_inside_the_job_and_says_whose_limit_it_was(
    bench: Bench, memory_program: Path, tmp_path: Path
) -> None:
    bench.page.set_quota(20 * MB)
    said = tmp_path / "said"
    command = ["sh", "-c", f"exec {memory_program} 2>{said}"]
    process = bench.start(command, bench.env())
    job = Job.__new__(Job)
    job.bench, job.process = bench, process
    assert job.hear() == "0"
    job.did("alloc", "a", 16 * MB)
    assert job.do("info") == "4 20"
    for kind in ("alloc", "managed", "async", "own", "array", "pitch"):
        assert job.do(kind, "b", 8 * MB) == OUT_OF_MEMORY
    assert job.memory.refusals == 6
    assert job.memory.held == 16 * MB
    line = said.read_text()
    assert 1 <= line.count("\n") <= 6
    assert "20 MiB" in line
    job.did("free", "a")
    job.did("alloc", "b", 8 * MB)


def test_what_a_pool_keeps_counts_and_is_given_back_before_a_refusal(
    bench: Bench, start: Start
) -> None:
    bench.page.set_quota(20 * MB)
    job = start(STANDIN_POOL_KEEPS="1")
    job.did("async", "a", 12 * MB)
    job.did("free", "a")
    assert job.memory.held == bench.stats()["memory"] == 12 * MB
    job.did("async", "a", 16 * MB)
    assert job.memory.held == 16 * MB
    job.did("free", "a")
    job.did("alloc", "b", 8 * MB)
    assert job.memory.held == bench.stats()["memory"] == 8 * MB
    assert job.memory.refusals == 0


def test_a_full_card_is_not_the_jobs_limit(
    bench: Bench, memory_program: Path, start: Start
) -> None:
    bench.page.set_quota(1 << 40)
    job = start(STANDIN_MEMORY=str(16 * MB))
    job.did("alloc", "a", 12 * MB)
    assert job.do("alloc", "b", 12 * MB) == OUT_OF_MEMORY
    assert job.memory.refusals == 0
    assert job.memory.held == 12 * MB
    assert job.memory.claimed == 0


def test_the_quota_is_never_exceeded_by_threads_and_processes(bench: Bench, start: Start) -> None:
    quota = 40 * MB
    bench.page.set_quota(quota)
    jobs = [start() for _ in range(3)]
    for job in jobs:
        job.say("threads", 4, 60, 8 * MB)
    peak = 0
    while not all(job.answered() for job in jobs):
        bench.page.beat()
        peak = max(peak, bench.stats()["memory"])
        time.sleep(0.001)
    answers = [job.hear().split() for job in jobs]
    assert peak <= quota
    assert bench.stats()["peak"] <= quota
    assert sum(int(refused) for refused, _ in answers) > 0
    assert all(int(most) > 0 for _, most in answers)
    assert all(job.memory.held == job.memory.claimed == job.memory.freeing == 0 for job in jobs)


def test_a_dead_process_no_longer_counts(bench: Bench, start: Start) -> None:
    bench.page.set_quota(10 * MB)
    first = start()
    first.did("alloc", "a", 8 * MB)
    second = start()
    assert second.do("alloc", "a", 8 * MB) == OUT_OF_MEMORY
    first.process.kill()
    first.process.wait()
    second.did("alloc", "a", 8 * MB)


# --- when something is wrong ------------------------------------------------------------------


def test_no_room_to_come_back_keeps_callers_waiting(
    bench: Bench, start: Start, tmp_path: Path
) -> None:
    faults = tmp_path / "faults"
    faults.write_text("")
    job = start(STANDIN_FAULT=str(faults))
    job.did("alloc", "a", 4 * MB)
    job.did("fill", "a", 9)
    expected = job.do("sum", "a")
    shut(bench)
    evict(bench, 4 * MB)
    faults.write_text("create 0 2\n")
    bench.page.open_gate()
    job.say("sum", "a")
    bench.until(lambda: job.memory.error == 2)
    assert job.memory.state in (layout.AWAY, layout.RETURNING)
    time.sleep(0.05)
    assert not job.answered()
    faults.write_text("")
    assert job.hear() == expected
    bench.until(lambda: job.memory.error == 0)


def test_an_evict_whose_copy_hangs_is_not_answered(
    bench: Bench, start: Start, tmp_path: Path
) -> None:
    faults = tmp_path / "faults"
    faults.write_text("")
    job = start(STANDIN_FAULT=str(faults))
    job.did("alloc", "a", 4 * MB)
    shut(bench)
    faults.write_text("stuck 0\n")
    assert bench.page.wait_evicted(bench.page.evict(4 * MB), S // 5) is None
    assert job.memory.evicted == 0


@pytest.mark.parametrize("fault", ["create 0 700", "lost"])
def test_a_broken_device_lets_callers_in_to_see_it(
    bench: Bench, start: Start, tmp_path: Path, fault: str
) -> None:
    faults = tmp_path / "faults"
    faults.write_text("")
    job = start(STANDIN_FAULT=str(faults))
    job.did("alloc", "a", 4 * MB)
    job.did("launch", 1)
    shut(bench)
    evict(bench, 4 * MB)
    faults.write_text(f"{fault}\nlost\n")
    bench.page.open_gate()
    assert job.do("launch", 1) != "0"
    assert bench.page.seats()[0].flags & layout.FAULTED


def test_a_broken_context_is_not_evicted(bench: Bench, start: Start, tmp_path: Path) -> None:
    faults = tmp_path / "faults"
    faults.write_text("")
    job = start(STANDIN_FAULT=str(faults))
    job.did("alloc", "a", 4 * MB)
    shut(bench)
    faults.write_text("lost\n")
    found = evict(bench, 4 * MB)
    assert found.moved == 0 and found.errors
    assert job.memory.evicted == 0


def test_a_job_killed_while_it_moves_leaves_its_seat(bench: Bench, start: Start) -> None:
    job = start()
    job.did("alloc", "a", 200 * MB)
    shut(bench)
    number = bench.page.evict(200 * MB)
    bench.until(lambda: job.memory.state != layout.HERE)
    job.process.send_signal(signal.SIGKILL)
    job.process.wait()
    assert bench.page.seats() == []
    assert bench.page.answer(number) == Evicted(0, 0, ())
    bench.page.open_gate()
    other = start(STANDIN_MEMORY=str(1 << 40))
    other.did("alloc", "a", 4 * MB)
    shut(bench)
    assert evict(bench, 4 * MB).moved == 4 * MB


def test_a_dead_node_gives_it_back(bench: Bench, start: Start) -> None:
    job = start()
    job.did("alloc", "a", 4 * MB)
    job.did("fill", "a", 4)
    expected = job.do("sum", "a")
    shut(bench)
    evict(bench, 4 * MB)
    job.say("sum", "a")
    # Nobody beats from here on.
    assert job.process.stdout is not None
    assert job.process.stdout.readline().strip() == expected
    assert job.memory.evicted == 0


def test_a_child_starts_with_nothing(bench: Bench, start: Start) -> None:
    job = start()
    job.did("alloc", "a", 4 * MB)
    job.did("fill", "a", 4)
    expected = job.do("sum", "a")
    job.say("fork", 6 * MB)
    bench.until(lambda: sorted(s.memory.held for s in bench.page.seats()) == [4 * MB, 6 * MB])
    assert job.hear() == "0"
    shut(bench)
    evict(bench, 4 * MB)
    bench.page.open_gate()
    assert job.do("sum", "a") == expected


def test_what_is_evicted_is_not_given_to_a_child(bench: Bench, start: Start) -> None:
    job = start()
    job.did("alloc", "a", 4 * MB)
    job.did("fill", "a", 4)
    expected = job.do("sum", "a")
    shut(bench)
    evict(bench, 4 * MB)
    job.say("fork", 6 * MB)
    bench.until(lambda: len(bench.page.seats()) == 2)
    bench.page.open_gate()
    assert job.hear() == "0"
    assert job.do("sum", "a") == expected


def test_memory_goes_with_its_context(bench: Bench, start: Start) -> None:
    job = start()
    job.did("alloc", "p", 4 * MB)
    job.did("context")
    for name, size in (("a", 4 * MB), ("b", 1000)):
        job.did("alloc", name, size)
    shut(bench)
    evict(bench, 1)
    bench.page.open_gate()
    job.did("launch", 1)
    job.did("destroy")
    assert job.memory.held == 4 * MB
    assert bench.stats()["memory"] == 4 * MB
    job.did("reset")
    assert job.memory.held == 0
    assert bench.stats()["memory"] == 0
    assert job.rows == []


def test_nothing_is_evicted_under_a_capture(bench: Bench, start: Start) -> None:
    job = start()
    job.did("alloc", "a", 4 * MB)
    job.did("begin")
    bench.page.close_gate()
    found = evict(bench, 4 * MB)
    assert found.moved == 0 and found.errors
    bench.page.open_gate()
    job.did("end")
    shut(bench)
    assert evict(bench, 4 * MB).moved == 4 * MB


def test_a_capture_begins_when_everything_is_back(bench: Bench, start: Start) -> None:
    job = start()
    job.did("alloc", "a", 4 * MB)
    shut(bench)
    evict(bench, 4 * MB)
    job.say("begin")
    bench.until(lambda: bench.page.seats()[0].waiting == 1)
    bench.page.open_gate()
    assert job.hear() == "0"
    assert job.memory.evicted == 0


def test_what_is_freed_under_a_capture_goes_after_it(bench: Bench, start: Start) -> None:
    job = start()
    job.did("alloc", "a", 4 * MB)
    job.did("begin")
    job.did("free", "a")
    assert job.memory.held == 4 * MB
    job.did("end")
    job.did("alloc", "b", 1000)
    assert job.memory.held == 1000


def test_a_job_at_work_does_not_notice(bench: Bench, start: Start) -> None:
    """Whoever touches memory that is away would crash the stand-in."""
    jobs = [start() for _ in range(2)]
    for job in jobs:
        job.did("alloc", "a", 4 * MB)
        job.did("alloc", "b", 2 * MB)
        job.say("work", "a", 1500)
    moved = rounds = 0
    while not all(job.answered() for job in jobs) and rounds < 60:
        bench.page.close_gate()
        number = bench.page.evict(12 * MB)
        if rounds % 3:
            found = bench.page.wait_evicted(number, 20 * S)
            assert found is not None and not found.errors
            moved += found.moved
        bench.page.open_gate()
        time.sleep(0.002)
        rounds += 1
    assert [job.hear() for job in jobs] == ["0 1500 0"] * 2
    assert moved > 0


def test_several_processes_share_an_order(bench: Bench, start: Start) -> None:
    jobs = [start() for _ in range(3)]
    sums = []
    for number, job in enumerate(jobs):
        job.did("alloc", "a", (4 + 4 * number) * MB)
        job.did("fill", "a", number)
        sums.append(job.do("sum", "a"))
    shut(bench)
    assert evict(bench, 14 * MB).moved == 20 * MB
    assert [job.memory.evicted // MB for job in jobs] == [0, 8, 12]
    bench.page.open_gate()
    assert [job.do("sum", "a") for job in jobs] == sums


def test_a_table_scribbled_over_does_not_hurt_the_node(bench: Bench, start: Start) -> None:
    job = start()
    job.did("alloc", "a", 4 * MB)
    os.kill(job.process.pid, signal.SIGSTOP)
    at = layout.HEAD_BYTES + layout.ROWS_AT
    with bench.page.path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * (layout.ROWS * layout.ROW.size))
    assert job.rows == []
    with bench.page.path.open("r+b") as file:
        file.seek(layout.HEAD_BYTES + layout.SEAT.size - 112)
        file.write(b"\x7f" * 112)
    assert bench.page.seats() == []


# --- real bindings ----------------------------------------------------------------------------


def test_real_bindings_keep_their_data(bench: Bench, gpu_python: None) -> None:
    code = """
from cuda.bindings import driver as d
import sys
def ok(r):
    assert int(r[0]) == 0, r
    return r[1] if len(r) == 2 else r[1:]
ok(d.cuInit(0)); ok(d.cuCtxSetCurrent(ok(d.cuDevicePrimaryCtxRetain(0))))
n = (1 << 22) + 5
at = ok(d.cuMemAlloc(n)); data = bytes(i % 251 for i in range(n))
ok(d.cuMemcpyHtoD(at, data, n))
base, size = ok(d.cuMemGetAddressRange(at)); assert (int(base), size) == (int(at), n)
print("ready", flush=True); sys.stdin.readline()
back = bytearray(n); ok(d.cuMemcpyDtoH(back, at, n)); assert bytes(back) == data
pooled = ok(d.cuMemAllocAsync(n, 0)); ok(d.cuMemFreeAsync(pooled, 0))
ok(d.cuMemFree(at)); print(ok(d.cuMemGetInfo())[1])
"""
    job = bench.python(code)
    assert job.stdout is not None and job.stdin is not None
    assert job.stdout.readline() == "ready\n"
    shut(bench)
    assert evict(bench, MB).moved == 6 * MB
    job.stdin.write("\n")
    job.stdin.flush()
    bench.until(lambda: bench.page.seats()[0].waiting)
    bench.page.open_gate()
    assert bench.finish(job) == str(1 << 28)
