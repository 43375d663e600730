"""Execution providers that come as libraries: which are taken, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cotenant.domain.config import ModelSettings, Plugin, parse_model_settings
from cotenant.domain.errors import ConfigError, ModelError
from cotenant.engines.base import Array, Opening
from cotenant.engines.onnx_plugin import VARIABLE, libraries
from tests.builders import open_engine
from tests.live.conftest import scale_model

OURS = "CPUExecutionProvider"
"""ONNX Runtime's own, which is found among the devices of plug-ins as they are."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    scale_model(path)
    return path


def opened(model: Path, plugin: Plugin) -> list[Array]:
    settings = ModelSettings(engine="onnxruntime-plugin", plugin=plugin)
    engine = open_engine(Opening(model, (1,), settings))
    return engine.run(1, {"x": np.ones((1, 4), np.float32)})  # type: ignore[union-attr]


def test_a_model_is_executed_by_the_provider_that_it_names(model: Path) -> None:
    (y,) = opened(model, Plugin(OURS))
    assert y.tolist() == [[2, 2, 2, 2]]


def test_by_itself_no_model_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "Nothing=/nowhere.so")
    assert "onnx" in open_engine(Opening(model, (1,))).meta.platform


def test_a_provider_without_a_device_is_refused_with_those_that_have_one(model: Path) -> None:
    with pytest.raises(ModelError, match=OURS):
        opened(model, Plugin("QNNExecutionProvider"))


def test_without_a_name_there_must_be_one_library(model: Path) -> None:
    with pytest.raises(ModelError, match=r"plugin\.provider"):
        opened(model, Plugin())


@pytest.mark.parametrize("said", ["/nowhere.so", "Ours=", "Ours=/nowhere.so", "Ours={here}"])
def test_what_is_no_library_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setenv(VARIABLE, said.format(here=model))
    with pytest.raises(ModelError):
        opened(model, Plugin("Ours"))


def test_several_libraries_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "A=/a.so:B=/b.so")
    assert libraries() == {"A": Path("/a.so"), "B": Path("/b.so")}


def test_options_are_words_and_others_are_refused() -> None:
    found = parse_model_settings("plugin: {provider: A, options: {backend_type: htp}}")
    assert found.plugin == Plugin("A", {"backend_type": "htp"})
    for wrong in ("plugin: {library: /a.so}", "plugin: {options: {a: 1}}"):
        with pytest.raises(ConfigError):
            parse_model_settings(wrong)
