"""Which libcuda a library of this machine gets where the shim is preloaded, and whether what it
launches passes the gate."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from typing import Any

from cotenant.devices.nvidia.page import ControlPage, Seat

from processes import Died, Job, open_page
from record import MS, Record, Setting

MODULES = {
    "plain": "",
    "bindings": "cuda.bindings",
    "torch": "torch",
    "triton": "triton",
    "cupy": "cupy",
    "jax": "jax",
}
COUNT = 200
START_S = 40.0
"""Within which a library must have launched its first kernels."""


def run(setting: Setting, record: Record) -> None:
    """All libraries, in processes of their own."""
    for library, module in MODULES.items():
        if reason := _missing(module):
            record.without(library, reason)
            continue
        with record.part(library):
            record.need(2)
            page = open_page(setting, library, 2 * MS)
            try:
                with Job(setting, page.path, program=("loader_job.py", library)) as job:
                    record.figure(library, _watch(job, page, setting, record))
            finally:
                page.close()


def _missing(module: str) -> str:
    """Why it need not be tried; empty if it may work."""
    try:
        if module and importlib.util.find_spec(module) is None:
            return "not installed"
        if module == "torch" and importlib.metadata.version("torch").endswith("+cpu"):
            return "a build without CUDA"
    except ImportError:
        return "not installed"
    return ""


def _watch(job: Job, page: ControlPage, setting: Setting, record: Record) -> dict[str, Any]:
    opened = job.answer(min(START_S, max(2.0, record.left_s)))
    shim = [path for path in opened["mapped"] if path.startswith(setting.shim)]
    found: dict[str, Any] = {
        "version": opened["version"],
        "mapped": opened["mapped"],
        "shim_mapped": bool(shim),
        "attached": page.attached(job.pid),
    }
    if not found["attached"]:
        return found
    before = _seat(page, job.pid).launches
    made = job.ask("launch", 30, count=COUNT)["kernels"]
    counted = _seat(page, job.pid).launches - before
    found |= {"launched": made, "counted": counted, "all_seen": counted >= made}
    return found | {"held": _held(job, page)}


def _held(job: Job, page: ControlPage) -> bool:
    """Whether a closed gate holds its launches: none is made, and a caller waits."""
    page.close_gate()
    page.wait_drained(2_000 * MS)
    before = _seat(page, job.pid).launches
    job.tell("launch", count=1)
    waits, end = False, time.monotonic() + 1
    while not waits and time.monotonic() < end:
        page.beat()
        time.sleep(0.005)
        waits = _seat(page, job.pid).waiting > 0
    held = waits and _seat(page, job.pid).launches == before
    page.open_gate()
    job.answer(30)
    return held


def _seat(page: ControlPage, pid: int) -> Seat:
    for seat in page.seats():
        if seat.pid == pid:
            return seat
    raise Died(f"process {pid} left its seat")
