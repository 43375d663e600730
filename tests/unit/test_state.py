"""The dispatcher's state as plain data: a compiled build decodes it by what its source says."""

from __future__ import annotations

import dataclasses
import inspect
from typing import get_type_hints

import pytest

from cotenant.policy import estimate, state
from cotenant.telemetry.compiled import source_types

CLASSES = [
    (module, kind)
    for module in (estimate, state)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
]


@pytest.mark.parametrize(("module", "kind"), CLASSES, ids=lambda x: x.__name__.split(".")[-1])
def test_the_types_read_from_the_source_are_those_that_the_classes_have(module, kind) -> None:
    assert source_types(module)[kind.__name__] == get_type_hints(kind)
