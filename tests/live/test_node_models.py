"""Models come, change and go under a node that serves: what is wrong never replaces what works."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.live.conftest import Answer, Box, Boxes

X = np.ones((1, 4), np.float32)


def version(answer: Answer) -> str:
    return str(answer.json.get("model_version"))


def write_check(model: Path, labels: list[int]) -> None:
    """Check data whose right label is the column of the 1."""
    x = np.eye(4, dtype=np.float32)[: len(labels)]
    np.savez(model.with_name("check.npz"), x=x, labels=np.array(labels))


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def reason(box: Box, name: str, which: str) -> str:
    return box.index().get((name, which), {}).get("reason", "")


@pytest.fixture(scope="module")
def box(module_boxes: Boxes) -> Box:
    """With services whose models come later, one for each test."""
    names = ("replaced", "kept", "dropped", "broken", "other", "gone", "late", "unchecked", "worse")
    services: list[dict[str, Any]] = [{"name": name} | FLOORS.get(name, {}) for name in names]
    return module_boxes().configure(services).start(ready=False)


FLOORS = {"unchecked": {"accuracy_floor": 0.5}, "worse": {"accuracy_floor": 0.9}}


def keep_two(box: Box, name: str) -> None:
    """A first version, of a model that keeps two."""
    directory = box.models / name
    directory.mkdir()
    (directory / "model.yaml").write_text("keep_versions: 2\n")
    box.model("scale", name)
    box.until(lambda: box.infer(name, x=X).status == 200)


def states(box: Box, name: str) -> set[str]:
    return {entry["state"] for (each, _), entry in box.index().items() if each == name}


def test_a_new_version_is_swapped_in_under_load_without_one_failed_request(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double", "objective": {"latency": "5s"}}]).start()
    with box.under_load("double", rate=100, x=X) as load:
        for number in (2, 3):
            box.model("scale", "double", version=number, factor=float(number))
            box.until(lambda n=number: version(box.infer("double", x=X)) == str(n))
        box.until(lambda: len(box.workers()) == 1)
    assert load.count(200) == len(load.answers) > 20
    assert box.infer("double", x=X).values == [3, 3, 3, 3]
    assert box.infer("double", version="1", x=X).status == 404


def test_a_replaced_file_of_the_same_version_is_swapped_in(box: Box) -> None:
    box.model("scale", "replaced")
    box.until(lambda: box.infer("replaced", x=X).status == 200)
    with box.under_load("replaced", rate=100, x=X) as load:
        box.model("scale", "replaced", factor=5.0)
        box.until(lambda: box.infer("replaced", x=X).values == [5, 5, 5, 5])
    assert load.count(200) == len(load.answers)


def test_versions_that_are_kept_are_served_by_name(box: Box) -> None:
    keep_two(box, "kept")
    box.model("scale", "kept", version=2, factor=3.0)
    box.until(lambda: version(box.infer("kept", x=X)) == "2")
    assert box.infer("kept", version="1", x=X).values == [2, 2, 2, 2]
    assert box.infer("kept", version="2", x=X).values == [3, 3, 3, 3]


def test_a_broken_new_version_is_refused_and_the_old_one_serves(box: Box) -> None:
    box.model("scale", "broken")
    box.until(lambda: box.infer("broken", x=X).status == 200)
    with box.under_load("broken", rate=50, x=X) as load:
        (box.models / "broken" / "2").mkdir()
        (box.models / "broken" / "2" / "model.onnx").write_bytes(b"no model at all")
        box.until(lambda: "cannot be loaded" in reason(box, "broken", "2"))
    assert load.count(200) == len(load.answers)
    assert version(box.infer("broken", x=X)) == "1"
    box.model("scale", "broken", version=2)
    box.until(lambda: version(box.infer("broken", x=X)) == "2")


def test_a_truncated_file_is_refused_until_it_is_whole(boxes: Boxes) -> None:
    box = boxes()
    truncate(box.model("work", "work"))
    box.model("scale", "double")
    box.configure([{"name": "work"}, {"name": "double"}]).start(ready=False)
    box.until(lambda: "cannot be loaded" in reason(box, "work", "1"))
    box.until(lambda: box.infer("double", x=X).status == 200)
    answer = box.infer("work", x=X)
    assert answer.status == 404
    assert "cannot be loaded" in answer.error
    box.model("work", "work")
    box.until(lambda: box.service("work")["state"] == "READY")


def test_a_file_replaced_while_it_is_loaded_is_refused_then_loaded_anew(
    boxes: Boxes, sabotage: dict[str, str]
) -> None:
    box = boxes(env=sabotage)
    box.model("scale", "double")
    box.configure([{"name": "double"}]).start()
    path = box.model("scale", "double", version=2, factor=3.0)
    hold = path.with_name(".hold")
    path.rename(path.with_name("aside"))
    hold.touch()
    path.with_name("aside").rename(path)
    box.until(lambda: box.service("double")["state"] == "READY" and len(box.workers()) == 2)
    box.model("scale", "double", version=2, factor=4.0)
    hold.unlink()
    box.until(lambda: version(box.infer("double", x=X)) == "2")
    assert box.infer("double", x=X).values == [4, 4, 4, 4]
    assert "was replaced while it was being loaded" in box.log()


def test_a_version_below_its_accuracy_floor_is_refused(box: Box) -> None:
    first = box.models / "worse" / "1"
    first.mkdir(parents=True)
    write_check(first / "model.onnx", [0, 1, 2, 3])
    box.model("scale", "worse")
    box.until(lambda: box.infer("worse", x=X).status == 200)
    directory = box.models / "worse" / "2"
    directory.mkdir()
    write_check(directory / "model.onnx", [0, 1, 3, 2])
    box.model("scale", "worse", version=2)
    box.until(lambda: "below the floor" in reason(box, "worse", "2"))
    assert "0.5000" in reason(box, "worse", "2")
    assert version(box.infer("worse", x=X)) == "1"


def test_check_data_that_cannot_be_read_refuse_the_version(box: Box) -> None:
    first = box.models / "unchecked" / "1"
    first.mkdir(parents=True)
    (first / "check.npz").write_bytes(b"no zip")
    box.model("scale", "unchecked")
    box.until(lambda: "check.npz cannot be read" in reason(box, "unchecked", "1"))


def test_a_version_with_other_inputs_is_refused(box: Box) -> None:
    box.model("scale", "other")
    box.until(lambda: box.infer("other", x=X).status == 200)
    box.model("count", "other", version=2)
    box.until(lambda: "has other inputs" in reason(box, "other", "2"))
    assert box.infer("other", x=X).status == 200


def test_models_are_loaded_and_unloaded_on_request(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.model("scale", "triple", factor=3.0)
    box.configure([{"name": "double"}]).start()
    assert box.infer("triple", x=X).status == 404
    assert box.index()["triple", "1"]["state"] == "UNAVAILABLE"
    assert box.post("/v2/repository/models/triple/load", b"{}").status == 200
    assert box.infer("triple", x=X).values == [3, 3, 3, 3]
    assert box.post("/v2/repository/models/triple/unload", b"{}").status == 200
    assert box.infer("triple", x=X).status == 404
    box.until(lambda: len(box.workers()) == 1)
    assert box.infer("double", x=X).status == 200
    assert box.post("/v2/repository/models/quadruple/load", b"{}").status == 404
    assert box.post("/v2/repository/models/..%2f..%2fetc/load", b"{}").status == 404


def test_a_declared_model_that_was_unloaded_stays_away_until_it_is_loaded(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double"}]).start()
    assert box.post("/v2/repository/models/double/unload", b"{}").status == 200
    box.model("scale", "double", version=2)
    box.model("scale", "triple")
    assert box.post("/v2/repository/models/triple/load", b"{}").status == 200
    box.until(lambda: box.infer("triple", x=X).status == 200)
    assert box.infer("double", x=X).status == 404
    assert box.post("/v2/repository/models/double/load", b"{}").status == 200
    assert version(box.infer("double", x=X)) == "2"


def test_a_model_is_unloaded_under_load_and_every_request_is_answered(boxes: Boxes) -> None:
    box = boxes()
    box.model("count", "count")
    box.configure([{"name": "count"}]).start()
    with box.under_load("count", rate=100, n=np.array([3000])) as load:
        box.until(lambda: box.service("count")["answered"] > 10)
        assert box.post("/v2/repository/models/count/unload", b"{}").status == 200
        assert box.post("/v2/repository/models/count/load", b"{}").status == 200
        box.until(lambda: box.service("count")["answered"] > 10)
    statuses = {a.status for a in load.answers if a is not None}
    assert None not in load.answers
    assert statuses <= {200, 404, 503}


def test_a_declared_model_may_come_after_the_node(box: Box) -> None:
    assert box.infer("late", x=X).status == 404
    assert "no model named" in box.index()["late", ""]["reason"]
    box.model("scale", "late")
    box.until(lambda: box.infer("late", x=X).status == 200)


def test_loads_at_the_same_time_are_done_in_turn(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([]).start()
    statuses: list[int] = []

    def load() -> None:
        statuses.append(box.post("/v2/repository/models/double/load", b"{}").status)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200, 200, 200]
    box.until(lambda: len(box.workers()) == 1)
    assert box.infer("double", x=X).status == 200


def test_an_instance_that_dies_while_its_siblings_load_is_started_again(
    boxes: Boxes, sabotage: dict[str, str]
) -> None:
    box = boxes(env=sabotage)
    hold = box.model("scale", "double").with_name(".hold")
    hold.touch()
    hold.with_name(".die_once").touch()
    box.configure([{"name": "double", "instances": 2}]).start(ready=False)
    box.until(lambda: len(box.workers()) == 2)
    box.until(lambda: len(box.workers()) == 1)
    hold.unlink()
    box.until(lambda: box.service("double")["workers"] == 2)
    assert box.infer("double", x=X).status == 200


def test_a_version_that_vanishes_while_it_is_loaded_holds_up_no_other(
    boxes: Boxes, sabotage: dict[str, str]
) -> None:
    box = boxes(env=sabotage)
    box.model("scale", "double").with_name(".hold").touch()
    box.configure([{"name": "double"}]).start(ready=False)
    box.until(lambda: len(box.workers()) == 1)
    shutil.rmtree(box.models / "double")
    box.until(lambda: len(box.workers()) == 0)
    box.model("scale", "double", version=2, factor=3.0)
    box.until(lambda: box.infer("double", x=X).status == 200)


def test_a_file_that_was_never_checked_does_not_come_in_by_way_of_a_crash(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double"}], node={"poll_models_every": "1h"}).start()
    box.model("count", "double")
    (worker,) = box.workers()
    os.kill(worker, signal.SIGKILL)
    box.until(lambda: "was replaced" in box.log())
    assert box.service("double")["workers"] == 0
    box.model("scale", "double", factor=7.0)
    assert box.post("/v2/repository/models/double/load", b"{}").status == 200
    assert box.infer("double", x=X).values == [7, 7, 7, 7]


def test_the_newest_version_that_is_there_takes_over_from_one_that_is_gone(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.model("scale", "double", version=2, factor=3.0)
    box.configure([{"name": "double", "objective": {"latency": "5s"}}]).start()
    with box.under_load("double", rate=50, x=X) as load:
        shutil.rmtree(box.models / "double" / "2")
        box.until(lambda: version(box.infer("double", x=X)) == "1")
    assert load.count(200) == len(load.answers)
    box.until(lambda: [v for n, v in box.index() if n == "double"] == ["1"])
    assert box.infer("double", version="2", x=X).status == 404


def test_a_kept_version_that_is_gone_is_served_no_longer(box: Box) -> None:
    keep_two(box, "dropped")
    box.model("scale", "dropped", version=2, factor=3.0)
    box.until(lambda: version(box.infer("dropped", x=X)) == "2")
    shutil.rmtree(box.models / "dropped" / "1")
    box.until(lambda: box.infer("dropped", version="1", x=X).status == 404)
    assert box.infer("dropped", x=X).values == [3, 3, 3, 3]


def test_a_declared_model_that_is_gone_is_waited_for(box: Box) -> None:
    box.model("scale", "gone")
    box.until(lambda: box.infer("gone", x=X).status == 200)
    shutil.rmtree(box.models / "gone")
    box.until(lambda: box.infer("gone", x=X).status == 404)
    box.until(lambda: states(box, "gone") == {"UNAVAILABLE"})
    box.model("scale", "gone", factor=5.0)
    box.until(lambda: box.infer("gone", x=X).status == 200)
    assert box.infer("gone", x=X).values == [5, 5, 5, 5]


def test_another_version_serves_where_the_newest_was_refused(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    truncate(box.model("work", "double", version=2))
    box.configure([{"name": "double"}]).start(ready=False)
    box.until(lambda: version(box.infer("double", x=X)) == "1")
    assert "cannot be loaded" in reason(box, "double", "2")


def test_a_model_that_is_being_loaded_is_to_be_asked_for_again(
    boxes: Boxes, sabotage: dict[str, str]
) -> None:
    box = boxes(env=sabotage)
    hold = box.model("scale", "double").with_name(".hold")
    hold.touch()
    box.configure([{"name": "double"}]).start(ready=False)
    answer = box.infer("double", x=X)
    assert (answer.status, answer.headers["cotenant-refusal"]) == (503, "UNAVAILABLE")
    assert int(answer.headers["retry-after"]) > 0
    hold.unlink()
    box.until(lambda: box.infer("double", x=X).status == 200)


def test_loading_what_serves_already_starts_nothing(boxes: Boxes) -> None:
    box = boxes()
    box.model("scale", "double")
    box.configure([{"name": "double"}]).start()
    before = box.workers()
    assert box.post("/v2/repository/models/double/load", b"{}").status == 200
    assert box.workers() == before


def test_a_model_that_fits_nowhere_is_refused_with_the_reason_and_others_serve(
    boxes: Boxes,
) -> None:
    box = boxes()
    box.model("scale", "small")
    box.model("scale", "large")
    box.configure([{"name": "small"}, {"name": "large", "memory": "900TiB"}]).start(ready=False)
    box.until(lambda: box.infer("small", x=X).status == 200)
    for _ in range(2):  # every time it is asked for
        answer = box.post("/v2/repository/models/large/load", b"{}")
        assert answer.status >= 400 and "cpu" in str(answer.json)
    assert box.infer("large", x=X).status >= 400
    box.submit("true", memory=2**60)
    box.until(lambda: box.job("job").reason)
    assert box.job("job").state == "queued"
