"""vLLM behind a worker's contract, with a stand-in for vLLM (``vllm_standin``)."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cotenant.domain.config import ModelSettings
from cotenant.domain.errors import ModelError
from cotenant.engines.base import Array, Opening, Target, TurnEngine
from cotenant.engines.llm.asking import Details
from cotenant.engines.llm.text import Text
from cotenant.engines.llm.vllm import SMALLEST, VERSION, Balloon, VllmEngine
from cotenant.policy.iterations import load
from tests.builders import open_engine
from tests.unit.llm_files import END, write_tokenizer
from tests.unit.vllm_standin import (
    BLOCK,
    BLOCK_BYTES,
    BLOCKS,
    CONTEXT,
    BlockPool,
    RequestOutputKind,
    answer,
    install,
)

KV = 1 << 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path / "model.safetensors"


@pytest.fixture
def engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    install(monkeypatch)
    return VllmEngine(path, KV)


def asked(prompt: list[int], count: int = 6, **options: Any) -> dict[str, Array]:
    inputs: dict[str, Array] = {
        "text_input": np.array([""], np.object_),
        "prompt_tokens": np.array(prompt, np.int64),
    }
    if options:
        given = msgspec.json.encode({"max_tokens": count} | options).decode()
        inputs["options"] = np.array([given], np.object_)
    else:
        inputs["max_tokens"] = np.array([count], np.int32)
    return inputs


def finish(engine: VllmEngine, keys: list[int], most: int = 200) -> dict[int, list[int]]:
    """All tokens that these say."""
    said: dict[int, list[int]] = {key: [] for key in keys}
    left = list(keys)
    for _ in range(most):
        if not left:
            return said
        for key, turn in zip(list(left), engine.turn(1, left, 0).turns, strict=True):
            assert not turn.error
            if turn.outputs:
                said[key] += turn.outputs[1].tolist()
            if turn.finished:
                left.remove(key)
    raise AssertionError(f"{left} do not end")


# --- opening ------------------------------------------------------------------------------------


def test_it_is_opened_where_the_settings_say_so(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    engine = open_engine(Opening(path, (1,), ModelSettings(engine="vllm")))
    assert isinstance(engine, VllmEngine)
    assert isinstance(engine, TurnEngine)
    assert engine.meta.platform == "vllm"
    assert engine.meta.context == CONTEXT
    assert engine.meta.room == (BLOCKS - 1) * BLOCK
    given = engine._llm.args
    assert given["model"] == str(path.parent)
    assert not given["async_scheduling"], "what a turn starts is done when it returns"


def test_arguments_of_vllm_can_be_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert VllmEngine(path, KV, {"dtype": "float32"})._llm.args["dtype"] == "float32"
    with pytest.raises(ModelError, match="architecture is not supported"):
        VllmEngine(path, KV, {"refused": True})


@pytest.mark.parametrize("name", ["model.gguf", "model.onnx"])
def test_other_files_than_safetensors_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="safetensors"):
        open_engine(Opening(tmp_path / name, (1,), ModelSettings(engine="vllm")))


def test_a_gpu_in_subsets_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    settings = ModelSettings(engine="vllm")
    assert open_engine(Opening(path, (1,), settings, target=Target("cuda:0")))
    with pytest.raises(ModelError, match="subsets"):
        open_engine(Opening(path, (1,), settings, target=Target("cuda-subsets:0")))


def test_an_index_of_several_files_is_safetensors_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    assert open_engine(
        Opening(path.with_name("model.safetensors.index.json"), (1,), ModelSettings(engine="vllm"))
    )


def test_a_missing_extra_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"cotenant\[vllm\]"):
        open_engine(Opening(path, (1,), ModelSettings(engine="vllm")))


def test_another_version_is_refused_and_a_build_of_this_one_is_not(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, version="0.99.0")
    with pytest.raises(ModelError, match=r"0\.99\.0.*" + VERSION):
        VllmEngine(path, KV)
    install(monkeypatch, version=f"{VERSION}+cpu")
    assert VllmEngine(path, KV)


def test_the_extra_brings_the_version_that_is_asked_for() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert f"vllm=={VERSION}" in project["optional-dependencies"]["vllm"]


def test_nothing_of_vllm_is_imported_with_the_module() -> None:
    code = "import sys, cotenant.engines.llm.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- turns --------------------------------------------------------------------------------------


def test_each_says_what_the_model_says_and_is_forgotten_then(engine: VllmEngine) -> None:
    prompts = {7: [5, 6, 7], 9: [8], -1: [1, 2, 3, 4, 5, 6]}
    for key, prompt in prompts.items():
        engine.begin(key, asked(prompt))
    assert finish(engine, list(prompts)) == {k: answer(p, 6) for k, p in prompts.items()}
    assert not engine._answers and not engine._llm.known


def test_a_turn_says_what_is_new_and_why_it_ends(engine: VllmEngine) -> None:
    engine.begin(1, asked([5, 6, 7], 2))
    first, last = engine.turn(1, [1], 0).turns[0], engine.turn(1, [1], 0).turns[0]
    assert first.outputs is not None and last.outputs is not None
    said = answer([5, 6, 7], 2)
    assert [o.tolist() for o in first.outputs] == [[chr(said[0])], said[:1], [""], [""]]
    assert [o.tolist() for o in last.outputs] == [[chr(said[1])], said[1:], ["length"], [""]]
    assert (first.finished, last.finished, first.said) == (False, True, 1)


def test_what_others_say_is_kept_for_their_next_turn(engine: VllmEngine) -> None:
    engine.begin(1, asked([5], 3))
    engine.begin(2, asked([6], 3))
    for _ in range(3):
        engine.turn(1, [1], 0)
    (turn,) = engine.turn(1, [2], 0).turns
    assert turn.outputs is not None
    assert turn.outputs[1].tolist() == answer([6], 3)
    assert turn.finished


def test_who_has_said_nothing_new_has_an_empty_turn(engine: VllmEngine) -> None:
    engine.resize(0)
    engine.begin(1, asked([5]))
    assert engine.turn(1, [1], 0).turns == [(None, False, "", 0)]


def test_a_text_is_read_with_the_special_tokens_in_it(engine: VllmEngine, path: Path) -> None:
    tokens = Text.from_folder(path.parent).encode("hi<|end|>", special=True)
    assert tokens[-1] == END
    engine.begin(1, {"text_input": np.array(["hi<|end|>"], np.object_)} | {
        "max_tokens": np.array([6], np.int32)
    })  # fmt: skip
    assert finish(engine, [1])[1] == answer(tokens, 6)


def test_who_is_forgotten_leaves_nothing(engine: VllmEngine) -> None:
    for key in (1, 2):
        engine.begin(key, asked([5]))
    engine.turn(1, [1, 2], 0)
    engine.forget((1, 77))
    assert finish(engine, [2])
    assert engine._scheduler.pool.get_num_free_blocks() == BLOCKS - 1


def test_work_is_tokens_and_the_pairs_they_look_at(engine: VllmEngine) -> None:
    engine.begin(1, asked([5, 6, 7]))
    assert engine.turn(1, [1], 0).work == (3, 6)
    engine.begin(2, asked([5, 6]))
    first, second = load(3, 1), load(0, 2)
    total = first + second
    assert engine.turn(1, [1, 2], 0).work == (total.tokens, total.pairs)
    engine.forget((1, 2))
    assert engine.turn(1, [], 0).work == (0, 0)


def test_nothing_is_scheduled_between_turns(engine: VllmEngine) -> None:
    engine.begin(1, asked([5]))
    assert engine._llm.step() == []
    assert not engine._scheduler.running
    assert finish(engine, [1])[1] == answer([5], 6)
    engine.begin(1, asked([6]))
    engine._llm.fail.append(ValueError("once"))
    with pytest.raises(ModelError):
        engine.turn(1, [1], 0)
    engine.begin(1, asked([6]))
    assert engine._llm.step() == [], "the gate is shut after a step that fails, too"


def test_a_short_turn_computes_few_tokens_of_a_prompt(engine: VllmEngine) -> None:
    engine.begin(1, asked([5] * 30, 2))
    for _ in range(20):
        engine._costs.observe(load(0, 4), 4_000_000)
        engine._costs.observe(load(0, 8), 8_000_000)
    assert engine.turn(1, [1], 1_000_000).work[0] == SMALLEST
    assert engine.turn(1, [1], 0).work[0] == 30 - SMALLEST


# --- options ------------------------------------------------------------------------------------


def test_options_are_vllms(engine: VllmEngine) -> None:
    how = {
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "presence_penalty": 0.25,
        "frequency_penalty": 0.75,
        "repetition_penalty": 1.5,
        "seed": 11,
        "logit_bias": {"3": 1.5},
        "logprobs": 2,
        "stop": ["x", "yz"],
        "ignore_eos": True,
        "salt": "mine",
    }
    engine.begin(1, asked([5], 9, **how))
    (params,) = engine._llm.params
    same = {name: value for name, value in how.items() if name not in ("salt", "logit_bias")}
    assert {name: getattr(params, name) for name in same} == same
    assert params.logit_bias == {3: 1.5}
    assert params.max_tokens == 9
    assert params.output_kind is RequestOutputKind.DELTA
    assert engine._llm.salts == ["mine"]


def test_what_is_not_asked_for_is_left_out(engine: VllmEngine) -> None:
    engine.begin(1, asked([5], temperature=0.0))
    (params,) = engine._llm.params
    assert (params.logit_bias, params.logprobs, params.structured_outputs) == (None,) * 3
    assert (params.temperature, params.seed, params.stop) == (0, 0, [])
    assert engine._llm.salts == [None]


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_every_seed_is_one_to_vllm(engine: VllmEngine, seed: int) -> None:
    engine.begin(1, asked([5], seed=seed))
    assert 0 <= engine._llm.params[0].seed < 2**63


@pytest.mark.parametrize(
    ("grammar", "form"),
    [
        ({"type": "json_object"}, {"json_object": True}),
        ({"type": "json_schema", "schema": {"enum": [1, 2000]}}, {"json": {"enum": [1, 2000]}}),
        ({"type": "regex", "pattern": "a+"}, {"regex": "a+"}),
        ({"type": "lark", "grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"type": "choice", "choices": ["a", "b"]}, {"choice": ["a", "b"]}),
    ],
)
def test_the_form_of_an_answer_is_vllms(
    engine: VllmEngine, grammar: dict[str, Any], form: dict[str, Any]
) -> None:
    engine.begin(1, asked([5], grammar=grammar))
    assert engine._llm.params[0].structured_outputs.form == form


def test_details_tell_of_each_token_and_of_the_likeliest(engine: VllmEngine) -> None:
    engine.begin(1, asked([5], 1, logprobs=2))
    engine.begin(2, asked([5], 1, logprobs=0))
    engine.begin(3, asked([5], 1, temperature=0.0))
    outputs = [turn.outputs for turn in engine.turn(1, [1, 2, 3], 0).turns]
    found = [msgspec.json.decode(o[3][0], type=Details) for o in outputs if o is not None]
    token = answer([5], 1)[0]
    assert found[0].said[0].top == ((65, -0.25), (token, -0.5))
    assert (found[1].said[0].logprob, found[1].said[0].top) == (-0.5, ())
    assert (found[2].said[0].token, found[2].said[0].logprob) == (token, None)
    assert found[2].cached == 3


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        asked([]),
        asked([5], 0),
        asked([5] * CONTEXT, 1),
        asked([5], CONTEXT),
        asked([5], temperature=9.0),
        asked([5], embed=True),
        asked([5], top_p=0.0),
        asked([5], unknown=1),
        asked([END + 1]),
        asked([5], grammar={"type": "regex", "pattern": "a{3,1001}"}),
        asked([5], grammar={"type": "lark", "grammar": 'start: "a"~99999999999999'}),
        asked([5], grammar={"type": "json_schema", "schema": {"minItems": 10**9}}),
        asked([5], grammar={"type": "json_schema", "schema": {"pattern": "a{2000}"}}),
        asked([5], grammar={"type": "choice", "choices": []}),
        asked([5]) | {"text_input": np.array(["and this"], np.object_)},
        {"text_input": np.array(["x" * 10_000], np.object_)},
    ],
)
def test_what_is_refused_fails_alone_and_leaves_nothing(
    engine: VllmEngine, inputs: dict[str, Array]
) -> None:
    engine.begin(2, asked([6]))
    with pytest.raises(ModelError):
        engine.begin(1, inputs)
    assert 1 not in engine._answers and engine._llm.known == {"2"}
    assert finish(engine, [2])[2] == answer([6], 6)


@pytest.mark.parametrize("reason", ["error", "abort", "repetition"])
def test_an_answer_that_vllm_ends_is_an_error_of_that_alone(
    engine: VllmEngine, reason: str
) -> None:
    engine.begin(1, asked([5]))
    engine.begin(2, asked([6]))
    engine._llm.end["1"] = reason
    ended, other = engine.turn(1, [1, 2], 0).turns
    assert ended.finished and reason in ended.error and ended.outputs is None
    assert not other.error
    assert finish(engine, [2])[2] == answer([6], 6)[1:]


def test_a_step_that_fails_ends_all_requests_and_the_next_one_works(engine: VllmEngine) -> None:
    engine.begin(1, asked([5]))
    engine._llm.fail.append(RuntimeError("out of luck"))
    with pytest.raises(ModelError, match="out of luck"):
        engine.turn(1, [1], 0)
    assert not engine._answers and not engine._llm.known
    engine.begin(1, asked([5]))
    assert finish(engine, [1])[1] == answer([5], 6)


def test_a_second_failure_in_a_row_is_no_error_of_a_request(engine: VllmEngine) -> None:
    for kind in (ModelError, RuntimeError):
        engine.begin(1, asked([5]))
        engine._llm.fail.append(RuntimeError("for good"))
        with pytest.raises(kind):
            engine.turn(1, [1], 0)


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "left"),
    [
        (0, 0),
        (-1, 0),
        (BLOCK_BYTES - 1, 0),
        (BLOCK_BYTES, 1),
        (5 * BLOCK_BYTES + 3, 5),
        ((BLOCKS - 1) * BLOCK_BYTES, BLOCKS - 1),
        (1 << 60, BLOCKS - 1),
    ],
)
def test_a_target_leaves_as_many_whole_blocks(target: int, left: int) -> None:
    pool = BlockPool()
    balloon = Balloon(pool, BLOCK_BYTES)
    for before in (0, 1 << 60, 3 * BLOCK_BYTES):
        balloon.resize(before)
        balloon.resize(target)
        assert pool.get_num_free_blocks() == left
    balloon.release()
    assert pool.get_num_free_blocks() == BLOCKS - 1
    balloon.settle()
    assert pool.get_num_free_blocks() == left


def test_what_is_in_use_is_waited_for(engine: VllmEngine) -> None:
    pool = engine._scheduler.pool
    used = pool.get_new_blocks(8)
    engine.resize(6 * BLOCK_BYTES)
    assert pool.get_num_free_blocks() == 0
    pool.free_blocks(used[:5])
    engine.turn(1, [], 0)
    assert pool.get_num_free_blocks() == 3
    pool.free_blocks(used[5:])
    engine.turn(1, [], 0)
    assert pool.get_num_free_blocks() == 6


def test_answers_are_the_same_whatever_the_balloon_does(engine: VllmEngine) -> None:
    prompts = {key: [key + 3] * (key + 2) for key in range(5)}
    for key, prompt in prompts.items():
        engine.begin(key, asked(prompt, 12))
    said: dict[int, list[int]] = {key: [] for key in prompts}
    rng = np.random.default_rng(3)
    for _ in range(400):
        engine.resize(int(rng.integers(5, BLOCKS)) * BLOCK_BYTES)
        keys = [key for key in said if len(said[key]) < 12]
        if not keys:
            break
        for key, turn in zip(keys, engine.turn(1, keys, 0).turns, strict=True):
            said[key] += turn.outputs[1].tolist() if turn.outputs else []
    assert engine._scheduler.preempted
    assert said == {key: answer(prompt, 12) for key, prompt in prompts.items()}
    engine.resize(1 << 60)
    assert engine._scheduler.pool.get_num_free_blocks() == BLOCKS - 1


@pytest.mark.parametrize(
    ("level", "calls"),
    [
        (1, [("wake_up", None)]),
        (2, [("wake_up", ["weights"]), "reload_weights", ("wake_up", ["kv_cache"])]),
    ],
)
def test_parked_it_has_no_balloon_and_no_turns(
    path: Path, monkeypatch: pytest.MonkeyPatch, level: Any, calls: list[Any]
) -> None:
    install(monkeypatch, sleeps=True)
    engine = VllmEngine(path, KV)
    assert engine._llm.args["enable_sleep_mode"]
    engine.begin(1, asked([5]))
    engine.resize(6 * BLOCK_BYTES)
    engine.park(level)
    engine.park(level)
    assert engine._llm.calls == [("sleep", level, "keep")]
    with pytest.raises(ModelError, match="parked"):
        engine.turn(1, [1], 0)
    engine.begin(2, asked([6]))
    engine.wake()
    assert engine._llm.calls[1:] == calls
    assert engine._scheduler.pool.get_num_free_blocks() == 6
    assert finish(engine, [1, 2]) == {1: answer([5], 6), 2: answer([6], 6)}
    engine.wake()
    assert engine._llm.calls[1:] == calls, "awake already"


def test_where_vllm_cannot_sleep_it_says_so(engine: VllmEngine) -> None:
    with pytest.raises(ModelError, match="sleep mode"):
        engine.park(1)
