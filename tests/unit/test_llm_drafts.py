"""Draft models: what they are asked, when they are let be, and that answers stay what they are."""

from __future__ import annotations

import json
from collections.abc import Sequence as Tokens
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from safetensors.numpy import save_file

from cotenant.domain.config import ModelSettings, parse_model_settings
from cotenant.domain.errors import ConfigError, ModelError
from cotenant.engines.base import Opening
from cotenant.engines.llm.blocks import BlockPool
from cotenant.engines.llm.checkpoint import open_checkpoint
from cotenant.engines.llm.drafter import Drafter, open_draft
from cotenant.engines.llm.drafting import Ask, Drafting
from cotenant.engines.llm.engine import LlmEngine
from cotenant.engines.llm.families import FAMILIES
from cotenant.engines.llm.families.base import family
from cotenant.engines.llm.generator import Generator, Question
from cotenant.engines.llm.gguf import Gguf
from cotenant.engines.llm.iteration import Iteration, Iterations, Limits
from cotenant.engines.llm.keys import Keys
from cotenant.engines.llm.language import text_of
from cotenant.engines.llm.lookup import PROBE
from cotenant.engines.llm.runner import Runner, Sizes
from cotenant.engines.llm.sampler import Sampling
from cotenant.engines.llm.sequence import Sequence
from cotenant.engines.llm.text import Text
from cotenant.engines.llm.weights import Build
from cotenant.policy.iterations import IterationCosts as Costs
from cotenant.policy.iterations import Load
from tests.builders import open_engine
from tests.unit.llm_files import TYPES, write, write_tokenizer

SIZE: Final = 4
MAIN: Final = {"fixed": 100.0, "token": 4.0}
CHEAP: Final = {"fixed": 5.0, "token": 1.0}


class Steady:
    """Costs that stay what they are, whatever is measured. No subclass: compiled ones have none."""

    def __init__(self, **costs: float) -> None:
        self._costs = Costs(**costs)

    def observe(self, work: Load, ns: int) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._costs, name)


def core(
    blocks: int = 64, draft: dict[str, float] = CHEAP, context: int = 999, **limits: int
) -> Iterations:
    drafting = Drafting(BlockPool(blocks, SIZE), context, Steady(**draft))
    pool = BlockPool(blocks, SIZE)
    found = Iterations(pool, Limits(**{"drafts": 4} | limits), Steady(**MAIN), drafting)
    found.acceptance.chance = 0.0  # or what is said again is looked up
    return found


def sequence(key: int = 1, prompt: int = 6, most: int = 40, **fields: int) -> Sequence:
    return Sequence(key, tuple(range(100 * key, 100 * key + prompt)), most, **fields)


def step(found: Iterations, within: int | None = None, right: bool = True) -> Iteration:
    """An iteration in which nobody says the same twice, and all drafts are right or wrong."""
    iteration = found.next(within)
    drafts = {
        ask.key: [
            _token(ask.key, ask.start + len(ask.tokens) + n) * right for n in range(ask.wanted)
        ]
        for ask in iteration.asks
    }
    iteration = iteration.drafted(drafts)
    chosen = {}
    for work in iteration.works:
        end = work.start + len(work.tokens) + 1
        chosen[work.key] = [_token(work.key, at) for at in range(end - work.sampled, end)]
    found.done(iteration, chosen)
    found.check()
    return iteration


def _token(key: int, at: int) -> int:
    """What a sequence says at a position."""
    return 10_000 * (key + 1) + at


def started(found: Iterations, *sequences: Sequence) -> Iterations:
    """With these sequences, whose prompts were read by the model."""
    for each in sequences:
        found.add(each)
    step(found)
    return found


def drafting(found: Iterations) -> Drafting:
    assert found.drafting is not None
    return found.drafting


# --- what is asked --------------------------------------------------------------------------


