"""Reads what a file says of a model, one key at a time, and believes no type.

GGUF keys and the JSON of a ``config.json`` are the same here: names and values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cotenant.domain.errors import ModelError

MOST_JSON: Final = 1 << 28
"""Bytes of a JSON file."""


def read_json(path: Path) -> dict[str, Any]:
    """A file of one JSON object. Raises ModelError, also where there is no file."""
    try:
        if path.stat().st_size > MOST_JSON:
            raise ModelError(f"{path.name} has more than {MOST_JSON} bytes")
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} is a {type(found).__name__}; it must be an object")
    return found


class Keys:
    """``prefix`` stands before every name that is asked for."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self.prefix = prefix

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number, 0 or more."""
        found = self._found(name, default)
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise self._wrong(name, found, "a whole number, 0 or more")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        found = self._found(name, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise self._wrong(name, found, "a number")
        if not abs(found) < 1e30:
            raise self._wrong(name, found, "a finite number")
        return float(found)

    def text(self, name: str, default: str | None = None) -> str:
        """Text."""
        found = self._found(name, default)
        if not isinstance(found, str):
            raise self._wrong(name, found, "text")
        return found

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        found = self._found(name, default)
        if not isinstance(found, bool):
            raise self._wrong(name, found, "true or false")
        return found

    def table(self, name: str) -> Keys | None:
        """A table of further keys; None without."""
        found = self.values.get(self.prefix + name)
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise self._wrong(name, found, "a table")
        return Keys(found)

    def has(self, name: str) -> bool:
        """Whether it says anything of it."""
        return self.values.get(self.prefix + name) is not None

    def _found(self, name: str, default: Any) -> Any:
        found = self.values.get(self.prefix + name)
        found = default if found is None else found
        if found is None:
            raise ModelError(f"the model does not say {self.prefix + name}")
        return found

    def _wrong(self, name: str, found: Any, right: str) -> ModelError:
        shown = repr(found)[:80]
        return ModelError(f"{self.prefix + name} is {shown}, which should be {right}")
