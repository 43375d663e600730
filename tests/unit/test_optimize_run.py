"""A small model optimized from end to end, and what cannot be done said."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cotenant.cli.main import main
from cotenant.domain.errors import CotenantError, InvalidRequest, ModelError
from cotenant.domain.variant import VariantState
from cotenant.optimize import running
from cotenant.optimize.comparing import compare, look
from cotenant.optimize.parent import Asked, open_variant
from cotenant.optimize.recipes.base import Made
from cotenant.optimize.recipes.known import chosen, lacking
from cotenant.optimize.rows import picked, read_rows
from cotenant.runtime.repository import ModelFiles, Repository
from tests.unit import optimize_models as models

pytest.importorskip("onnx")

QUICK = ("onnxruntime",)


@pytest.fixture(autouse=True)
def short_races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "RACE_S", 0.2)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    models.put(tmp_path / "models")
    return Repository(tmp_path / "models")


def run(repository: Repository, *recipes: str, **more: Any) -> running.Result:
    asked = Asked(recipes=recipes, engines=QUICK, max_drop=0.2, seconds=1.5, **more)
    files = repository.newest("small")
    return running.optimize(repository, files, asked, lambda text: None)


def by_name(result: running.Result) -> dict[str, running.Row]:
    return {row.name: row for row in result.rows}


def hidden(version: Path) -> list[str]:
    return [p.name for p in version.rglob(".*") if p.name != ".optimize"]


def test_int8_is_measured_and_written(repository: Repository) -> None:
    before = repository.newest("small")
    result = run(repository, "int8")
    found = by_name(result)["int8"]
    assert found.accuracy is not None and found.accuracy.rows == result.judging
    assert {(t.units, t.rows) for t in found.profile} == {(1, 1), (1, 8)}
    assert found.size < by_name(result)["original"].size
    (variant,) = repository.variants(before)
    assert variant.record is not None and variant.record.state.value == found.state
    assert (variant.path is None) == (variant.record.state is VariantState.REFUSED)
    assert repository.newest("small") == before
    assert not hidden(before.path.parent)
    assert os.listdir(before.path.parent / ".optimize") != ["lock"]


def test_nothing_serves_unless_it_is_asked_for(repository: Repository) -> None:
    for promotes in (False, True):
        result = run(repository, "int8", promote=promotes)
        states = {row.state for row in result.rows}
        assert "promoted" not in states or promotes


def test_a_recipe_that_makes_nothing_says_why_and_others_go_on(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        name, needs, trains = "int8", (), False

        def make(self, *args: Any) -> Any:
            raise ModelError("it is broken")

    class Lacking(Broken):
        name, needs = "nncf", ("no_such_module",)

    recipes = (Broken(), Lacking(), *chosen(["sparse"]))
    monkeypatch.setattr(running, "chosen", lambda names: recipes)
    result = run(repository)
    states = {row.name: row.state for row in result.rows}
    assert states["int8"] == states["nncf"] == running.SKIPPED
    assert "sparse" in states
    assert all(row.why for row in result.rows if row.state == running.SKIPPED)


@pytest.mark.parametrize("wrong", ["nan", "classes"])
def test_what_answers_no_numbers_or_other_classes_is_refused(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    import onnx
    from onnx import numpy_helper

    class Wrong:
        name, needs, trains = "wrong", (), False

        def make(self, parent: Any, work: Path, *args: Any) -> Any:
            made = models.graph(classes=5 if wrong == "classes" else models.CLASSES)
            if wrong == "nan":
                bias = numpy_helper.from_array(np.full(models.CLASSES, np.nan, np.float32), "b3")
                next(t for t in made.graph.initializer if t.name == "b3").CopyFrom(bias)
            onnx.save(made, str(work / "model.onnx"))
            yield Made("wrong", "wrongly", work / "model.onnx")

    monkeypatch.setattr(running, "chosen", lambda names: (Wrong(),))
    found = by_name(run(repository))["wrong"]
    assert found.state == "refused" and found.why
    (variant,) = repository.variants(repository.newest("small"))
    assert variant.path is None


def test_a_version_that_changes_meanwhile_gets_no_variants(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = repository.newest("small")

    class Changing:
        name, needs, trains = "changing", (), False

        def make(self, *args: Any) -> Any:
            files.path.write_bytes(files.path.read_bytes() + b"\x00")
            raise ModelError("and nothing else")

    monkeypatch.setattr(running, "chosen", lambda names: (*chosen(["sparse"]), Changing()))
    with pytest.raises(ModelError):
        run(repository)
    assert not (files.path.parent / "variants").exists()


def test_models_that_answer_in_turns_are_refused(tmp_path: Path) -> None:
    version = tmp_path / "talker" / "1"
    version.mkdir(parents=True)
    (version / "model.pieces.json").write_text("{}")
    repository = Repository(tmp_path)
    with pytest.raises(CotenantError):
        running.optimize(repository, repository.newest("talker"), Asked(), lambda text: None)


def test_the_same_answers_lose_nothing_and_others_do(repository: Repository) -> None:
    files = repository.newest("small")
    engine = open_variant(files.path, "onnxruntime", (1,))
    data = read_rows(files.check, None, engine.meta.inputs, repository.settings("small").check)
    for labelled in (True, False):
        seen = look(engine, 1, data.judging, labelled)
        same = compare(seen, engine, 1)
        assert same.drop == 0 and same.lost == same.won == 0 and same.bound > 0
    turned = picked(data.judging, np.arange(data.judging.samples))
    turned.labels = (turned.labels + 1) % models.CLASSES
    wrong = msgspec.structs.replace(look(engine, 1, data.judging, True), data=turned)
    assert compare(wrong, engine, 1).drop == pytest.approx(1.0)


@pytest.mark.parametrize("recipe", ["qat", "pruned", "student"])
def test_recipes_that_train_make_files_of_the_same_inputs_and_outputs(
    repository: Repository, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why := lacking(chosen([recipe])[0]):
        pytest.skip(why)
    monkeypatch.setenv("PATH", "/nonexistent")  # NNCF then compiles nothing, which takes a minute
    result = run(repository, recipe)
    made = [row for row in result.rows if row.name.startswith(recipe)]
    assert made
    for row in made:
        assert row.state != running.SKIPPED, row.why
        assert row.accuracy is not None, row.why


def test_nncf_makes_a_variant_for_openvino(repository: Repository) -> None:
    if why := lacking(chosen(["nncf"])[0]):
        pytest.skip(why)
    if "openvino" not in running.usable_engines(("openvino",)):
        pytest.skip("the engine openvino is not registered")
    asked = Asked(recipes=("nncf",), engines=("openvino",), max_drop=0.2)
    result = running.optimize(repository, repository.newest("small"), asked, lambda text: None)
    assert by_name(result)["nncf"].accuracy is not None


def test_sensitive_layers_stay_in_float(repository: Repository) -> None:
    result = run(repository, "int8-mixed")
    found = by_name(result)["int8-mixed"]
    assert found.state != running.SKIPPED or found.why


# --- the commands -------------------------------------------------------------------------------


def test_an_unknown_name_gets_a_near_one() -> None:
    with pytest.raises(InvalidRequest, match="int8"):
        chosen(["int9"])


@pytest.mark.parametrize(
    "words",
    [
        ["small", "--recipes", "intt8"],
        ["small", "--engines", "onnxruntim"],
        ["small", "--version", "x"],
        ["small", "--data", "nothing.npz"],
        ["small", "--units", "100000"],
        ["smal"],
    ],
)
def test_what_there_is_not_is_said(
    repository: Repository, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["optimize", *words, "--models", str(repository.root), "--here"]) == 1
    assert "cotenant:" in capsys.readouterr().err


def test_a_recipe_that_is_asked_for_and_cannot_be_had_is_an_error(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = ["optimize", "small", "--recipes", "qat", "--models", str(repository.root), "--here"]
    assert main(words) == 1
    assert "qat" in capsys.readouterr().err


def test_the_commands_make_show_and_promote(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--models", str(repository.root)]
    words = ["--here", "--units", "1", "--max-drop", "0.3", "--recipes", "sparse"]
    assert main(["optimize", "small", *where, *words, "--json"]) == 0
    made = msgspec.json.decode(capsys.readouterr().out, type=running.Result)
    assert main(["variants", "small", *where, "--json"]) == 0
    shown = msgspec.json.decode(capsys.readouterr().out)
    assert shown[0]["name"] == "original"
    assert {v["name"] for v in shown[1:]} == {r.name for r in made.rows[1:]}
    assert main(["variants", "small", *where]) == 0
    refused = [v["name"] for v in shown if v["state"] == "refused"]
    for name in refused:
        assert main(["variants", "small", *where, "--promote", name]) == 1
    assert main(["variants", "small", *where, "--promote", "a", "--demote", "b"]) == 1


def test_an_ended_job_leaves_nothing(repository: Repository) -> None:
    version = repository.newest("small").path.parent
    words = ["small", "--models", str(repository.root), "--units", "1", "--recipes", "sparse"]
    job = subprocess.Popen(
        [sys.executable, "-m", "cotenant.optimize", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert job.stderr is not None and job.stderr.readline()
    job.send_signal(signal.SIGTERM)
    until = time.monotonic() + 30
    while job.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    job.stderr.close()
    assert job.poll() == 128 + signal.SIGTERM
    assert not (version / "variants").exists()
    assert not hidden(version) and not list((version / ".optimize").glob("work-*"))


def test_files_of_other_kinds_are_not_unpickled(tmp_path: Path) -> None:
    version = tmp_path / "m" / "1"
    version.mkdir(parents=True)
    (version / "model.pt").write_bytes(b"\x80\x04.")
    assert main(["optimize", "m", "--models", str(tmp_path), "--here"]) == 1
    (version / "model.onnx").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    assert main(["optimize", "m", "--models", str(tmp_path), "--here"]) == 1


def test_files_are_those_of_the_version(repository: Repository) -> None:
    found = running.the_version(repository, "small", "1")
    assert isinstance(found, ModelFiles) and found.version == "1"


def test_without_labels_the_output_that_is_named_is_compared(repository: Repository) -> None:
    files = repository.newest("small")
    engine = open_variant(files.path, "onnxruntime", (1,))
    data = read_rows(files.check, None, engine.meta.inputs, repository.settings("small").check)
    data.judging.output = "y"
    assert look(engine, 1, data.judging, labelled=False).judged.name == "y"
    data.judging.output = "z"
    with pytest.raises(ModelError):
        look(engine, 1, data.judging, labelled=False)
