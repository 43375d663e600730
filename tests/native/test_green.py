"""Subsets of a GPU's multiprocessors: the real bindings on the stand-in for the driver.

Each case is a process of its own, since a process has one driver. It prints what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.gpu_machine import NATIVE
from tests.native.conftest import Built

pytestmark = pytest.mark.usefixtures("gpu_python")
Case = Callable[..., Any]

PRELUDE = """
import ctypes, json
from cotenant.domain.errors import CotenantError
from cotenant.engines.cuda.driver import CudaError, Gpu
from cotenant.engines.cuda.subsets import Subsets
library = ctypes.CDLL("libcuda.so.1")
library.standinGreen.restype = ctypes.c_uint64

def live():
    '''Contexts, contexts ever, streams, pinned bytes.'''
    return [library.standinGreen(what) for what in range(4)]

gpu = Gpu("0")
gpu.open()
subsets = Subsets(gpu)
subsets.open()
"""


def run(
    built: Built, arguments: list[str], env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """A process on the stand-in."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "LD_LIBRARY_PATH": str(built.driver), **env},
        cwd=NATIVE.parent,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def case(built: Built) -> Case:
    """Runs what a case does, on open ``subsets`` of ``gpu``, and gives what it printed."""

    def call(code: str, **env: str) -> Any:
        done = run(built, ["-c", PRELUDE + code], env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


@pytest.mark.parametrize(
    ("sms", "group", "units"), [(132, "8 8", 16), (58, "4 2", 14), (40, "2 2", 20), (20, "3 4", 5)]
)
def test_units_are_as_small_as_the_driver_allows(
    case: Case, sms: int, group: str, units: int
) -> None:
    found = case(
        "print(json.dumps([subsets.sms, len(subsets.units), subsets.unit_sms]))",
        STANDIN_SMS=str(sms), STANDIN_SM_GROUP=group,
    )  # fmt: skip
    assert found == [sms, units, max(map(int, group.split()))]


def test_a_subset_has_as_many_multiprocessors_as_are_read_back(case: Case) -> None:
    found = case("""
lanes = [subsets.lane(units) for units in ((0, 1), (2, 3, 4), (15,), range(16))]
print(json.dumps([[lane.sms, lane.whole] for lane in lanes]))
""")
    assert found == [[16, False], [24, False], [8, False], [132, True]]


def test_the_stream_of_a_subset_is_on_it_and_goes_first(case: Case) -> None:
    found = case("""
lane = subsets.lane((3, 7))
stream = gpu.cuda.CUstream(lane.stream)
kind = gpu.cuda.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
had = gpu.call("cuStreamGetDevResource", stream, kind)
print(json.dumps([had.sm.smCount, gpu.call("cuStreamGetPriority", stream), lane.priority]))
""")
    assert found[0] == 16 and found[1] == found[2] < 0


def test_subsets_are_the_same_multiprocessors_each_time_and_never_each_others(case: Case) -> None:
    found = case("""
def mask(units):
    kind = gpu.cuda.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    stream = gpu.cuda.CUstream(subsets.lane(units).stream)
    return gpu.call("cuStreamGetDevResource", stream, kind)._internal_padding[4:36].hex()
before = [mask((unit,)) for unit in subsets.units]
for unit in subsets.units:
    subsets.release((unit,))
print(json.dumps([before, [mask((unit,)) for unit in reversed(subsets.units)]]))
""")
    masks = [int(mask, 16) for mask in found[0]]
    assert found[0] == found[1][::-1]
    assert sum(masks) == int.from_bytes(b"\xff" * 16 + bytes(16)), "128 of 132, each of them once"


def test_a_subset_is_made_once_and_everything_is_given_back(case: Case) -> None:
    found = case("""
seen = [live()]
first, again = subsets.lane((1, 2)), subsets.lane((2, 1))
subsets.lane((5,)), subsets.lane(subsets.units)
seen.append(live())
subsets.release((5,))
seen.append(live())
subsets.close()
gpu.close()
print(json.dumps([first == again, *seen, live()]))
""")
    same, tried, three, less, closed = found
    assert same and tried == [0, 1, 0, 0], "one was tried at the start, and given back"
    assert three == [2, 3, 3, 0] and less[:3:2] == [1, 2] and closed[:3:2] == [0, 0]


def test_units_that_are_not_there_are_refused(case: Case) -> None:
    found = case("""
refused = []
for units in ((), (16,), (0, -1)):
    try:
        subsets.lane(units)
    except CotenantError as error:
        refused.append(str(error))
print(json.dumps(refused))
""")
    assert len(found) == 3 and all(found)


@pytest.mark.parametrize(
    "call",
    ["cuDeviceGetDevResource", "cuDevSmResourceSplitByCount", "cuDevResourceGenerateDesc",
     "cuGreenCtxCreate", "cuGreenCtxGetDevResource", "cuGreenCtxStreamCreate"],
)  # fmt: skip
def test_without_green_contexts_every_subset_is_the_gpu_and_why_is_said(
    case: Case, call: str
) -> None:
    found = case(
        """
lane = subsets.lane((3,))
print(json.dumps([subsets.refusal, lane.whole, lane == subsets.lane((0, 1)), live()]))
""",
        STANDIN_GREEN_FAULT=f"{call} 801",
    )
    why, whole, same, (contexts, _, streams, _) = found
    assert call in why and whole and same and (contexts, streams) == (0, 1)


def test_a_gpu_too_small_to_split_is_used_whole(case: Case) -> None:
    found = case(
        "print(json.dumps([bool(subsets.refusal), subsets.lane((0,)).whole]))", STANDIN_SMS="6"
    )
    assert found == [True, True]


def test_a_gpu_is_found_by_its_uuid(case: Case) -> None:
    found = case("""
uuid = "GPU-01020304-0506-0708-090a-0b0c0d0e0f10"
ordinals = []
for which in (uuid, uuid.replace("GPU", "MIG"), uuid[:-1] + "1", "1"):
    gpu = Gpu(which)
    try:
        gpu.open()
        ordinals.append(gpu.ordinal)
    except CotenantError as error:
        ordinals.append(None)
print(json.dumps(ordinals))
""")
    assert found == [0, 0, None, None]


def test_what_could_be_used_is_told_by_a_process_of_its_own(built: Built) -> None:
    done = run(built, ["-m", "cotenant.engines.cuda", "0"], {})
    said = json.loads(done.stdout)
    assert (said["sms"], said["unit_sms"], said["units"], said["refusal"]) == (132, 8, 16, "")
    done = run(built, ["-m", "cotenant.engines.cuda", "7"], {})
    assert done.returncode and done.stderr


def test_the_engine_serves_on_subsets_through_the_real_bindings(case: Case) -> None:
    found = case("""
subsets.close()
gpu.close()
from pathlib import Path
import numpy as np
from cotenant.engines.base import Target
from cotenant.engines.onnx_cuda import OnnxCudaEngine
from tests.cuda_standin import Runtime, doubled
from cuda.bindings import driver
runtime = Runtime(doubled(), wait=driver.cuStreamSynchronize)
engine = OnnxCudaEngine(Path("m"), (2, 16), Target("cuda-subsets:0", ((4, 5),)), runtime=runtime)
right = []
for place in ((4, 5), (6, 7), (4, 5)):
    engine.place(place)
    for count in (1, 3, 3, 3):
        x = np.random.default_rng(count).random((count, 3), np.float32)
        (y,) = engine.run(2, {"x": x})
        right.append(bool((y == 2 * x).all()))
lanes = [[lane.units, lane.sms] for lane in engine.lanes]
graphs = [len(session.graphs) for session in runtime.sessions]
during = live()
engine.close()
print(json.dumps([right, lanes, graphs, during, live()]))
""")
    right, lanes, graphs, during, after = found
    assert all(right) and [sms for _, sms in lanes] == [132, 16, 16]
    assert sorted(lanes)[-1][0] == [6, 7] and sum(graphs) >= 2
    assert during[2] == 3 and during[3] > 0
    assert [after[0], after[2], after[3]] == [0, 0, 0]
