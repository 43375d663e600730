"""The gate: what says otherwise than the file is refused, and the fastest of the others served."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cotenant.domain.config import Exactness
from cotenant.domain.errors import ModelError
from cotenant.engines.llm import engine, verdicts
from cotenant.engines.llm.checkpoint import Checkpoint, GgufCheckpoint, open_checkpoint
from cotenant.engines.llm.engine import LlmEngine
from cotenant.engines.llm.gate import (
    MOST_TOKENS,
    REFERENCE,
    Figures,
    Judgement,
    Reader,
    check_text,
    judge,
    passages,
    quantized,
    refusal,
)
from cotenant.engines.llm.gguf import Stored
from cotenant.engines.llm.runner import Runner
from cotenant.engines.llm.text import Text
from cotenant.engines.llm.verdicts import AT_LOAD, Bounds, chosen_build, described, judgement
from cotenant.engines.llm.weights import Build
from tests.unit.llm_files import TYPES, write

AS_STORED, ROUNDED = Build(), Build(rounded=True)
LENIENT, ANY = (
    Exactness(agreement=0.5, perplexity=2.0),
    Exactness(agreement=0.0, perplexity=math.inf),
)
NOTHING = Bounds(0, 0.0)


class Damaged:
    """A checkpoint whose quantized weights are not those that it gives as FP32."""

    def __init__(self, inner: Checkpoint, damage: Callable[[Stored], Any]) -> None:
        self.decoder, self.vision = inner.decoder, inner.vision
        self.floats = inner.floats
        self._inner = inner
        self._damage = damage

    def stored(self, name: str) -> Stored | None:
        found = self._inner.stored(name)
        return found and found._replace(data=self._damage(found))


def noise(stored: Stored) -> Any:
    """Other numbers, the same scales."""
    blocks = stored.data.reshape(-1, stored.kind.size).copy()
    blocks[:, 2:] = np.random.default_rng(1).integers(0, 256, blocks[:, 2:].shape)
    return blocks.ravel()


def no_numbers(stored: Stored) -> Any:
    """Scales that are NaN."""
    blocks = stored.data.reshape(-1, stored.kind.size).copy()
    blocks[:, :2] = np.array([math.nan], np.float16).view(np.uint8)
    return blocks.ravel()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def model(tmp_path: Path, kind: TYPES = TYPES.Q4_0, **more: int) -> GgufCheckpoint:
    (tmp_path / "1").mkdir(exist_ok=True)
    found = open_checkpoint(write(tmp_path / "1" / "model.gguf", kind, text=True, **more))
    assert isinstance(found, GgufCheckpoint)
    return found


def text_of(checkpoint: GgufCheckpoint) -> Text:
    return Text.from_gguf(checkpoint.file.keys)


def judged(checkpoint: Checkpoint, text: Text, **how: Any) -> Judgement:
    script = passages("hello, all of you\n---\n1, 2, 3 and 4: so it goes on", text, 64)
    return judge(Reader(checkpoint, text, script, 1), **how)


def kept(cache: Path) -> list[Path]:
    return list(cache.glob("cotenant/builds/*.json"))


# --- judging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TYPES.Q4_0, TYPES.Q4_1, TYPES.Q8_0])
def test_what_is_computed_as_stored_passes(kind: TYPES, tmp_path: Path) -> None:
    checkpoint = model(tmp_path, kind)
    found = judged(checkpoint, text_of(checkpoint), candidates=[AS_STORED])
    figures = found.verdicts[0].figures
    assert found.build == AS_STORED
    assert figures is not None
    assert figures.agreement == 1.0
    assert figures.perplexity == pytest.approx(1.0, abs=1e-3)
    assert figures.answers == found.answers == 2


def test_noise_is_refused_and_the_next_one_is_served(tmp_path: Path) -> None:
    checkpoint = model(tmp_path)
    wrong = Damaged(checkpoint, noise)
    found = judged(wrong, text_of(checkpoint), candidates=[AS_STORED, REFERENCE])
    assert [bool(verdict.refused) for verdict in found.verdicts] == [True, False]
    assert found.build == REFERENCE
    assert found.verdicts[0].figures is not None
    assert found.verdicts[0].figures.agreement < 0.5


def test_where_none_passes_the_reference_is_served(tmp_path: Path) -> None:
    checkpoint = model(tmp_path)
    found = judged(Damaged(checkpoint, noise), text_of(checkpoint))
    assert found.build == REFERENCE
    assert len(found.verdicts) == 2
    assert all(verdict.refused for verdict in found.verdicts)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    checkpoint = model(tmp_path)
    wrong = Damaged(checkpoint, no_numbers)
    found = judged(wrong, text_of(checkpoint), candidates=[AS_STORED], floor=ANY)
    assert found.build == REFERENCE
    assert found.verdicts[0].figures is None
    assert "finite" in found.verdicts[0].refused


def test_a_reference_without_numbers_judges_nothing(tmp_path: Path) -> None:
    checkpoint = model(tmp_path)
    wrong = Damaged(checkpoint, lambda stored: stored.data)
    wrong.floats = lambda name: checkpoint.floats(name) * np.float32(math.nan)
    found = judged(wrong, text_of(checkpoint))
    assert found.build == AS_STORED
    assert not found.judged
    assert not found.verdicts


def test_the_floor_decides(tmp_path: Path) -> None:
    """Rounded activations of a model of random weights turn a few per cent of the choices."""
    checkpoint = model(tmp_path)
    text = text_of(checkpoint)
    strict = judged(checkpoint, text, floor=Exactness(agreement=1.0, perplexity=1.0 + 1e-6))
    lenient = judged(checkpoint, text, floor=LENIENT)
    assert strict.verdicts[0].figures == lenient.verdicts[0].figures
    assert strict.verdicts[0].refused
    assert lenient.build == ROUNDED
    assert len(lenient.verdicts) == 1, "what is behind the first that passes is not built"


@pytest.mark.parametrize(
    ("figures", "named"),
    [
        (Figures(0.98, 1.0, 0), ["0.98"]),
        (Figures(1.0, 1.2, 0), ["1.2"]),
        (Figures(0.9, 3.0, 0), ["0.9", "3.0"]),
        (Figures(1.0, math.nan, 0), ["nan"]),
        (Figures(math.nan, 1.0, 0), ["nan"]),
    ],
)
def test_a_refusal_says_the_figures_that_it_is_for(figures: Figures, named: list[str]) -> None:
    why = refusal(figures, Exactness())
    assert why
    assert all(each in why for each in named)


@pytest.mark.parametrize("figures", [Figures(0.99, 1.005, 0), Figures(1.0, 0.9, 0)])
def test_what_is_at_the_floor_or_above_passes(figures: Figures) -> None:
    assert refusal(figures, Exactness()) == ""


@pytest.mark.parametrize("context", [2, 4, 30])
def test_a_model_with_hardly_any_context_is_judged(context: int, tmp_path: Path) -> None:
    checkpoint = model(tmp_path, context_length=context)
    text = text_of(checkpoint)
    script = passages("so\n---\nthis one is longer than the other", text, context)
    found = judge(Reader(checkpoint, text, script, 1))
    assert found.judged
    assert found.positions > context


def test_a_model_that_is_wrong_throughout_can_be_judged(tmp_path: Path) -> None:
    """Its perplexity is more than a number can be."""
    checkpoint = model(tmp_path)
    wrong = Damaged(checkpoint, lambda stored: stored.data)
    wrong.floats = lambda name: checkpoint.floats(name) * np.float32(1e4 if name == "norm" else 1)
    found = judged(wrong, text_of(checkpoint))
    assert found.judged
    assert math.isfinite(found.perplexity)


# --- check text ---------------------------------------------------------------------------------


def test_the_package_brings_a_check_text_of_several_kinds(tmp_path: Path) -> None:
    text = text_of(model(tmp_path))
    found = passages(check_text(tmp_path), text, 4096)
    assert len(found) > 4
    assert sum(map(len, found)) > 1000
    assert max(map(len, found)) <= 256


def test_a_text_beside_the_model_is_used_instead(tmp_path: Path) -> None:
    (tmp_path / "check.txt").write_text("one\n---\n\n---\ntwo\n")
    text = text_of(model(tmp_path))
    found = passages(check_text(tmp_path), text, 64)
    assert ["".join(map(chr, each)) for each in found] == ["one", "two"]


def test_a_long_text_is_read_in_part(tmp_path: Path) -> None:
    text = text_of(model(tmp_path))
    found = passages("wind and weather " * 1000, text, 64)
    assert sum(map(len, found)) <= MOST_TOKENS
    assert max(map(len, found)) <= 64


def test_each_passage_begins_as_the_model_has_it(tmp_path: Path) -> None:
    text = text_of(model(tmp_path))
    text.begin, text.begins = 7, True
    found = passages("wind and weather " * 10 + "\n---\nrain", text, 32)
    assert len(found) > 4
    assert {each[0] for each in found} == {7}
    assert max(map(len, found)) <= 32


def test_a_check_text_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "check.txt").write_bytes(b"\xff\xfe" * 8)
    with pytest.raises(ModelError, match=r"check\.txt"):
        check_text(tmp_path)


# --- at load ------------------------------------------------------------------------------------


def test_a_judgement_is_remembered(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = model(tmp_path)
    text = text_of(checkpoint)
    first = judgement(checkpoint, text, 1, AT_LOAD)
    monkeypatch.setattr(verdicts, "judge", None)
    assert judgement(checkpoint, text, 1, AT_LOAD) == first
    assert judgement(checkpoint, text, 1, NOTHING) == first, "size counts only where it is made"
    assert len(kept(cache)) == 1


@pytest.mark.parametrize("change", ["model", "check"])
def test_another_file_or_text_is_judged_anew(change: str, tmp_path: Path, cache: Path) -> None:
    checkpoint = model(tmp_path)
    judgement(checkpoint, text_of(checkpoint), 1, AT_LOAD)
    if change == "check":
        (tmp_path / "1" / "check.txt").write_text("something else")
    else:
        checkpoint = model(tmp_path, TYPES.Q8_0)
    judgement(checkpoint, text_of(checkpoint), 1, AT_LOAD)
    assert len(kept(cache)) == 2


def test_what_is_kept_and_damaged_is_made_again(tmp_path: Path, cache: Path) -> None:
    checkpoint = model(tmp_path)
    text = text_of(checkpoint)
    first = judgement(checkpoint, text, 1, AT_LOAD)
    kept(cache)[0].write_text('{"build": 3}')
    assert judgement(checkpoint, text, 1, AT_LOAD) == first


@pytest.mark.parametrize("bounds", [Bounds(1 << 10, math.inf), Bounds(AT_LOAD.size, -1.0)])
def test_what_is_too_large_or_too_slow_to_judge_is_served_as_stored(
    bounds: Bounds,
    tmp_path: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = model(tmp_path)
    monkeypatch.setattr(verdicts, "AT_LOAD", bounds)
    assert chosen_build(checkpoint, text_of(checkpoint), (1, 2), Exactness()) == AS_STORED
    assert "unjudged" in caplog.text
    assert not kept(cache), "it is judged as soon as that is possible"


def test_without_a_place_to_keep_it_a_model_is_judged_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = model(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    found = judgement(checkpoint, text_of(checkpoint), 1, AT_LOAD)
    assert found.judged
    assert found.verdicts


def test_a_file_that_is_not_quantized_is_not_judged(tmp_path: Path, cache: Path) -> None:
    checkpoint = model(tmp_path, TYPES.F16)
    assert not quantized(checkpoint)
    assert chosen_build(checkpoint, text_of(checkpoint), (1,), Exactness()) == AS_STORED
    assert not kept(cache)


@pytest.mark.parametrize("build", [AS_STORED, ROUNDED, REFERENCE])
def test_an_engine_serves_what_was_chosen(
    build: Build, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model(tmp_path).file.path
    LlmEngine(path, (1,), kv=1 << 20)
    kept(cache)[0].write_bytes(msgspec.json.encode(Judgement(build, "as chosen before")))
    built: list[Build] = []

    def runner(checkpoint: Checkpoint, chosen: Build, *rest: Any) -> Runner:
        built.append(chosen)
        return Runner(checkpoint, chosen, *rest)

    monkeypatch.setattr(engine, "Runner", runner)
    LlmEngine(path, (1,), kv=1 << 20)
    assert built == [build]


def test_a_judgement_is_told_with_its_figures(tmp_path: Path) -> None:
    checkpoint = model(tmp_path)
    found = judged(Damaged(checkpoint, noise), text_of(checkpoint))
    told = described(found).splitlines()
    assert len(told) == 4
    for line, verdict in zip(told[1:3], found.verdicts, strict=True):
        assert verdict.figures is not None
        assert f"{verdict.figures.agreement:.4f}" in line
        assert verdict.refused in line


def test_the_command_shows_a_judgement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model(tmp_path).file.path
    monkeypatch.setattr("sys.argv", ["verdicts", str(path), "--threads", "1"])
    verdicts.main()
    assert "agreement" in capsys.readouterr().out
