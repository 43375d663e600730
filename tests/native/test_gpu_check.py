"""``make gpu-check`` on the stand-ins: that it runs, and that what goes wrong stays where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import nvml_standin

from .conftest import HERE, Built

GPU = HERE.parents[1] / "benchmarks" / "gpu"
SECONDS = 36


@dataclass(frozen=True)
class Run:
    """What the command left."""

    document: dict[str, Any]
    said: str
    picture: Path

    def section(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.document["sections"][name]
        return found

    def figures(self, name: str, part: str) -> dict[str, Any]:
        """A part of a section; skips where a busy machine left no time for it."""
        found: dict[str, Any] = self.section(name)["figures"]
        if part not in found:
            reason = self.section(name)["reason"]
            assert any(word in reason for word in ("no time", "time was up", "time is up")), reason
            pytest.skip(reason)
        part_of_it: dict[str, Any] = found[part]
        return part_of_it


def command(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(GPU / "check.py"), *map(str, words)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


@pytest.fixture(scope="module")
def run(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole command, once."""
    pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("gpu-check")
    out, picture = folder / "out" / "found.json", folder / "out" / "picture.png"
    nvml = nvml_standin.build(folder)
    machine = nvml_standin.Box((nvml_standin.h100(),)).write(folder / "machine")
    ended = command(
        *("--json", out, "--plot", picture, "--seconds", SECONDS, "--most-mb", 16),
        *("--driver", built.driver / "libcuda.so.1"),
        LD_LIBRARY_PATH=f"{built.driver}:{nvml}",
        COTENANT_NVML_STANDIN=str(machine),
        LD_PRELOAD=str(built.rm),
    )
    assert ended.returncode == 0, ended.stderr
    return Run(json.loads(out.read_text()), ended.stdout, picture)


def test_every_section_has_figures_or_says_why_not(run: Run) -> None:
    names = ("facts", "loader", "gate", "vmm", "green", "evict", "colocate", "channel")
    assert tuple(run.document["sections"]) == names
    for name in names:
        found = run.section(name)
        assert found["state"] != "failed", found["stderr"]
        assert found["figures"] or found["reason"]


def test_nobody_takes_it_for_a_gpu(run: Run) -> None:
    assert run.document["standin"] is True
    assert run.picture.exists() or "matplotlib" in run.said


def test_what_is_launched_is_seen_and_a_closed_gate_holds_it(run: Run) -> None:
    for library in ("plain", "bindings"):
        found = run.figures("loader", library)
        assert found["attached"]
        assert found["shim_mapped"]
        assert found["all_seen"]
        assert found["held"]


@pytest.mark.parametrize("who", ["own", "shim"])
def test_memory_comes_back_as_it_was(run: Run, who: str) -> None:
    found = run.figures("evict", who)
    assert found["same"] is True
    assert found["held"]["bytes"] > 0


@pytest.mark.parametrize("way", ["disabled", "preempted"])
def test_a_kernel_that_is_held_does_not_move_and_is_whole_in_the_end(run: Run, way: str) -> None:
    found = run.figures("channel", way)
    assert found["whole"] is True
    assert found["moved"]["n"] > 0
    assert found["moved"]["most"] == 0


def test_raw_samples_are_behind_the_figures(run: Run) -> None:
    costs, samples = run.figures("gate", "cost"), run.section("gate")["samples"]
    for arm, summary in costs["launch_ns"].items():
        assert len(samples[f"cost.launch_ns.{arm}"]) == summary["n"] > 0
    arms, rounds = run.figures("colocate", "arms"), run.section("colocate")["samples"]["rounds"]
    for arm, summary in arms.items():
        taken = [each[arm] for each in rounds if each.get(arm, {}).get("latencies_ms")]
        assert summary.get("p99_ms", {"n": 0})["n"] == len(taken)


def test_no_section_is_given_more_than_is_left(run: Run) -> None:
    limits = [found["limit_s"] for found in run.document["sections"].values()]
    assert all(limit < SECONDS for limit in limits)


# --- what goes wrong --------------------------------------------------------------------------


def check(folder: Path, seconds: float, **modules: str) -> dict[str, Any]:
    """Run these modules as sections; what was found of each."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    code = f"""
import json, sys
sys.path[:0] = [{str(GPU)!r}]
from check import Check, Section
check = Check([Section(name, 1, "?") for name in {list(modules)!r}], {seconds},
              dict(shim="", loop=""))
