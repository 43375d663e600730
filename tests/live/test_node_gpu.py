"""A node with a GPU, on stand-ins for the driver: jobs behind their gates, beside the CPU."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from cotenant.domain.reservation import Reservation
from cotenant.domain.workload import RestartPolicy
from tests.gpu_machine import GpuMachine
from tests.nvml_standin import Fault, uuid_of

if TYPE_CHECKING:
    from tests.live.conftest import Box, Boxes

GPU = {"kind": "cuda", "bound": "20ms"}
DEVICES = [{"kind": "cpu"}, GPU]
RUNS = ("sh", "-c", 'exec "$COTENANT_JOB" forever 1 1 200')


def device(box: Box) -> dict[str, Any]:
    return next(dict(d) for d in box.status()["devices"] if d["id"] == "cuda")


def tenants(box: Box) -> dict[str, Any]:
    return dict(device(box)["tenants"])


def partition(box: Box) -> dict[str, Any]:
    return next(dict(p) for p in box.status()["partitions"] if p["device"] == "cuda")


def asked(box: Box) -> int:
    """A request that takes three turns; its status. Its answer is whole if there is one."""
    answer = box.post("/v2/models/pieces/generate_stream", b'{"text": "abcdef"}')
    assert answer.status != 200 or answer.body.count(b"data: ") == 3
    return answer.status


@pytest.fixture
def box(boxes: Boxes, gpu: GpuMachine) -> Box:
    """A model of pieces on the GPU: its engine stands in for one that computes there."""
    return with_a_model(boxes(dict(gpu.env())), DEVICES)


def with_a_model(found: Box, devices: list[dict[str, Any]]) -> Box:
    path = found.models / "pieces" / "1" / "model.pieces.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(msgspec.json.encode({"pieces": 3, "turn_ms": 5}))
    return found.configure([{"name": "pieces", "kinds": "cuda"}], devices=devices)


def submit(
    box: Box, gpu: GpuMachine, *command: str, env: Mapping[str, str] = {}, **fields: Any
) -> str:
    env = {**os.environ, **gpu.env(), "COTENANT_TEST_BOX": box.mark, **env}
    return box.submit(*command, kinds=("cuda",), env=env, **fields)


def program(box: Box) -> int:
    """The process of the job's command."""
    found = box.until(lambda: [p for p in box.processes() if _argument(p) == "forever"])
    return int(found[0])


def _argument(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1]
    except (OSError, IndexError):
        return ""


def test_a_job_has_the_gpu_between_requests(box: Box, gpu: GpuMachine) -> None:
    box.start()
    job = submit(box, gpu, *RUNS)
    box.until(lambda: box.job("job").partitions)
    assert tenants(box)[job]["level"] == "GATE"
    switches = partition(box)["switches"]
    for _ in range(5):
        assert asked(box) == 200
        box.until(lambda: box.job("job").partitions)
    assert partition(box)["switches"] > switches
    gpu.show(program(box), memory=5 << 30)
    box.until(lambda: 0 < (tenants(box)[job]["memory"] or 0) < 5 << 30)  # as it counts itself
    box.control.cancel(job)
    box.until(lambda: job not in tenants(box))
    assert asked(box) == 200


def test_who_is_adopted_has_the_gpu_between_requests_as_a_job_has(
    box: Box, gpu: GpuMachine
) -> None:
    box.start()
    assert box.control.reserve(Reservation("r", "cuda", share=0.4)).made
    (found,) = box.until(
        lambda: [s for s in box.control.reservations() if s.state == "ready"],
        box.control.reservations,
    )
    env = {**os.environ, **gpu.env(), **found.env, "COTENANT_TEST_BOX": box.mark}
    for name, paths in found.prepend.items():
        env[name] = ":".join((paths, env.get(name, ""))).strip(":")
    process = subprocess.Popen(["sh", "-c", RUNS[2]], env=env, start_new_session=True)
    try:
        box.control.adopt("r", process.pid)
        gpu.show(process.pid, memory=5 << 30)
        box.until(lambda: 0 < (tenants(box)[found.job]["memory"] or 0) < 5 << 30)
        switches = partition(box)["switches"]
        for _ in range(5):
            assert asked(box) == 200
            box.until(lambda: box.job("r").partitions)
        assert partition(box)["switches"] > switches
        assert tenants(box)[found.job]["level"] == "GATE"
        box.control.release("r")
        box.until(lambda: found.job not in tenants(box))
        assert process.poll() is None
    finally:
        gpu.show()
        process.kill()
        process.wait()