def test_it_reads_what_it_has_not_and_goes_on_from_there() -> None:
    found = started(core(), sequence(prompt=6))
    drafting(found).acceptance.chance = 0.99
    read = [(ask.start, len(ask.tokens)) for _ in range(3) for ask in step(found).asks]
    # The newest token, and the last draft, which was right and not read.
    assert read == [(0, 7), (10, 2), (15, 2)]


def test_what_it_read_of_wrong_drafts_is_read_again() -> None:
    found = started(core(), sequence(prompt=6))
    drafting(found).acceptance.chance = 0.99
    read = [(a.start, len(a.tokens)) for _ in range(3) for a in step(found, right=False).asks]
    assert read == [(0, 7), (7, 1), (8, 1)]


def test_what_was_said_before_is_drafted_first() -> None:
    found = core()
    found.acceptance.chance = drafting(found).acceptance.chance = 0.9
    found.add(Sequence(1, (1, 2, 3, 4, 5, 1, 2), 20))
    found.done(found.next(), {1: [3]})
    iteration = step(found)
    assert iteration.works[0].drafts[:2] == (4, 5)
    assert not iteration.asks
    assert step(found).asks


def test_an_answer_to_a_known_prompt_finds_what_was_read() -> None:
    found = started(core(), sequence(1, prompt=12, most=3))
    while found.running:
        step(found)
    started(found, Sequence(2, (*range(100, 112), 7), 9))
    (ask,) = step(found).asks
    assert ask.start == 12


def test_no_more_is_drafted_than_it_can_look_at() -> None:
    found = started(core(context=10), sequence(prompt=6))
    drafting(found).acceptance.chance = 0.99
    while found.running:
        for ask in step(found).asks:
            assert ask.start + len(ask.tokens) + ask.wanted - 1 <= 10


def test_where_it_has_no_block_the_model_goes_on_without() -> None:
    found = core(blocks=32)
    drafting(found).pool.resize(2)
    started(found, sequence(prompt=12))
    while found.running:
        assert not step(found).asks


def test_who_is_put_aside_is_read_again() -> None:
    found = core(blocks=10)
    started(found, sequence(1, prompt=12, most=20, due=1), sequence(2, prompt=12, due=2, most=20))
    asked: dict[int, list[int]] = {1: [], 2: []}
    while found.running + found.waiting:
        for ask in step(found).asks:
            asked[ask.key].append(ask.start)
    assert found.put_aside
    assert asked[1] == sorted(asked[1])
    assert asked[2] != sorted(asked[2])
    assert drafting(found).pool.available == 10


def test_a_smaller_pool_has_what_it_read_at_once() -> None:
    found = started(core(blocks=12), sequence(1, prompt=8), sequence(2, prompt=8))
    step(found)
    drafting(found).resize(2)
    drafting(found).check(s for s in map(found.find, (1, 2)) if s)
    assert drafting(found).pool.capacity == 2


# --- whether it pays ------------------------------------------------------------------------


def asked(found: Iterations, steps: int, right: bool) -> int:
    return sum(len(step(found, right=right).asks) for _ in range(steps))


def test_drafts_that_are_never_right_are_given_up_but_for_trials() -> None:
    found = started(core(blocks=999), sequence(most=900))
    asked(found, 60, right=False)
    assert 1 <= asked(found, 8 * PROBE, right=False) <= 8


def test_the_dearer_a_trial_the_rarer_it_is() -> None:
    def trials(prompt: int) -> int:
        found = started(core(blocks=2000), sequence(1, prompt, 2000))
        drafting(found).acceptance.chance = 0.0
        return asked(found, 4 * PROBE, right=False)

    assert trials(6) > trials(500)


def test_a_draft_model_as_slow_as_the_model_is_let_be() -> None:
    found = started(core(draft=MAIN), sequence(most=200))
    drafting(found).acceptance.chance = 0.99
    assert asked(found, 40, right=True) <= 2


def test_it_drafts_for_few_and_not_where_many_fill_the_iteration() -> None:
    def share(count: int) -> float:
        found = core(blocks=999, draft={"fixed": 5.0, "token": 3.0})
        started(found, *(sequence(key, most=99) for key in range(count)))
        drafting(found).acceptance.chance = 0.7
        return len(step(found).asks) / count

    assert share(2) == 1
    assert share(60) == 0


