"""Which engine opens a model."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from cotenant.domain.config import ModelSettings
from cotenant.domain.device import CUDA
from cotenant.domain.errors import ModelError
from cotenant.engines import registry
from cotenant.engines.base import ON_CPU, Engine, Opening, Target
from cotenant.engines.registry import candidates, choose, kinds, open_language, suffixes

GPU = Target(f"{CUDA}GPU-1")


class Theirs:
    """An engine from elsewhere."""

    name = "theirs"
    suffixes = (".theirs", ".onnx")
    rank = 1
    drafts = True

    def refuses(self, opening: Opening) -> str:
        return "" if opening.target.on_cpu else "it needs a CPU"

    def open(self, opening: Opening) -> Engine:
        raise ModelError("opened")


THEIRS = Theirs()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Theirs is installed, and something that is broken."""
    found = [
        *registry.entry_points(group=registry.GROUP),
        EntryPoint("theirs", f"{__name__}:THEIRS", registry.GROUP),
        EntryPoint("broken", f"{__name__}:NOTHING", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    kinds.cache_clear()
    yield
    kinds.cache_clear()


def opening(name: str, engine: str = "auto", target: Target = ON_CPU, draft: str = "") -> Opening:
    return Opening(Path(name), (1,), ModelSettings(engine=engine, draft=draft), target=target)


@pytest.mark.parametrize(
    ("name", "target", "chosen"),
    [
        ("model.onnx", ON_CPU, "cotenant.engines.onnx"),
        ("model.onnx", GPU, "cotenant.engines.cuda.kinds"),
        ("model.gguf", ON_CPU, "cotenant.engines.llm.kinds"),
        ("model.safetensors.index.json", ON_CPU, "cotenant.engines.llm.kinds"),
        ("model.pieces.json", GPU, "cotenant.engines.pieces"),
    ],
)
def test_a_model_is_opened_by_what_its_file_and_processor_say(
    name: str, target: Target, chosen: str
) -> None:
    found = choose(opening(name, target=target))
    assert type(found).__module__ == chosen
    assert found == choose(opening(name, found.name, target)), "naming it changes nothing"


def test_an_engine_that_is_named_is_taken_before_those_that_rank_higher() -> None:
    assert choose(opening("model.safetensors", "vllm")).name == "vllm"
    assert choose(opening("model.onnx", "tensorrt", GPU)).name == "tensorrt"


@pytest.mark.parametrize(
    ("name", "engine", "target"),
    [
        ("model.xyz", "auto", ON_CPU),
        ("model.gguf", "auto", GPU),
        ("model.onnx", "auto", Target("npu:0")),
        ("model.onnx", "tensorrt", ON_CPU),
        ("model.onnx", "llm", ON_CPU),
        ("model.onnx", "onnxruntme", ON_CPU),
    ],
)
def test_what_nothing_opens_is_refused_with_what_would(
    name: str, engine: str, target: Target
) -> None:
    with pytest.raises(ModelError) as refused:
        choose(opening(name, engine, target))
    assert name in str(refused.value)


def test_a_draft_model_is_for_those_that_take_one() -> None:
    assert choose(opening("model.gguf", draft="small")).drafts
    for name, engine in (("model.onnx", "auto"), ("model.safetensors", "vllm")):
        with pytest.raises(ModelError, match="draft"):
            choose(opening(name, engine, draft="small"))


def test_engines_from_elsewhere_are_as_good(installed: None) -> None:
    assert choose(opening("model.onnx")).name == "theirs", "it ranks higher"
    assert choose(opening("model.onnx", target=GPU)).name == "onnxruntime"
    assert choose(opening("model.theirs")) is THEIRS
    assert ".theirs" in suffixes()


def test_one_that_is_broken_is_left_out(installed: None) -> None:
    assert "theirs" in [kind.name for kind in kinds()]
    assert choose(opening("model.gguf")).name == "llm"


def test_each_engine_for_such_files_says_whether_it_could_open_one_if_it_were_named() -> None:
    on_cpu = {c.name: c.refusal for c in candidates(opening("model.onnx", "openvino"))}
    assert list(dict.fromkeys(k.name for k in kinds() if ".onnx" in k.suffixes)) == list(on_cpu)
    assert not on_cpu["onnxruntime"] and not on_cpu["openvino"], "of kinds with one name one can"
    assert on_cpu["tensorrt"] and on_cpu["onnxruntime-plugin"]
    on_gpu = {c.name: c.refusal for c in candidates(opening("model.onnx", target=GPU))}
    assert not on_gpu["onnxruntime"] and not on_gpu["tensorrt"] and on_gpu["openvino"]
    assert not candidates(opening("model.xyz"))


def test_an_engine_that_cannot_even_refuse_keeps_nobody_from_opening(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(opening: Opening) -> str:
        raise KeyError("broken")

    monkeypatch.setattr(THEIRS, "refuses", breaks)
    assert choose(opening("model.onnx")).name == "onnxruntime"
    assert {c.name: c.refusal for c in candidates(opening("model.onnx"))}["theirs"]


def test_only_language_models_have_a_language() -> None:
    with pytest.raises(ModelError, match="no language model"):
        open_language(Path("model.onnx"))
