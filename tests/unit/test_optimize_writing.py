"""Variants appear whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cotenant.domain.config import ModelSettings
from cotenant.domain.errors import CotenantError, EnvironmentProblem, InvalidRequest, NotFound
from cotenant.domain.variant import Compared, VariantRecord, VariantState
from cotenant.optimize import promoting, writing
from cotenant.runtime.repository import ModelFiles, Repository, digest

GOOD = Compared(
    measure="argmax", rows=900, original=0.9, value=0.9, lost=1, won=1, drop=0.0, bound=0.004
)


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    version = tmp_path / "models" / "m" / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_text("model")
    return Repository(tmp_path / "models").files("m", "1")


@pytest.fixture
def repository(files: ModelFiles) -> Repository:
    return Repository(files.path.parents[2])


def record(files: ModelFiles, **changes: Any) -> VariantRecord:
    plain = VariantRecord(
        recipe="int8",
        parent=digest(files),
        made="2026-11-29T12:00:00+00:00",
        state=VariantState.CANDIDATE,
        accuracy=GOOD,
    )
    return msgspec.structs.replace(plain, **changes)


def put(files: ModelFiles, name: str = "int8", text: str = "smaller", **changes: Any) -> Path:
    made = files.path.parents[3] / "model.onnx"
    made.write_text(text)
    return writing.put(files.path.parent, name, record(files, **changes), [made])


def names(files: ModelFiles) -> list[str]:
    return sorted(os.listdir(files.path.parent / "variants"))


def test_a_variant_has_its_files_and_its_record(files: ModelFiles, repository: Repository) -> None:
    put(files)
    (found,) = repository.variants(files)
    assert found.record == record(files) and not found.problem
    assert found.path is not None and found.path.read_text() == "smaller"


def test_one_of_the_same_name_is_replaced(files: ModelFiles) -> None:
    put(files)
    place = put(files, text="another")
    assert (place / "model.onnx").read_text() == "another"
    assert names(files) == ["int8"]


@pytest.mark.parametrize("at", ["copyfile", "rename"])
def test_a_full_disk_leaves_all_as_it_was(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    place = put(files)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((shutil, at) if at == "copyfile" else (Path, at)), full)
        with pytest.raises(EnvironmentProblem):
            put(files, text="another")
    assert names(files) == ["int8"]
    assert (place / "model.onnx").read_text() == "smaller"


def test_what_a_killed_run_left_is_removed_and_put_back(files: ModelFiles) -> None:
    put(files)
    variants = files.path.parent / "variants"
    (variants / "int8").rename(variants / ".old-int8")
    (variants / ".new-int8").mkdir()
    (files.path.parent / ".optimize").mkdir()
    (files.path.parent / ".optimize" / "work-x").mkdir()
    with writing.workplace(files.path.parent):
        pass
    assert names(files) == ["int8"]
    assert os.listdir(files.path.parent / ".optimize") == ["lock"]


def test_a_disk_that_is_full_while_variants_are_made_is_said(files: ModelFiles) -> None:
    with pytest.raises(EnvironmentProblem), writing.workplace(files.path.parent):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(files.path.parent / ".optimize") == ["lock"]


def test_two_do_not_work_on_one_version(files: ModelFiles) -> None:
    with writing.workplace(files.path.parent):
        with pytest.raises(InvalidRequest), writing.workplace(files.path.parent):
            pass


def test_a_good_candidate_is_promoted_and_taken_back(
    files: ModelFiles, repository: Repository
) -> None:
    put(files)
    promoting.promote(repository, files, "int8", ModelSettings(), 0.01)
    (found,) = repository.variants(files)
    assert found.record is not None and found.record.state is VariantState.PROMOTED
    with pytest.raises(InvalidRequest):
        promoting.remove(repository, files, "int8")
    promoting.demote(repository, files, "int8")
    promoting.remove(repository, files, "int8")
    assert repository.variants(files) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy": None},
        {"accuracy": msgspec.structs.replace(GOOD, bound=0.05)},
        {"state": VariantState.REFUSED, "why": "slower"},
        {"parent": "sha256:another"},
    ],
)
def test_what_was_not_seen_to_be_good_is_not_promoted(
    files: ModelFiles, repository: Repository, changes: dict[str, Any]
) -> None:
    put(files, **changes)
    with pytest.raises(CotenantError):
        promoting.promote(repository, files, "int8", ModelSettings(), 0.01)


def test_below_the_floor_nothing_is_promoted(files: ModelFiles, repository: Repository) -> None:
    put(files)
    with pytest.raises(CotenantError):
        promoting.promote(repository, files, "int8", ModelSettings(accuracy_floor=0.95), 0.01)


def test_a_name_that_is_not_there_is_not_found(files: ModelFiles, repository: Repository) -> None:
    put(files)
    for act in (promoting.demote, promoting.remove):
        with pytest.raises(NotFound):
            act(repository, files, "int9")
