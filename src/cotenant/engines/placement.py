"""Which operators of a model an engine executes where, as the engine itself says."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import msgspec

RECORDS: Final = ("session.record_ep_graph_assignment_info", "1")
"""The setting of an ONNX Runtime session that has it remember that."""
_IN_8_BITS: Final = ("QLinear", "DynamicQuantize", "QGemm", "QAttention")


class Executed(msgspec.Struct, frozen=True):
    """``count`` operators of a ``kind``, executed by ``where``, a part of the engine, in a
    ``precision`` ("": in that of their tensors)."""

    where: str
    kind: str
    count: int
    precision: str = ""


def by_provider(session: Any) -> tuple[Executed, ...]:
    """Of a session of ONNX Runtime that was made with ``RECORDS``, by execution provider, once its
    graph was rewritten; empty where this ONNX Runtime does not tell."""
    try:
        parts = session.get_provider_graph_assignment_info()
    except Exception:  # not there, or not built in
        return ()
    found = Counter((part.ep_name, node.op_type) for part in parts for node in part.get_nodes())
    return tuple(
        Executed(where, kind, count, _precision(kind))
        for (where, kind), count in sorted(found.items())
    )


def _precision(kind: str) -> str:
    """What the name of an ONNX operator says of it."""
    in_8 = kind.startswith(_IN_8_BITS) or kind.endswith("Integer")
    return "INT8" if in_8 else ""


def told(executed: tuple[Executed, ...]) -> list[str]:
    """A line for each part of the engine."""
    lines = []
    for where in dict.fromkeys(e.where for e in executed):
        there = sorted((e for e in executed if e.where == where), key=lambda e: (-e.count, e.kind))
        parts = (f"{e.count} {e.kind}{f' in {e.precision}' * bool(e.precision)}" for e in there)
        lines.append(f"{where}: {', '.join(parts)}")
    return lines
