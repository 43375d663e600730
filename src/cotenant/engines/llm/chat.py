"""Messages to a prompt, by the chat template (Jinja) that comes with a model.

A template is a program by a stranger, and its input comes from another one. So it runs in Jinja's
sandbox, for ``MOST_SECONDS``, and no text or list in it grows beyond ``MOST_TEXT``:

- time is up: an exception is raised in its thread. That ends Python code, but nothing written in C
- so all that makes much from little in C is bounded here or not there: operators, literals,
  filters, methods. ``weigh`` says how long a value is when it is written out.
"""

from __future__ import annotations

import ctypes
import html
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import BuiltinMethodType
from typing import Any, Final

from jinja2 import nodes, pass_context, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, sync_do_map
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from cotenant.domain.errors import InvalidRequest, ModelError

MOST_SECONDS: Final = 2.0
MOST_TEXT: Final = 1 << 22
"""Characters of a prompt, and of anything on the way to it."""
MOST_TEMPLATE: Final = 1 << 20
"""Characters of a template."""
MOST_BITS: Final = 256
"""Of a whole number."""
CHATML: Final = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For models that have no template."""
FILTERS: Final = frozenset(
    "abs attr capitalize count d default dictsort e escape first float groupby indent int items "  # noqa: SIM905
    "join last length list lower map max min reject rejectattr replace reverse safe select "
    "selectattr sort string title tojson trim unique upper".split()
)
METHODS: Final[Mapping[tuple[type, ...], frozenset[str]]] = {
    (str,): frozenset(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit "  # noqa: SIM905
        "islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix "
        "removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith "
        "strip swapcase title upper".split()
    ),
    (dict,): frozenset(("get", "items", "keys", "values")),
    (list, tuple): frozenset(("count", "index")),
    (int, float, bytes): frozenset(),
}
"""By type, what may be called; of other types, what Jinja's sandbox allows."""

Message = Mapping[str, Any]


class _TooMuch(Exception):
    pass


class _Overtime(Exception):
    pass


def weigh(value: Any) -> int:
    """About how many characters a value is when written out. Raises if that is too many."""
    total, rest = 0, [value]
    while rest:
        each = rest.pop()
        total += 1
        if isinstance(each, str):
            total += len(each)
        elif isinstance(each, dict):
            rest.extend(each.keys())
            rest.extend(each.values())
        elif isinstance(each, list | tuple):
            rest.extend(each)
        elif isinstance(each, Namespace):
            raise TypeError("a namespace cannot be inside of another value")
        if total + len(rest) > MOST_TEXT:
            raise _TooMuch
    return total


class _Held(Namespace):
    """A namespace that no other one is in."""

    def __init__(self, **values: Any) -> None:
        weigh(values)
        super().__init__(**values)

    def __setitem__(self, name: str, value: Any) -> None:
        weigh(value)
        super().__setitem__(name, value)


class _Buffer(list[str]):
    """What a block or macro has said so far."""

    total = 0

    def append(self, part: str) -> None:
        self.total += len(part)
        if self.total > MOST_TEXT:
            raise _TooMuch
        super().append(part)

    def extend(self, parts: Iterable[str]) -> None:
        for part in parts:
            self.append(part)


