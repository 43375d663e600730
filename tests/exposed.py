"""What an exposition holds, and what a query asks of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

TARGET_LABELS = frozenset({"instance", "namespace", "pod"})
"""Those that Prometheus adds to what it scrapes (docs/howto-orchestrators.md)."""


class Exposed(NamedTuple):
    """Labels of each series by its name, and kinds of families by the name in ``# TYPE`` lines."""

    labels: dict[str, set[str]]
    kinds: dict[str, str]
    values: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def value(self, name: str, **labels: str) -> float:
        """Of one series."""
        return self.values[name, frozenset(labels.items())]


def read(text: str) -> Exposed:
    """An exposition, by the names that it has itself: the parser would add ``_total`` to some."""
    bare = {
        line.split()[2]
        for line in text.splitlines()
        if line.startswith("# TYPE ") and line.endswith(" counter") and "_total" not in line
    }
    labels: dict[str, set[str]] = {}
    values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            plain = sample.name.removesuffix("_total")
            name = plain if plain in bare else sample.name
            labels.setdefault(name, set()).update(sample.labels)
            values[name, frozenset(sample.labels.items())] = sample.value
    types = [line.split() for line in text.splitlines() if line.startswith("# TYPE ")]
    return Exposed(labels, {name: kind for _, _, name, kind in types}, values)


class Query:
    """The series of a PromQL expression, and the labels that it looks at in each. Raises ValueError
    for what is no PromQL."""

    def __init__(self, text: str) -> None:
        self.series: list[tuple[str, set[str]]] = []
        self._visit(promql_parser.parse(text), set())

    def _visit(self, node: Any, grouped: set[str]) -> None:
        match type(node).__name__:
            case "VectorSelector":
                matched = {m.name for m in node.matchers.matchers if m.name != "__name__"}
                self.series.append((node.name, matched | grouped))
            case "MatrixSelector":
                self._visit(node.vector_selector, grouped)
            case "AggregateExpr":
                inner = set(node.modifier.labels) if node.modifier is not None else set()
                self._visit(node.expr, grouped | inner)
            case "BinaryExpr":
                self._visit(node.lhs, grouped)
                self._visit(node.rhs, grouped)
            case "Call":
                for arg in node.args:
                    self._visit(arg, grouped)
            case "ParenExpr" | "UnaryExpr" | "SubqueryExpr":
                self._visit(node.expr, grouped)
            case "NumberLiteral" | "StringLiteral":
                pass
            case other:
                raise ValueError(f"{other} in a query: teach this test what it is")

    def missing(self, exposed: Exposed) -> list[str]:
        """Metrics and labels in it that an exposition has not."""
        found = []
        for name, labels in self.series:
            known = exposed.labels.get(name)
            if known is None:
                found.append(name)
            else:
                found += [f"{name}{{{label}}}" for label in labels - known - TARGET_LABELS]
        return found
