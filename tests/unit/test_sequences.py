"""Requests that live through several turns, on the worker's side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cotenant.domain.errors import ModelError
from cotenant.engines.base import Array, EngineMeta, Opening
from cotenant.engines.pieces import PiecesEngine
from cotenant.runtime.messages import Item, Open, Outputs, Place, Run
from cotenant.runtime.sequences import Sequences
from tests.builders import open_engine

PIECES = 3


class Rig:
    """Sequences over the stand-in engine; ``texts`` are the inputs by request, ``said`` what was
    stored for each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text(f'{{"pieces": {PIECES}, "turn_ms": 0}}')
        engine = open_engine(Opening(path, (1,)))
        assert isinstance(engine, PiecesEngine)
        self.engine = engine
        self.texts = {1: "abc", 2: "uvwxyz"}
        self.said: dict[int, list[str]] = {}
        self.sequences = Sequences(engine, self.read, self.store)

    def read(self, meta: EngineMeta, items: tuple[Item, ...]) -> dict[str, Array]:
        (item,) = items
        if item.id not in self.texts:
            raise ModelError("unknown")
        return {"text": np.array([self.texts[item.id]], np.object_)}

    def store(self, item: Item, parts: list[Array]) -> Outputs:
        self.said.setdefault(item.id, []).extend(str(part[0]) for part in parts[:1])
        return Outputs(tuple(Place(part.shape, 0, 8) for part in parts))

    def run(self, *keys: int) -> tuple[Outputs, ...]:
        items = tuple(Item(1, (), 0, 0, key) for key in keys)
        outputs, _ = self.sequences.turn(Run(1, (0,), 1, 0, items), items)
        return outputs


def opening(rig: Rig, units: tuple[int, ...] = (1,), check: str = "") -> Open:
    return Open(path=str(rig.path), units=units, max_batch=4, check=check)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "model.pieces.json")


def test_a_request_has_a_turn_with_each_batch_until_it_is_finished(rig: Rig) -> None:
    assert [rig.run(1)[0].finished for _ in range(PIECES)] == [False, False, True]
    assert rig.said == {1: ["a", "b", "c"]}


def test_requests_join_and_leave_the_turns_of_others(rig: Rig) -> None:
    rig.run(1)
    assert [outputs.finished for outputs in rig.run(1, 2)] == [False, False]
    assert [outputs.finished for outputs in rig.run(1, 2)] == [True, False]
    assert [outputs.finished for outputs in rig.run(2)] == [True]
    assert rig.said == {1: ["a", "b", "c"], 2: ["uv", "wx", "yz"]}


def test_an_engine_is_told_when_an_answer_is_wanted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[int, tuple[int, int]] = {}

    def begin(_: object, key: int, inputs: object, due: int = 0, pace: int = 0) -> None:
        begun[key] = due, pace
        raise ModelError("enough was said")

    monkeypatch.setattr(PiecesEngine, "begin", begin)
    items = (Item(1, (), 0, 0, 1, due=70, pace=8), Item(1, (), 0, 0, 2, due=50))
    rig.sequences.turn(Run(1, (0,), 1, 0, items), items)
    assert begun == {1: (70, 8), 2: (50, 0)}


def test_what_is_forgotten_begins_anew_if_it_comes_again(rig: Rig) -> None:
    rig.run(1)
    rig.sequences.forget((1, 77))
    rig.run(1)
    assert rig.said == {1: ["a", "a"]}


def test_an_input_that_is_refused_fails_alone(rig: Rig) -> None:
    wrong, right = rig.run(5, 1)
    assert (wrong.error, wrong.finished) == ("unknown", True)
    assert (right.error, right.finished) == ("", False)
    assert rig.run(5)[0].error


def test_it_is_measured_in_several_sizes_and_nothing_is_kept(rig: Rig) -> None:
    opened = rig.sequences.open(opening(rig, units=(1, 2)))
    assert [(units, count) for units, count, _ in opened.profile] == [
        (units, count) for units in (1, 2) for count in (1, 2, 4)
    ]
    assert opened.meta.turns
    assert not rig.engine._texts


@pytest.mark.parametrize("text", ["{", '{"pieces": 0}', '{"piece": 3}', '{"turn_ms": -1}'])
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.pieces.json"
    path.write_text(text)
    with pytest.raises(ModelError):
        open_engine(Opening(path, (1,)))


def test_check_data_do_not_fit_answers_in_turns(rig: Rig) -> None:
    with pytest.raises(ModelError):
        rig.sequences.open(opening(rig, check="check.npz"))
