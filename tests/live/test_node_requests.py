"""What clients send: refused with what would be right, or answered; never a slot or byte kept."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
import uvloop
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from tests.live.conftest import Answer, Box, Boxes

X = np.ones((1, 4), np.float32)
ROW = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}


@pytest.fixture(scope="module")
def box(module_boxes: Boxes) -> Box:
    box = module_boxes()
    for kind, name in (("scale", "double"), ("pick", "pick"), ("positive", "positive")):
        box.model(kind, name)
    (box.models / "pick" / "model.yaml").write_text("ranges: {x: [0, 9]}")
    box.model("scale", "wide", width=2**20)
    together = {"max": 8, "preferred": [8], "max_queue_delay": "300ms"}
    services = [
        {"name": "double", "refuse_nan": True},
        {"name": "pick", "batch": together},
        {"name": "positive", "batch": {"max": 4, "preferred": [4], "max_queue_delay": "300ms"}},
        {"name": "wide", "batch": {"max": 1}},
    ]
    box.configure(services, node={"limits": {"body": "5MiB", "arena": "4MiB"}})
    return box.start()


def with_input(box: Box, **changes: object) -> Answer:
    return box.post("/v2/models/double/infer", json.dumps({"inputs": [ROW | changes]}).encode())


def test_a_right_request_is_answered(box: Box) -> None:
    assert box.infer("double", x=X).values == [2, 2, 2, 2]


def test_an_unknown_model_is_not_found_and_the_known_ones_are_named(box: Box) -> None:
    answer = box.infer("duoble", x=X)
    assert answer.status == 404
    assert "duoble" in answer.error
    assert "double" in answer.error


def test_an_unknown_version_is_not_found_and_those_served_are_named(box: Box) -> None:
    answer = box.infer("double", version="7", x=X)
    assert answer.status == 404
    assert "serving: 1" in answer.error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "z"}, "the model's inputs are 'x'"),
        ({"datatype": "INT32"}, "the model takes FP32"),
        ({"datatype": "FP99"}, "FP99"),
        ({"shape": [1, 5], "data": [1, 2, 3, 4, 5]}, "the model takes [-1, 4]"),
        ({"shape": [4]}, "the model takes [-1, 4]"),
        ({"shape": [1, -4]}, ""),
        ({"shape": [0, 4], "data": []}, "1 to 8 rows"),
        ({"shape": [9, 4], "data": list(range(36))}, "1 to 8 rows"),
        ({"data": [1, 2, 3]}, "4"),
        ({"data": ["a", "b", "c", "d"]}, ""),
    ],
)
def test_a_wrong_input_is_refused_with_what_would_be_right(
    box: Box, changes: dict[str, object], said: str
) -> None:
    answer = with_input(box, **changes)
    assert answer.status == 400
    assert said in answer.error


def test_an_input_with_too_few_bytes_is_refused(box: Box) -> None:
    head = {**ROW, "parameters": {"binary_data_size": 12}}
    del head["data"]
    text = json.dumps({"inputs": [head]}).encode()
    answer = box.post(
        "/v2/models/double/infer",
        text + bytes(12),
        {"Inference-Header-Content-Length": str(len(text))},
    )
    assert answer.status == 400
    assert "12" in answer.error


def test_a_missing_input_is_refused(box: Box) -> None:
    answer = box.post("/v2/models/double/infer", b'{"inputs": []}')
    assert answer.status == 400
    assert "every input" in answer.error


def test_an_output_that_the_model_does_not_have_is_refused(box: Box) -> None:
    body = {"inputs": [ROW], "outputs": [{"name": "q"}]}
    answer = box.post("/v2/models/double/infer", json.dumps(body).encode())
    assert answer.status == 400
    assert "'y'" in answer.error


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_where_the_service_says_so(box: Box, value: float) -> None:
    answer = box.infer_binary("double", "x", np.array([[1, value, 3, 4]], np.float32))
    assert answer.status == 400
    assert "NaN or infinity" in answer.error
    taken = box.infer_binary("positive", "x", np.array([-abs(value), 1], np.float32))
    assert taken.values == [1]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"inputs": 3}', b"\xff\xfe", b"null"])
def test_malformed_json_is_refused(box: Box, body: bytes) -> None:
    answer = box.post("/v2/models/double/infer", body)
    assert answer.status == 400
    assert answer.error


def test_a_body_over_the_limit_is_refused(box: Box) -> None:
    assert box.post("/v2/models/double/infer", bytes(6 * 2**20)).status == 413


def test_a_request_that_can_never_fit_tensor_memory_is_not_told_to_retry(box: Box) -> None:
    answer = box.infer_binary("wide", "x", np.ones((1, 2**20), np.float32))
    assert answer.status == 413
    assert "limits.arena" in answer.error


def at_once(box: Box, model: str, arrays: list[np.ndarray]) -> list[Answer]:
    """Requests that arrive together, so that they share a batch."""
    answers: dict[int, Answer] = {}

    def send(index: int) -> None:
        answers[index] = box.infer(model, x=arrays[index])

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(arrays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[i] for i in range(len(arrays))]


def batches(box: Box, model: str) -> int:
    stats = box.ask("GET", f"/v2/models/{model}/stats").json["model_stats"][0]
    return int(stats["execution_count"])


def test_an_input_on_which_the_model_fails_fails_alone(box: Box) -> None:
    rows = [np.array([[i]]) for i in range(7)]
    before = batches(box, "pick")
    answers = at_once(box, "pick", [*rows, np.array([[99]])])
    assert batches(box, "pick") - before < 8, "nothing was batched"
    assert [a.values for a in answers[:7]] == [[i] for i in range(7)]
    assert answers[7].status == 400
    assert answers[7].headers["cotenant-refusal"] == "FAILED"


def test_outputs_that_count_what_was_found_are_never_shared_out(box: Box) -> None:
    """Three of four values are above 0; or, as it happens, as many as there are requests."""
    for mine, other in (([1, -1], [2, 3]), ([4, 5], [-1, -1]), ([-1], [6, 7])):
        arrays = [np.array(x, np.float32) for x in (mine, other)]
        answers = at_once(box, "positive", arrays)
        assert [a.values for a in answers] == [[v for v in x if v > 0] for x in (mine, other)]


def test_a_thousand_connections_are_answered(box: Box) -> None:
    load = box.load("double", x=X)
    load.run(rate=1e6, seconds=1e-3)
    assert len(load.answers) == 1000
    assert load.count(200) == 1000


def test_a_client_that_hangs_up_frees_its_place_and_its_memory(boxes: Boxes) -> None:
    box = boxes()
    box.model("count", "count")
    box.configure([{"name": "count", "objective": {"latency": "30s"}}])

    async def hang_up() -> None:
        async with box.here() as node:
            n = np.array([1])
            # Long ones are not handed to a busy worker: all but the one that runs wait here.
            await asyncio.to_thread(box.infer, "count", n=np.array([500_000]))
            arena = node.models.services["count"].arena
            assert arena.used == 0
            socks = [box.hang_up_on("count", n=np.array([500_000])) for _ in range(5)]
            state = node.core.dispatcher.state
            async with asyncio.timeout(30):
                while len(state.queued) < 4:  # one runs
                    await asyncio.sleep(0.01)
            for sock in socks:
                sock.close()
            await asyncio.to_thread(box.until, lambda: not state.queued and not arena.used)
            assert node.monitor.service("count").refused["CANCELLED"] == 4
            after = await asyncio.to_thread(box.infer, "count", n=n)
            assert after.values == [1]
            assert arena.used == 0

    uvloop.run(hang_up())


def test_no_file_is_kept_open_by_answered_requests(box: Box) -> None:
    assert box.process is not None
    fds = f"/proc/{box.process.pid}/fd"
    for _ in range(20):
        box.infer("double", x=X)
    box.until(lambda: len(os.listdir(fds)) < 200, lambda: len(os.listdir(fds)))


def test_the_public_client_is_answered_over_http_and_grpc(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double"}], node={"grpc": "127.0.0.1:0"}).start()
    addresses = {http_client: f"127.0.0.1:{box.port}", grpc_client: box.status()["grpc"]}
    for library, address in addresses.items():
        client = library.InferenceServerClient(address)
        assert client.is_model_ready("double")
        assert client.get_model_metadata("double")
        for rows in (1, 3):
            given = library.InferInput("x", [rows, 4], "FP32")
            given.set_data_from_numpy(np.full((rows, 4), rows, np.float32))
            answer = client.infer("double", [given], request_id="a1")
            assert (answer.as_numpy("y") == 2 * rows).all()
            assert answer.as_numpy("y").shape == (rows, 4)
        wrong = library.InferInput("z", [1, 4], "FP32")
        wrong.set_data_from_numpy(X)
        with pytest.raises(InferenceServerException, match="the model's inputs are 'x'"):
            client.infer("double", [wrong])
        client.close()
