"""Answers in pieces on a real box: turns take turns, and whatever ends one in the middle."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.grpc as triton

if TYPE_CHECKING:
    from pathlib import Path

    from tests.live.conftest import Box, Boxes

X = np.ones((1, 4), np.float32)
TEXT = "the quick brown fox jumps over the lazy dog"


def talking(box: Box, name: str = "talk", pieces: int = 20, turn_ms: float = 20) -> Path:
    """A model that says back its text in pieces."""
    path = box.models / name / "1" / "model.pieces.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"pieces": pieces, "turn_ms": turn_ms}))
    return path


class Talk:
    """A ``generate_stream`` under way."""

    def __init__(self, box: Box, text: str = TEXT, model: str = "talk") -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=40)
        body = json.dumps({"text": text})
        self._connection.request("POST", f"/v2/models/{model}/generate_stream", body)
        self._answer = self._connection.getresponse()
        self.status = self._answer.status

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while line := self._answer.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
        self.close()

    def close(self) -> None:
        self._answer.close()
        self._connection.close()


def is_whole(pieces: list[dict[str, Any]], text: str = TEXT, count: int = 20) -> bool:
    said = "".join(piece.get("text", "") for piece in pieces)
    return said == text and [piece.get("index") for piece in pieces] == list(range(count))


def turns(box: Box, model: str) -> int:
    """How many there were."""
    (found,) = box.ask("GET", f"/v2/models/{model}/stats").json["model_stats"]
    return int(found["execution_count"])


@pytest.fixture(scope="module")
def box(module_boxes: Boxes) -> Box:
    box = module_boxes()
    talking(box)
    talking(box, "long", pieces=1000)
    box.model("scale", "double")
    services = [{"name": name} for name in ("talk", "long", "double")]
    return box.configure(services, node={"grpc": "127.0.0.1:0"}).start()


def test_pieces_come_in_order_and_add_up(box: Box) -> None:
    assert is_whole(list(Talk(box)))
    whole = box.post("/v2/models/talk/generate", json.dumps({"text": TEXT}).encode()).json
    assert (whole["text"], whole["index"]) == (TEXT, list(range(20)))


def test_requests_share_turns(box: Box) -> None:
    texts = [f"{n}: {TEXT}" for n in range(4)]
    said: dict[str, list[dict[str, Any]]] = {}

    def talk(text: str) -> None:
        said[text] = list(Talk(box, text))

    before = turns(box, "talk")
    threads = [threading.Thread(target=talk, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(is_whole(said[text], text) for text in texts)
    assert turns(box, "talk") - before < 4 * 20


def test_another_service_is_answered_between_turns(box: Box) -> None:
    talk = Talk(box, model="long")
    pieces = iter(talk)
    next(pieces)
    for _ in range(5):
        before = next(pieces)["index"]
        assert box.infer("double", x=X).values == [2, 2, 2, 2]
        assert next(pieces)["index"] > before
    talk.close()


def test_who_hangs_up_in_the_middle_is_forgotten(box: Box) -> None:
    before = box.service("long")["refused"].get("CANCELLED", 0)
    talk = Talk(box, model="long")
    assert next(iter(talk))["index"] == 0
    talk.close()
    box.until(lambda: box.service("long")["refused"].get("CANCELLED", 0) > before)
    so_far = turns(box, "long")
    assert is_whole(list(Talk(box)))
    assert turns(box, "long") == so_far


def test_a_stream_of_the_public_client(box: Box) -> None:
    client = triton.InferenceServerClient(box.status()["grpc"])
    text = triton.InferInput("text", [1], "BYTES")
    text.set_data_from_numpy(np.array([TEXT.encode()], np.object_))
    got: list[Any] = []
    over = threading.Event()

    def heard(result: Any, error: Any) -> None:
        got.append(error or result.as_numpy("text")[0])
        if error or result.get_response().parameters["triton_final_response"].bool_param:
            over.set()

    client.start_stream(heard)
    client.async_stream_infer("talk", [text])
    assert over.wait(40)
    client.stop_stream()
    client.close()
    assert b"".join(got).decode() == TEXT


def test_a_plain_inference_is_told_where_to_ask(box: Box) -> None:
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}
    answer = box.post("/v2/models/talk/infer", json.dumps(body).encode())
    assert answer.status == 400
    assert "generate_stream" in answer.error


def test_a_worker_killed_in_the_middle_ends_what_has_begun_with_an_error(boxes: Boxes) -> None:
    box = boxes()
    talking(box, pieces=1000)
    box.configure([{"name": "talk"}]).start()
    pieces = iter(Talk(box))
    next(pieces)
    (worker,) = box.workers()
    os.kill(worker, signal.SIGKILL)
    *_, last = pieces
    assert list(last) == ["error"]
    box.until(lambda: box.service("talk")["workers"] == 1)
    again = Talk(box)
    assert next(iter(again))["index"] == 0
    again.close()


def test_unloading_lets_what_has_begun_end(boxes: Boxes) -> None:
    box = boxes()
    talking(box)
    box.configure([{"name": "talk"}]).start()
    pieces = iter(Talk(box))
    first = next(pieces)
    unloading = threading.Thread(target=box.post, args=("/v2/repository/models/talk/unload", b"{}"))
    unloading.start()
    assert is_whole([first, *pieces])
    unloading.join()
    assert Talk(box).status == 404


def test_a_new_version_lets_what_has_begun_end(boxes: Boxes) -> None:
    box = boxes()
    path = talking(box, pieces=200)
    box.configure([{"name": "talk"}]).start()
    pieces = iter(Talk(box))
    first = next(pieces)
    newer = path.parents[1] / "2" / path.name
    newer.parent.mkdir()
    newer.write_text(json.dumps({"pieces": 3, "turn_ms": 1}))
    box.until(lambda: box.index().get(("talk", "2"), {}).get("state") == "READY")
    assert is_whole(list(Talk(box)), count=3)
    rest = list(pieces)
    assert is_whole([first, *rest], count=200)
    assert {piece["model_version"] for piece in (first, *rest)} == {"1"}
    box.until(lambda: len(box.workers()) == 1)


def test_a_client_that_does_not_read_is_ended_at_the_limit(boxes: Boxes) -> None:
    box = boxes()
    talking(box, pieces=64, turn_ms=1)
    box.configure([{"name": "talk"}], node={"limits": {"unread": "256KiB"}}).start()
    body = json.dumps({"text": "x" * (7 * 2**20)}).encode()
    head = b"POST /v2/models/talk/generate_stream HTTP/1.1\r\nHost: b\r\nConnection: close\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(40)
        sock.connect(("127.0.0.1", box.port))
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        box.until(lambda: box.service("talk")["refused"].get("CANCELLED"))
        got = bytearray()
        while data := sock.recv(2**20):
            got += data
    assert got.count(b"data: ") < 64
    assert b'data: {"error":' in got


def test_the_journal_of_turns_replays(boxes: Boxes) -> None:
    box = boxes()
    talking(box)
    box.model("scale", "double")
    box.configure([{"name": "talk"}, {"name": "double"}]).start()
    first, hung_up = iter(Talk(box)), Talk(box)
    next(first)
    next(iter(hung_up))
    hung_up.close()
    assert box.infer("double", x=X).status == 200
    list(first)
    box.stop()
    command = [sys.executable, "-m", "cotenant", "replay", str(box.state / "journal")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no difference" in done.stdout
