"""Rows for making and rows for judging are never the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotenant.domain.config import CheckSettings
from cotenant.domain.errors import ModelError
from cotenant.domain.port import TensorMeta
from cotenant.optimize.rows import Rows, read_rows

INPUTS = (TensorMeta("x", "FP32", (-1, 3)),)


def file(path: Path, rows: int, seed: int = 0, **more: Any) -> Path:
    x = np.random.default_rng(seed).random((rows, 3), dtype=np.float32)
    arrays = {"x": x, "labels": np.arange(rows) % 2, **more}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def read(check: Path | None, data: Path | None = None) -> Rows:
    return read_rows(check, data, INPUTS, CheckSettings())


def lines(array: np.ndarray[Any, Any]) -> set[bytes]:
    return {row.tobytes() for row in array}


def test_one_file_is_divided_and_always_alike(tmp_path: Path) -> None:
    check = file(tmp_path / "check.npz", 90)
    found, again = read(check), read(check)
    making, judging = lines(found.making.inputs["x"]), lines(found.judging.inputs["x"])
    assert not making & judging
    assert len(making) + len(judging) == 90
    assert making == lines(again.making.inputs["x"])


def test_rows_of_the_data_that_are_in_the_check_too_are_left_out(tmp_path: Path) -> None:
    check = file(tmp_path / "check.npz", 50)
    x = np.load(check)["x"]
    more = np.concatenate([x[:20], 1 + x])
    data = file(tmp_path / "data.npz", 70, x=more)
    found = read(check, data)
    assert found.judging.samples == 50
    assert found.making.samples == 50
    assert not lines(found.making.inputs["x"]) & lines(found.judging.inputs["x"])


def test_without_any_file_nothing_can_be_made() -> None:
    with pytest.raises(ModelError):
        read(None)


def test_a_file_without_labels_is_for_agreement(tmp_path: Path) -> None:
    assert not read(file(tmp_path / "check.npz", 60, labels=None)).labelled


@pytest.mark.parametrize(
    "x",
    [np.zeros((60, 4), np.float32), np.zeros((60, 3, 3, 3), np.float32), np.full((60, 3), "a")],
)
def test_rows_of_another_shape_or_type_are_refused(tmp_path: Path, x: Any) -> None:
    with pytest.raises(ModelError):
        read(file(tmp_path / "check.npz", 60, x=x))


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        read(file(tmp_path / "check.npz", 9))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    bad = tmp_path / "check.npz"
    np.savez(bad, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ModelError):
        read(bad)
