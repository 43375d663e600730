"""The launch gate on a stand-in for the driver: what it promises node and job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotenant.devices.nvidia import page as layout
from cotenant.domain.units import S
from tests.gpu_machine import NATIVE, compile_c

from .conftest import HERE, Bench


def close_and_drain(bench: Bench) -> None:
    bench.page.close_gate()
    assert bench.page.wait_drained(20 * S)


def stands_still(bench: Bench) -> bool:
    """Nothing is on the device, and nothing comes in the next moment."""
    before = bench.stats()
    time.sleep(0.03)
    after = bench.stats()
    if any(before[what] != after[what] for what in ("launched", "executed", "running")):
        return False
    return after["launched"] == after["executed"] and not after["running"]


# --- nothing is lost, a closed gate is quiet --------------------------------------------------


@pytest.mark.parametrize("verb", ["run 3", "threads 3", "destroy"])
def test_every_launch_is_executed_once_whatever_the_gate_does(bench: Bench, verb: str) -> None:
    job = bench.job(*verb.split(), 300, 200)
    for _ in range(8):
        bench.until(lambda: bench.page.seats() or job.poll() is not None)
        close_and_drain(bench)
        assert stands_still(bench)
        bench.page.open_gate()
        time.sleep(0.01)
    streams = 3 if "3" in verb else 1
    assert bench.finish(job) == str(300 * streams)
    assert bench.stats()["executed"] == 300 * streams


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    steps=st.lists(st.sampled_from(["close", "open", "drain", "pause"]), max_size=12),
    streams=st.integers(1, 3),
    us=st.sampled_from([10, 300, 3000]),
)
def test_random_histories_lose_nothing(
    bench: Bench, steps: list[str], streams: int, us: int
) -> None:
    bench.page.open_gate()
    job = bench.job("run", streams, 40, us)
    for step in steps:
        if step == "close":
            bench.page.close_gate()
        elif step == "open":
            bench.page.open_gate()
        elif step == "pause":
            time.sleep(0.01)
        elif bench.page.closed:
            assert bench.page.wait_drained(20 * S)
            assert stands_still(bench)
    bench.page.open_gate()
    assert bench.finish(job) == str(40 * streams)


def test_callers_wait_before_the_call(bench: Bench) -> None:
    bench.page.close_gate()
    job = bench.job("run", 2, 10, 100)
    bench.until(lambda: [seat for seat in bench.page.seats() if seat.waiting == 2])
    assert bench.stats()["launched"] == 0
    assert bench.page.drained()
    bench.page.open_gate()
    assert bench.finish(job) == "20"


def test_what_is_in_flight_is_bounded(bench: Bench) -> None:
    """Of kernels of a known time, no more are unexecuted than the bound has room for."""
    bench.job("forever", 2, 1, 2000)
    bench.until(lambda: bench.stats()["executed"] > 50)
    seen = []
    for _ in range(100):
        bench.page.beat()
        stats = bench.stats()
        seen.append(stats["launched"] - stats["executed"])
        time.sleep(0.003)
    # 20 ms are ten kernels of 2 ms; a read of the counters is not atomic.
    assert sorted(seen)[90] <= 11
    assert max(seen) > 0


def test_closing_takes_as_long_as_the_bound_lets_it(bench: Bench) -> None:
    """At the moment of closing there is no more on the device than the bound, ever."""
    bench.job("forever", 1, 1, 2000)
    bench.until(lambda: bench.stats()["executed"] > 50)
    left = []
    for _ in range(10):
        bench.page.close_gate()
        at_closing = bench.stats()["executed"]
        assert bench.page.wait_drained(20 * S)
        left.append(bench.stats()["executed"] - at_closing)
        bench.page.open_gate()
        time.sleep(0.03)
    assert sorted(left)[-2] <= 12


def test_small_copies_pass_and_large_ones_wait(bench: Bench, gpu_python: None) -> None:
    code = """
from cuda.bindings import driver as d
import sys
def ok(r):
    assert int(r[0]) == 0, r
    return r[1] if len(r) == 2 else None