def test_a_job_that_is_past_its_gate_does_not_stay_beside_services(
    box: Box, gpu: GpuMachine
) -> None:
    box.start()
    job = submit(box, gpu, "sh", "-c", 'env -u COTENANT_GATE "$COTENANT_JOB" forever 1 1 200')
    gpu.show(program(box))
    box.until(lambda: job not in tenants(box))
    box.until(lambda: box.job(job).state == "queued" and box.job(job).reason)
    assert asked(box) == 200
    gpu.show()
    assert box.job(job).state == "queued", "what was seen is not forgotten"


def test_that_a_job_was_past_its_gate_is_known_after_a_restart(box: Box, gpu: GpuMachine) -> None:
    box.start()
    job = submit(box, gpu, "sh", "-c", 'env -u COTENANT_GATE "$COTENANT_JOB" forever 1 1 200')
    gpu.show(program(box))
    box.until(lambda: box.job(job).state == "queued" and box.job(job).reason)
    gpu.show()
    assert box.process is not None
    box.process.kill()
    box.process.wait()
    box.start()
    box.until(lambda: asked(box) == 200 and box.job(job).reason)
    for _ in range(20):
        assert box.job(job).state == "queued"
        time.sleep(0.05)


def test_a_job_whose_kernels_do_not_end_is_ended_and_requests_go_on(
    box: Box, gpu: GpuMachine
) -> None:
    box.start()
    job = submit(box, gpu, "sh", "-c", 'exec "$COTENANT_JOB" forever 1 1 60000000')
    box.until(lambda: box.job("job").partitions)
    # Requests before its first kernel are answered: the job has to be asked for the GPU until then.
    box.until(lambda: asked(box) and job not in tenants(box))
    box.until(lambda: asked(box) == 200)


def test_a_long_kernel_is_stopped_for_each_request_and_ends_as_it_would(
    boxes: Boxes, gpu: GpuMachine, tmp_path: Path
) -> None:
    stats = tmp_path / "stats"
    stats.write_bytes(bytes(64))
    env = {**gpu.env(), "LD_PRELOAD": str(gpu.rm)}
    box = with_a_model(boxes(dict(env)), [{"kind": "cpu"}, {**GPU, "preempt": "channel"}])
    box.start()
    words = ("sh", "-c", 'exec "$COTENANT_JOB" run 1 1 3000000')
    job = submit(box, gpu, *words, env={"LD_PRELOAD": str(gpu.rm), "STANDIN_STATS": str(stats)})
    box.until(lambda: struct.unpack("<8Q", stats.read_bytes())[2])
    for _ in range(5):
        assert asked(box) == 200
        assert struct.unpack("<8Q", stats.read_bytes())[1] == 0, "the kernel was waited for"
        box.until(lambda: box.job("job").partitions)
    assert tenants(box)[job]["level"] == "PAUSE"
    box.until(lambda: box.job(job).state == "succeeded")


def test_what_a_job_does_wrong_is_its_own_error_and_nobody_elses(
    box: Box, gpu: GpuMachine, tmp_path: Path
) -> None:
    """An illegal access, and more memory than it may have."""
    box.start()
    other = submit(box, gpu, *RUNS, name="other")
    faults = tmp_path / "faults"
    faults.write_text("run 3 700\n")
    once: dict[str, Any] = {"restart": RestartPolicy.NEVER}
    bad = submit(box, gpu, *RUNS, name="bad", env={"STANDIN_FAULT": str(faults)}, **once)
    greedy = 'echo "alloc a 64000000" | "$COTENANT_MEMORY_JOB" | grep -x 2'
    full = submit(box, gpu, "sh", "-c", greedy, name="full", memory=32 << 20, **once)
    box.until(lambda: box.job(bad).state == "failed", lambda: box.job(bad))
    box.until(lambda: box.job(full).state == "succeeded")  # it was told: out of memory
    assert asked(box) == 200
    assert box.job(other).state == "running"


@pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None, reason="cuda-bindings is not installed"
)
def test_an_illegal_access_costs_a_worker_and_the_next_one_answers(
    boxes: Boxes, gpu: GpuMachine, tmp_path: Path
) -> None:
    """By an engine of another package; the next thing that it runs breaks the context."""
    faults = tmp_path / "faults"
    path = f"{Path(__file__).parent / 'computes'}:{os.environ.get('PYTHONPATH', '')}"
    env = {**gpu.env(), "PYTHONPATH": path, "STANDIN_FAULT": str(faults)}
    box = boxes(env)
    model = box.models / "model" / "1" / "model.computes.json"
    model.parent.mkdir(parents=True)
    model.write_text("{}")
    box.configure([{"name": "model", "kinds": "cuda"}], devices=DEVICES).start()
    assert box.infer("model", x=np.ones(1, np.float32)).status == 200
    workers = box.workers()
    faults.write_text("run 0 700\n")
    answer = box.infer("model", x=np.ones(1, np.float32))
    faults.unlink()
    assert answer.status in (200, 503), answer.body
    box.until(lambda: box.workers() != workers)
    box.until(lambda: box.infer("model", x=np.ones(1, np.float32)).status == 200)


def test_a_gpu_that_is_lost_is_said_and_the_rest_of_the_box_goes_on(
    box: Box, gpu: GpuMachine
) -> None:
    box.model("scale", "scale")
    services = [{"name": "pieces", "kinds": "cuda"}, {"name": "scale", "kinds": "cpu"}]
    box.configure(services, devices=DEVICES).start()
    job = submit(box, gpu, *RUNS)
    box.until(lambda: box.job("job").partitions)
    gpu.show(faults=(Fault("nvmlDeviceGetComputeRunningProcesses_v3", 15),))
    box.until(lambda: device(box)["trouble"])
    assert box.infer("scale", x=np.ones((1, 4), np.float32)).status == 200
    assert asked(box) == 200
    assert box.job(job).state == "running"
    gpu.show()
    box.until(lambda: not device(box)["trouble"])


def test_a_node_that_is_killed_leaves_the_next_one_nothing_to_stumble_over(
    box: Box, gpu: GpuMachine
) -> None:
    box.start()
    job = submit(box, gpu, *RUNS)
    box.until(lambda: box.job("job").partitions)
    assert box.process is not None
    box.process.kill()
    box.process.wait()
    box.start()
    box.until(lambda: box.job(job).partitions)
    assert asked(box) == 200


def test_one_gpu_that_is_named_twice_is_refused_at_start(box: Box) -> None:
    named = [{**GPU, "id": "first"}, {**GPU, "id": "second", "gpu": uuid_of(0)}]
    assert box.configure([], devices=named).spawn().wait(60) != 0
    assert all(word in box.log() for word in ("first", "second", uuid_of(0)))


def test_a_job_that_is_held_goes_on_where_it_was(box: Box, gpu: GpuMachine) -> None:
    box.start()
    job = submit(box, gpu, *RUNS)
    box.until(lambda: box.job("job").partitions)
    pid = program(box)
    box.control.hold(job)
    box.until(lambda: box.job(job).state == "held")
    assert asked(box) == 200
    box.control.resume(job)
    box.until(lambda: box.job(job).partitions)
    assert (program(box), tenants(box)[job]["level"]) == (pid, "GATE")


def test_where_no_gate_works_jobs_wait_while_something_is_served(box: Box, gpu: GpuMachine) -> None:
    box.configure([{"name": "pieces", "kinds": "cuda"}], devices=[{**GPU, "preempt": "none"}])
    box.start()
    job = submit(box, gpu, *RUNS)
    box.until(lambda: job in tenants(box) or box.job(job).state == "queued")
    box.until(lambda: box.job(job).state == "queued" and job not in tenants(box))
    for _ in range(20):
        assert box.job(job).state == "queued", "it is not started again and again"
        time.sleep(0.05)
    assert asked(box) == 200
