"""What stands in the JSON of an exported program, as far as it is needed to execute it.

The names are those of PyTorch's own schema, version 8 (``torch/_export/serde/schema.py``). Fields
that are not here are passed over: a minor version adds some.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from cotenant.domain.errors import ModelError

MAJOR: Final = 8
"""The version of the schema that is read."""
STRIDED: Final = 7
"""The layout of tensors that are plain."""

Union = dict[str, Any]
"""One of several kinds of value: ``{kind: value}``."""


class TensorValue(msgspec.Struct, frozen=True):
    """A tensor's type, and its sizes and strides, which may be formulas."""

    dtype: int
    sizes: list[Union]
    strides: list[Union]
    storage_offset: Union
    layout: int


class Payload(msgspec.Struct, frozen=True):
    """Where the bytes of a weight or constant are."""

    path_name: str
    use_pickle: bool
    tensor_meta: TensorValue | None


class PayloadConfig(msgspec.Struct, frozen=True):
    """Weights or constants by name."""

    config: dict[str, Payload]


class Named(msgspec.Struct, frozen=True):
    """An argument of an operator."""

    name: str
    arg: Union


class Node(msgspec.Struct, frozen=True):
    """A call of an operator."""

    target: str
    inputs: list[Named]
    outputs: list[Union]


class Graph(msgspec.Struct, frozen=True):
    """Calls in their order. Each value has a name of its own."""

    inputs: list[Union]
    outputs: list[Union]
    nodes: list[Node]
    tensor_values: dict[str, TensorValue]


class Signature(msgspec.Struct, frozen=True):
    """What each input and output of the graph is to the program."""

    input_specs: list[Union]
    output_specs: list[Union]


class CallSignature(msgspec.Struct, frozen=True):
    """How the outputs of a module are nested."""

    out_spec: str


class Call(msgspec.Struct, frozen=True):
    """A module of the program; the first one is the program itself."""

    fqn: str
    signature: CallSignature | None = None


class Fields(msgspec.Struct, frozen=True):
    """The fields of a named tuple."""

    field_names: list[str]


class GraphModule(msgspec.Struct, frozen=True):
    """A graph with all that is said of it."""

    graph: Graph
    signature: Signature
    module_call_graph: list[Call]
    treespec_namedtuple_fields: dict[str, Fields] = {}


class Range(msgspec.Struct, frozen=True):
    """Sizes that an axis may have, both ends included; None is no bound."""

    min_val: int | None
    max_val: int | None


class Version(msgspec.Struct, frozen=True):
    """Of the schema."""

    major: int
    minor: int


class Written(msgspec.Struct, frozen=True):
    """By what a program was written: all that is read of one whose schema may be another."""

    schema_version: Version
    torch_version: str = "of an old version"


class Program(msgspec.Struct, frozen=True):
    """An exported program."""

    graph_module: GraphModule
    range_constraints: dict[str, Range]
    torch_version: str


class Place(msgspec.Struct, frozen=True):
    """A place in a nest of outputs: of what type, and what its type says of what is in it."""

    type: str | None
    context: str | None
    children_spec: list[Place]


def one(union: Union) -> tuple[str, Any]:
    """Kind and value of a union; raises ModelError."""
    if len(union) != 1:
        raise ModelError(f"the program has {list(union) or 'nothing'} where one value must be")
    return next(iter(union.items()))


def name_of(union: Union) -> str:
    """The name of a value in a graph, "" for a constant; raises ModelError."""
    kind, value = one(union)
    if kind == "as_tensor" and isinstance(value, Mapping):
        return str(value.get("name", ""))
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool") and isinstance(value, Mapping):
        return str(value.get("as_name", ""))
    return ""


def places(module: GraphModule) -> list[str]:
    """The outputs' names by where they are nested: their keys, else ``output`` and their number;
    [] if that is not said. Raises msgspec.DecodeError."""
    signature = module.module_call_graph[0].signature if module.module_call_graph else None
    if signature is None:
        return []
    _, root = msgspec.json.decode(signature.out_spec, type=tuple[int, Place])
    if root.type is None:
        return ["output0"]
    found: list[str] = []
    _walk(root, (), module.treespec_namedtuple_fields, found)
    return found if all(found) and len({*found}) == len(found) else []


def _walk(
    place: Place, path: tuple[str, ...], tuples: Mapping[str, Fields], found: list[str]
) -> None:
    if place.type is None:
        name = ".".join(path)
        found.append(f"output{name}" if path[0].isdigit() else name)
        return
    keys = _keys(place, tuples)
    for key, child in zip(keys, place.children_spec, strict=True):
        _walk(child, (*path, key), tuples, found)


def _keys(place: Place, tuples: Mapping[str, Fields]) -> list[str]:
    count = len(place.children_spec)
    said = msgspec.json.decode(place.context or "null")
    if isinstance(said, str) and said in tuples:
        said = tuples[said].field_names
    elif isinstance(said, dict):
        said = said.get("dict_context")
    if isinstance(said, list) and len(said) == count:
        return [str(key) for key in said]
    return [str(number) for number in range(count)]
