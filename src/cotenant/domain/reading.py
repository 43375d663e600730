"""Strict reading of a YAML document: sections whose keys must all be known, values with units.

Every complaint is a ConfigError that names the key's path and what would be right.
"""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import yaml

from cotenant.domain.errors import ConfigError
from cotenant.domain.units import parse_bytes, parse_duration

T = TypeVar("T")
_MISSING: Any = object()


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice (plain YAML silently keeps the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"the key {key!r} stands twice (line {line}); remove one")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


class Section:
    """One mapping of the document; every key must be taken before ``done``."""

    def __init__(self, value: Any, path: str) -> None:
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise ConfigError(f"expected a mapping of keys, got {shown(value)}", path)
        self._left = {str(k): v for k, v in value.items()}
        self._known: list[str] = []
        self._path = path

    def at(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def raw(self, key: str, default: Any = _MISSING) -> Any:
        self._known.append(key)
        if key in self._left:
            return self._left.pop(key)
        if default is _MISSING:
            near = difflib.get_close_matches(key, self._left, 1, 0.7)
            hint = f" (is {near[0]!r} a slip?)" if near else ""
            raise ConfigError(f"is required{hint}", self.at(key))
        return default

    def take(self, key: str, read: Callable[[Any], T], default: Any = _MISSING) -> T:
        """The value of a key through ``read`` (which raises ValueError); defaults pass as is."""
        value = self.raw(key, default)
        if value is default and default is not _MISSING:
            return default  # type: ignore[no-any-return]
        try:
            return read(value)
        except ValueError as error:
            raise ConfigError(str(error), self.at(key)) from None

    def names(self) -> list[str]:
        """Keys not taken yet, for mappings whose keys are free."""
        return list(self._left)

    def section(self, key: str, required: bool = False) -> Section:
        return Section(self.raw(key, _MISSING if required else None), self.at(key))

    def sections(self, key: str) -> list[Section]:
        value = self.raw(key, None)
        if value is None:
            return []
        if not isinstance(value, list):
            raise ConfigError(f"expected a list, got {shown(value)}", self.at(key))
        return [Section(item, f"{self.at(key)}[{i}]") for i, item in enumerate(value)]

    def done(self) -> None:
        for key in self._left:
            near = difflib.get_close_matches(key, self._known, 1, 0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(self._known)}"
            raise ConfigError(f"unknown key; {hint}", self.at(key))


def load(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError("not valid YAML: nested too deeply") from None


# --- values ---------------------------------------------------------------------------------


def shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected text, got {shown(value)}")
    return value


def name(value: Any) -> str:
    word = text(value)
    if not all(c.isalnum() or c in "-_." for c in word) or word.startswith("."):
        raise ValueError(f"{word!r} is no name; use letters, digits, '-', '_' and '.'")
    return word


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {shown(value)}")
    return value


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a number, got {shown(value)}")
    return float(value)


def positive(value: Any) -> float:
    found = number(value)
    if found <= 0:
        raise ValueError(f"must be above 0, got {found:g}")
    return found


def not_negative(value: Any) -> float:
    found = number(value)
    if found < 0:
        raise ValueError(f"must not be negative, got {found:g}")
    return found


def share(value: Any) -> float:
    found = number(value)
    if not 0 <= found <= 1:
        raise ValueError(f"must be a share between 0 and 1, got {found:g}")
    return found


def shares(value: Any) -> float | dict[str, float]:
    if not isinstance(value, dict):
        return share(value)
    if not value:
        raise ValueError("is an empty table; expected a share, or shares by kind of device")
    return {name(kind): share(part) for kind, part in value.items()}


def positive_shares(value: Any) -> float | dict[str, float]:
    found = shares(value)
    if 0 in (found.values() if isinstance(found, dict) else (found,)):
        raise ValueError("must be above 0")
    return found


def texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list of names")
    return tuple(text(item) for item in value)


def names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (name(value),)
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a name or a list of names, got {shown(value)}")
    return tuple(name(item) for item in value)


def percentile(value: Any) -> float:
    found = number(value)
    if not 50 <= found < 100:
        raise ValueError(f"must be at least 50 and below 100, got {found:g}")
    return found


def integer(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}, got {shown(value)}")
        return value

    return read


def integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list of whole numbers, got {shown(value)}")
    return tuple(integer(1, 4096)(item) for item in value)


def shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list of lengths, got {shown(value)}")
    return tuple(integer(1, 2**31)(item) for item in value)


def integer_range(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"expected [lowest, highest], got {shown(value)}")
    read = integer(-(2**63), 2**63 - 1)
    low, high = read(value[0]), read(value[1])
    if low > high:
        raise ValueError(f"the lowest, {low}, is above the highest, {high}")
    return low, high


def cores(value: Any) -> tuple[int, ...] | None:
    if value == "all":
        return None
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected 'all' or a list of core numbers, got {shown(value)}")
    return tuple(sorted({integer(0, 65535)(item) for item in value}))


def split(value: Any) -> tuple[int, int]:
    section = Section(value, "policy.split")
    cores = section.take("cores", integer(1, 65535))
    size = section.take("size", integer(1, 65535), 1)
    section.done()
    if cores % size:
        raise ValueError(f"{cores} cores cannot be cut into partitions of {size}")
    return cores, size


def duration(value: Any) -> int:
    ns = duration_or_zero(value)
    if ns == 0:
        raise ValueError("must be longer than 0")
    return ns


def duration_or_zero(value: Any) -> int:
    if value == 0 and not isinstance(value, bool):
        return 0
    if not isinstance(value, str):
        raise ValueError(f"needs a unit, such as 20ms or 1.5s; got {shown(value)}")
    return parse_duration(value)


def size(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    count = parse_bytes(text(value))
    if count == 0:
        raise ValueError("must be above 0")
    return count


def address(value: Any) -> str:
    word = text(value)
    host, colon, port = word.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{word!r} is no address; expected host:port, such as 127.0.0.1:8000")
    return word


def command(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"cannot be split into words: {error}") from None
    elif isinstance(value, list) and all(isinstance(word, str) for word in value):
        words = value
    else:
        raise ValueError(f"expected a command line or a list of words, got {shown(value)}")
    if not words:
        raise ValueError("is empty; expected a command")
    return tuple(words)


def environment(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"expected NAME: value pairs, got {shown(value)}")
    return {str(k): str(v) for k, v in value.items()}


def one_of(choices: Iterable[str]) -> Callable[[Any], str]:
    options = list(choices)

    def read(value: Any) -> str:
        if value not in options:
            near = difflib.get_close_matches(str(value), options, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{value!r} is none of {', '.join(options)}{hint}")
        return str(value)

    return read


def optional(read: Callable[[Any], T]) -> Callable[[Any], T | None]:
    return lambda value: None if value is None else read(value)
