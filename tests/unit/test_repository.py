"""Model directories: what is found, what is ignored, and what must not be reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotenant.domain.errors import ModelError, NotFound
from cotenant.runtime.repository import Repository, stamp


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for version in ("1", "2", "10"):
        write(tmp_path / "models" / "net" / version / "model.onnx")
    write(tmp_path / "secret" / "1" / "model.onnx")
    return tmp_path / "models"


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_versions_are_ordered_as_numbers(models: Path) -> None:
    assert Repository(models).versions("net") == ["1", "2", "10"]
    assert Repository(models).newest("net").version == "10"


def test_what_is_no_version_is_ignored(models: Path) -> None:
    for name in ("latest", "1.5", "-3", "²", ".4"):
        write(models / "net" / name / "model.onnx")
    write(models / "net" / "77")
    assert Repository(models).versions("net") == ["1", "2", "10"]


def test_names_are_directories(models: Path) -> None:
    write(models / "readme.txt")
    assert Repository(models).names() == ["net"]


def test_a_directory_that_is_not_there_is_an_empty_one(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "nowhere")
    assert repository.names() == []
    with pytest.raises(NotFound, match="no model named 'net'"):
        repository.newest("net")


@pytest.mark.parametrize("name", ["../secret", "..", ".", "", "net/../../secret", "/etc", "a\0b"])
def test_a_name_cannot_lead_out_of_the_repository(models: Path, name: str) -> None:
    repository = Repository(models)
    for ask in (repository.versions, repository.newest, repository.settings):
        with pytest.raises(NotFound, match="is no model name"):
            ask(name)


def test_a_near_miss_is_named(models: Path) -> None:
    with pytest.raises(NotFound, match="did you mean 'net'"):
        Repository(models).newest("nett")


def test_a_model_without_versions_or_file_says_what_is_expected(models: Path) -> None:
    (models / "empty").mkdir()
    with pytest.raises(ModelError, match=r"expected empty/1/model\.onnx"):
        Repository(models).newest("empty")
    (models / "empty" / "1").mkdir()
    with pytest.raises(ModelError, match=r"holds no model\.onnx"):
        Repository(models).newest("empty")
    with pytest.raises(NotFound, match="no version 9"):
        Repository(models).files("net", "9")


def test_check_data_are_found_beside_the_model(models: Path) -> None:
    assert Repository(models).files("net", "1").check is None
    write(models / "net" / "1" / "check.npz")
    assert Repository(models).files("net", "1").check is not None


def test_a_replaced_file_has_another_stamp(models: Path) -> None:
    path = models / "net" / "1" / "model.onnx"
    before = stamp(path)
    assert stamp(path) == before
    write(path.with_name("new"), "y").rename(path)
    assert stamp(path) != before
    path.unlink()
    with pytest.raises(ModelError, match=r"model\.onnx"):
        stamp(path)


def test_settings_are_defaults_without_a_file(models: Path) -> None:
    assert Repository(models).settings("net").keep_versions == 1


@pytest.mark.parametrize("text", ["keep_version: 2", "{", "\xff: 1\n\x00"])
def test_wrong_settings_name_the_file(models: Path, text: str) -> None:
    write(models / "net" / "model.yaml", text)
    with pytest.raises(ModelError, match=r"net/model\.yaml"):
        Repository(models).settings("net")
