"""A language model on a real box: answers, streams, what it refuses, whoever else is served."""

from __future__ import annotations

import http.client
import json
import queue
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.unit.llm_files import write

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

PROMPT = "hello hello he said"


@pytest.fixture(scope="module")
def box(module_boxes: Boxes) -> Box:
    box = module_boxes()
    path = box.models / "says" / "1" / "model.gguf"
    path.parent.mkdir(parents=True)
    write(path, text=True)
    return box.configure([{"name": "says"}], node={"grpc": "127.0.0.1:0"}).start()


def ask(box: Box, **given: Any) -> Any:
    body = {"text_input": PROMPT, "max_tokens": 12} | given
    return box.post("/v2/models/says/generate", json.dumps(body).encode())


def stream(box: Box, **given: Any) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=40)
    body = json.dumps({"text_input": PROMPT, "max_tokens": 12} | given)
    connection.request("POST", "/v2/models/says/generate_stream", body)
    lines = connection.getresponse().read().split(b"\n")
    connection.close()
    return [json.loads(line[6:]) for line in lines if line.startswith(b"data: ")]


def tokens(answer: dict[str, Any]) -> list[int]:
    """What JSON gives of one element is that."""
    found = answer["tokens"]
    return found if isinstance(found, list) else [found]


def test_a_stream_says_what_the_whole_answer_is(box: Box) -> None:
    whole = ask(box).json
    pieces = stream(box)
    assert len(tokens(whole)) == 12
    assert [t for piece in pieces for t in tokens(piece)] == tokens(whole)
    assert "".join(piece["text_output"] for piece in pieces) == whole["text_output"]
    assert len(pieces) > 1


def test_a_draft_model_changes_no_answer(box: Box, boxes: Boxes) -> None:
    drafted = boxes()
    for part in ("1", "small"):
        path = drafted.models / "says" / part / "model.gguf"
        path.parent.mkdir(parents=True)
        write(path, text=True)
    (drafted.models / "says" / "model.yaml").write_text("draft: small")
    drafted.configure([{"name": "says"}]).start()
    for drawn in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}):
        whole = ask(box, max_tokens=40, **drawn).json
        assert ask(drafted, max_tokens=40, **drawn).json["tokens"] == whole["tokens"]


def test_optional_inputs_may_be_left_out(box: Box) -> None:
    drawn = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": 3}
    assert tokens(ask(box, **drawn).json) == tokens(ask(box, **drawn).json)
    assert tokens(ask(box, **drawn).json) != tokens(ask(box, **drawn | {"seed": 4}).json)
    whole = ask(box, **drawn).json["text_output"]
    stop = whole[3:5]
    assert ask(box, **drawn, stop=[stop]).json["text_output"] == whole[: whole.index(stop)]


def test_answers_side_by_side_are_those_alone(box: Box) -> None:
    prompts = [f"{n} hello" for n in range(5)]
    once = [tokens(ask(box, text_input=prompt).json) for prompt in prompts]
    found: dict[str, list[int]] = {}

    def one(prompt: str) -> None:
        found[prompt] = tokens(ask(box, text_input=prompt).json)

    threads = [threading.Thread(target=one, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[prompt] for prompt in prompts] == once


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "answer"),
        ({"text_input": ""}, "prompt"),
        ({"text_input": "ab" * 500_000}, "64"),
        ({"max_tokens": 5000}, "5000"),
        ({"text_input": "", "prompt_tokens": [1] * 10**6}, "64"),
        ({"text_input": "", "prompt_tokens": [-1]}, "-1"),
        ({"prompt_tokens": [1]}, "prompt_tokens"),
    ],
)
def test_what_is_refused_says_why_and_harms_nobody(
    box: Box, given: dict[str, Any], named: str
) -> None:
    answer = ask(box, **given)
    assert answer.status == 400
    assert named in answer.error
    assert ask(box).status == 200


def test_a_prompt_that_is_no_text_is_refused(box: Box) -> None:
    answer = box.post("/v2/models/says/generate", b'{"text_input": "a\xff"}')
    assert answer.status == 400
    client = triton.InferenceServerClient(box.status()["grpc"])
    prompt = triton.InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"a\xff"], np.object_))
    got: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: got.put(error or result))
    client.async_stream_infer("says", [prompt])
    assert isinstance(got.get(timeout=40), InferenceServerException)
    client.stop_stream()
    client.close()
    assert ask(box).status == 200


def test_the_input_that_is_needed_is_named(box: Box) -> None:
    answer = box.post("/v2/models/says/generate", b'{"max_tokens": 3}')
    assert answer.status == 400
    assert "text_input" in answer.error


def test_clients_are_told_what_may_be_left_out(box: Box) -> None:
    config = box.ask("GET", "/v2/models/says/config").json
    optional = [each["name"] for each in config["input"] if each.get("optional")]
    assert optional[:2] == ["max_tokens", "temperature"]
    client = triton.InferenceServerClient(box.status()["grpc"])
    told = client.get_model_config("says").config
    assert [each.name for each in told.input if each.optional] == optional
    client.close()


def test_two_models_lend_each_other_memory_and_lose_nothing(boxes: Boxes) -> None:
    """Together they have room for six blocks of 16 tokens, where each answer takes up to four."""
    box = boxes()
    for name in ("one", "two"):
        path = box.models / name / "1" / "model.gguf"
        path.parent.mkdir(parents=True)
        write(path, text=True)
    objective = {"ttft": "30s", "tpot": "10s"}
    services = [{"name": name, "objective": objective} for name in ("one", "two")]
    devices = [{"kind": "cpu", "kv": 6 * 32 * 1024}]
    box.configure(services, devices=devices).start()
    found: dict[tuple[str, int], Any] = {}

    def one(name: str, number: int) -> None:
        asked = {"text_input": f"{number % 3} hello", "max_tokens": 50}
        answer = box.post(f"/v2/models/{name}/generate", json.dumps(asked).encode())
        found[name, number] = answer.json.get("tokens", answer.json)

    threads = [
        threading.Thread(target=one, args=(name, number))
        for number in range(6)
        for name in ("one", "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert len(found) == 12
    for number in range(3):
        answers = [found[name, n] for name in ("one", "two") for n in (number, number + 3)]
        assert all(answer == answers[0] for answer in answers), answers
    sizes = {s["name"]: s["kv"] for s in box.status()["services"]}
    assert sum(kv["size"] for kv in sizes.values()) <= 6 * 32 * 1024


def test_routers_find_the_metrics_that_they_know(box: Box) -> None:
    assert ask(box).status == 200
    told = box.ask("GET", "/metrics").body.decode()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    for name in names:
        (line,) = [x for x in told.splitlines() if x.startswith(f"vllm:{name}{{")]
        assert 'model_name="says"' in line
        assert 0 <= float(line.split()[-1]) <= 1
    counts = ("generation_tokens_total", "time_to_first_token_seconds_count")
    for name in counts:
        (line,) = [x for x in told.splitlines() if x.startswith(f"vllm:{name}{{")]
        assert float(line.split()[-1]) >= 1
