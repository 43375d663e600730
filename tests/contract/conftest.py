"""Front ends over a fake node, one per module; each test leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.contract.fake_node import eventually, serving


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    with serving() as served:
        yield served


@pytest.fixture
def served(shared: Any) -> Iterator[Any]:
    node = shared.node
    yield shared
    node.script = []
    shared.call(node.gate.clear)
    node.refuse = node.fail = node.most = None
    node.loaded = {"double", "echo", "sleepy", "talk"}
    assert eventually(lambda: node.unreleased == 0), "a result was not released"
    assert eventually(lambda: shared.intake.budget.held == 0), "a body's memory was not given back"
