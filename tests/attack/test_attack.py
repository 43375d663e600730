"""A few attacks of each kind: afterwards the client that behaves is served, what they took is given
back, and nothing went wrong inside. ``make attack`` runs them all, for longer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attack.campaign import MEMORY_MB, Behaving, Campaign, attacks
from tests.attack.node import Node

SECONDS = 1.0
QUICK = {
    "trailers",
    "chunks of one byte",
    "pipelined inferences, unread",
    "a gzip bomb of numbers",
    "pings",
    "inferences given up",
    "inferences made to be reset",
    "window flips, answers waiting",
    "many headers",
    "connections that greet",
    "inputs, gzip",
    "empty messages on a stream",
    "answers not taken up",
    "messages held back",
    "pages, unread",
    "crowds of viewers",
    "studies",
    "forms of nested lists",
    "forms of many fields",
}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("attack")) as node:
        yield node


@pytest.fixture(scope="module")
def campaign(node: Node) -> Iterator[Campaign]:
    behaving = Behaving(node)
    yield Campaign(node, behaving, before=0.0, after=1.0)
    behaving.stop()


CHOSEN = [each for each in attacks() if each[2] in QUICK]


@pytest.mark.parametrize(("module", "port", "name"), CHOSEN, ids=[name for *_, name in CHOSEN])
def test_an_attack_leaves_nothing_broken(
    node: Node, campaign: Campaign, module: str, port: str, name: str
) -> None:
    result = campaign.run(module, port, name, 1, SECONDS)
    assert node.alive
    assert result.recovered, result
    assert result.memory_after < result.memory_before + MEMORY_MB
    assert "Traceback" not in node.said


def test_every_quick_attack_is_there() -> None:
    assert {name for *_, name in CHOSEN} >= QUICK
