"""Model directories: what is found, what is ignored, and what must not be reached."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cotenant.domain.errors import ModelError, NotFound
from cotenant.runtime.profiling import write_profile
from cotenant.runtime.repository import Repository, stamp
from tests.builders import profiled


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
    for name in ("latest", "1.5", "-3", "²", "２", ".4"):
        write(models / "net" / name / "model.onnx")
    write(models / "net" / "77")
    assert Repository(models).versions("net") == ["1", "2", "10"]


def test_names_are_directories(models: Path) -> None:
    write(models / "readme.txt")
    write(models / ".git" / "1" / "model.onnx")
    assert Repository(models).names() == ["net"]


def test_a_directory_that_is_not_there_is_an_empty_one(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "nowhere")
    assert repository.names() == []
    with pytest.raises(NotFound, match="no model named 'net'"):
        repository.newest("net")


@pytest.mark.parametrize(
    "name", ["../secret", "..", ".git", ".", "", "net/../../secret", "/etc", "a\0b"]
)
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


# --- what lies about ------------------------------------------------------------------------


def a_loop(at: Path) -> None:
    at.symlink_to(at.name)


def a_dangling_link(at: Path) -> None:
    at.symlink_to("nowhere")


def no_text(at: Path) -> None:
    Path(os.fsdecode(os.fsencode(at) + b"\xff")).mkdir()


@pytest.mark.parametrize("litter", [a_loop, a_dangling_link, no_text])
def test_an_entry_that_cannot_be_looked_at_takes_no_other_away(
    models: Path, litter: Callable[[Path], None]
) -> None:
    litter(models / "litter")
    litter(models / "net" / "11")
    repository = Repository(models)
    assert repository.names() == ["net"]
    assert repository.listing() == {"net": "10"}
    assert repository.versions("net") == ["1", "2", "10"]
    assert repository.newest("net").version == "10"


def test_it_is_said_once(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    a_loop(models / "litter")
    repository = Repository(models)
    for _ in range(3):
        repository.names()
    assert len(caplog.records) == 1


def deny(monkeypatch: pytest.MonkeyPatch, closed: Path) -> None:
    """Let a directory be unreadable, to root too."""

    def scandir(path: Path) -> Any:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)


def test_an_unreadable_model_is_skipped_and_says_why_when_asked(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(models / "lost+found" / "1" / "model.onnx")
    deny(monkeypatch, models / "lost+found")
    repository = Repository(models)
    assert repository.listing() == {"net": "10"}
    for name in ("nett", "lost+found"):
        with pytest.raises((NotFound, ModelError)):
            repository.newest(name)
    deny(monkeypatch, models)
    assert Repository(models).names() == []


def test_the_newest_version_is_the_newest_that_holds_a_model(models: Path) -> None:
    (models / "net" / "11").mkdir()
    assert Repository(models).newest("net").version == "10"


# --- stamps ---------------------------------------------------------------------------------


def weights_come(version: Path) -> None:
    write(version / "model.onnx.data", "w")


def weights_grow(version: Path) -> None:
    write(version / "weights", "longer than before")


def weights_are_replaced(version: Path) -> None:
    write(version / ".new", "x").rename(version / "weights")


def weights_below_are_replaced(version: Path) -> None:
    write(version / ".new", "x").rename(version / "below" / "weights")


def a_link_leads_elsewhere(version: Path) -> None:
    write(version.parent / "blob2", "x")
    (version / "link").unlink()
    (version / "link").symlink_to(version.parent / "blob2")


@pytest.mark.parametrize(
    "change",
    [
        weights_come,
        weights_grow,
        weights_are_replaced,
        weights_below_are_replaced,
        a_link_leads_elsewhere,
    ],
)
def test_a_versions_stamp_covers_all_its_files(
    models: Path, change: Callable[[Path], None]
) -> None:
    version = models / "net" / "1"
    for name in ("weights", "below/weights"):
        write(version / name)
    write(models / "net" / "blob1")
    (version / "link").symlink_to("../blob1")
    a_loop(version / "loop")
    a_dangling_link(version / "late")
    before = stamp(version / "model.onnx")
    assert stamp(version / "model.onnx") == before
    change(version)
    assert stamp(version / "model.onnx") != before


def test_a_profile_is_of_the_files_that_it_was_measured_with(models: Path) -> None:
    write(models / "m" / "1" / "model.onnx")
    repository = Repository(models)
    files = repository.files("m", "1")
    assert not repository.profiles(files)
    write_profile(msgspec.structs.replace(profiled(), files=files.stamp.files), files.path.parent)
    assert repository.profiles(files)
    write(models / "m" / "1" / "model.onnx", "another")
    assert not repository.profiles(repository.files("m", "1"))
    (files.path.parent / ".profile.json").write_text("{")
    assert not repository.profiles(files)
