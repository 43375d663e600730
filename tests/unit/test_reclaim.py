"""Taking memory back from jobs: on a file tree as the kernel shows it, and on a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cotenant.devices.reclaim import LEAF, Cgroups, Pageout, find

if TYPE_CHECKING:
    from pathlib import Path

SWAPS = "Filename Type Size Used Priority\n/dev/sda2 partition 1000 0 -2\n"
EVERYTHING, NOTHING = "CapEff:\t000001ffffffffff\n", "CapEff:\t0000000000000000\n"


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """What ``/proc`` and ``/sys/fs/cgroup`` say on a machine with swap and a delegated cgroup."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "swaps").write_text(SWAPS)
    (proc / "self" / "status").write_text(NOTHING)
    (proc / "self" / "cgroup").write_text("4:memory:/old\n0::/mine\n")
    (groups / "mine").mkdir(parents=True)
    (groups / "mine" / "cgroup.controllers").write_text("cpu memory\n")
    (groups / "mine" / "cgroup.procs").write_text("17\n")
    return proc, groups


def test_a_delegated_cgroup_is_the_way(machine: tuple[Path, Path]) -> None:
    proc, groups = machine
    way, why = find(proc, groups)
    assert isinstance(way, Cgroups) and not why
    own = groups / "mine" / LEAF
    assert (own / "cgroup.procs").read_text() == str(os.getpid())
    assert (groups / "mine/cgroup.subtree_control").read_text() == "+memory"
    place = way.place("j")
    way.take("j", [], 4096)
    (told,) = (groups / "mine").glob("job-*/memory.reclaim")
    assert str(told.parent) == place and told.read_text() == "4096"
    told.unlink()
    way.forget("j")
    way.forget("never there")
    assert not told.parent.exists()


def test_who_comes_after_another_node_finds_the_same_cgroup(machine: tuple[Path, Path]) -> None:
    proc, groups = machine
    (proc / "self" / "cgroup").write_text(f"0::/mine/{LEAF}\n")
    way, _ = find(proc, groups)
    assert way is not None
    assert way.place("j") == str(groups / "mine" / "job-j")


def test_without_one_it_takes_a_capability(machine: tuple[Path, Path]) -> None:
    proc, groups = machine
    (groups / "mine" / "cgroup.controllers").write_text("cpu\n")
    way, why = find(proc, groups)
    assert way is None and "CAP_SYS_NICE" in why
    (proc / "self" / "status").write_text(EVERYTHING)
    way, why = find(proc, groups)
    assert isinstance(way, Pageout) and not why
    assert way.place("j") == ""


def test_without_swap_there_is_none(machine: tuple[Path, Path]) -> None:
    proc, groups = machine
    (proc / "swaps").write_text(SWAPS.splitlines()[0] + "\n")
    way, why = find(proc, groups)
    assert way is None and "swap" in why
    assert not (groups / "mine" / LEAF).exists(), "and nothing was changed"


def test_a_process_whose_pages_are_named_loses_nothing() -> None:
    program = "data = bytes(range(256)) * 200_000; print(flush=True); input(); print(sum(data))"
    job = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert job.stdout is not None
    job.stdout.readline()
    try:
        Pageout().take("j", [job.pid, 2**22 + 1], 40_000_000)
    except PermissionError:
        job.kill()
        pytest.skip("this machine does not let one process name the pages of another")
    except OSError:
        job.kill()
        raise
    said, _ = job.communicate("\n", timeout=60)
    assert int(said) == sum(range(256)) * 200_000
