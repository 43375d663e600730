"""Executes the graph of an exported program, call by call, with PyTorch's operators.

A program names its operators. Only those of PyTorch's own set ``aten`` are looked up, arithmetic of
sizes from a table, and three that execute a graph within the graph. Nothing else can be called.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import torch

from cotenant.domain.errors import ModelError
from cotenant.engines.exported.archive import dtype_of
from cotenant.engines.exported.schema import STRIDED, Graph, Node, Union, name_of, one

_ATEN: Final = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)", re.ASCII)
_FILES: Final = frozenset({"from_file"})
"""Operators that open files."""
_RUNNING: Final = ("running_mean", "running_var")
_UPDATING: Final = ("training", "use_input_stats")
"""Normalization writes to these arguments where one of those flags is set; its schema is silent."""
_SIZES: Final[dict[str, Callable[..., Any]]] = {
    "_operator.add": operator.add,
    "_operator.and_": operator.and_,
    "_operator.eq": operator.eq,
    "_operator.floordiv": operator.floordiv,
    "_operator.ge": operator.ge,
    "_operator.gt": operator.gt,
    "_operator.le": operator.le,
    "_operator.lt": operator.lt,
    "_operator.mod": operator.mod,
    "_operator.mul": operator.mul,
    "_operator.ne": operator.ne,
    "_operator.neg": operator.neg,
    "_operator.or_": operator.or_,
    "_operator.pos": operator.pos,
    "_operator.sub": operator.sub,
    "_operator.truediv": operator.truediv,
    "math.trunc": math.trunc,
    "torch.sym_float": float,
    "torch.sym_int": int,
    "torch.sym_ite": lambda condition, then, other: then if condition else other,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_not": operator.not_,
    "torch.sym_sqrt": math.sqrt,
}
_MEMORY_FORMATS: Final = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}


def changing(*weights: str) -> ModelError:
    """A program that changes these in each execution is refused."""
    return ModelError(
        f"the program changes {', '.join(sorted(weights))} in each execution, so that answers "
        "would depend on requests before; export it as model.eval(), with state as input and output"
    )


class _Ref(NamedTuple):
    """A value made before, by its number."""

    slot: int


class _Listed(NamedTuple):
    """A list in which such values are."""

    items: tuple[Any, ...]


class Step(NamedTuple):
    """A call: what it takes, where its results go, and which values nobody needs after it."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    into: tuple[Any, ...]
    spread: bool
    done: tuple[int, ...]


class Routine(NamedTuple):
    """A graph, ready to be executed. ``writes``: some operator changes a tensor in place."""

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Any, ...]
    size: int
    writes: bool

    def run(self, given: Sequence[Any]) -> list[Any]:
        """Its outputs; raises whatever PyTorch does."""
        values: list[Any] = [None] * self.size
        for slot, value in zip(self.inputs, given, strict=True):
            values[slot] = value
        for call, args, kwargs, into, spread, done in self.steps:
            found = call(
                *[_look(arg, values) for arg in args],
                **{name: _look(arg, values) for name, arg in kwargs.items()},
            )
            if spread:
                _put(values, into, found)
            elif into:
                values[into[0]] = found
            for slot in done:
                values[slot] = None
        return [_look(output, values) for output in self.outputs]


def _look(arg: Any, values: list[Any]) -> Any:
    if arg.__class__ is _Ref:
        return values[arg.slot]
    if arg.__class__ is _Listed:
        return [_look(item, values) for item in arg.items]
    return arg


def _put(values: list[Any], into: tuple[Any, ...], found: Sequence[Any]) -> None:
    for place, value in zip(into, found, strict=True):
        if isinstance(place, tuple):
            _put(values, place, value)
        elif place >= 0:
            values[place] = value


