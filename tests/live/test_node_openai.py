"""OpenAI's own client, and a checker of what it expects, against a node with a language model."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.live.conftest import until
from tests.unit.llm_files import TOKENS, write

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
)
"""Its calls are of Hermes' form."""
CONTEXT = 2048
KEY = "a-key-of-enough-characters"
IMAGE: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
HELLO: Any = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "day": {"enum": [1, 2]}},
    "required": ["city", "day"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
SHORT: Any = {"model": "says", "max_tokens": 8, "seed": 3, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def box(module_boxes: Boxes) -> Box:
    box = module_boxes()
    path = box.models / "says" / "1" / "model.gguf"
    path.parent.mkdir(parents=True)
    likely = {len(TOKENS) - 1: 6.0, TOKENS.index('"'): 5.0}  # so that answers end
    write(path, text=True, template=TEMPLATE, likely=likely, context_length=CONTEXT)
    box.model("scale", "scale")
    token = box.directory / "token"
    token.write_text(KEY)
    token.chmod(0o600)
    objective = {"latency": "60s"}
    services = [
        {"name": "says", "objective": objective},
        {"name": "narrow", "model": "says", "objective": objective, "max_queue": 1},
        {"name": "scale"},
    ]
    return box.configure(services, node={"token_file": str(token)}).start()


def reach(box: Box) -> dict[str, Any]:
    return {"base_url": f"http://127.0.0.1:{box.port}/v1", "api_key": KEY, "max_retries": 0}


@pytest.fixture(scope="module")
def client(box: Box) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(**reach(box)) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["narrow", "says"]
    assert client.models.retrieve("says").object == "model"


def test_a_stream_says_what_the_whole_chat_is(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=HELLO, **SHORT)
    said = whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=HELLO, **SHORT, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said
    assert chunks[-2].choices[0].finish_reason == "length"
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 8)


def test_other_seeds_say_something_else(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(messages=HELLO, n=3, **SHORT)
    texts = [choice.message.content for choice in found.choices]
    assert len(set(texts)) == 3
    once = client.chat.completions.create(messages=HELLO, **SHORT | {"seed": 4})
    assert once.choices[0].message.content == texts[1]


def test_completions(client: openai.OpenAI) -> None:
    prompts: Any = ["he said", [104, 105]]
    whole = client.completions.create(prompt=prompts, logprobs=2, n=2, **SHORT)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    told = whole.choices[0].logprobs
    assert told is not None
    assert len(told.tokens or ()) == len(told.text_offset or ()) == 8
    texts = ["", "", "", ""]
    for chunk in client.completions.create(prompt=prompts, n=2, stream=True, **SHORT):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    echoed = client.completions.create(prompt="he said", echo=True, **SHORT)
    assert echoed.choices[0].text == "he said" + texts[0]


def test_stop_strings_and_biases(client: openai.OpenAI) -> None:
    asked: Any = SHORT | {"temperature": 0, "logit_bias": {str(TOKENS.index("a")): 100}}
    found = client.completions.create(prompt="x", stop=["aaa"], **asked)
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("", "stop")
    found = client.completions.create(prompt="x", **asked)
    assert found.choices[0].text == "a" * 8


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    asked = SHORT | {"temperature": 0}
    found = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, **asked)
    told = found.choices[0].logprobs
    assert told is not None
    assert told.content
    for token in told.content:
        assert token.top_logprobs[0].logprob == token.logprob


def test_the_second_time_the_prompt_is_cached(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "he said " * 20}]
    cached = []
    for _ in range(2):
        usage = client.chat.completions.create(messages=long, **SHORT).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == 0
    assert (cached[1] or 0) > 0


