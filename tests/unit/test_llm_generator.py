"""Whole answers: the core, the runner and the text together, on a tiny random model."""

from __future__ import annotations

import pytest

from cotenant.domain.errors import InvalidRequest, TooLarge
from cotenant.engines.llm.asking import Lark, OneOf
from cotenant.engines.llm.blocks import BlockPool
from cotenant.engines.llm.checkpoint import GgufCheckpoint
from cotenant.engines.llm.generator import Generator, Piece, Question
from cotenant.engines.llm.gguf import Gguf
from cotenant.engines.llm.iteration import Iterations, Limits
from cotenant.engines.llm.runner import Runner, Sizes
from cotenant.engines.llm.sampler import Sampling
from cotenant.engines.llm.sequence import End
from cotenant.engines.llm.text import Text
from cotenant.engines.llm.weights import Build
from tests.unit.llm_files import TOKENS, write

GREEDY = Sampling(temperature=0, seed=0)
MEMORY = Sizes(blocks=12, size=4, host=6, context=48)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Text, Runner]:
    file = Gguf(write(tmp_path_factory.mktemp("model") / "model.gguf", text=True))
    return Text.from_gguf(file.keys), Runner(GgufCheckpoint(file), Build(), MEMORY, (1,))


def generator(parts: tuple[Text, Runner], limits: Limits | None = None) -> Generator:
    pool = BlockPool(MEMORY.blocks, MEMORY.size, MEMORY.host)
    return Generator(*parts, Iterations(pool, limits or Limits(tokens=16)))


def finish(made: Generator) -> dict[int, list[Piece]]:
    found: dict[int, list[Piece]] = {}
    for _ in range(2000):
        if not made.core.running and not made.core.waiting:
            return found
        for piece in made.step(1):
            found.setdefault(piece.key, []).append(piece)
        made.core.check()
    raise AssertionError("it does not end")


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def alone(parts: tuple[Text, Runner], question: Question) -> list[Piece]:
    made = generator(parts)
    made.begin(1, question)
    return finish(made)[1]


def asked(parts: tuple[Text, Runner], text: str, **how: object) -> Question:
    given = {"prompt": tuple(parts[0].encode(text, special=True)), "most": 20, "sampling": GREEDY}
    return Question(**given | how)  # type: ignore[arg-type]


def test_each_answers_as_it_does_alone(parts: tuple[Text, Runner]) -> None:
    """In a pool that holds less than half of them; so some are put aside and come back."""
    drawn = [Sampling(temperature=1.5, top_p=0.9, presence=0.5, seed=n) for n in range(3)]
    questions = [asked(parts, "hello hello hello", sampling=how) for how in (GREEDY, *drawn)]
    questions += [asked(parts, "say it again, say it"), asked(parts, "é", most=3)]
    made = generator(parts)
    for key, question in enumerate(questions):
        made.begin(key, question)
    together = finish(made)
    assert made.core.put_aside
    for key, question in enumerate(questions):
        once = alone(parts, question)
        assert text_of(together[key]) == text_of(once)
        assert together[key][-1].end is once[-1].end
        said = [c.token for piece in together[key] for c in piece.choices]
        assert said == [c.token for piece in once for c in piece.choices]


def test_a_stop_string_ends_an_answer_wherever_tokens_do(parts: tuple[Text, Runner]) -> None:
    question = asked(parts, "hello", sampling=Sampling(temperature=1, seed=4))
    whole = text_of(alone(parts, question))
    for start in range(2, len(whole) - 3):
        stop = whole[start : start + 3]
        pieces = alone(parts, asked(parts, "hello", sampling=question.sampling, stops=(stop,)))
        assert text_of(pieces) == whole[: whole.index(stop)]
        assert pieces[-1].end is End.STOP


def test_an_answer_is_of_its_form(parts: tuple[Text, Runner]) -> None:
    choices = ("hell", "hello", "he said")
    for seed in range(6):
        how = Sampling(temperature=2, seed=seed)
        question = asked(parts, "so?", sampling=how, grammar=OneOf(choices=choices))
        pieces = alone(parts, question)
        assert text_of(pieces) in choices
        assert pieces[-1].end is End.STOP


def test_a_form_that_becomes_too_complex_ends_its_answer_alone(parts: tuple[Text, Runner]) -> None:
    made = generator(parts)
    made.begin(1, asked(parts, "so?", grammar=Lark(grammar='start: "ab" start'), most=7))
    made.begin(2, asked(parts, "hello"))
    found = finish(made)
    assert found[1][-1].error and found[1][-1].end is None
    assert text_of(found[2]) == text_of(alone(parts, asked(parts, "hello")))


def test_who_is_forgotten_leaves_nothing(parts: tuple[Text, Runner]) -> None:
    made = generator(parts)
    for key in range(3):
        made.begin(key, asked(parts, "a long prompt that takes several steps", most=9))
    made.step(1)
    made.forget((0, 2, 77))
    found = finish(made)
    assert list(found) == [1]
    assert made.core.pool.available == MEMORY.blocks


def test_an_answer_does_not_end_where_it_must_not(parts: tuple[Text, Runner]) -> None:
    """Of a model that is made to say the token that ends answers."""
    how = Sampling(temperature=0, seed=0, bias={len(TOKENS) - 1: 100.0})
    assert alone(parts, asked(parts, "a", sampling=how))[-1].end is End.STOP
    endless = alone(parts, asked(parts, "a", sampling=how, endless=True))
    assert endless[-1].end is End.LENGTH
    assert sum(len(piece.choices) for piece in endless) == 20


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"prompt": ()}, InvalidRequest),
        ({"most": 0}, InvalidRequest),
        ({"prompt": (len(TOKENS),)}, InvalidRequest),
        ({"prompt": (-1,)}, InvalidRequest),
        ({"prompt": (1,) * 40}, TooLarge),
        ({"most": 1 << 40}, TooLarge),
        ({"sampling": Sampling(temperature=9, seed=0)}, InvalidRequest),
        ({"grammar": Lark(grammar="start: nothing")}, InvalidRequest),
    ],
)
def test_what_cannot_be_answered_is_refused_and_kept_nowhere(
    parts: tuple[Text, Runner], how: dict[str, object], kind: type[Exception]
) -> None:
    made = generator(parts)
    with pytest.raises(kind):
        made.begin(1, asked(parts, "hello", **how))
    assert not made.core.waiting
    made.begin(1, asked(parts, "hello", most=2))
    assert finish(made)[1][-1].over