class _Compiler:
    """Turns one graph into a routine."""

    def __init__(self, graph: Graph, weights: Mapping[str, frozenset[str]]) -> None:
        self._graph = graph
        self._slots: dict[str, int] = {}
        self._last: dict[int, int] = {}
        """By value, the last step that needs it."""
        self._of_weights = dict(weights)
        """By value, the weights whose memory it may be."""
        self._writes = False
        self._passed: list[str] = []
        """What the present step is given; a graph within the graph gets the last of it."""

    def compile(self) -> Routine:
        """Raises ModelError."""
        inputs = tuple(self._slot(name_of(union)) for union in self._graph.inputs)
        steps = [self._step(number, node) for number, node in enumerate(self._graph.nodes)]
        outputs = tuple(self._value(union, len(steps)) for union in self._graph.outputs)
        finished: dict[int, list[int]] = {}
        for slot, last in self._last.items():
            finished.setdefault(last, []).append(slot)
        steps = [step._replace(done=tuple(finished.get(n, ()))) for n, step in enumerate(steps)]
        return Routine(inputs, tuple(steps), outputs, len(self._slots) + 1, self._writes)

    def _slot(self, name: str) -> int:
        """A new value's number; 0 is for what has no name."""
        return self._slots.setdefault(name, len(self._slots) + 1) if name else 0

    def _step(self, number: int, node: Node) -> Step:
        if node.target in _SIZES or node.target in _WITHIN:
            return self._named_step(number, node)
        called = _operator(node.target)
        self._guard(node, called)
        known = {named.name: self._value(named.arg, number) for named in node.inputs}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for place, argument in enumerate(called._schema.arguments):
            if argument.name in known:
                value = known.pop(argument.name)
                if argument.kwarg_only or len(args) < place:
                    kwargs[argument.name] = value
                else:
                    args.append(value)
        if known:
            raise ModelError(f"{node.target} has no argument {next(iter(known))!r} here")
        return self._made(number, node, called, args, kwargs)

    def _named_step(self, number: int, node: Node) -> Step:
        """Of an operator from our tables, whose arguments have no names."""
        within = node.target in _WITHIN
        self._passed = [name for named in node.inputs for name in _names(named.arg)]
        args = [self._value(named.arg, number) for named in node.inputs]
        call = _WITHIN[node.target] if within else _SIZES[node.target]
        step = self._made(number, node, call, args, {})
        if not within:
            return step
        # What a graph gives is always a list.
        flat = [slot for place in step.into for slot in _flat(place)]
        return step._replace(into=tuple(flat), spread=True)

    def _made(
        self,
        number: int,
        node: Node,
        call: Callable[..., Any],
        args: list[Any],
        kwargs: dict[str, Any],
    ) -> Step:
        into = tuple(self._place(number, output) for output in node.outputs)
        spread = len(into) != 1
        if len(into) == 1 and isinstance(into[0], tuple):
            into, spread = into[0], True
        return Step(call, tuple(args), kwargs, into, spread and bool(into), ())

    def _place(self, number: int, output: Union) -> Any:
        """Where a result goes: a number, or a tuple of them for a list."""
        kind, value = one(output)
        if kind == "as_tensors":
            return tuple(self._new(number, {"as_tensor": item}) for item in value)
        if kind == "as_optional_tensors":
            return tuple(self._new(number, item) for item in value)
        return self._new(number, output)

    def _new(self, number: int, output: Union) -> int:
        slot = self._slot(name_of(output))
        if slot:
            self._last.setdefault(slot, number)
        return slot

    def _used(self, name: object, number: int) -> _Ref:
        slot = self._slots.get(str(name))
        if not slot:
            raise ModelError(f"the program uses {name!r} before anything makes it")
        self._last[slot] = number
        return _Ref(slot)

    def _value(self, union: Union, number: int) -> Any:
        """An argument, of the step of this number."""
        kind, value = one(union)
        single = _SINGLE.get(kind)
        if single is not None:
            return single(value)
        if name := name_of(union):
            return self._used(name, number)
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            return one(value)[1]
        if kind == "as_optional_tensor":
            return self._value(value, number)
        if kind == "as_graph":
            return self._routine(value)
        if kind in ("as_tensors", "as_nested_tensors"):
            inner = "as_tensor" if kind == "as_tensors" else "as_tensors"
            return _Listed(tuple(self._value({inner: item}, number) for item in value))
        if kind == "as_optional_tensors":
            return _Listed(tuple(self._value(item, number) for item in value))
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
            return _Listed(tuple(self._value({kind[:-1]: item}, number) for item in value))
        raise ModelError(f"the program has an argument of the kind {kind}, which is not served")

    def _routine(self, value: Any) -> Routine:
        try:
            graph = msgspec.convert(value["graph"], Graph)
        except (msgspec.ValidationError, KeyError, TypeError) as error:
            raise ModelError(f"a graph in the program cannot be read: {error}") from error
        names = [name_of(union) for union in graph.inputs]
        passed = self._passed[-len(names) :] if names else []
        weights = {
            name: self._of_weights[given]
            for name, given in zip(names, passed, strict=False)
            if given in self._of_weights
        }
        routine = _Compiler(graph, weights).compile()
        self._writes = self._writes or routine.writes
        return routine

    def _guard(self, node: Node, called: torch._ops.OpOverload) -> None:
        """Raises ModelError for a program that changes its own weights: its answers would depend on
        the requests before. Whatever is a view of a weight is one, too."""
        views: set[str] = set()
        given = {named.name: named.arg for named in node.inputs}
        updates = any(given.get(flag) == {"as_bool": True} for flag in _UPDATING)
        for argument in called._schema.arguments:
            unsaid = updates and argument.name in _RUNNING
            alias = argument.alias_info
            if argument.name not in given or (alias is None and not unsaid):
                continue
            changes = alias is not None and alias.is_write
            writes = unsaid or (changes and called is not torch.ops.aten.detach_.default)
            for name in _names(given[argument.name]):
                mine = self._of_weights.get(name, frozenset())
                self._writes = self._writes or writes
                if writes and mine:
                    raise changing(*mine)
                if alias is not None:
                    views |= mine
        if views:
            for output in node.outputs:
                for name in _names(output):
                    self._of_weights[name] = frozenset(views)


