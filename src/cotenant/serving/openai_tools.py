"""How models call tools: the forms of calls in text, how they are read, and grammars for them.

Which form a model has is seen from its chat template:

| form | a call is |
| --- | --- |
| Hermes, Qwen | ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` |
| Mistral | ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`` |
| Llama 3 | ``{"name": ..., "parameters": {...}}``, with or without ``<|python_tag|>`` |

Marks that are special tokens are no part of an answer's text, so Mistral's and Llama's calls are
known by how they begin without them, and by the name of a tool that was given.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, NamedTuple

import msgspec

from cotenant.engines.llm.asking import JsonSchema, Lark, Spec
from cotenant.serving.openai_ask import Function

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_CALLS: Final = "[TOOL_CALLS]"
_TAG: Final = "<|python_tag|>"


class Form(Enum):
    """See the module's text."""

    HERMES = "hermes"
    MISTRAL = "mistral"
    LLAMA = "llama"

    @property
    def arguments(self) -> str:
        """The key of a call's arguments."""
        return "parameters" if self is Form.LLAMA else "arguments"


def form_of(template: str) -> Form | None:
    """The form of a model's calls; None if its template has no tools, or calls of another form."""
    if not re.search(r"\btools\b", template) or "<function=" in template or "[ARGS]" in template:
        return None
    if _CALLS in template:
        return Form.MISTRAL
    if _OPEN in template:
        return Form.HERMES
    if _TAG in template or '"parameters"' in template:
        return Form.LLAMA
    return None


class Call(NamedTuple):
    """A call of a tool; ``arguments`` is JSON, as the model wrote it."""

    id: str
    name: str
    arguments: str


_ABSENT: Final = msgspec.Raw()


class _Written(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = _ABSENT
    parameters: msgspec.Raw = _ABSENT


class Reader:
    """Tells the calls in an answer from its text. ``known``: names of the tools; ``most``: calls
    that are wanted, what follows them is dropped."""

    def __init__(self, form: Form, known: Sequence[str], most: int | None = None) -> None:
        self._form = form
        self._known = frozenset(known)
        self._room = most
        self._held = ""
        self._plain = False
        self.called = False
        """Whether there was a call."""

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """More text; what of it and of what was held back is text, and which calls are whole."""
        self._held += text
        if self._form is Form.HERMES:
            return self._tagged()
        if not self._plain and self._may_be_calls():
            return "", []
        self._plain = True
        said, self._held = self._held, ""
        return said, []

    def finish(self) -> tuple[str, list[Call]]:
        """There is no more."""
        rest, self._held = self._held, ""
        if not rest:
            return "", []
        if self._form is Form.HERMES:
            before, mark, inner = rest.partition(_OPEN)
            calls = self._calls(inner) if mark else None
            if calls is not None:
                return before.rstrip(), self._counted(calls)
            return (rest, []) if rest.strip() or not self.called else ("", [])
        stripped = rest.strip()
        marked = stripped.startswith((_CALLS, _TAG))
        calls = self._calls(stripped.removeprefix(_CALLS).removeprefix(_TAG), marked)
        return (rest, []) if calls is None else ("", self._counted(calls))

    def _may_be_calls(self) -> bool:
        """Whether all the text may still turn out to be calls."""
        text = self._held.lstrip()
        marks = (_CALLS, "[{") if self._form is Form.MISTRAL else (_TAG, "{")
        return any(text.startswith(mark) or mark.startswith(text) for mark in marks)

    def _tagged(self) -> tuple[str, list[Call]]:
        said, found = "", list[Call]()
        while True:
            start = self._held.find(_OPEN)
            end = self._held.find(_CLOSE, start)
            if start < 0 or end < 0:
                break
            before, inner = self._held[:start], self._held[start + len(_OPEN) : end]
            end += len(_CLOSE)
            calls = self._calls(inner)
            if calls is None:
                said += self._held[:end]
            else:
                said += before.rstrip()
                found += self._counted(calls)
            self._held = self._held[end:]
        keep = self._held.find(_OPEN) if start >= 0 else _may_begin(self._held)
        blank = len(self._held[:keep].rstrip())  # white space before a call is not part of the text
        said, self._held = said + self._held[:blank], self._held[blank:]
        return said, found

    def _calls(self, text: str, marked: bool = True) -> list[Call] | None:
        """What is written there; None if that is no call."""
        kind: Any = list[_Written] if text.lstrip().startswith("[") else _Written
        try:
            written = msgspec.json.decode(text, type=kind)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            return None
        calls = []
        for each in written if isinstance(written, list) else [written]:
            given = bytes(each.arguments) or bytes(each.parameters)
            if not marked and (each.name not in self._known or not given):
                return None
            calls.append(Call(self._id(), each.name, _json(given or b"{}")))
        return calls or None

    def _id(self) -> str:
        # Mistral's templates take no other ids than nine letters or digits.
        mistral = self._form is Form.MISTRAL
        return secrets.token_hex(5)[:9] if mistral else f"call_{secrets.token_hex(12)}"

    def _counted(self, calls: list[Call]) -> list[Call]:
        self.called = True
        if self._room is not None:
            calls = calls[: self._room]
            self._room -= len(calls)
        return calls


def _json(raw: bytes) -> str:
    """Arguments as text; some models write them as a string that holds JSON."""
    return str(msgspec.json.decode(raw, type=str)) if raw[:1] == b'"' else str(raw, "utf-8")


def _may_begin(text: str) -> int:
    """Where a call's mark may have begun; the end of the text if nowhere."""
    for at in range(max(0, len(text) - len(_OPEN) + 1), len(text)):
        if _OPEN.startswith(text[at:]):
            return at
    return len(text)


def grammar(form: Form, functions: Sequence[Function], several: bool) -> Spec:
    """An answer that is one call, or ``several``, of these functions, and nothing else."""
    one: dict[str, Any] = {"anyOf": [_call(form, f, n) for n, f in enumerate(functions)]}
    one["$defs"] = {
        f"f{n}": _moved(function.parameters or {"type": "object"}, f"#/$defs/f{n}")
        for n, function in enumerate(functions)
    }
    if form is Form.LLAMA:
        return JsonSchema(one)
    if form is Form.MISTRAL:
        definitions = one.pop("$defs")
        calls = {"type": "array", "items": one, "minItems": 1, "$defs": definitions}
        return JsonSchema(calls if several else calls | {"maxItems": 1})
    more = r' ("\n" call)*' if several else ""
    written = msgspec.json.encode(one).decode()
    return Lark(f'start: call{more}\ncall: "{_OPEN}\\n" one "\\n{_CLOSE}"\none: %json {written}\n')


def _call(form: Form, function: Function, number: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            form.arguments: {"$ref": f"#/$defs/f{number}"},
        },
        "required": ["name", form.arguments],
        "additionalProperties": False,
    }


def _moved(schema: Any, to: str) -> Any:
    """A schema that is no longer the root of its document, so that references lead where they
    did."""
    if isinstance(schema, list):
        return [_moved(each, to) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, to) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = to + reference[1:]
    return moved
