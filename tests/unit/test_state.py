"""The dispatcher's state as plain data: a compiled build decodes it by what its source says."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from cotenant.policy.planstate import PlannerState
from cotenant.policy.state import DispatcherState
from cotenant.telemetry.compiled import source_types
from cotenant.telemetry.records import STATE_MODULES, Entry

CLASSES = [
    (module, kind)
    for module in STATE_MODULES
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
]


@pytest.mark.parametrize(("module", "kind"), CLASSES, ids=lambda x: x.__name__.split(".")[-1])
def test_the_types_read_from_the_source_are_those_that_the_classes_have(module, kind) -> None:
    assert source_types(module)[kind.__name__] == get_type_hints(kind)


def test_the_types_of_all_that_a_checkpoint_has_are_read_from_the_source() -> None:
    found: set[type] = set()
    for kind in (DispatcherState, PlannerState, *get_args(Entry)):
        collect(kind, found)
    modules = {kind.__module__ for kind in found if dataclasses.is_dataclass(kind)}
    assert DispatcherState.__module__ in modules
    assert modules <= {module.__name__ for module in STATE_MODULES}


def collect(hint: Any, found: set[type]) -> None:
    """Add the classes with fields that a type is made of."""
    for part in get_args(hint):
        collect(part, found)
    if not isinstance(hint, type) or hint in found:
        return
    if dataclasses.is_dataclass(hint) or issubclass(hint, msgspec.Struct):
        found.add(hint)
        for each in get_type_hints(hint).values():
            collect(each, found)
