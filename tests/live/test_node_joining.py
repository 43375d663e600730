"""Every answer is that of the request alone, whatever else is asked at the same time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from cotenant.engines.base import Array
from cotenant.telemetry.explain import Incident, explain
from cotenant.telemetry.records import read

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

Rows = list[list[float]]


def ask_all(box: Box, model: str, inputs: Sequence[Array]) -> list[Rows]:
    """The answers to requests of which sixteen are under way at any time."""

    def ask(x: Array) -> Rows:
        answer = box.infer(model, x=x)
        assert answer.status == 200, answer.error
        (output,) = answer.json["outputs"]
        return np.reshape(output["data"], output["shape"]).tolist()

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, inputs))


def told(box: Box) -> list[Incident]:
    return explain(read(box.state / "journal"), time.time()).services


def random_inputs(count: int, rows: Sequence[int]) -> list[Array]:
    random = np.random.default_rng(0)
    return [
        random.integers(0, 9, (rows[i % len(rows)], 4)).astype(np.float32) for i in range(count)
    ]


def test_sequences_with_time_on_the_first_axis_are_answered_one_by_one(boxes: Boxes) -> None:
    box = boxes()
    box.model("running_sum", "sums")
    box.configure([{"name": "sums", "objective": {"latency": "5s"}, "batch": {"max": 8}}]).start()
    inputs = random_inputs(64, (1, 3, 20))
    assert ask_all(box, "sums", inputs) == [x.cumsum(axis=0).tolist() for x in inputs]
    service = box.service("sums")
    assert service["joined"] is False
    assert service["notes"]


def test_rows_that_do_not_depend_on_each_other_share_batches(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double", "objective": {"latency": "5s"}, "batch": {"max": 8}}]).start()
    inputs = random_inputs(64, (1, 3, 8))
    assert ask_all(box, "double", inputs) == [(2 * x).tolist() for x in inputs]
    assert box.service("double")["joined"] is True
    assert box.service("double")["notes"] == []
    assert box.infer("double", x=np.ones((9, 4), np.float32)).status == 400


def test_outputs_that_are_not_row_by_row_end_joining_and_nobody_gets_what_is_anothers(
    boxes: Boxes,
) -> None:
    box = boxes()
    box.model("repeating", "found")
    box.configure([{"name": "found", "objective": {"latency": "5s"}, "batch": {"max": 8}}]).start()
    assert box.service("found")["joined"] is True
    inputs = random_inputs(64, (1,))
    for x in inputs[::7]:
        x[0, 0] = 2e6
    wanted = [np.concatenate([x, x[x[:, 0] > 1e6]]).tolist() for x in inputs]
    assert ask_all(box, "found", inputs) == wanted
    assert box.service("found")["joined"] is False
    assert box.infer("found", x=np.ones((20, 4), np.float32)).status == 200
    box.until(lambda: [x.subject for x in told(box)] == ["found"])


def test_nothing_is_shared_out_because_the_size_happens_to_fit(boxes: Boxes) -> None:
    """Of two requests one is found twice and the other not at all: two rows for two requests."""
    box = boxes()
    box.model("finding", "found")
    together = {"max": 2, "preferred": [2], "max_queue_delay": "300ms"}
    box.configure([{"name": "found", "objective": {"latency": "5s"}, "batch": together}]).start()
    assert box.service("found")["joined"] is True
    inputs = [np.array([[sign * 2e6, 0, 0, i]], np.float32) for i in range(4) for sign in (1, -1)]
    wanted = [np.repeat(x, 2 if x[0, 0] > 0 else 0, axis=0).tolist() for x in inputs]
    assert ask_all(box, "found", inputs) == wanted
    assert box.service("found")["joined"] is False


def test_an_owner_may_say_that_there_is_no_batch_axis_or_that_joining_is_right(
    boxes: Boxes,
) -> None:
    box = boxes()
    for name in ("none", "trusted"):
        box.model("pick", name)
    box.configure(
        [
            {"name": "none", "batch": "none"},
            {"name": "trusted", "batch": {"max": 4, "joining": "trusted"}},
        ]
    ).start()
    x = np.zeros((6, 1), np.int64)
    assert box.infer("none", x=x).status == 200
    assert box.infer("trusted", x=x).status == 400
    assert [box.service(n)["joined"] for n in ("none", "trusted")] == [False, True]
    assert [box.service(n)["notes"] for n in ("none", "trusted")] == [[], []]


def test_what_was_found_out_of_a_version_holds_for_a_worker_that_comes_after(boxes: Boxes) -> None:
    box = boxes()
    box.model("running_sum", "sums")
    box.configure([{"name": "sums", "objective": {"latency": "5s"}}]).start()
    (old,) = box.workers("sums")
    os.kill(old, signal.SIGKILL)
    box.until(lambda: box.service("sums")["workers"] == 0)
    box.until(lambda: box.service("sums")["workers"] == 1)
    inputs = random_inputs(32, (1, 5))
    assert ask_all(box, "sums", inputs) == [x.cumsum(axis=0).tolist() for x in inputs]
