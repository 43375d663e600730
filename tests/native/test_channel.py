"""Channels that are taken off the device, on a stand-in for the kernel driver (standin_rm.c)."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotenant.devices.nvidia import page as layout
from cotenant.devices.nvidia.page import DISABLED, LEFT, PREEMPTED, ControlPage
from cotenant.domain.errors import DeviceError
from cotenant.domain.units import MS, S

from .conftest import Bench

LONG_US = 300_000
Control = Callable[[int], Bench]


@pytest.fixture
def control(bench: Bench) -> Control:
    """The bench with a page of its own, by which channels are controlled in the way given."""

    def make(way: int) -> Bench:
        bench.page.close()
        bench.page = ControlPage(bench.page.path, 20 * MS, patience_ns=1 * S, channels=way)
        bench.page.open()
        return bench

    return make


def start(bench: Bench, *words: object, rm: str = "") -> subprocess.Popen[str]:
    """A job that the kernel driver's stand-in plays for."""
    preload = f"{bench.built.shim / 'libcuda.so.1'}:{bench.built.rm}"
    return bench.job(*words, LD_PRELOAD=preload, STANDIN_RM=rm)


def in_a_kernel(bench: Bench) -> None:
    """Close the gate behind a kernel that is running."""
    bench.until(lambda: bench.stats()["running"])
    bench.page.close_gate()
    assert not bench.page.wait_drained(20 * MS)


def hold_in_a_kernel(bench: Bench) -> None:
    in_a_kernel(bench)
    bench.page.hold()
    assert bench.page.wait_held(20 * S)


def beat_for(bench: Bench, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        bench.page.beat()
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("way", "rm"), [(DISABLED, ""), (PREEMPTED, ""), (PREEMPTED, "old"), (DISABLED, "noslice")]
)
def test_what_is_held_stands_still_and_then_goes_on(control: Control, way: int, rm: str) -> None:
    bench = control(way)
    job = start(bench, "run", 1, 3, LONG_US, rm=rm)
    hold_in_a_kernel(bench)
    assert not bench.page.drained()
    before = bench.stats()["executed"]
    beat_for(bench, 2 * LONG_US / 1e6)
    assert bench.stats()["executed"] == before
    assert bench.stats()["running"] == 1
    (seat,) = bench.page.seats()
    assert seat.channels.groups == 2
    assert bool(seat.channels.slice_error) == (rm == "noslice")
    bench.page.open_gate()
    assert bench.finish(job) == "3"


def test_what_is_released_behind_a_closed_gate_ends_and_nothing_follows(control: Control) -> None:
    bench = control(DISABLED)
    job = start(bench, "run", 1, 3, LONG_US)
    hold_in_a_kernel(bench)
    bench.page.release()
    assert bench.page.wait_drained(20 * S)
    executed = bench.stats()["executed"]
    beat_for(bench, 0.1)
    assert bench.stats()["launched"] == bench.stats()["executed"] == executed
    bench.page.open_gate()
    assert bench.finish(job) == "3"


@pytest.mark.parametrize(
    ("way", "rm"), [(DISABLED, "refuse"), (DISABLED, "nodisable"), (PREEMPTED, "refuse")]
)
def test_a_driver_that_refuses_is_told_and_the_job_goes_on(
    control: Control, way: int, rm: str
) -> None:
    bench = control(way)
    job = start(bench, "run", 1, 3, LONG_US, rm=rm)
    in_a_kernel(bench)
    bench.page.hold()
    assert not bench.page.wait_held(20 * S)
    assert bench.page.seats()[0].channels.error
    bench.page.release()
    assert bench.page.wait_drained(20 * S)
    assert bench.page.wait_held(20 * S), "what is drained is off the device, held or not"
    bench.page.open_gate()
    assert bench.finish(job) == "3"


def test_a_driver_that_accepts_and_does_nothing_does_not_stop_a_kernel(control: Control) -> None:
    """Why a kernel of our own must be seen to stop before anybody relies on it."""
    bench = control(DISABLED)
    start(bench, "run", 1, 3, LONG_US, rm="inert")
    hold_in_a_kernel(bench)
    bench.until(lambda: not bench.stats()["running"])


