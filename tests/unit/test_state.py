"""The dispatcher's state as plain data: what a compiled build must know to decode it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import get_args, get_type_hints

import pytest

from cotenant.policy import state

CLASSES = [
    kind for _, kind in inspect.getmembers(state, inspect.isclass) if dataclasses.is_dataclass(kind)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_made_of_others_is_in_the_table(kind: type) -> None:
    made_of_others = {name: t for name, t in get_type_hints(kind).items() if get_args(t)}
    assert state.COMPOUND.get(kind, {}) == made_of_others


def test_the_table_has_no_other_classes() -> None:
    assert set(state.COMPOUND) < set(CLASSES)
