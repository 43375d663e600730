"""What check data measure: labels of all kinds against outputs of all kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cotenant.domain.config import CheckSettings
from cotenant.domain.errors import ModelError
from cotenant.domain.port import TensorMeta
from cotenant.engines.accuracy import Accuracy, measure
from cotenant.engines.base import Array, EngineMeta
from cotenant.engines.checkdata import read_check

KINDS = {"f": "FP32", "i": "INT64", "O": "BYTES"}


class Fixed:
    """An engine whose answers are looked up: row x of an output is at x."""

    def __init__(self, batchable: bool = True, **outputs: Array) -> None:
        self.outputs = outputs
        first = (-1,) if batchable else ()
        found = tuple(
            TensorMeta(n, KINDS[a.dtype.kind], (*first, *a.shape[1:])) for n, a in outputs.items()
        )
        inputs = (TensorMeta("x", "INT64", (*first, 1)),)
        self.meta = EngineMeta("fixed", inputs, found, batchable)
        self.axes: dict[str, tuple[str, ...]] = {}

    def run(self, _: int, inputs: dict[str, Array]) -> list[Array]:
        where = inputs["x"].reshape(-1)
        rows = [a[where] for a in self.outputs.values()]
        return rows if self.meta.batchable else [a[0] for a in rows]


def check(path: Path, engine: Fixed, settings: CheckSettings, **arrays: Any) -> Accuracy:
    count = len(arrays["labels"])
    arrays.setdefault("x", np.arange(count, dtype=np.int64)[:, np.newaxis])
    np.savez(path / "check.npz", **arrays)
    data = read_check(path / "check.npz", engine.meta.inputs, settings)
    return measure(engine, 1, data, 3)


SCORES = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1, 2, 0]]
CLASSES = np.array([0, 1, 2, 3, 0, 1, 2, 3])
WORDS = np.array(["a", "b", "c", "d"])[CLASSES]
RIGHT = 7 / 8
LABELS_OUT = np.array([0, 1, 2, 3, 0, 1, 2, 0])
WORDS_OUT = np.array(["a", "b", "c", "d"], dtype=object)[LABELS_OUT]


@pytest.mark.parametrize("batchable", [True, False])
@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        ({"scores": SCORES}, CLASSES),
        ({"scores": SCORES}, CLASSES[:, np.newaxis]),
        ({"label": LABELS_OUT, "scores": SCORES}, CLASSES),
        ({"label": LABELS_OUT[:, np.newaxis], "scores": SCORES}, CLASSES),
        ({"label": WORDS_OUT, "scores": SCORES}, WORDS),
        ({"scores": SCORES, "label": WORDS_OUT}, WORDS),
        ({"loss": np.zeros((8,), np.float32), "scores": SCORES}, CLASSES),
    ],
)
def test_the_output_that_fits_the_labels_is_compared(
    outputs: dict[str, Array], labels: Array, batchable: bool, tmp_path: Path
) -> None:
    found = check(tmp_path, Fixed(batchable, **outputs), CheckSettings(), labels=labels)
    assert found.value == RIGHT


def test_classes_may_be_on_the_second_axis_of_a_map(tmp_path: Path) -> None:
    scores = np.moveaxis(np.eye(3, dtype=np.float32)[np.arange(8 * 6).reshape(8, 2, 3) % 3], -1, 1)
    labels = np.arange(8 * 6).reshape(8, 2, 3) % 3
    assert check(tmp_path, Fixed(map=scores), CheckSettings(), labels=labels).value == 1.0


def test_regressions_are_measured_by_their_error(tmp_path: Path) -> None:
    truth = np.linspace(0, 1, 8, dtype=np.float32)
    exact = check(tmp_path, Fixed(y=truth[:, np.newaxis]), CheckSettings(), labels=truth)
    assert exact.value == pytest.approx(1.0)
    mean = np.full((8, 1), truth.mean(), np.float32)
    none = check(tmp_path, Fixed(y=mean), CheckSettings(), labels=truth)
    assert none.value == pytest.approx(0, abs=1e-5)
    wrong = check(tmp_path, Fixed(y=-truth[:, np.newaxis]), CheckSettings(), labels=truth)
    assert wrong.value < 0


def test_output_and_measure_may_be_named_in_the_file_or_in_the_settings(tmp_path: Path) -> None:
    engine = Fixed(label=np.zeros(8, np.int64), scores=SCORES)
    assert check(tmp_path, engine, CheckSettings(), labels=CLASSES).value == 2 / 8
    named = check(tmp_path, engine, CheckSettings(), labels=CLASSES, output="scores")
    assert named.value == RIGHT
    settings = CheckSettings("scores", "argmax")
    assert check(tmp_path, engine, settings, labels=CLASSES).value == RIGHT


@pytest.mark.parametrize(
    ("arrays", "settings"),
    [
        ({"labels": CLASSES[:5], "x": np.zeros((8, 1), np.int64)}, CheckSettings()),
        ({"labels": CLASSES[:0]}, CheckSettings()),
        ({"labels": WORDS}, CheckSettings()),
        ({"labels": CLASSES, "x": np.full((8, 1), "a")}, CheckSettings()),
        ({"labels": CLASSES, "x": np.full((8, 1), 0.5)}, CheckSettings()),
        ({"labels": CLASSES}, CheckSettings(output="nothing")),
        ({"labels": CLASSES}, CheckSettings(measure="exact")),
        ({"labels": CLASSES, "measure": "guess"}, CheckSettings()),
        ({"labels": np.full(8, np.nan)}, CheckSettings()),
        ({"labels": np.zeros((8, 0))}, CheckSettings()),
        ({"labels": CLASSES.astype("datetime64[s]")}, CheckSettings()),
        ({"labels": WORDS, "measure": "r2"}, CheckSettings()),
        ({"labels": CLASSES, "x": np.full((8, 1), 2**63, np.uint64)}, CheckSettings()),
    ],
)
def test_check_data_that_do_not_fit_are_refused_and_said_to_be(
    arrays: dict[str, Any], settings: CheckSettings, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"check\.npz"):
        check(tmp_path, Fixed(scores=SCORES), settings, **arrays)


def test_scores_that_are_no_numbers_are_wrong(tmp_path: Path) -> None:
    scores = np.full((8, 4), np.nan, np.float32)
    assert check(tmp_path, Fixed(scores=scores), CheckSettings(), labels=CLASSES).value == 0
    with pytest.raises(ModelError, match=r"check\.npz"):
        y = np.full((8, 1), np.nan, np.float32)
        check(tmp_path, Fixed(y=y), CheckSettings(), labels=np.linspace(0, 1, 8))


def test_one_score_for_two_classes_is_measured_where_that_is_said(tmp_path: Path) -> None:
    engine = Fixed(y=np.linspace(0, 1, 8, dtype=np.float32)[:, np.newaxis])
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 0])
    with pytest.raises(ModelError, match=r"check\.npz"):
        check(tmp_path, engine, CheckSettings(), labels=labels)
    said = CheckSettings(measure="threshold")
    assert check(tmp_path, engine, said, labels=labels).value == RIGHT


def test_shapes_that_only_have_the_same_size_are_not_compared(tmp_path: Path) -> None:
    engine = Fixed(y=np.zeros((8, 2, 3), np.float32))
    with pytest.raises(ModelError, match=r"check\.npz"):
        check(tmp_path, engine, CheckSettings(), labels=np.zeros((8, 3, 2)) + 0.5)


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "check.npz", labels=CLASSES)
    with pytest.raises(ModelError, match="'x'"):
        read_check(tmp_path / "check.npz", Fixed(scores=SCORES).meta.inputs, CheckSettings())


def test_numbers_are_taken_in_the_type_of_the_model_where_that_loses_nothing(
    tmp_path: Path,
) -> None:
    x = np.arange(8, dtype=np.int32)[:, np.newaxis]
    found = check(tmp_path, Fixed(scores=SCORES), CheckSettings(), labels=CLASSES, x=x)
    assert found.value == RIGHT