def test_structured_output(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    asked: Any = {"model": "says", "messages": HELLO, "seed": 1, "response_format": form}
    found = client.chat.completions.create(**asked).choices[0]
    assert found.finish_reason == "stop"
    assert sorted(json.loads(found.message.content or "")) == ["city", "day"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be(client: openai.OpenAI, stream: bool) -> None:
    asked: Any = {"messages": HELLO, "model": "says", "tools": [WEATHER], "seed": 2}
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    if not stream:
        whole = client.chat.completions.create(tool_choice=choice, **asked).choices[0]
        assert whole.finish_reason == "tool_calls"
        (call,) = whole.message.tool_calls or ()
        assert call.function.name == "weather"
        assert sorted(json.loads(call.function.arguments)) == ["city", "day"]
        return
    with client.chat.completions.stream(tool_choice="required", **asked) as events:
        final = events.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    for each in final.message.tool_calls or ():
        assert sorted(json.loads(each.function.arguments)) == ["city", "day"]


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["hello", "he said", "hello"]
    floats = client.embeddings.create(model="says", input=texts, encoding_format="float").data
    assert floats[0].embedding == pytest.approx(floats[2].embedding, abs=1e-5)
    assert sum(x * x for x in floats[1].embedding) == pytest.approx(1.0, abs=1e-4)
    packed = client.embeddings.create(model="says", input=texts).data  # the client unpacks it
    for one, other in zip(floats, packed, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-5)


def test_many_at_a_time(box: Box) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(**reach(box)) as client:

            async def whole(seed: int) -> str:
                found = await client.chat.completions.create(
                    messages=HELLO, **SHORT | {"seed": seed}
                )
                return found.choices[0].message.content or ""

            async def streamed(seed: int) -> str:
                asked = SHORT | {"seed": seed, "stream": True}
                chunks = await client.chat.completions.create(messages=HELLO, **asked)
                return "".join([c.choices[0].delta.content or "" async for c in chunks])

            return await asyncio.gather(whole(1), streamed(1), whole(2), streamed(2))

    first, same, second, also = asyncio.run(ask())
    assert (first, second) == (same, also)


def test_who_leaves_a_stream_leaves_no_work(box: Box, client: openai.OpenAI) -> None:
    def given_up() -> int:
        answer = box.ask("GET", "/v2/models/says/stats", headers={"Authorization": f"Bearer {KEY}"})
        return int(answer.json["model_stats"][0]["inference_stats"]["fail"]["count"])

    before = given_up()
    asked = SHORT | {"max_tokens": 1500, "n": 2}
    with client.chat.completions.create(messages=HELLO, stream=True, **asked) as chunks:
        next(iter(chunks))
    until(lambda: given_up() >= before + 2)


@pytest.mark.parametrize(
    ("given", "error", "param"),
    [
        ({"model": "nothing"}, openai.NotFoundError, "model"),
        ({"model": "scale"}, openai.BadRequestError, "model"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, openai.BadRequestError, None),
        ({"functions": [{"name": "f"}]}, openai.BadRequestError, "functions"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, openai.BadRequestError, "messages"),
    ],
)
def test_errors_are_those_of_the_client(
    client: openai.OpenAI, given: Any, error: type[openai.APIStatusError], param: str | None
) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(**SHORT | {"messages": HELLO} | given)
    assert param in (raised.value.param, None)


def test_a_form_that_is_none_is_a_bad_request(client: openai.OpenAI) -> None:
    asked: Any = SHORT | {"extra_body": {"structured_outputs": {"regex": "("}}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(messages=HELLO, **asked)


def test_a_wrong_key(box: Box) -> None:
    with openai.OpenAI(**reach(box) | {"api_key": "wrong"}) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_who_asks_for_too_much_is_told_when_to_come_back(client: openai.OpenAI) -> None:
    """Of so many answers one may wait for its first turn."""
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(messages=HELLO, n=16, **SHORT | {"model": "narrow"})
    assert int(raised.value.response.headers["retry-after"]) >= 1
    assert client.chat.completions.create(messages=HELLO, **SHORT | {"model": "narrow"}).choices


CHECKED = (
    "chat-basic-response,chat-system-prompt,chat-multi-turn,chat-tool-calling,"
    "chat-streaming-response,chat-streaming-usage,chat-error-handling"
)
"""All of its tests but images, which this model cannot see, and summaries of reasoning."""


@pytest.mark.skipif(
    importlib.util.find_spec("llm_comply") is None, reason="llm-comply is not installed"
)
def test_a_checker_of_compliance_is_content(box: Box) -> None:
    run = "import sys; from llm_comply.cli import main; sys.exit(main())"
    url = reach(box)["base_url"]
    options = ["--format", "openai-chat", "-u", url, "-m", "says", "-k", KEY, "-f", CHECKED]
    found = subprocess.run(
        [sys.executable, "-c", run, *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert found.returncode == 0, found.stdout