check.run()
print(json.dumps(check.found))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


FINE = """
def run(setting, record):
    record.figure("seconds", setting.seconds)
"""


@pytest.mark.parametrize(
    "crash",
    [
        "raise ValueError('of no use')",
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "import sys; sys.exit(3)",
    ],
)
def test_a_section_that_crashes_costs_itself(tmp_path: Path, crash: str) -> None:
    bad = f"def run(setting, record):\n    record.figure('before', 1)\n    {crash}\n"
    found = check(tmp_path, 20, bad=bad, missing="nonsense(", fine=FINE)
    assert found["bad"]["state"] == found["missing"]["state"] == "failed"
    assert found["bad"]["figures"] == {"before": 1}
    assert found["bad"]["reason"]
    assert found["fine"]["state"] == "done"


def test_a_section_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    hangs = """
import subprocess, time
def run(setting, record):
    record.figure("child", subprocess.Popen(["sleep", "1000"]).pid)
    time.sleep(1000)
"""
    found = check(tmp_path, 8, hangs=hangs, fine=FINE)
    assert found["hangs"]["state"] == "ended"
    assert found["fine"]["state"] == "done"
    child = Path(f"/proc/{found['hangs']['figures']['child']}/stat")
    end = time.monotonic() + 10
    while child.exists() and " Z " not in child.read_text():
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.01)


def test_later_sections_shrink_to_what_is_left(tmp_path: Path) -> None:
    """Who takes all of his time leaves the others theirs; who takes less leaves them more."""
    slow = "import time\ndef run(setting, record):\n    time.sleep(1000)\n"
    found = check(tmp_path, 12, slow=slow, quick=FINE, last=FINE)
    assert found["slow"]["limit_s"] + found["last"]["limit_s"] < 12
    assert found["last"]["limit_s"] > found["quick"]["limit_s"]
    assert found["last"]["figures"]["seconds"] < found["last"]["limit_s"]


def test_a_part_that_fails_costs_itself(tmp_path: Path) -> None:
    parts = """
def run(setting, record):
    with record.part("first"):
        raise OSError("not today")
    with record.part("late"):
        record.need(1000)
    record.sampled("second", [1.0, 2.0, float("nan")])
"""
    found = check(tmp_path, 10, parts=parts)["parts"]
    assert found["state"] == "partial"
    assert set(found["why"]) == {"first", "late"}
    assert found["samples"]["second"] == [1.0, 2.0, None]


@pytest.mark.parametrize(
    "words",
    [
        ("--json", "x", "--fast"),
        ("--json", "x", "--seconds", "0"),
        ("--json", "x", "--only", "tea"),
        ("--json", "x", "--most-mb", "-1"),
        (),
    ],
)
def test_what_it_does_not_know_it_refuses(words: tuple[str, ...], tmp_path: Path) -> None:
    ended = command(*(str(tmp_path / w) if w == "x" else w for w in words))
    assert ended.returncode == 2
    assert not (tmp_path / "x").exists()


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    ended = command("--json", tmp_path / "x", CC="no-such-compiler")
    assert ended.returncode == 1
    assert "no-such-compiler" in ended.stderr


def test_without_a_driver_every_section_says_why(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    if any(Path("/dev").glob("nvidia*")):
        pytest.skip("there is a driver")
    out = tmp_path / "found.json"
    ended = command("--json", out, "--seconds", 30, "--only", "vmm", "green", "evict", "channel")
    assert ended.returncode == 1
    sections = json.loads(out.read_text())["sections"]
    assert all(found["reason"] for found in sections.values())
    assert {found["state"] for found in sections.values()} <= {"partial", "not possible"}


def test_each_kernel_that_is_asked_for_is_in_the_source() -> None:
    source = (GPU / "kernels.py").read_text()
    code = f"import sys; sys.path[:0] = [{str(GPU)!r}]; import kernels; print(kernels.SOURCE)"
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for name in ("spin", "count", "work", "fill", "checksum", "places"):
        assert f'"{name}"' in source
        assert made.count(f".visible .entry {name}(") == 1
    assert made.count("{") == made.count("}")


def test_the_nets_run(tmp_path: Path) -> None:
    """On the processor, small."""
    pytest.importorskip("torch")
    code = f"""
import sys
sys.path[:0] = [{str(GPU)!r}]
import nets
nets.NetService(0).run()
training = nets.NetTraining(0)
training.step()
training.finish()
"""
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True
    )
