"""Whether the policy is compiled, and then the types of the dispatcher's state.

A compiled class keeps of a field's type only the outermost part (``list``), and a checkpoint cannot
be decoded by that. The rest is read from the source, which lies beside what was made of it.
"""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType
from typing import Any

from cotenant.policy import dispatcher


def policy_is_compiled() -> bool:
    """Whether this is a compiled wheel, whose decisions take a third of the time."""
    return not str(dispatcher.__file__).endswith(".py")


def source_types(module: ModuleType) -> dict[str, dict[str, Any]]:
    """The fields of a module's classes with their types, by class, as the source has them."""
    made = Path(str(module.__file__))
    source = made.with_name(made.name.partition(".")[0] + ".py").read_text()
    return {
        node.name: {
            field.target.id: eval(ast.unparse(field.annotation), vars(module))
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def restore_types(module: ModuleType) -> None:
    """Give a compiled module's classes their types back."""
    if str(module.__file__).endswith(".py"):
        return
    for name, types in source_types(module).items():
        getattr(module, name).__annotations__.update(types)
