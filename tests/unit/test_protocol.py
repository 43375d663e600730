"""The table of actions and answers is complete, and the life cycles are the code's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from cotenant.domain.actions import Action
from cotenant.domain.device import PreemptLevel
from cotenant.domain.events import Event
from cotenant.domain.protocol import ANSWERS, EFFECTS, answer_table
from cotenant.policy.state import HOLD_TRANSITIONS, Hold
from tests.property.test_dispatcher_random import Chaos

ROOT = Path(__file__).parents[2]


def test_every_action_has_its_answers_and_every_answer_its_effect() -> None:
    assert set(ANSWERS) == set(get_args(Action))
    assert set(EFFECTS) == {(action, answer) for action, ans in ANSWERS.items() for answer in ans}
    assert {answer for ans in ANSWERS.values() for answer in ans} <= set(get_args(Event))


def test_the_docs_hold_the_table_that_the_code_has() -> None:
    assert answer_table() in (ROOT / "docs" / "protocol.md").read_text()
    done = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], check=False)
    assert done.returncode == 0


class Watched(Chaos):
    """Notes every step from hold to hold."""

    def __init__(self, seed: int, level: PreemptLevel, units: int) -> None:
        super().__init__(seed, level, units)
        self.before: dict[str, Hold] = {}
        self.steps: set[tuple[Hold, Hold]] = set()

    def send(self, event: Event) -> None:
        super().send(event)
        for name, p in self.d.state.partitions.items():
            old = self.before.get(name, p.hold)
            if old != p.hold:
                self.steps.add((old, p.hold))
            self.before[name] = p.hold


@pytest.mark.parametrize("level", [PreemptLevel.GATE, PreemptLevel.PRIORITY])
def test_partitions_pass_only_through_the_holds_of_the_table(level: PreemptLevel) -> None:
    allowed = {(a, b) for a, steps in HOLD_TRANSITIONS.items() for b in steps.values()}
    seen: set[tuple[Hold, Hold]] = set()
    for seed in range(25):
        chaos = Watched(seed, level, 2)
        chaos.run(200)
        seen |= chaos.steps
    # One event may take a partition through two steps (revoked, then granted to the next job).
    two = {(a, d) for a, b in allowed for c, d in allowed if b == c}
    assert seen <= allowed | two


def test_importing_the_package_or_the_policy_loads_no_engine_and_no_server() -> None:
    heavy = ["torch", "onnxruntime", "openvino", "google.protobuf", "uvicorn"]
    heavy += ["hpack", "numpy", "kubernetes"]
    for module in (
        "cotenant",
        "cotenant.policy.dispatcher",
        "cotenant.policy.planner",
        "cotenant.sim.replay",
    ):
        code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]", f"importing {module} loads {done.stdout.strip()}"
