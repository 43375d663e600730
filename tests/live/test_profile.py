"""``cotenant profile`` with real workers: what it finds, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cotenant.devices import npu_look, proctree
from cotenant.devices.nvidia.survey import survey
from cotenant.domain.profile import PROFILE_FILE, ModelProfile, read_profiles
from cotenant.sim.scenario_file import parse_scenario
from tests.live.conftest import PATIENCE_S, free_model, scale_model, until

CORES = len(os.sched_getaffinity(0))
CORE = min(os.sched_getaffinity(0))
THERE: dict[str, Callable[[], object]] = {
    "npu": lambda: npu_look.look().npus,
    "cuda": lambda: survey().gpus,
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    scale_model(tmp_path / "models" / "scale" / "1" / "model.onnx")
    scale_model(tmp_path / "models" / "scale" / "2" / "model.onnx", 3.0)
    return tmp_path / "models"


def command(models: Path, *words: str) -> list[str]:
    python = [sys.executable, "-m", "cotenant", "profile", "--models", str(models)]
    return [*python, "--seconds", "0.1", *words]


def profile(models: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(models, *words), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def read(path: Path) -> ModelProfile:
    """The only profile of a version."""
    (found,) = read_profiles((path / PROFILE_FILE).read_bytes())
    return found


def test_the_newest_version_is_measured_in_all_sizes(models: Path) -> None:
    done = profile(models, "scale", "--units", "1", "--max-batch", "6", "--json")
    assert done.returncode == 0, done.stderr
    written = (models / "scale" / "2" / PROFILE_FILE).read_bytes()
    assert json.loads(done.stdout) == json.loads(written)
    found = read(models / "scale" / "2")
    assert (found.kind, found.emulated, found.units) == ("cpu", False, CORES)
    assert (found.model, found.version, found.engine) == ("scale", "2", "onnxruntime")
    assert [(f.units, f.rows) for f in found.figures] == [(1, 1), (1, 2), (1, 4), (1, 6)]
    assert len({f.runs for f in found.figures}) == 1, "sizes take turns"
    assert all(0 < f.median_ns <= f.p95_ns for f in found.figures)
    assert 0 < found.memory_loaded <= found.memory_peak
    assert [name for name, *_ in found.files] == ["model.onnx"]
    assert not (models / "scale" / "1" / PROFILE_FILE).exists()


def test_usual_units_are_one_core_and_all(models: Path) -> None:
    done = profile(models, "scale", "--version", "1", "--max-batch", "1", "--json", "--dry-run")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["profiles"]
    assert sorted({f["units"] for f in found["figures"]}) == sorted({1, CORES})
    assert not (models / "scale" / "1" / PROFILE_FILE).exists(), "a dry run writes nothing"


def test_the_settings_of_the_model_say_the_largest_batch(models: Path) -> None:
    (models / "scale" / "model.yaml").write_text("batch: {max: 2}\n")
    done = profile(models, "scale", "--units", "1", "--json", "--dry-run")
    (found,) = json.loads(done.stdout)["profiles"]
    assert [f["rows"] for f in found["figures"]] == [1, 2]


def test_other_sizes_are_measured_where_they_are_asked_for(models: Path) -> None:
    free_model(models / "free" / "1" / "model.onnx")
    words = ("--units", "1", "--max-batch", "1", "--shape", "x=1x9", "--shape", "x=1x30")
    done = profile(models, "free", *words)
    assert done.returncode == 0, done.stderr
    found = read(models / "free" / "1")
    assert {f.size for f in found.figures} == {found.size, 9, 30}
    assert len(found.table) == 1, "the simulator takes the size of the warm-up"


@pytest.mark.parametrize("shape", ["x", "x=", "=1", "x=1xa", "x=0x4"])
def test_what_is_no_shape_is_refused(models: Path, shape: str) -> None:
    done = profile(models, "scale", "--shape", shape)
    assert done.returncode == 2 and shape in done.stderr


def test_a_shape_that_the_model_does_not_take_is_refused(models: Path) -> None:
    for shape in ("y=1x4", "x=1x5"):
        done = profile(models, "scale", "--units", "1", "--shape", shape)
        assert done.returncode == 1 and not (models / "scale" / "2" / PROFILE_FILE).exists()


def test_a_person_gets_a_table(models: Path) -> None:
    done = profile(models, "scale", "--units", "1", "--max-batch", "2")
    assert done.returncode == 0, done.stderr
    assert "MEDIAN" in done.stdout
    assert PROFILE_FILE in done.stderr


def test_the_simulator_takes_what_was_measured(models: Path) -> None:
    assert profile(models, "scale").returncode == 0
    text = f"""
