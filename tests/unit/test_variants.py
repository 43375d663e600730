"""Variants of a version on disk: which of them can serve, and why others cannot."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cotenant.domain.errors import ConfigError
from cotenant.domain.variant import (
    Compared,
    Timing,
    VariantRecord,
    VariantState,
    read_variant,
    write_variant,
)
from cotenant.runtime.repository import ModelFiles, Repository, digest
from cotenant.runtime.variants import as_variant

COMPARED = Compared(
    measure="argmax", rows=500, original=0.96, value=0.95, lost=9, won=4, drop=0.01, bound=0.022
)


@pytest.fixture
def version(tmp_path: Path) -> ModelFiles:
    path = tmp_path / "m" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_text("model")
    return Repository(tmp_path).files("m", "1")


def record(version: ModelFiles, state: VariantState = VariantState.PROMOTED) -> VariantRecord:
    return VariantRecord(
        recipe="static int8",
        parent=digest(version),
        made="2026-11-29T12:00:00+00:00",
        state=state,
        kinds=("cpu",),
        accuracy=COMPARED,
        profile=(Timing("cpu", "onnxruntime", 1, 1, 100, 250),),
    )


def put(version: ModelFiles, found: VariantRecord, name: str = "int8", model: bool = True) -> Path:
    directory = version.path.parent / "variants" / name
    directory.mkdir(parents=True)
    (directory / "variant.yaml").write_text(write_variant(found))
    if model:
        (directory / "model.onnx").write_text("smaller")
    return directory


def problem(version: ModelFiles) -> str:
    (found,) = Repository(version.path.parents[2]).variants(version)
    return found.problem


def test_a_record_is_read_as_it_was_written(version: ModelFiles) -> None:
    assert read_variant(write_variant(record(version))) == record(version)


@pytest.mark.parametrize("state", [VariantState.PROMOTED, VariantState.CANDIDATE])
def test_a_variant_of_this_version_has_no_problem(version: ModelFiles, state: VariantState) -> None:
    put(version, record(version, state))
    assert problem(version) == ""


def test_a_version_without_variants_has_none(version: ModelFiles) -> None:
    assert Repository(version.path.parents[2]).variants(version) == []


def test_a_refused_one_says_why(version: ModelFiles) -> None:
    refused = msgspec.structs.replace(record(version, VariantState.REFUSED), why="it is slower")
    put(version, refused, model=False)
    assert problem(version) == "it is slower"


def test_one_made_of_another_model_cannot_serve(version: ModelFiles) -> None:
    put(version, record(version))
    version.path.write_text("another model")
    again = Repository(version.path.parents[2]).files("m", "1")
    assert problem(again)


@pytest.mark.parametrize("text", ["", "recipe: 1", "{", "recipe: x\nnot_known: 1", "[1]", "\x00"])
def test_a_broken_record_is_a_problem_that_names_its_file(version: ModelFiles, text: str) -> None:
    (put(version, record(version)) / "variant.yaml").write_text(text)
    assert "variant.yaml" in problem(version)


def test_a_variant_without_a_record_or_a_model_cannot_serve(version: ModelFiles) -> None:
    directory = put(version, record(version), model=False)
    assert problem(version)
    (directory / "model.onnx").write_text("smaller")
    (directory / "variant.yaml").unlink()
    assert problem(version)


def test_the_name_of_the_version_itself_is_taken(version: ModelFiles) -> None:
    put(version, record(version), name="original")
    assert problem(version)


@pytest.mark.parametrize(
    "wrong", [{"rows": 0}, {"value": 1.5}, {"bound": 0.0}, {"confidence": 0.2}, {"lost": -1}]
)
def test_an_accuracy_that_cannot_be_is_refused(version: ModelFiles, wrong: dict[str, int]) -> None:
    impossible = msgspec.structs.replace(COMPARED, **wrong)
    text = write_variant(msgspec.structs.replace(record(version), accuracy=impossible))
    with pytest.raises(ConfigError):
        read_variant(text)


def test_a_variant_makes_no_other_version_of_its_parent(version: ModelFiles) -> None:
    put(version, record(version))
    assert Repository(version.path.parents[2]).files("m", "1") == version


def test_what_a_version_computes_with_makes_its_digest(version: ModelFiles) -> None:
    before = digest(version)
    version.path.with_name("check.npz").write_text("rows")
    repository = Repository(version.path.parents[2])
    assert digest(repository.files("m", "1")) == before
    version.path.with_name("weights.bin").write_text("weights")
    assert digest(repository.files("m", "1")) != before


@pytest.mark.parametrize(("bound", "better"), [(-0.01, True), (0.0, False), (0.02, False)])
def test_the_planner_counts_what_a_variant_keeps_at_least(
    version: ModelFiles, bound: float, better: bool
) -> None:
    compared = msgspec.structs.replace(COMPARED, drop=-0.03, bound=bound)
    known = as_variant("v", msgspec.structs.replace(record(version), accuracy=compared), "cpu")
    assert (known.accuracy > 1.0) == better
    assert known.relative == pytest.approx(100 / 250)
