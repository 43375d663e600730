"""Manifests of Kubernetes, read and judged as an API server would: unknown fields are errors.

Kinds of Kubernetes itself are judged by ``kubernetes-validate``, those of others by the schemas in
``deploy/schemas`` (its README says where they are from). Rules in CEL are not evaluated.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

SCHEMAS = Path(__file__).parents[1] / "deploy" / "schemas"
KUBERNETES = "1.36"
"""The oldest version that is supported."""
_PLAIN_META = ("name", "namespace", "generateName", "labels", "annotations")


class _Loader(yaml.SafeLoader):
    """One that takes no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise AssertionError(f"said twice: {sorted(twice)} {node.start_mark}")
        return super().construct_mapping(node, deep)


def documents(text: str) -> list[dict[str, Any]]:
    """All objects of a file."""
    return [document for document in yaml.load_all(text, _Loader) if document]


def check(document: dict[str, Any]) -> None:
    """Raises AssertionError for what an API server would refuse by the shape alone."""
    version, kind = document["apiVersion"], document["kind"]
    schema = _schemas().get((version, kind))
    try:
        if schema is not None:
            jsonschema.Draft7Validator(schema).validate(document)
        else:
            kubernetes_validate = pytest.importorskip("kubernetes_validate")
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except Exception as error:
        where = f"{kind} {document.get('metadata', {}).get('name')}"
        raise AssertionError(f"{where}: {str(error)[:600]}") from None


@cache
def _schemas() -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for path in SCHEMAS.glob("*.json"):
        kept = json.loads(path.read_text())
        made = strict(kept["openAPIV3Schema"], top=True)
        found[f"{kept['group']}/{kept['version']}", kept["kind"]] = made
    return found


def strict(schema: dict[str, Any], top: bool = False) -> dict[str, Any]:
    """A structural schema of a CRD as a JSON schema that allows no field it does not name."""
    made = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        made["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            made[name] = strict(schema[name])
    if "(?i)" in made.get("pattern", ""):  # Go has such flags anywhere, Python at the start
        made["pattern"] = "(?i)" + made["pattern"].replace("(?i)", "")
    if made.pop("nullable", False) and "type" in made:
        made["type"] = [made["type"], "null"]
    if top:
        made["properties"]["metadata"] = {
            "type": "object",
            "required": ["name"],
            "properties": {name: {} for name in _PLAIN_META},
            "additionalProperties": False,
        }
    return made
