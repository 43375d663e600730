"""Whether an object is what Kubernetes 1.36 takes: its schema, no unknown fields, and the rules
that no schema says."""

from __future__ import annotations

from typing import Any

import kubernetes_validate

from tests import kube_oracle

VERSION = "1.36"


def check(item: dict[str, Any]) -> None:
    """Raises ``kubernetes_validate.ValidationError`` or ``kube_oracle.Invalid``."""
    kubernetes_validate.validate(item, VERSION, strict=True)
    if item["kind"] == "ResourceSlice":
        kube_oracle.check_slice(item)
