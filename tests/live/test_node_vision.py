"""OpenAI's own client, and a checker of what it expects, against a node whose model sees images."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.unit.vlm_files import END, encoded, picture, write_vlm

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

SHORT: Any = {"model": "sees", "max_tokens": 8, "seed": 3, "extra_body": {"ignore_eos": True}}
CONTEXT = 2048
NOT_ENDING: Any = {str(END): -100}
QUOTE = ord('"') - 33
"""The token of a quotation mark: bytes that can be seen come first, in the order of ASCII."""


@pytest.fixture(scope="module")
def box(module_boxes: Boxes) -> Box:
    box = module_boxes()
    likely = {END: 4.0, QUOTE: 3.0}  # so that answers end, and not before they have begun
    opening = (ord(":") - 33, ord("A") - 33)
    path = box.models / "sees" / "1"
    write_vlm(path, context=CONTEXT, likely=likely, opening=opening)
    objective = {"latency": "60s"}
    return box.configure([{"name": "sees", "objective": objective}]).start()


@pytest.fixture(scope="module")
def client(box: Box) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{box.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def url_of(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def asking(*urls: str) -> Any:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, *parts]}]


SMALL = url_of(encoded(picture(60, 40)))
PHOTO = url_of(encoded(picture(640, 480, seed=2), "JPEG"), "jpeg")


def test_a_stream_says_what_the_whole_answer_is(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=asking(SMALL, PHOTO), **SHORT)
    assert whole.usage is not None
    plain = client.chat.completions.create(messages=asking(), **SHORT).usage
    assert plain is not None
    assert whole.usage.prompt_tokens > plain.prompt_tokens + 40, "tiles are tokens, too"
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(messages=asking(SMALL, PHOTO), **SHORT, **options))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said
    assert said == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_another_picture_is_another_question(client: openai.OpenAI) -> None:
    told = []
    for seed in (4, 4, 5):
        asked = asking(url_of(encoded(picture(60, 40, seed=seed))))
        found = client.chat.completions.create(
            messages=asked, logprobs=True, **SHORT | {"temperature": 0, "logit_bias": NOT_ENDING}
        )
        assert found.choices[0].logprobs is not None
        second = (found.choices[0].logprobs.content or [])[1]  # the first is always the same
        assert found.usage is not None
        assert found.usage.prompt_tokens_details is not None
        told.append((second.logprob, found.usage.prompt_tokens_details.cached_tokens or 0))
    assert told[0][0] == pytest.approx(told[1][0], abs=1e-3)
    assert abs(told[2][0] - told[0][0]) > 1e-3
    assert told[1][1] > told[2][1], "the same picture was read before"


def test_tokens_can_be_counted_before(box: Box, client: openai.OpenAI) -> None:
    usage = client.chat.completions.create(messages=asking(SMALL), **SHORT).usage
    asked = json.dumps({"model": "sees", "messages": asking(SMALL)}).encode()
    assert usage is not None
    assert box.ask("POST", "/tokenize", asked).json["count"] == usage.prompt_tokens


def test_an_image_of_each_kind_of_message_is_seen_and_text_goes_on(client: openai.OpenAI) -> None:
    talk = [
        {"role": "system", "content": "be brief"},
        *asking(SMALL),
        {"role": "assistant", "content": "blots"},
        *asking(PHOTO),
    ]
    assert client.chat.completions.create(messages=talk, **SHORT).choices


def test_several_answers_to_one_picture(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(messages=asking(SMALL), n=3, **SHORT)
    assert len({choice.message.content for choice in found.choices}) == 3


HUGE = encoded(picture(5000, 4000))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/image.jpg",
        "file:///etc/hostname",
        "data:image/png,plain",
        "data:image/png;base64,***",
        "data:image/png;base64,",
        url_of(b"no image at all"),
        url_of(encoded(picture(60, 40), "GIF"), "png"),
        url_of(encoded(picture(60, 40))[:60]),
        url_of(encoded(picture(300, 300), "JPEG")[:2000], "jpeg"),
        url_of(HUGE),
    ],
    ids=["http", "file", "plain", "base64", "none", "text", "gif", "cut", "damaged", "pixels"],
)
def test_a_bad_image_is_a_bad_request_that_names_the_part(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(messages=asking(SMALL, url), **SHORT)
    assert raised.value.param == "messages[0].content[2].image_url"
    assert client.chat.completions.create(messages=asking(SMALL), **SHORT).choices


def test_too_many_images_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(messages=asking(*[SMALL] * 17), **SHORT)
    small = url_of(encoded(picture(8, 600)))
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            messages=asking(*[small] * 16), **SHORT | {"max_tokens": 1900}
        )


@pytest.mark.skipif(
    importlib.util.find_spec("llm_comply") is None, reason="llm-comply is not installed"
)
def test_a_checker_of_compliance_is_content_with_all(box: Box) -> None:
    """All of its tests, images among them; one skips itself, for want of reasoning."""
    run = "import sys; from llm_comply.cli import main; sys.exit(main())"
    url = f"http://127.0.0.1:{box.port}/v1"
    found = subprocess.run(
        [sys.executable, "-c", run, "--format", "openai-chat", "-u", url, "-m", "sees", "-k", "x"],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert found.returncode == 0, found.stdout