def _names(union: Union) -> list[str]:
    """Of all values in an argument or a result."""
    kind, value = one(union)
    if kind == "as_tensors":
        return [str(item.get("name")) for item in value]
    if kind == "as_optional_tensors":
        return [name for item in value if (name := name_of(item))]
    if kind == "as_optional_tensor":
        return _names(value)
    name = name_of(union)
    return [name] if name else []


def _flat(place: Any) -> tuple[int, ...]:
    return place if isinstance(place, tuple) else (place,)


def _operator(target: str) -> torch._ops.OpOverload:
    """Raises ModelError for what is no operator of PyTorch's own on tensors."""
    found = _ATEN.fullmatch(target)
    if found is None:
        raise ModelError(
            f"the program needs {target}, which is no operator of PyTorch's own set (aten); custom "
            "operators are not loaded: export the model without it"
        )
    name, overload = found.groups()
    called = getattr(getattr(torch.ops.aten, name, None), overload, None)
    if not isinstance(called, torch._ops.OpOverload) or not _dispatched(name, overload):
        raise ModelError(f"the program needs {target}, which PyTorch {torch.__version__} has not")
    if name in _FILES:
        raise ModelError(f"the program needs {target}, which opens files; that is not served")
    return called


def _dispatched(name: str, overload: str) -> bool:
    """Whether it is an operator on tensors; TorchScript has others, which save files, say."""
    try:
        torch._C._dispatch_find_schema_or_throw(
            f"aten::{name}", "" if overload == "default" else overload
        )
    except RuntimeError:
        return False
    return True


def _without_grad(_: bool, body: Routine, *given: Any) -> list[Any]:
    return body.run(given)


def _in_autocast(
    device: str, dtype: torch.dtype | None, enabled: bool, cache: bool, body: Routine, *given: Any
) -> list[Any]:
    on = enabled and device == "cpu"
    with torch.autocast("cpu", dtype=dtype, enabled=on, cache_enabled=bool(cache)):
        return body.run(given)


def _one_of(condition: Any, then: Routine, other: Routine, given: Sequence[Any]) -> list[Any]:
    return (then if condition else other).run(given)


_WITHIN: Final[dict[str, Callable[..., list[Any]]]] = {
    "torch.ops.higher_order.cond": _one_of,
    "torch.ops.higher_order.wrap_with_autocast": _in_autocast,
    "torch.ops.higher_order.wrap_with_set_grad_enabled": _without_grad,
}
"""Operators that execute graphs within the graph."""


def _layout(number: Any) -> torch.layout:
    if number != STRIDED:
        raise ModelError("the program makes sparse tensors, which are not served")
    return torch.strided


def _memory_format(number: Any) -> torch.memory_format:
    if number not in _MEMORY_FORMATS:
        raise ModelError(f"the program has the memory format {number}, which is not known")
    return _MEMORY_FORMATS[number]


_SINGLE: Final[dict[str, Callable[[Any], Any]]] = {
    "as_none": lambda _: None,
    "as_int": int,
    "as_ints": list,
    "as_float": float,
    "as_floats": lambda values: [float(value) for value in values],
    "as_string": str,
    "as_strings": list,
    "as_bool": bool,
    "as_bools": list,
    "as_scalar_type": dtype_of,
    "as_memory_format": _memory_format,
    "as_layout": _layout,
    "as_device": lambda _: torch.device("cpu"),
    "as_complex": lambda value: complex(value["real"], value["imag"]),
}
"""Arguments that are constants. Infinity and NaN are strings in the file."""


def compile_graph(graph: Graph, weights: Sequence[str]) -> Routine:
    """A graph as a routine; ``weights`` are the names of those of its inputs that are to stay as
    they are. Raises ModelError."""
    return _Compiler(graph, {name: frozenset({name}) for name in weights}).compile()