name: s
duration: 1s
device: {{kind: cpu, units: 2}}
services:
  - name: scale
    objective: {{latency: 30s}}
    profile: scale/2/{PROFILE_FILE}
    arrivals: {{kind: poisson, rate: 1}}
"""
    (service,) = parse_scenario(text, models).services
    assert service.costs["cpu"].profile == read(models / "scale" / "2").table


def test_what_a_configuration_leaves_a_device_is_what_it_is_measured_on(models: Path) -> None:
    config = models / "cotenant.yaml"
    config.write_text(f"devices: [{{kind: cpu, cores: [{CORE}]}}]\n")
    assert profile(models, "scale", "--config", str(config)).returncode == 0
    found = read(models / "scale" / "2")
    assert found.units == 1 and {f.units for f in found.figures} == {1}
    for words in (("--device", "npu"), ("--units", "2")):
        done = profile(models, "scale", "--config", str(config), *words)
        assert done.returncode == 1 and "Traceback" not in done.stderr
    assert read(models / "scale" / "2") == found


def test_a_kind_that_there_is_not_is_no_kind(models: Path) -> None:
    done = profile(models, "scale", "--device", "abacus")
    assert done.returncode == 2 and "abacus" in done.stderr


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_a_device_that_is_not_there_is_said_and_the_others_are_measured(
    models: Path, kind: str
) -> None:
    if THERE[kind]():
        pytest.skip(f"{kind} is there")
    done = profile(models, "scale", "--device", kind)
    assert done.returncode == 1 and f"cotenant devices --kind {kind}" in done.stderr
    assert not list(models.glob(f"**/{PROFILE_FILE}*"))
    done = profile(models, "scale", "--device", "all", "--units", "1", "--max-batch", "1")
    assert done.returncode == 0 and kind in done.stderr
    assert read(models / "scale" / "2").kind == "cpu"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("scael",), "did you mean 'scale'"),
        (("scale", "--version", "7"), "no version 7"),
        (("scale", "--version", "../1"), "whole numbers"),
        (("empty",), "has no versions"),
        (("broken",), "model.onnx"),
        (("scale", "--engine", "onnxruntim"), "did you mean 'onnxruntime'"),
        (("scale", "--engine", "llm"), "opens files that end in"),
        (("scale", "--units", str(CORES + 1)), f"{CORES} cores"),
        (("scale", "--max-batch", "5000"), "at most"),
        (("talks",), "answers in turns"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    models: Path, words: tuple[str, ...], said: str
) -> None:
    (models / "empty").mkdir()
    for path, text in (("broken/1/model.onnx", "x"), ("talks/1/model.pieces.json", "{}")):
        (models / path).parent.mkdir(parents=True)
        (models / path).write_text(text)
    done = profile(models, *words)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.startswith("cotenant: ")
    assert "Traceback" not in done.stderr
    assert not list(models.glob(f"**/{PROFILE_FILE}*"))


def test_ctrl_c_leaves_no_process_and_no_file(models: Path) -> None:
    words = command(models, "scale", "--seconds", "600")
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        workers = until(lambda: proctree.descendants(running.pid))
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate(timeout=PATIENCE_S)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 130, said
    assert b"Traceback" not in said
    assert not any(proctree.runs(pid) for pid in workers)
    assert not list(models.glob(f"**/{PROFILE_FILE}*"))


def test_a_worker_that_ends_is_said_and_nothing_is_written(models: Path) -> None:
    words = command(models, "scale", "--seconds", "600")
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        (worker,) = until(lambda: proctree.descendants(running.pid))
        os.kill(worker, signal.SIGKILL)
        _, said = running.communicate(timeout=PATIENCE_S)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 1
    assert "the worker ended" in said
    assert "Traceback" not in said
    assert not list(models.glob(f"**/{PROFILE_FILE}*"))