def test_together_they_share_what_a_round_takes() -> None:
    found = started(core(draft={"fixed": 60.0, "token": 1.0}), *map(sequence, range(4)))
    drafting(found).acceptance.chance = 0.8
    assert len(step(found).asks) == 4


def test_it_is_part_of_what_an_iteration_takes() -> None:
    found = started(core(), sequence(prompt=60))
    drafting(found).acceptance.chance = 0.99
    while found.running:
        iteration = step(found, within=150)
        assert iteration.expected <= 150
        for ask in iteration.asks:
            assert len(ask.tokens) < 60


def test_while_prompts_wait_it_catches_up_a_block_at_a_time() -> None:
    found = started(core(tokens=40), sequence(1, prompt=30, pace=1))
    found.add(sequence(2, prompt=200))
    (ask,) = step(found).asks
    assert len(ask.tokens) == SIZE
    assert not ask.wanted


# --- with real models -----------------------------------------------------------------------

MEMORY: Final = Sizes(blocks=24, size=SIZE, host=0, context=48)
Parts = tuple[Text, Runner, dict[str, Runner]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("models")

    def runner(path: Path) -> Runner:
        return Runner(open_checkpoint(path), Build(), MEMORY, (1,))

    path = write(folder / "model.gguf", text=True)
    other = write(folder / "other.gguf", text=True, seed=6)
    small = {"same": runner(path), "unrelated": runner(other)}
    return text_of(open_checkpoint(path), path), runner(path), small


class Counting(Drafter):
    """Knows how often it was asked."""

    asked = 0

    def propose(self, units: int, asks: Tokens[Ask]) -> dict[int, list[int]]:
        self.asked += len(asks)
        return super().propose(units, asks)


def generator(parts: Parts, draft: str | None = None) -> Generator:
    text, runner, small = parts
    found = core(MEMORY.blocks, context=MEMORY.context)
    if draft is None:
        return Generator(text, runner, Iterations(found.pool, Limits(drafts=0)))
    drafter = Counting(small[draft], drafting(found), text.vocabulary)
    return Generator(text, runner, found, drafter)


def answers(made: Generator, how: Sampling, count: int = 6) -> tuple[dict[int, list[int]], int]:
    """What is said to so many prompts, two at a time; and in how many steps."""
    said: dict[int, list[int]] = {}
    steps = 0
    for key in range(count):
        prompt = tuple(made.text.encode(f"say {key} and {key * key}", special=True))
        made.begin(key, Question(prompt=prompt, most=30, sampling=how))
        while made.core.running + made.core.waiting > (key < count - 1):
            steps += 1
            for piece in made.step(1):
                said.setdefault(piece.key, []).extend(c.token for c in piece.choices)
            made.core.check()
    return said, steps


@pytest.mark.parametrize("how", [Sampling(temperature=0, seed=0), Sampling(temperature=1, seed=3)])
@pytest.mark.parametrize("draft", ["same", "unrelated"])
def test_answers_are_what_they_are_without(parts: Parts, draft: str, how: Sampling) -> None:
    assert answers(generator(parts, draft), how)[0] == answers(generator(parts), how)[0]


def test_a_model_drafts_well_for_itself(parts: Parts) -> None:
    made = generator(parts, "same")
    said, steps = answers(made, Sampling(temperature=0, seed=0))
    assert drafting(made.core).acceptance.chance > 0.9
    assert 2 * steps < sum(map(len, said.values()))


def test_an_unrelated_model_is_let_be(parts: Parts) -> None:
    made = generator(parts, "unrelated")
    how, drafter = Sampling(temperature=1, seed=3), made.drafter
    assert isinstance(drafter, Counting)
    answers(made, how)
    assert drafting(made.core).acceptance.chance < 0.2
    before = drafter.asked
    said, _ = answers(made, how)
    assert drafter.asked - before < sum(map(len, said.values())) / 10


# --- model.yaml -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a model with one version, and of a draft model beside it."""
    for name in ("1", "small"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "model.gguf", text=True)
    return tmp_path


def test_a_draft_model_is_a_path_seen_from_the_models_directory() -> None:
    assert parse_model_settings("draft: ../small/1").draft == "../small/1"
    for wrong in ("draft: 1", "drafts: small"):
        with pytest.raises(ConfigError, match="draft"):
            parse_model_settings(wrong)


@pytest.mark.parametrize("draft", ["small", "small/model.gguf", "../{name}/small"])
def test_a_file_or_a_directory_with_one_is_a_draft_model(folder: Path, draft: str) -> None:
    text = text_of(open_checkpoint(folder / "1/model.gguf"), folder / "1/model.gguf")
    assert open_draft(folder, draft.format(name=folder.name), text).decoder.layers == 2


@pytest.mark.parametrize("draft", ["nothing", "1/nothing.gguf", "small/notes.txt", "empty"])
def test_what_is_no_draft_model_is_refused(folder: Path, draft: str) -> None:
    (folder / "empty").mkdir()
    (folder / "small" / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=rf"draft: {draft}: .*GGUF or safetensors"):
        LlmEngine(folder / "1" / "model.gguf", (1,), 1 << 20, draft=draft)


def safetensors(folder: Path) -> Text:
    """A model of random weights in a directory, with the tokenizer that is returned."""
    config = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    llama = family(FAMILIES, "llama", gguf=False)
    shapes = llama.from_config(Keys(config), "llama").tensors()
    weights = {llama.tensor(name): np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return Text.from_folder(folder)


def test_a_directory_of_safetensors_is_a_draft_model(folder: Path) -> None:
    text = safetensors(folder / "other")
    assert open_draft(folder, "other", text).decoder.vocab == 300


def test_a_draft_model_of_other_tokens_is_refused(folder: Path) -> None:
    safetensors(folder / "other")
    with pytest.raises(ModelError, match=r"draft: other: it has 257 tokens.*vocabulary"):
        LlmEngine(folder / "1" / "model.gguf", (1,), 1 << 20, draft="other")
    keys = dict(Gguf(folder / "small" / "model.gguf").keys)
    first, second, *others = keys["tokenizer.ggml.tokens"]
    keys["tokenizer.ggml.tokens"] = [second, first, *others]
    with pytest.raises(ModelError, match=r"draft: small: token 0 is .*vocabulary"):
        open_draft(folder, "small", Text.from_gguf(keys))


@pytest.mark.parametrize(
    ("name", "engine"), [("model.onnx", "auto"), ("model.safetensors", "vllm")]
)
def test_what_has_no_use_for_a_draft_model_refuses_it(
    tmp_path: Path, name: str, engine: str
) -> None:
    with pytest.raises(ModelError, match="draft"):
        open_engine(Opening(tmp_path / name, (1,), ModelSettings(engine=engine, draft="small")))


def test_an_engine_counts_the_keys_and_values_of_both(folder: Path) -> None:
    path = folder / "1" / "model.gguf"
    write(folder / "small" / "model.gguf", TYPES.Q4_0, text=True)
    alone = LlmEngine(path, (1,), 1 << 20)
    both = open_engine(Opening(path, (1,), ModelSettings(draft="small"), 1 << 20))
    assert isinstance(both, LlmEngine)
    assert both.meta.block == 2 * alone.meta.block
    assert both.meta.pool <= 1 << 20
    inputs = {"text_input": np.array(["hello hello"], np.object_)}
    inputs["max_tokens"] = np.array([20], np.int32)
    tokens = {}
    for engine in (alone, both):
        engine.begin(1, inputs)
        tokens[engine] = []
        while True:
            (turn,) = engine.turn(1, [1], 0).turns
            tokens[engine] += turn.outputs[1].tolist() if turn.outputs else []
            if turn.finished:
                break
    assert tokens[alone] == tokens[both]
    both.resize(0)
    assert both.pool_use()[0] == 0
