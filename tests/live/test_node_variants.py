"""A node serves a model in the variant that holds the objective, and says which that is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from cotenant.domain.variant import (
    Compared,
    Timing,
    VariantRecord,
    VariantState,
    read_variant,
    write_variant,
)
from cotenant.runtime.repository import ModelFiles, Repository, digest
from tests.live.conftest import scale_model

if TYPE_CHECKING:
    from tests.live.conftest import Answer, Box, Boxes

X = np.ones((1, 256), np.float32)
LONG = 300
"""Layers: more than the objective allows on any machine."""


def files(box: Box, name: str) -> ModelFiles:
    return Repository(box.models).files(name, "1")


def put(box: Box, name: str, state: VariantState, **changes: Any) -> Path:
    """A variant that is some hundred times as fast, put there whole as ``optimize`` does."""
    version = files(box, name)
    directory = version.path.parent / "variants" / "fast"
    hidden = directory.with_name(".fast")
    scale_model(hidden / "model.onnx", width=256)
    record = VariantRecord(
        recipe="a test's",
        parent=digest(version),
        made="2026-11-29T12:00:00+00:00",
        state=state,
        engine="onnxruntime",
        accuracy=Compared(
            measure="argmax",
            rows=500,
            original=0.96,
            value=0.95,
            lost=9,
            won=4,
            drop=0.01,
            bound=0.02,
        ),
        profile=(Timing("cpu", "onnxruntime", 1, 1, 1_000_000, 100_000_000),),
    )
    text = write_variant(msgspec.structs.replace(record, **changes))
    (hidden / "variant.yaml").write_text(text)
    hidden.rename(directory)
    return directory


def promote(directory: Path, state: VariantState = VariantState.PROMOTED) -> None:
    path = directory / "variant.yaml"
    record = msgspec.structs.replace(read_variant(path.read_text()), state=state)
    path.with_name(".new").write_text(write_variant(record))
    path.with_name(".new").rename(path)


def variant(answer: Answer) -> str:
    said = answer.headers.get("cotenant-variant", "")
    assert said == answer.json.get("parameters", {}).get("cotenant-variant", "")
    return str(said)


def serves(box: Box, name: str) -> str:
    answer = box.infer(name, x=X)
    return variant(answer) if answer.status == 200 else ""


@pytest.fixture
def box(boxes: Boxes) -> Box:
    """A service whose model is too slow for its objective, and one that takes no variants."""
    box = boxes()
    box.model("work", "m", layers=LONG)
    box.model("work", "fixed", layers=LONG)
    tight: dict[str, Any] = {"objective": {"latency": "4ms"}}
    return box.configure([{"name": "m"} | tight, {"name": "fixed", "variants": "original"} | tight])


def test_a_promoted_variant_serves_where_the_original_misses_the_objective(box: Box) -> None:
    directory = put(box, "m", VariantState.CANDIDATE)
    put(box, "fixed", VariantState.PROMOTED)
    box.start()
    assert box.service("m")["variants"] is None  # a candidate does not serve
    promote(directory)
    box.until(lambda: serves(box, "m") == "fast")
    assert box.service("m")["variants"]["serving"] == {"cpu": "fast"}
    metrics = box.ask("GET", "/metrics").body.decode()
    assert 'cotenant_variant_serving{kind="cpu",service="m",variant="fast"} 1.0' in metrics
    assert box.service("fixed")["variants"]["serving"] == {"cpu": "original"}
    promote(directory, VariantState.CANDIDATE)
    box.until(lambda: box.service("m")["variants"] is None)
    shutil.rmtree(directory)
    assert box.index()["m", "1"]["state"] == "READY"


def test_a_variant_that_cannot_be_loaded_leaves_the_original_serving(box: Box) -> None:
    directory = put(box, "m", VariantState.CANDIDATE)
    (directory / "model.onnx").write_text("no model")
    promote(directory)
    box.start()
    box.until(lambda: "fast" in str(box.service("m")["variants"]["failed"]))
    assert box.service("m")["variants"]["serving"] == {"cpu": "original"}
    assert box.service("m")["state"] == "READY"


def test_a_variant_with_other_tensors_is_refused(box: Box) -> None:
    directory = put(box, "m", VariantState.CANDIDATE)
    box.model("count", "other")
    shutil.copy(files(box, "other").path, directory / "model.onnx")
    promote(directory)
    box.start()
    box.until(lambda: "fast" in str(box.service("m")["variants"]["failed"]))
    assert box.service("m")["variants"]["serving"] == {"cpu": "original"}
