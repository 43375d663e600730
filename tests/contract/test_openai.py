"""OpenAI's API over a node whose language model says what a test wrote."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from cotenant.domain.errors import ModelError, NotReady
from cotenant.domain.port import Refused
from cotenant.domain.request import Refusal
from cotenant.engines.llm.asking import Expression, JsonObject, JsonSchema, Lark, OneOf
from cotenant.serving.rest_openai import MOST_AT_ONCE, MOST_WAITING
from cotenant.serving.tensors import Limits
from tests.contract import replies
from tests.contract.fake_language import (
    CONTEXT,
    End,
    SpeakingNode,
    call_text,
    options_of,
    prompt_of,
    tool,
)
from tests.contract.fake_node import eventually, serving

C, T, E = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "says", "messages": HELLO}
TEXT = {"model": "says", "prompt": "once"}
HERMES = "{% for t in tools %}{{ t }}{% endfor %}<tool_call>"
UNREAD = Refused(Refusal.UNREAD, 0, "too much waits")
LARGE = "x" * 2**20


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    with serving(make=SpeakingNode) as served:
        yield served


@pytest.fixture
def served(shared: Any) -> Iterator[Any]:
    node = shared.node
    yield shared
    node.script, node.scripts, node.calls, node.cached = [], [], [], 0
    node.words.template, node.words.asked = "", []
    shared.call(node.gate.clear)
    node.refuse = node.fail = None
    assert eventually(lambda: node.unreleased == 0), "a result was not released"
    assert eventually(lambda: shared.intake.budget.held == 0), "a body's memory was not given back"


class Reply(replies.Reply):
    @property
    def error(self) -> dict[str, Any]:
        """The error; nothing else is there."""
        found = self.json
        assert list(found) == ["error"]
        assert list(found["error"]) == ["message", "type", "param", "code"]
        return dict(found["error"])


def chat(served: Any, **given: Any) -> Reply:
    return Reply(served, "/v1/chat/completions", CHAT | given)


def complete(served: Any, **given: Any) -> Reply:
    return Reply(served, "/v1/completions", TEXT | given)


def deltas(chunks: list[Any]) -> list[dict[str, Any]]:
    return [c["choices"][0]["delta"] for c in chunks[:-1] if c["choices"]]


# --- models -----------------------------------------------------------------------------------


def test_only_language_models_are_listed(served: Any) -> None:
    found = Reply(served, "/v1/models").json
    assert (found["object"], [m["id"] for m in found["data"]]) == ("list", ["says"])
    (card,) = found["data"]
    assert (card["object"], card["max_model_len"]) == ("model", CONTEXT)
    assert Reply(served, "/v1/models/says").json == card


def test_models_that_are_none(served: Any) -> None:
    missing = Reply(served, "/v1/models/nothing")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")
    assert Reply(served, "/v1/models/double").status == 400
    missing = chat(served, model="nothing")
    assert (missing.status, missing.error["param"]) == (404, "model")
    other = complete(served, model="double")
    assert (other.status, other.error["param"]) == (400, "model")


# --- completions ------------------------------------------------------------------------------


def test_a_completion(served: Any) -> None:
    served.node.script, served.node.cached = ["upon", " a", " time"], 3
    found = complete(served).json
    (choice,) = found["choices"]
    assert (found["object"], found["model"]) == ("text_completion", "says")
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == (
        "upon a time",
        "stop",
        None,
    )
    assert found["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 12,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    (call,) = served.node.calls
    assert prompt_of(call) == list(b"once")
    assert (options_of(call).max_tokens, options_of(call).temperature) == (CONTEXT - 4, 1.0)


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
        (["ab", [99]], [b"ab", b"c"]),
    ],
)
def test_prompts_are_texts_or_tokens(served: Any, prompt: Any, asked: list[bytes]) -> None:
    served.node.script = ["x"]
    found = complete(served, prompt=prompt).json
    assert [bytes(prompt_of(call)) for call in served.node.calls] == asked
    assert [choice["index"] for choice in found["choices"]] == list(range(len(asked)))
    assert found["usage"]["prompt_tokens"] == sum(map(len, asked))


def test_echo_goes_before(served: Any) -> None:
    served.node.script = ["x", "y"]
    found = complete(served, prompt=["ab", "c"], echo=True).json
    assert [choice["text"] for choice in found["choices"]] == ["abxy", "cxy"]
    chunks = complete(served, prompt=[97, 98], echo=True, stream=True).events
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "abxy"


def test_settings_reach_the_model(served: Any) -> None:
    served.node.script = ["x"]
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.5,
        "seed": 7,
        "max_tokens": 3,
        "ignore_eos": True,
    }
    complete(served, **given, stop=["a", "b"], logit_bias={"65": 2, "66": -100}).whole()
    options = options_of(served.node.calls[-1])
    assert {name: getattr(options, name) for name in given} == given
    assert (options.stop, options.logit_bias) == (("a", "b"), {65: 2.0, 66: -100.0})
    complete(
        served, stop="z", top_k=-1, user="me", metadata={}, suffix="", stream_options=None
    ).whole()
    options = options_of(served.node.calls[-1])
    assert (options.stop, options.top_k) == (("z",), 0)


@pytest.mark.parametrize(
    ("given", "spec"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, JsonObject()),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "strict": True, "schema": {"type": "array"}},
                }
            },
            JsonSchema({"type": "array"}),
        ),
        ({"structured_outputs": {"json": '{"type": "array"}'}}, JsonSchema({"type": "array"})),
        ({"structured_outputs": {"regex": "a+"}}, Expression("a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, OneOf(("a", "b"))),
        ({"structured_outputs": {"grammar": "start: A"}}, Lark("start: A")),
    ],
)
def test_forms_reach_the_model(served: Any, given: Any, spec: Any) -> None:
    served.node.script = ["x"]
    chat(served, **given).whole()
    assert options_of(served.node.calls[-1]).grammar == spec


def test_logprobs_of_a_completion(served: Any) -> None:
    served.node.script = ["aé", "b"]
    (choice,) = complete(served, logprobs=2).json["choices"]
    told = choice["logprobs"]
    assert [len(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs")] == [4, 4, 4]
    assert told["text_offset"] == [0, 1, 1, 2], "the end of an answer is no token of its text"
    assert (told["tokens"][0], told["token_logprobs"][0]) == ("a", -0.5)
    assert told["top_logprobs"][0] == {"a": -97.0, "b": -98.0}


# --- chats ------------------------------------------------------------------------------------


def test_a_chat(served: Any) -> None:
    served.node.script = ["good ", "morning"]
    found = chat(served, max_tokens=1, max_completion_tokens=20).json
    (choice,) = found["choices"]
    assert found["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant"
    assert (choice["message"]["content"], choice["finish_reason"]) == ("good morning", "stop")
    assert options_of(served.node.calls[-1]).max_tokens == 20
    ((messages, tools, names),) = served.node.words.asked
    assert (messages, tools, names) == (HELLO, None, {"add_generation_prompt": True})


def test_what_the_template_is_given(served: Any) -> None:
    served.node.script = ["x"]
    function = {"name": "weather", "arguments": '{"city": "Bern"}'}
    conversation = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}]},
        {"role": "user", "content": "hello", "name": "me"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    chat(served, messages=conversation, chat_template_kwargs={"enable_thinking": False}).whole()
    ((messages, _, names),) = served.node.words.asked
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool"]
    assert messages[0]["content"] == [{"type": "text", "text": "be"}]
    assert messages[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
    assert messages[3]["tool_call_id"] == "1"
    assert names["enable_thinking"] is False


def test_a_stream_of_a_chat(served: Any) -> None:
    served.node.script = ["good ", "morning", End("", "length")]
    reply = chat(served, stream=True)
    assert reply.answer.getheader("content-type") == "text/event-stream; charset=utf-8"
    chunks = reply.events
    assert chunks[-1] == "[DONE]"
    assert deltas(chunks) == [
        {"role": "assistant", "content": ""},
        {"content": "good "},
        {"content": "morning"},
        {},
    ]
    assert {c["id"] for c in chunks[:-1]} == {chunks[0]["id"]}
    assert {c["object"] for c in chunks[:-1]} == {"chat.completion.chunk"}
    reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
    assert reasons == [None, None, None, "length"]
    assert all("usage" not in c for c in chunks[:-1])


def test_a_chunk_is_sent_before_the_next_is_there(served: Any) -> None:
    served.node.script = ["a", "", "b"]
    reply = chat(served, stream=True)
    assert reply.event()["choices"][0]["delta"]["role"] == "assistant"
    assert reply.event()["choices"][0]["delta"] == {"content": "a"}
    assert served.node.waiting.acquire(timeout=20)
    served.call(served.node.gate.set)
    assert reply.events[-1] == "[DONE]"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_of_a_stream(served: Any, path: str) -> None:
    served.node.script = ["ab", "c"]
    asked = CHAT if "chat" in path else TEXT
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = Reply(served, path, asked | options).events
    *others, last, done = chunks
    assert (last["choices"], done) == ([], "[DONE]")
    assert last["usage"]["completion_tokens"] == 4
    assert all(c["usage"] is None for c in others)


def test_logprobs_of_a_chat(served: Any) -> None:
    served.node.script = ["a", "\n"]
    (choice,) = chat(served, logprobs=True, top_logprobs=1).json["choices"]
    first, second = choice["logprobs"]["content"]
    top = [{"token": "a", "logprob": -97.0, "bytes": [97]}]
    assert first == {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": top}
    assert second["bytes"] == [10]
    chunks = chat(served, logprobs=True, stream=True).events
    told = [c["choices"][0]["logprobs"] for c in chunks[:-1]]
    assert [len(t["content"]) if t else 0 for t in told] == [0, 1, 1, 0]
    assert options_of(served.node.calls[-1]).logprobs == 0


# --- several answers --------------------------------------------------------------------------


def test_each_of_n_has_a_seed_of_its_own(served: Any) -> None:
    served.node.scripts = [["a"], ["b"], ["c"]]
    found = chat(served, n=3, seed=5).json
    assert [c["message"]["content"] for c in found["choices"]] == ["a", "b", "c"]
    assert [options_of(call).seed for call in served.node.calls] == [5, 6, 7]
    assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (5, 6)
    served.node.calls, served.node.script = [], ["x"]
    chat(served, n=2).whole()
    chat(served).whole()
    assert len({options_of(call).seed for call in served.node.calls}) == 3


def test_streams_of_n_say_whose_chunk_it_is(served: Any) -> None:
    served.node.scripts = [["a", "", "b"], ["c", "d"]]
    reply = complete(served, n=2, stream=True)
    texts = {0: "", 1: ""}
    for _ in range(3):
        choice = reply.event()["choices"][0]
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "a", 1: "cd"}
    served.call(served.node.gate.set)
    *rest, done = reply.events
    assert [c["choices"][0]["text"] for c in rest] == ["b"]
    assert done == "[DONE]"
    assert served.node.waiting.acquire(timeout=20)


def test_more_answers_than_the_node_takes_at_once(served: Any) -> None:
    served.node.script = ["a", "b"]
    found = complete(served, prompt=["p"] * 3, n=16).json
    assert [c["index"] for c in found["choices"]] == list(range(3 * MOST_AT_ONCE))
    assert {c["text"] for c in found["choices"]} == {"ab"}


def test_one_refusal_ends_all(served: Any) -> None:
    served.node.scripts = [["a", "", "b"], [Refused(Refusal.OVERLOADED, 1, "")]]
    assert chat(served, n=2).status == 429
    assert served.node.withdrawn.acquire(timeout=20)
    while served.node.waiting.acquire(blocking=False):
        pass


# --- tools ------------------------------------------------------------------------------------


def test_calls_are_told_from_text(served: Any) -> None:
    served.node.words.template = HERMES
    served.node.script = ["Let me see. <tool", call_text(city="Bern")[5:], "\n", call_text("time")]
    (choice,) = chat(served, tools=[tool(), tool("time")]).json["choices"]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == ("Let me see.", "tool_calls")
    functions = [c["function"] for c in message["tool_calls"]]
    assert [f["name"] for f in functions] == ["weather", "time"]
    assert json.loads(functions[0]["arguments"]) == {"city": "Bern"}
    assert len({c["id"] for c in message["tool_calls"]}) == 2
    ((_, tools, _),) = served.node.words.asked
    assert [t["function"]["name"] for t in tools] == ["weather", "time"]
    assert options_of(served.node.calls[-1]).grammar is None


def test_calls_in_a_stream(served: Any) -> None:
    served.node.words.template = HERMES
    served.node.script = ["Hm.", *call_text(city="Bern"), "\n", call_text("time")]
    chunks = chat(served, tools=[tool(), tool("time")], stream=True).events
    said = deltas(chunks)
    assert "".join(d.get("content") or "" for d in said) == "Hm."
    calls = [d["tool_calls"][0] for d in said if "tool_calls" in d]
    assert [c["index"] for c in calls] == [0, 0, 1, 1]
    assert [c.get("id") is None for c in calls] == [False, True, False, True]
    assert [c["function"].get("name") for c in calls] == ["weather", None, "time", None]
    assert json.loads(calls[1]["function"]["arguments"]) == {"city": "Bern"}
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_one_call_where_no_more_are_wanted(served: Any) -> None:
    served.node.words.template = HERMES
    served.node.script = [call_text(), call_text("time")]
    asked = {"tools": [tool(), tool("time")], "parallel_tool_calls": False}
    (choice,) = chat(served, **asked).json["choices"]
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["weather"]
    assert choice["message"]["content"] is None


def test_what_is_no_call_is_text(served: Any) -> None:
    served.node.words.template = HERMES
    for text in ("<tool_call>what?</tool_call>", "<tool_call>{", "a < b\n"):
        served.node.script = list(text)
        (choice,) = chat(served, tools=[tool()]).json["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_that_must_be_is_a_form(served: Any, choice: Any) -> None:
    served.node.words.template = HERMES
    served.node.script = [call_text()]
    chat(served, tools=[tool(), tool("time")], tool_choice=choice).whole()
    grammar = options_of(served.node.calls[-1]).grammar
    assert isinstance(grammar, Lark)
    assert "weather" in grammar.grammar
    assert ("time" in grammar.grammar) == (choice == "required")


def test_tools_need_a_template_that_knows_them(served: Any) -> None:
    served.node.script = [call_text()]
    refused = chat(served, tools=[tool()])
    assert (refused.status, refused.error["param"]) == (400, "tools")
    (choice,) = chat(served, tools=[tool()], tool_choice="none").json["choices"]
    assert choice["message"]["content"] == call_text()


@pytest.mark.parametrize("depth", [300, 600, 900, 960])
def test_schemas_may_be_deep(served: Any, depth: int) -> None:
    """They reach the model or are refused; nothing breaks."""
    served.node.words.template = HERMES
    served.node.script = [call_text()]
    deep = '{"items": ' * depth + "{}" + "}" * depth
    shown = json.dumps(CHAT | {"tools": [tool()], "tool_choice": "required"})
    for body in (
        shown.replace('"properties": {}', f'"properties": {deep}'),
        json.dumps(CHAT | {"structured_outputs": {"json": 1}}).replace("1}", deep + "}"),
    ):
        assert Reply(served, C, body.encode()).status in (200, 400)


# --- embeddings and tokens --------------------------------------------------------------------


@pytest.mark.parametrize("given", ["ab", ["ab"], [97, 98], [[97, 98]]])
def test_an_embedding(served: Any, given: Any) -> None:
    served.node.script = ["x"]
    found = Reply(served, "/v1/embeddings", {"model": "says", "input": given}).json
    assert found["data"] == [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}]
    assert found["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert options_of(served.node.calls[-1]).embed


def test_embeddings_in_base64(served: Any) -> None:
    served.node.script = ["x"]
    asked = {"model": "says", "input": ["a", "b"], "encoding_format": "base64"}
    data = Reply(served, "/v1/embeddings", asked).json["data"]
    packed = base64.b64decode(data[1]["embedding"])
    assert struct.unpack("<2f", packed) == pytest.approx((0.6, 0.8))


def test_tokens_there_and_back(served: Any) -> None:
    found = Reply(served, "/tokenize", {"model": "says", "prompt": "abc"}).json
    assert found == {"tokens": [97, 98, 99], "count": 3, "max_model_len": CONTEXT}
    found = Reply(served, "/tokenize", CHAT | {"return_token_strs": True}).json
    assert found["token_strs"] == list("hello")
    back = Reply(served, "/detokenize", {"model": "says", "tokens": found["tokens"]}).json
    assert back == {"prompt": "hello"}


# --- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        (C, {"model": None}, "model"),
        (C, {"messages": []}, "messages"),
        (C, {"messages": "hello"}, "messages"),
        (C, {"messages": [{"role": "king", "content": "x"}]}, "messages"),
        (C, {"messages": [{"role": "user"}]}, "messages"),
        (C, {"messages": [{"role": "tool", "content": "x"}]}, None),
        (C, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (C, {"messages": [{"role": "user", "content": "x" * 65}]}, "messages"),
        (C, {"messages": [{"role": "user", "content": ""}]}, "messages"),
        (C, {"max_tokens": 0}, "max_tokens"),
        (C, {"max_completion_tokens": 60}, "max_completion_tokens"),
        (C, {"max_tokens": 10**30}, "max_tokens"),
        (C, {"temperature": "hot"}, "temperature"),
        (C, {"temperature": 3}, "temperature"),
        (C, {"top_p": -1}, "top_p"),
        (C, {"top_k": -2}, "top_k"),
        (C, {"presence_penalty": 9}, "presence_penalty"),
        (C, {"seed": 2**63}, "seed"),
        (C, {"n": 0}, "n"),
        (C, {"n": 17}, "n"),
        (C, {"n": 10**400}, "n"),
        (C, {"stop": ["a"] * 17}, "stop"),
        (C, {"stop": "a" * 1025}, "stop"),
        (C, {"logit_bias": {"a": 1}}, "logit_bias"),
        (C, {"logit_bias": {"257": 1}}, "logit_bias"),
        (C, {"logit_bias": {"1": 101}}, "logit_bias"),
        (C, {"logit_bias": {"-1": 1}}, "logit_bias"),
        (C, {"logprobs": 5}, "logprobs"),
        (C, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (C, {"top_logprobs": 1}, "top_logprobs"),
        (C, {"stream_options": {"include_usage": True}}, "stream_options"),
        (C, {"response_format": {"type": "xml"}}, "response_format"),
        (C, {"response_format": {"type": "json_schema"}}, "response_format"),
        (C, {"structured_outputs": {"json": "["}}, "structured_outputs"),
        (C, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        (C, {"functions": [{"name": "f"}]}, "functions"),
        (C, {"function_call": "auto"}, "function_call"),
        (C, {"audio": {"voice": "x"}}, "audio"),
        (C, {"modalities": ["text", "audio"]}, "modalities"),
        (C, {"guided_json": {}}, "guided_json"),
        (C, {"tools": [{"type": "web"}]}, "tools"),
        (C, {"tools": [tool("a b")]}, "tools"),
        (C, {"tools": [tool(), tool()]}, "tools"),
        (C, {"tools": [tool(f"f{n}") for n in range(129)]}, "tools"),
        (C, {"tool_choice": "required"}, "tool_choice"),
        (C, {"tools": [tool()], "tool_choice": "maybe"}, "tool_choice"),
        (
            C,
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "no"}}},
            "tool_choice",
        ),
        (C, {"chat_template_kwargs": {"most": 10**9}}, "messages"),
        (T, {"prompt": None}, "prompt"),
        (T, {"prompt": ""}, "prompt"),
        (T, {"prompt": []}, "prompt"),
        (T, {"prompt": [[]]}, "prompt"),
        (T, {"prompt": [97, "b"]}, "prompt"),
        (T, {"prompt": ["b", 97]}, "prompt"),
        (T, {"prompt": [-1]}, "prompt"),
        (T, {"prompt": [257]}, "prompt"),
        (T, {"prompt": [10**30]}, "prompt"),
        (T, {"prompt": [1.5]}, "prompt"),
        (T, {"prompt": ["a"] * 65}, "prompt"),
        (T, {"prompt": [1] * 10**6}, "prompt"),
        (T, {"prompt": "x" * 65}, "prompt"),
        (T, {"prompt": "x" * 64}, "prompt"),
        (T, {"prompt": ["a"] * 5, "n": 13}, "n"),
        (T, {"logprobs": 21}, "logprobs"),
        (T, {"echo": True, "logprobs": 1}, "echo"),
        (T, {"suffix": "end"}, "suffix"),
        (T, {"best_of": 2}, "best_of"),
        (T, {"min_tokens": 2}, "min_tokens"),
        (E, {"input": "a", "dimensions": 4}, "dimensions"),
        (E, {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        (E, {"input": ""}, "input"),
        (E, {"input": ["a"] * 257}, "input"),
        (E, {"input": [1] * 64}, "input"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "a" * (2**17 + 1)}, "prompt"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
def test_what_does_not_fit_is_named(served: Any, path: str, given: Any, param: Any) -> None:
    base = {C: CHAT, T: TEXT}.get(path, {"model": "says"})
    reply = Reply(served, path, base | given)
    assert reply.status == 400
    error = reply.error
    assert (error["param"] or "").split("[")[0].split(".")[0] == (param or "")
    assert error["type"] == "invalid_request_error"
    assert served.node.calls == []


@pytest.mark.parametrize("length", [60, 65])
def test_too_long_a_prompt_has_a_code_and_both_numbers(served: Any, length: int) -> None:
    error = complete(served, prompt="x" * length, max_tokens=5).error
    assert error["code"] == "context_length_exceeded"
    assert str(length) in error["message"]
    assert str(CONTEXT) in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"null",
        b'{"model": "says", "prompt": "\xff"}',
        b'{"model": "says", "prompt": "\\ud800"}',
        b'{"model": "says", "prompt": "\\ud800\\u0041"}',
        b'{"model": "says", "prompt": NaN}',
        b'{"model": "says", "prompt": ' + b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("path", [C, T, E, "/tokenize", "/detokenize"])
def test_what_is_no_request_at_all(served: Any, path: str, body: bytes) -> None:
    reply = Reply(served, path, body)
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/tokenize", 405),
        ("POST", "/v1/audio/speech", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/", 404),
    ],
)
def test_routes_that_are_none(served: Any, method: str, path: str, status: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.request(method, path, b"{}" if method != "GET" else None)
    answer = connection.getresponse()
    assert answer.status == status
    assert list(json.loads(answer.read())["error"]) == ["message", "type", "param", "code"]
    assert (answer.getheader("allow") is not None) == (status == 405)
    connection.close()


def test_the_nodes_token_is_the_key() -> None:
    with serving(token="secret", make=SpeakingNode) as served:
        for key in ({}, {"Authorization": "Bearer wrong"}):
            refused = Reply(served, "/v1/chat/completions", CHAT, **key)
            assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
        served.node.script = ["a"]
        assert Reply(served, C, CHAT, Authorization="Bearer secret").status == 200


def test_bodies_too_large_or_too_slow() -> None:
    with serving(Limits(json_bytes=2000, body_timeout_s=0.2), make=SpeakingNode) as served:
        reply = chat(served, messages=[{"role": "user", "content": "x" * 2000}])
        assert (reply.status, reply.error["type"]) == (413, "invalid_request_error")
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\n{")
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            assert answer.status == 408
            assert "type" in json.loads(answer.read())["error"]


def test_a_request_needs_chunks(served: Any) -> None:
    body = json.dumps(CHAT).encode()
    head = f"POST {C} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as sock:
        sock.sendall(head + body)
        assert sock.recv(100).split()[1] == b"505"


# --- refusals and failures --------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (Refusal.OVERLOADED, 429, "rate_limit_error"),
        (Refusal.WORKER_LOST, 503, "server_error"),
        (Refusal.EXPIRED, 504, "server_error"),
        (Refusal.FAILED, 400, "invalid_request_error"),
    ],
)
def test_a_refusal_before_the_first_chunk(
    served: Any, refusal: Refusal, status: int, kind: str, stream: bool
) -> None:
    refused = Refused(refusal, 1, "")
    for when in ("at once", "later"):
        served.node.refuse = refused if when == "at once" else None
        served.node.script = [refused]
        reply = chat(served, stream=stream)
        assert reply.status == status
        assert (reply.answer.getheader("retry-after") is not None) == (status in (429, 503))
        assert reply.error["type"] == kind


@pytest.mark.parametrize(
    ("exc", "status"),
    [(NotReady("loading"), 503), (ModelError("broken"), 400), (RuntimeError("a bug"), 500)],
)
def test_what_the_node_raises(served: Any, exc: Exception, status: int) -> None:
    served.node.fail = exc
    reply = chat(served)
    assert (reply.status, bool(reply.error["message"])) == (status, True)


@pytest.mark.parametrize("path", [C, T])
def test_an_error_in_the_middle_ends_the_stream(served: Any, path: str) -> None:
    served.node.script = ["a", UNREAD]
    asked = CHAT if path == C else TEXT
    *before, error = Reply(served, path, asked | {"stream": True}).events
    assert "".join(json.dumps(c) for c in before).count('"a"') == 1
    assert error["error"]["type"] == "rate_limit_error"


def test_an_error_in_the_middle_fails_the_whole(served: Any) -> None:
    served.node.script = ["a", Refused(Refusal.WORKER_LOST, 0, "")]
    assert chat(served).status == 503


def test_an_answer_too_long_to_be_given_at_once_can_be_streamed() -> None:
    with serving(Limits(json_bytes=2000), make=SpeakingNode) as served:
        served.node.script = ["x" * 3000]
        assert chat(served).status == 413
        assert chat(served, stream=True).events[-1] == "[DONE]"


# --- clients that misbehave -------------------------------------------------------------------


def send(sock: socket.socket, served: Any, asked: dict[str, Any], path: str = C) -> None:
    body = json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n"
    sock.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [["", "b"], ["a", "", "b"]])
def test_hanging_up_withdraws_all(served: Any, n: int, stream: bool, script: list[str]) -> None:
    served.node.script = script
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as sock:
        send(sock, served, CHAT | {"n": n, "stream": stream})
        for _ in range(n):
            assert served.node.waiting.acquire(timeout=20)
    for _ in range(n):
        assert served.node.withdrawn.acquire(timeout=20)


def test_hanging_up_before_there_is_a_prompt(served: Any) -> None:
    served.node.words.free.clear()
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as sock:
        send(sock, served, CHAT)
        assert eventually(lambda: served.node.words.asked)
    for _ in range(3):  # turns of the loop, in which the end of that connection is seen
        assert Reply(served, "/v1/models").status == 200
    served.node.words.free.set()
    served.node.script = ["a"]
    assert chat(served).status == 200
    assert len(served.node.calls) == 1


def test_chunks_wait_at_the_node_for_a_slow_reader(served: Any) -> None:
    served.node.script = [*[LARGE] * 32, "", "end"]
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", served.port))
        send(sock, served, CHAT | {"stream": True})
        assert served.node.waiting.acquire(timeout=20)
        assert served.node.unreleased > 16, "most of it was taken though nobody reads"
        served.call(served.node.gate.set)
        got = bytearray()
        while data := sock.recv(2**20):
            got += data
    assert got.count(b"data: ") == 36


def test_a_connection_too_many_is_told_so_in_the_same_words() -> None:
    with serving(connections=2, make=SpeakingNode) as served:
        served.node.script = ["", "a"]
        kept = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(2)]
        for sock in kept:
            send(sock, served, CHAT)
            assert served.node.waiting.acquire(timeout=20)
        refused = chat(served)
        assert (refused.status, refused.error["type"]) == (503, "server_error")
        for sock in kept:
            sock.close()


def test_prompts_that_wait_are_bounded(served: Any) -> None:
    served.node.words.free.clear()
    served.node.script = ["a"]
    held = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(MOST_WAITING)]
    try:
        for sock in held:
            send(sock, served, TEXT, T)
        refused = None
        while refused is None or refused.status != 429:  # those before may be on their way
            sock = socket.create_connection(("127.0.0.1", served.port), timeout=0.2)
            send(sock, served, TEXT, T)
            held.append(sock)
            answer = http.client.HTTPResponse(sock)
            try:
                answer.begin()
                refused = answer
            except TimeoutError:
                continue
        assert refused.getheader("retry-after") is not None
    finally:
        served.node.words.free.set()
        for sock in held:
            sock.close()
    assert eventually(lambda: served.node.unreleased == 0)