def test_a_node_that_dies_lets_go_of_what_it_held(control: Control) -> None:
    bench = control(DISABLED)
    job = start(bench, "run", 1, 3, LONG_US)
    hold_in_a_kernel(bench)
    out, _ = job.communicate(timeout=20)
    assert out.strip() == "3"


def test_a_node_that_comes_back_holds_again(control: Control) -> None:
    bench = control(DISABLED)
    job = start(bench, "run", 1, 8, LONG_US)
    hold_in_a_kernel(bench)
    executed = bench.stats()["executed"]
    end = time.monotonic() + 20
    while bench.stats()["executed"] == executed and time.monotonic() < end:
        time.sleep(0.01)
    assert bench.stats()["executed"] > executed, "it was not let go"
    assert bench.page.wait_held(20 * S)
    executed = bench.stats()["executed"]
    beat_for(bench, 2 * LONG_US / 1e6)
    assert bench.stats()["executed"] == executed
    bench.page.open_gate()
    assert bench.finish(job) == "8"


def test_what_cannot_be_let_go_at_once_is_tried_again(control: Control) -> None:
    bench = control(DISABLED)
    job = start(bench, "run", 1, 3, LONG_US, rm="stubborn")
    hold_in_a_kernel(bench)
    bench.page.open_gate()
    assert bench.finish(job) == "3"


def test_a_job_that_is_killed_while_it_is_held_leaves_its_seat(control: Control) -> None:
    bench = control(DISABLED)
    job = start(bench, "forever", 2, 1, LONG_US)
    hold_in_a_kernel(bench)
    job.kill()
    job.wait()
    assert bench.page.seats() == []
    assert bench.page.drained()


def test_a_child_has_no_channels_of_its_parents(control: Control) -> None:
    bench = control(DISABLED)
    job = start(bench, "fork", 20, 1000)
    assert bench.finish(job) == "20"


def test_channels_are_left_alone_unless_they_are_to_be_held(control: Control) -> None:
    bench = control(LEFT)
    job = start(bench, "run", 1, 3, LONG_US)
    in_a_kernel(bench)
    assert bench.page.seats()[0].channels == layout.Channels(0, 0, 0, 0)
    with pytest.raises(DeviceError):
        bench.page.hold()
    bench.page.open_gate()
    assert bench.finish(job) == "3"


def test_nothing_is_held_behind_an_open_gate(control: Control) -> None:
    bench = control(DISABLED)
    with pytest.raises(DeviceError, match="close it first"):
        bench.page.hold()


def test_a_page_that_is_taken_over_can_be_released(control: Control) -> None:
    bench = control(DISABLED)
    job = start(bench, "run", 1, 3, LONG_US)
    hold_in_a_kernel(bench)
    bench.page = ControlPage(bench.page.path)
    bench.page.adopt()
    assert bench.page.channels == DISABLED
    assert bench.page.wait_held(20 * S)
    bench.page.open_gate()
    assert bench.finish(job) == "3"


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    steps=st.lists(st.sampled_from(["close", "open", "hold", "release", "look"]), max_size=12),
    streams=st.integers(1, 3),
    us=st.sampled_from([300, 3000, 30000]),
    way=st.sampled_from([DISABLED, PREEMPTED]),
)
def test_random_histories_lose_nothing(
    control: Control, steps: list[str], streams: int, us: int, way: int
) -> None:
    bench = control(way)
    job = start(bench, "run", streams, 10, us)
    for step in steps:
        page = bench.page
        if step == "close":
            page.close_gate()
        elif step == "open":
            page.open_gate()
        elif step == "hold" and page.closed:
            page.hold()
            assert page.wait_held(20 * S)
            executed = bench.stats()["executed"]
            beat_for(bench, 0.05)
            assert bench.stats()["executed"] == executed
        elif step == "release":
            page.release()
        else:
            beat_for(bench, 0.01)
    bench.page.open_gate()
    assert bench.finish(job) == str(10 * streams)
