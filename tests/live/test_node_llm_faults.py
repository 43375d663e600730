"""Language models under wrong files, wrong requests and clients that misbehave, on a real box:
what is wrong ends alone, and everybody else is answered."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.live.conftest import until
from tests.unit.llm_files import write

if TYPE_CHECKING:
    from tests.live.conftest import Answer, Box, Boxes

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.content == 'loop' %}"
    + LOOP
    + "{% endif %}{% endfor %}"
)
CONTEXT = 4096
ROOM = 200
"""Blocks (of 16 tokens) that all models together have."""
BLOCK = 32 * 1024
LONG = 2800
"""Tokens of a prompt that takes most of the room: of two, one waits."""
HELLO = [{"role": "user", "content": "hello"}]
X = np.ones((1, 4), np.float32)
BOMBS: dict[str, Any] = {
    "brackets": {"regex": "(" * 50_000 + ")" * 50_000},
    "nested": {
        "json": {"type": "array", "items": json.loads('{"items":' * 400 + "{}" + "}" * 400)}
    },
    "repeats": {"regex": "((((a{999}){999}){999}){999})"},
    "rules": {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60))},
    "long": {"choice": ["a" * 10_000_000]},
}


@pytest.fixture(scope="module")
def box(module_boxes: Boxes) -> Box:
    box = module_boxes()
    for name in ("says", "other"):
        path = box.models / name / "1" / "model.gguf"
        path.parent.mkdir(parents=True)
        write(path, text=True, template=TEMPLATE, context_length=CONTEXT)
    box.model("scale", "double")
    objective = {"ttft": "60s", "tpot": "10s"}
    services = [{"name": name, "objective": objective} for name in ("says", "other")]
    node = {"limits": {"unread": "256KiB"}}
    devices = [{"kind": "cpu", "kv": ROOM * BLOCK}]
    return box.configure([*services, {"name": "double"}], node=node, devices=devices).start()


def generate(box: Box, text: str = "hello", model: str = "says", **given: Any) -> Answer:
    body = {"text_input": text, "max_tokens": 4} | given
    return box.post(f"/v2/models/{model}/generate", json.dumps(body).encode())


def chat(box: Box, said: str, **given: Any) -> Answer:
    messages = [{"role": "user", "content": said}]
    body = {"model": "says", "messages": messages, "max_tokens": 4} | given
    return box.post("/v1/chat/completions", json.dumps(body).encode())


def everybody_is_answered(box: Box) -> None:
    assert generate(box).status == 200
    assert generate(box, model="other").status == 200
    assert box.infer("double", x=X).values == [2, 2, 2, 2]


@contextlib.contextmanager
def begun(box: Box, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request that was sent, by a client that reads nothing unless told to."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: b\r\nConnection: close\r\nContent-Length: {len(data)}"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(40)
        sock.connect(("127.0.0.1", box.port))
        sock.sendall(head.encode() + b"\r\n\r\n" + data)
        yield sock


def in_use(box: Box, model: str = "says") -> int:
    """Bytes of keys and values that somebody reads."""
    kv = box.service(model)["kv"]
    return int(kv["held"] - kv["cold"])


def cancelled(box: Box) -> int:
    return int(box.service("says")["refused"].get("CANCELLED", 0))


# --- files ----------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    write(path, text=True)
    os.truncate(path, path.stat().st_size // 2)


def unknown(path: Path) -> None:
    write(path, text=True, architecture="mamba")


def lying(path: Path) -> None:
    write(path, text=True, block_count=3)


@pytest.mark.parametrize("wrong", [truncated, unknown, lying])
def test_a_wrong_file_is_refused_with_the_reason_and_others_serve(box: Box, wrong: Any) -> None:
    name = wrong.__name__
    path = box.models / name / "1" / "model.gguf"
    path.parent.mkdir(parents=True)
    wrong(path)
    answer = box.post(f"/v2/repository/models/{name}/load", b"{}")
    assert answer.status == 400
    assert answer.error
    everybody_is_answered(box)


# --- requests -------------------------------------------------------------------------------


def test_a_template_that_never_ends_fails_alone(box: Box) -> None:
    found: list[Answer] = []
    loops = [threading.Thread(target=lambda: found.append(chat(box, "loop"))) for _ in range(2)]
    for loop in loops:
        loop.start()
    everybody_is_answered(box)
    assert not found, "they had come to an end before others were answered"
    for loop in loops:
        loop.join()
    assert [answer.status for answer in found] == [400, 400]
    assert chat(box, "hello").status == 200


def test_what_no_pool_could_hold_is_refused_and_what_it_can_is_answered(box: Box) -> None:
    """Its context is longer than all memory: a pool that is as large as can be does not grow."""
    assert generate(box, "x" * (16 * ROOM - 3)).status == 400
    assert generate(box, "x" * (16 * ROOM - 4)).status == 200
    assert generate(box, "x" * CONTEXT).status == 400
    everybody_is_answered(box)


@pytest.mark.parametrize("name", BOMBS)
def test_a_form_that_is_a_bomb_harms_nobody(box: Box, name: str) -> None:
    asked = {"text_input": "hello", "max_tokens": 300}
    with begun(box, "/v2/models/says/generate", asked) as other:
        bomb = chat(box, "hello", structured_outputs=BOMBS[name])
        assert bomb.status in (200, 400, 413)
        assert other.recv(100).split()[1] == b"200"
    everybody_is_answered(box)


# --- clients --------------------------------------------------------------------------------


def test_who_hangs_up_while_the_prompt_is_read_gives_its_blocks_back(box: Box) -> None:
    """To one that has no room beside it."""
    for attempt in range(20):  # until it is in the midst
        if hung_up_in_the_midst(box, attempt):
            break
    else:
        raise AssertionError("each time the prompt was read before")
    until(lambda: not in_use(box))
    everybody_is_answered(box)


def hung_up_in_the_midst(box: Box, number: int) -> bool:
    """Hang up on a long prompt once it has blocks; whether nothing was said yet. The next one is
    answered either way."""
    before = cancelled(box)
    first, second = (f"{number}{letter}" * (LONG // 2) for letter in "ab")
    asked = {"text_input": second, "max_tokens": 4}
    with begun(box, "/v2/models/says/generate_stream", asked | {"text_input": first}) as sock:
        until(lambda: in_use(box))
        with begun(box, "/v2/models/says/generate", asked) as other:
            sock.setblocking(False)
            try:
                said = bool(sock.recv(1))
            except BlockingIOError:
                said = False
            sock.close()
            assert other.recv(100).split()[1] == b"200"
    if not said:
        until(lambda: cancelled(box) > before)
    return not said


def test_who_reads_nothing_of_an_answer_ends_it_and_holds_up_nobody(box: Box) -> None:
    """Of each token the likeliest twenty are told: more than any socket keeps for its reader."""
    before, most = cancelled(box), 3000
    asked = {"model": "says", "messages": HELLO, "max_tokens": most, "ignore_eos": True}
    told = {"stream": True, "logprobs": True, "top_logprobs": 20}
    with begun(box, "/v1/chat/completions", asked | told) as sock:
        until(lambda: cancelled(box) > before)
        until(lambda: not in_use(box))
        everybody_is_answered(box)
        got = bytearray()
        while data := sock.recv(2**20):
            got += data
    assert 0 < got.count(b"data: ") < most
    assert got.count(b'data: {"error":') == 1
    assert b"[DONE]" not in got


# --- workers --------------------------------------------------------------------------------


def test_a_worker_that_is_killed_takes_its_own_answers_and_no_others(box: Box) -> None:
    for _ in range(20):  # until it is in the midst
        streams = [Stream(box, model) for model in ("says", "says", "other", "other")]
        for stream in streams:
            assert stream.began.wait(40)
        os.kill(box.workers()[0], signal.SIGKILL)
        for stream in streams:
            stream.join()
        until(lambda: all(generate(box, model=name).status == 200 for name in ("says", "other")))
        ended = [stream.said.endswith(b"data: [DONE]\n\n") for stream in streams]
        failed = [b'data: {"error":' in stream.said for stream in streams]
        assert all(done != broken for done, broken in zip(ended, failed, strict=True))
        if any(failed):
            break
    else:
        raise AssertionError("each time all was said before it was killed")
    assert failed in ([True, True, False, False], [False, False, True, True])


class Stream(threading.Thread):
    """An answer that is read as it comes; ``began`` with its first piece."""

    def __init__(self, box: Box, model: str) -> None:
        super().__init__()
        self.began = threading.Event()
        self.said = b""
        self._connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=40)
        asked = {"model": model, "prompt": "hello", "max_tokens": 700, "ignore_eos": True}
        self._connection.request("POST", "/v1/completions", json.dumps(asked | {"stream": True}))
        self.start()

    def run(self) -> None:
        answer = self._connection.getresponse()
        self.said += answer.readline()
        self.began.set()
        self.said += answer.read()
        self._connection.close()