ok(d.cuInit(0)); ok(d.cuCtxSetCurrent(ok(d.cuDevicePrimaryCtxRetain(0))))
at = ok(d.cuMemAlloc(1 << 22)); stream = ok(d.cuStreamCreate(0))
print("ready", flush=True); sys.stdin.readline()
ok(d.cuMemcpyHtoD(at, b"x" * 100, 100)); print("small", flush=True)
data = bytes(1 << 22)
ok(d.cuMemcpyHtoDAsync(at, data, 1 << 22, stream))
ok(d.cuMemsetD8Async(at, 1, 1 << 22, stream))
ok(d.cuStreamSynchronize(stream)); print("large", flush=True); sys.stdin.readline()
"""
    job = bench.python(code)
    assert job.stdout is not None and job.stdin is not None
    assert job.stdout.readline() == "ready\n"
    close_and_drain(bench)
    job.stdin.write("\n")
    job.stdin.flush()
    assert job.stdout.readline() == "small\n"
    bench.until(lambda: bench.page.seats()[0].waiting == 1)
    assert bench.page.seats()[0].copies == 0
    bench.page.open_gate()
    assert job.stdout.readline() == "large\n"
    assert bench.page.seats()[0].copies == 2


def test_where_streams_cannot_write_host_functions_do(bench: Bench) -> None:
    job = bench.job("run", 2, 200, 200, STANDIN_NO_WRITES="1")
    bench.until(lambda: bench.stats()["executed"] > 20)
    close_and_drain(bench)
    assert stands_still(bench)
    assert bench.page.seats()[0].flags & layout.HOST_MARKS
    bench.page.open_gate()
    assert bench.finish(job) == "400"
    assert bench.stats()["callbacks"] > 0


def test_a_capturing_stream_is_left_alone(bench: Bench) -> None:
    """Its launches pass the closed gate, nothing of ours gets into the graph; the graph waits."""
    job = bench.job("capture", 5, 100)
    assert job.stdin is not None and job.stdout is not None
    assert job.stdout.readline() == "capturing\n"
    bench.page.close_gate()
    time.sleep(0.05)
    job.stdin.write("\n")
    job.stdin.flush()
    assert job.stdout.readline() == "captured\n"
    bench.until(lambda: bench.page.seats()[0].waiting == 1)
    assert bench.page.seats()[0].blocks == 1
    assert not bench.page.seats()[0].flags & layout.ORPHANED
    assert bench.page.wait_drained(20 * S)
    bench.page.open_gate()
    assert bench.finish(job) == "26"
    assert bench.stats()["in_capture"] == 0


def test_what_is_launched_beside_a_capture_drains(bench: Bench) -> None:
    """Also on the default stream of a thread that waits at the gate."""
    job = bench.job("beside", 5, 300)
    assert job.stdout is not None and job.stdin is not None
    assert job.stdout.readline() == "capturing\n"
    for _ in range(5):
        executed = bench.stats()["executed"]
        bench.until(lambda before=executed: bench.stats()["executed"] > before + 3)
        close_and_drain(bench)
        assert stands_still(bench)
        bench.page.open_gate()
    job.stdin.write("\n")
    job.stdin.flush()
    assert bench.finish(job) == "ended"
    assert bench.stats()["in_capture"] == 0


# --- either side may die ----------------------------------------------------------------------


def test_a_killed_job_leaves_its_seat(bench: Bench) -> None:
    job = bench.job("forever", 2, 1, 500)
    bench.until(lambda: bench.stats()["executed"] > 10)
    bench.page.close_gate()
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert bench.page.seats() == []
    assert bench.page.drained()
    assert not bench.page.attached(job.pid)
    bench.page.open_gate()
    assert bench.finish(bench.job("run", 1, 10, 10)) == "10"


def test_more_processes_come_and_go_than_there_are_seats(bench: Bench) -> None:
    for _ in range(layout.SEATS + 3):
        process = bench.job("run", 1, 1, 1)
        assert bench.finish(process) == "1"
    assert bench.page.seats() == []


def test_processes_that_nobody_reaps_leave_their_seats(bench: Bench) -> None:
    for _ in range(layout.SEATS + 1):
        process = bench.job("run", 1, 1, 1)
        assert process.stdout is not None and process.stdout.read() == "1\n"
    bench.job("forever", 1, 1, 500)
    bench.until(bench.page.seats)


def test_a_context_that_ends_is_left_alone(bench: Bench) -> None:
    """The stand-in ends whoever comes back to one."""
    job = bench.job("contexts", 40, 20000)
    while job.poll() is None:
        bench.page.close_gate()
        time.sleep(0.01)
        bench.page.open_gate()
        time.sleep(0.002)
        bench.page.beat()
    assert bench.finish(job) == "40"


def test_a_dead_node_opens_the_gate(bench: Bench) -> None:
    bench.page.close_gate()
    job = bench.job("run", 1, 20, 100)
    # Nobody beats from here on.
    assert job.wait(30) == 0
    assert bench.stats()["executed"] == 20


def test_a_context_that_broke_is_drained(bench: Bench, gpu_python: None, tmp_path: Path) -> None:
    """What was on its streams will never be reached; the node must not wait for it."""
    faults = tmp_path / "faults"
    faults.write_text("run 3 700\n")
    code = (HERE / "bindings_job.py").read_text().replace("LAUNCHES = 200", "LAUNCHES = 8")
    code = code.replace("ok(driver.cuStreamSynchronize", "input()\nok(driver.cuStreamSynchronize")
    code = code.replace("count_300", "count_50000")
    job = bench.python(code, STANDIN_FAULT=str(faults))
    bench.until(lambda: bench.stats()["executed"] == 3)
    close_and_drain(bench)
    assert bench.page.seats()[0].flags & layout.FAULTED
    assert job.poll() is None


@pytest.mark.parametrize("fault, code", [("run 5 700", "700"), ("lost", "999")])
def test_the_job_sees_the_devices_errors(
    bench: Bench, tmp_path: Path, fault: str, code: str
) -> None:
    faults = tmp_path / "faults"
    faults.write_text("")
    job = bench.job("error", 1, 1000, STANDIN_FAULT=str(faults))
    bench.until(lambda: bench.stats()["executed"] > 3)
    faults.write_text(fault.replace("5", str(bench.stats()["executed"] + 20)) + "\n")
    assert bench.finish(job) == code


def test_out_of_memory_is_the_jobs_to_see(bench: Bench, tmp_path: Path) -> None:
    faults = tmp_path / "faults"
    faults.write_text("alloc 1 2\n")
    job = bench.job("run", 1, 1, 1, STANDIN_FAULT=str(faults))
    assert job.wait(30) != 0
    assert bench.stats()["launched"] == 0


def test_if_nothing_moves_one_call_is_let_through(bench: Bench) -> None:
    """A kernel may wait for what comes after it."""
    bench.job("run", 1, 6, 600_000)
    bench.until(lambda: bench.page.seats() and bench.page.seats()[0].overruns)


def test_a_refused_launch_is_the_jobs_to_see(bench: Bench, tmp_path: Path) -> None:
    faults = tmp_path / "faults"
    faults.write_text("call 3 701\n")
    assert bench.finish(bench.job("error", 1, 10, STANDIN_FAULT=str(faults))) == "701"
    assert bench.stats()["executed"] <= 2


def test_a_call_that_hangs_is_not_drained(bench: Bench, tmp_path: Path) -> None:
    faults = tmp_path / "faults"
    faults.write_text("hang 3\n")
    bench.job("run", 1, 10, 10, STANDIN_FAULT=str(faults))
    bench.until(lambda: bench.stats()["executed"] == 2)
    bench.page.close_gate()
    assert not bench.page.wait_drained(S // 5)


# --- who is behind the gate -------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["fork", "exec"])
def test_the_gate_holds_after(bench: Bench, verb: str) -> None:
    bench.page.close_gate()
    job = bench.job(verb, 20, 100)
    bench.until(lambda: [seat for seat in bench.page.seats() if seat.waiting])
    assert bench.stats()["launched"] == 0
    bench.page.open_gate()
    assert bench.finish(job) == "20"


def test_a_process_that_leaves_without_a_word_leaves_its_seat(
    bench: Bench, gpu_python: None
) -> None:
    """``os._exit``, with kernels under way and the gate closed."""
    code = (HERE / "bindings_job.py").read_text().replace("LAUNCHES = 200", "LAUNCHES = 3")
    code = code.replace("count_300", "count_500000").replace(
        "ok(driver.cuStreamSynchronize",
        "import os; input(); os._exit(7)\nok(driver.cuStreamSynchronize",
    )
    job = bench.python(code)
    bench.until(lambda: bench.stats()["running"])
    bench.page.close_gate()
    assert not bench.page.wait_drained(S // 50)
    assert job.stdin is not None
    job.stdin.write("\n")
    job.stdin.flush()
    assert job.wait(20) == 7
    assert bench.page.seats() == [] and bench.page.drained()


def test_a_program_without_the_variables_is_not_attached(bench: Bench) -> None:
    plain = {**os.environ, "LD_LIBRARY_PATH": str(bench.built.driver)}
    plain["STANDIN_STATS"] = str(bench.stats_file)
    job = bench.start([str(bench.program), "forever", "1", "1", "100"], plain)
    bench.until(lambda: bench.stats()["executed"] > 5)
    assert not bench.page.attached(job.pid)


def test_a_program_that_drops_the_shim_in_exec_is_not_attached(bench: Bench) -> None:
    code = (
        "import ctypes, os, sys; ctypes.CDLL('libcuda.so.1').cuInit(0);"
        "print('in', flush=True); sys.stdin.readline();"
        "os.execve('/bin/sleep', ['sleep', '60'], {})"
    )
    job = bench.python(code)
    assert job.stdout is not None and job.stdin is not None
    assert job.stdout.readline() == "in\n"
    assert bench.page.attached(job.pid)
    job.stdin.write("\n")
    job.stdin.flush()
    bench.until(lambda: not bench.page.attached(job.pid))
    assert job.poll() is None


def test_a_page_scribbled_over_is_not_attached(bench: Bench) -> None:
    job = bench.job("forever", 1, 1, 100)
    bench.until(lambda: bench.page.attached(job.pid))
    for junk in (b"\xff", b"\x00", b"\x5a"):
        os.kill(job.pid, signal.SIGSTOP)
        with bench.page.path.open("r+b") as file:
            file.seek(layout.HEAD_BYTES)
            file.write(junk * (layout.SEATS * layout.SEAT_BYTES))
        assert bench.page.seats() == []
        assert not bench.page.attached(job.pid)
    bench.page.close_gate()
    bench.page.open_gate()


def test_a_page_cut_short_does_not_hurt_the_node(bench: Bench) -> None:
    job = bench.job("forever", 1, 1, 100)
    bench.until(lambda: bench.page.attached(job.pid))
    os.truncate(bench.page.path, 0)
    assert bench.page.lost
    assert bench.page.seats() == []
    bench.page.close_gate()
    bench.page.open_gate()
    bench.page.beat()


def test_a_page_deleted_is_lost_to_those_who_come_later(bench: Bench) -> None:
    bench.page.path.unlink()
    assert bench.page.lost
    bench.page.close_gate()
    assert bench.finish(bench.job("run", 1, 5, 10)) == "5"
    assert bench.page.seats() == []


# --- the shim as a library --------------------------------------------------------------------


def test_page_layout_is_the_same_in_both_languages(built: object, tmp_path: Path) -> None:
    source = tmp_path / "layout.c"
    source.write_text(
        '#include <stdio.h>\n#include <stddef.h>\n#include "page.h"\n'
        'int main(void) { printf("%zu %zu %zu %zu %zu %d %d %llu %llu %zu ", sizeof(struct head),'
        " sizeof(struct seat), sizeof(struct slot), offsetof(struct head, gate),"
        " offsetof(struct head, beat_ns), PAGE_BYTES, SLOTS_AT, PAGE_MAGIC, SEAT_MAGIC,"
        " offsetof(struct seat, in_flight_ns));"
        ' printf("%zu %zu %zu %zu %d %d %d", sizeof(struct row),'
        " offsetof(struct head, quota_bytes), offsetof(struct head, command),"
        " offsetof(struct seat, held), ROWS_AT, ROWS,"
        " IS_REGISTERED);"
        ' printf(" %zu %zu %d %d", offsetof(struct head, hold), offsetof(struct seat, groups),'
        " CHANNELS_DISABLED, CHANNELS_PREEMPTED); }\n"
    )
    compile_c(source, tmp_path / "layout", [])
    found = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True)
    assert [int(word) for word in found.stdout.split()] == [
        layout.HEAD.size,
        layout.SEAT.size,
        layout.SLOT.size,
        layout.GATE_AT,
        layout.BEAT_AT,
        layout.PAGE_BYTES,
        layout.SLOTS_AT,
        layout.PAGE_MAGIC,
        layout.SEAT_MAGIC,
        layout.SEAT.size - 152,
        layout.ROW.size,
        layout.QUOTA_AT,
        layout.COMMAND_AT,
        layout.SEAT.size - 128,
        layout.ROWS_AT,
        layout.ROWS,
        len(layout.REASONS) - 1,
        layout.HOLD_AT,
        layout.SEAT.size - 16,
        layout.DISABLED,
        layout.PREEMPTED,
    ]


def test_every_name_of_the_list_is_exported(built: object, bench: Bench) -> None:
    shim = bench.built.shim / "libcuda.so.1"
    code = "import ctypes, sys; l = ctypes.CDLL(sys.argv[1]); [getattr(l, n) for n in sys.argv[2:]]"
    names = [
        line.split()[0]
        for line in (NATIVE / "symbols.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    subprocess.run([sys.executable, "-c", code, str(shim), *names], check=True)
    readable = shim.read_bytes()
    assert b"libcuda.so.1\0" in readable


def test_arguments_pass_through_a_trampoline(bench: Bench) -> None:
    assert bench.finish(bench.job("pass")) == str(sum(i * i for i in range(1, 12)))


def test_lookups_answer_with_ours_for_what_is_gated(bench: Bench) -> None:
    names = [
        "cuLaunchKernel",
        "cuGraphLaunch",
        "cuMemcpyHtoDAsync",
        "cuMemAlloc",
        "cuModuleUnload",
        "cuGetProcAddress",
    ]
    legacy = bench.finish(bench.job("ask", 13000, 0, *names)).split()
    assert legacy == [
        "cuLaunchKernel",
        "cuGraphLaunch",
        "cuMemcpyHtoDAsync_v2",
        "cuMemAlloc_v2",
        "driver",
        "cuGetProcAddress_v2",
    ]
    per_thread = bench.finish(bench.job("ask", 13000, 2, "cuLaunchKernel", "cuNoSuchThing")).split()
    assert per_thread == ["cuLaunchKernel_ptsz", "none"]


def test_without_a_driver_there_is_no_device(bench: Bench, tmp_path: Path) -> None:
    code = "import ctypes; print(ctypes.CDLL('libcuda.so').cuInit(0))"
    job = bench.python(code, COTENANT_GATE_DRIVER=str(tmp_path / "none"))
    answer = bench.finish(job)
    if answer == "0":
        pytest.skip("this machine has a driver")
    assert re.fullmatch(r"\d+", answer) and int(answer) != 0


def test_real_bindings_run_on_it(bench: Bench, gpu_python: None) -> None:
    job = bench.python((HERE / "bindings_job.py").read_text())
    bench.until(lambda: bench.stats()["executed"] > 20 or job.poll() is not None)
    close_and_drain(bench)
    assert stands_still(bench)
    bench.page.open_gate()
    assert bench.finish(job) == "200 200"