class _Code(CodeGenerator):
    """Literals, ``~`` and what blocks say are bounded."""

    def buffer(self, frame: Frame) -> None:
        frame.buffer = self.temporary_identifier()
        self.writeline(f"{frame.buffer} = environment.buffer()")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.joined((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self.write("environment.weighed(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("environment.weighed(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        stored = node.ctx == "store"
        self.write("" if stored else "environment.weighed(")
        super().visit_Tuple(node, frame)
        self.write("" if stored else ")")


class _Generation(Extension):
    """``{% generation %}`` marks what a model said, for training; here it means nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    buffer = _Buffer
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[loopcontrols, _Generation],
        )
        own: dict[str, Any] = {
            "e": _escape,
            "escape": _escape,
            "indent": _indent,
            "join": _join,
            "list": _list,
            "map": _map,
            "replace": _replace,
            "safe": str,
            "tojson": _tojson,
        }
        self.filters = {name: own.get(name, self.filters[name]) for name in sorted(FILTERS)}
        self.globals = {
            "range": self.globals["range"],
            "namespace": _Held,
            "raise_exception": _raise,
            "strftime_now": _now,
        }

    def weighed(self, value: Any) -> Any:
        weigh(value)
        return value

    def joined(self, values: Iterable[Any]) -> str:
        """The values as one text."""
        parts = _Buffer()
        parts.extend(map(str, values))
        return "".join(parts)

    concat = joined

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise TypeError("text is not formatted by %")
        bits = [each.bit_length() for each in (left, right) if isinstance(each, int)]
        if operator == "**" and (len(bits) < 2 or bits[0] * right > MOST_BITS):
            raise _TooMuch
        if operator == "*" and len(bits) == 1:
            many, what = (left, right) if isinstance(left, int) else (right, left)
            if not isinstance(what, float) and weigh(what) * many > MOST_TEXT:
                raise _TooMuch
        elif sum(bits) > MOST_BITS:
            raise _TooMuch
        return self.weighed(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> None:
        """``format`` is no method here."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for types, known in METHODS.items():
            if isinstance(obj, types):
                return attr in known
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Names as in Jinja, so that none of a template's is one of ours."""
        text = __obj.__self__ if isinstance(__obj, BuiltinMethodType) else None
        if isinstance(text, str) and __obj.__name__ == "replace":
            return _replace(text, *args, **kwargs)
        if isinstance(text, str) and __obj.__name__ == "join":
            return _join(__self, args[0], text)
        return super().call(__context, __obj, *args, **kwargs)


# --- filters and functions --------------------------------------------------------------------


def _raise(message: str) -> None:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form[:100])


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _list(values: Iterable[Any]) -> list[Any]:
    found, total = [], 0
    for each in values:
        total += weigh(each)
        if total > MOST_TEXT:
            raise _TooMuch
        found.append(each)
    return found


@pass_context
def _map(context: Any, values: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """At once: of all filters it alone makes new values as somebody takes them."""
    return _list(sync_do_map(context, values, *args, **kwargs))


@pass_environment
def _join(environment: Any, values: Any, d: str = "", attribute: Any = None) -> str:
    found = _list(values)
    if attribute is not None:
        found = [environment.getitem(each, attribute) for each in found]
    if weigh(found) + len(d) * len(found) > MOST_TEXT:
        raise _TooMuch
    return str(d).join(map(str, found))


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    if len(text) + text.count(old) * len(new) > MOST_TEXT:
        raise _TooMuch
    return str(text.replace(old, new, -1 if count is None else count))


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(text)
    wide = len(width) if isinstance(width, str) else width
    if len(text) + (len(text.splitlines()) + 1) * wide > MOST_TEXT:
        raise _TooMuch
    return do_indent(text, width, first, blank)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > 16:
        raise _TooMuch
    weigh(value)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    parts = _Buffer()
    parts.extend(encoder.iterencode(value))
    return "".join(parts)


# --- rendering --------------------------------------------------------------------------------


class Chat:
    """A chat template; "" means ChatML. ``begin_text`` and ``end_text``: what it knows as
    ``bos_token`` and ``eos_token``. Raises ModelError for a template that is none.

    ``lists``: whether it takes a content of several parts. It does if it has a loop over
    something named content; for others the parts are joined to one text."""

    def __init__(self, template: str, begin_text: str = "", end_text: str = "") -> None:
        template = template or CHATML
        if len(template) > MOST_TEMPLATE:
            raise ModelError(f"the chat template has more than {MOST_TEMPLATE} characters")
        environment = _Sandbox()
        try:
            self.lists = any(
                _is_content(loop.iter) for loop in environment.parse(template).find_all(nodes.For)
            )
            self._template = environment.from_string(template)
        except Exception as error:
            raise ModelError(f"the chat template is no Jinja template: {error}") from error
        self._names = {"bos_token": begin_text, "eos_token": end_text}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The prompt. Raises InvalidRequest, with the template's own words, for messages that it
        does not take, and if it takes too long or makes too much of them."""
        names = {"documents": None, **self._names, **extra}
        names |= {"messages": [dict(each) for each in messages], "tools": tools}
        names["add_generation_prompt"] = add_generation_prompt
        if not self.lists:
            names["messages"] = [_flat(each) for each in names["messages"]]
        run = _Run(self._template, names)
        try:
            weigh(names)
            return run.result()
        except _TooMuch:
            why = f"it makes more than {MOST_TEXT} characters of these messages"
        except _Overtime:
            why = f"it takes longer than {MOST_SECONDS:g} s with these messages"
        except Exception as error:
            why = str(error) or type(error).__name__
        raise InvalidRequest(f"the model's chat template: {why}")


class _Run(threading.Thread):
    """One rendering, in a thread of its own, so that it can be ended."""

    def __init__(self, template: Any, names: dict[str, Any]) -> None:
        super().__init__(name="chat-template", daemon=True)
        self._template, self._names = template, names
        self._said: str | None = None
        self._error: BaseException = _Overtime()

    def run(self) -> None:
        try:
            root = self._template.root_render_func
            context = self._template.new_context(self._names)
            self._said = self._template.environment.joined(root(context))
        except BaseException as error:  # it is raised where the result is asked for
            self._error = error

    def result(self) -> str:
        self.start()
        self.join(MOST_SECONDS)
        for _ in range(100):  # one may hit where an exception is lost, such as a destructor
            if not self.is_alive():
                break
            ident, error = ctypes.c_ulong(self.ident or 0), ctypes.py_object(_Overtime)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, error)
            self.join(0.05)
        if self._said is None:
            raise self._error
        return self._said


def _is_content(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Filter):
        return node.node is not None and _is_content(node.node)
    if isinstance(node, nodes.Getitem):
        named = isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return named or _is_content(node.node)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Name) and node.name == "content"


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    """With the parts of its content joined to one text."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise InvalidRequest('each part of a content must be {"type": "text", "text": ...}')
    return message | {"content": "\n".join(part["text"] for part in parts)}
