"""A job moves between two nodes on one machine, each with cores and a state directory of its own,
through its checkpoint: it loses the steps since that, and ends as if it had never moved."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cotenant.devices import proctree
from cotenant.domain.units import S
from cotenant.domain.workload import RestartPolicy
from tests.installed import SITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.live.conftest import Box, Boxes

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "examples" / "moving" / "train.py"
CORES = sorted(os.sched_getaffinity(0))[:2]
EVERY, STEPS = 20, 1000
PLAIN = {"PYTHONPATH": SITE, "PATH": os.environ["PATH"]}
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")


def command(checkpoints: Path, pause: float) -> tuple[str, ...]:
    options = {"checkpoints": checkpoints, "every": EVERY, "steps": STEPS, "pause": pause}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return (sys.executable, str(TRAIN), *given)


def admitted(
    box: Box, checkpoints: Path, env: dict[str, str] | None = None, pause: float = 0
) -> None:
    """The job is submitted to a node; it is not the node that starts it again elsewhere."""
    # What it prints goes to a file at once: a log has a pipe before it, which dies with the box.
    straight = ("sh", "-c", f'exec "$@" > {box.directory / "said"}', "sh")
    marked = {"COTENANT_TEST_BOX": box.mark}
    box.submit(
        *straight,
        *command(checkpoints, pause),
        env={**PLAIN, **marked, **(env or {})},
        restart=RestartPolicy.NEVER,
        grace=20 * S,
    )


def said(box: Box, what: str) -> list[int]:
    """The numbers after ``what`` in what the job printed."""
    path = box.directory / "said"
    text = path.read_text() if path.exists() else ""
    return [int(n) for n in re.findall(rf"^{what} (\d+)$", text, re.M)]


def weights(checkpoints: Path) -> np.ndarray:
    with np.load(checkpoints / f"step-{STEPS:09d}.npz") as kept:
        return np.array(kept["weights"])


def told_to_leave(box: Box) -> dict[str, str]:
    box.control.cancel("job")
    box.until(lambda: box.job("job").state == "cancelled", lambda: box.job("job"))
    return {"COTENANT_CHECKPOINT": box.job("job").checkpoint}


def killed(box: Box) -> dict[str, str]:
    os.kill(box.job("job").pid, signal.SIGKILL)
    box.until(lambda: box.job("job").state == "failed", lambda: box.job("job"))
    return {"COTENANT_CHECKPOINT": box.job("job").checkpoint}


def whole_box_lost(box: Box) -> dict[str, str]:
    """Nobody is left to ask: the job finds its checkpoint where it leaves them."""
    assert box.process is not None
    all_of_it = [box.process.pid, *proctree.descendants(box.process.pid)]
    proctree.send(all_of_it, signal.SIGSTOP)  # at one moment, as it were
    proctree.send(all_of_it, signal.SIGKILL)
    box.process.wait()
    box.until(lambda: not [pid for pid in all_of_it if Path(f"/proc/{pid}").exists()])
    return {}


@pytest.mark.parametrize("leaves", [told_to_leave, killed, whole_box_lost])
def test_a_job_that_moves_loses_at_most_what_it_did_since_its_checkpoint(
    boxes: Boxes, tmp_path: Path, leaves: Callable[[Box], dict[str, str]]
) -> None:
    here, there = (
        boxes().configure([], devices=[{"kind": "cpu", "cores": [core]}]).start() for core in CORES
    )
    shared = tmp_path / "shared"
    admitted(here, shared, pause=0.02)
    here.until(lambda: len(said(here, "step")) > 2 * EVERY + EVERY // 2, here.log)
    here.until(lambda: here.job("job").checkpoint, lambda: here.job("job"))

    env = leaves(here)
    done = said(here, "step")
    admitted(there, shared, env)
    there.until(lambda: there.job("job").state == "succeeded", lambda: there.job("job"))

    (begun,) = said(there, "goes on from step")
    assert 0 < begun <= done[-1] < STEPS  # it was stopped on its way
    assert done[-1] - begun <= (0 if leaves is told_to_leave else EVERY)
    assert said(there, "step") == list(range(begun + 1, STEPS + 1))
    assert there.job("job").checkpoint_step == STEPS

    unmoved = tmp_path / "unmoved"
    alone = command(unmoved, pause=0)
    subprocess.run(alone, env=PLAIN, check=True, stdout=subprocess.DEVNULL, timeout=60)
    np.testing.assert_array_equal(weights(shared), weights(unmoved))
