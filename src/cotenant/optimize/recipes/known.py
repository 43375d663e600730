"""Which recipes there are, in the order in which they are tried."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from typing import Final

from cotenant.domain.errors import EnvironmentProblem, InvalidRequest
from cotenant.optimize.recipes.base import Recipe
from cotenant.optimize.recipes.int8 import Int8
from cotenant.optimize.recipes.mixed import Mixed
from cotenant.optimize.recipes.nncf import Nncf
from cotenant.optimize.recipes.pruned import Pruned
from cotenant.optimize.recipes.qat import Qat
from cotenant.optimize.recipes.sparse import Sparse
from cotenant.optimize.recipes.student import Student

RECIPES: Final[tuple[Recipe, ...]] = (
    Int8(),
    Mixed(),
    Nncf(),
    Sparse(),
    Pruned(),
    Qat(),
    Student(),
)


def chosen(names: Sequence[str]) -> tuple[Recipe, ...]:
    """Those of these names, all where none is given. Raises InvalidRequest for an unknown one."""
    known = {recipe.name: recipe for recipe in RECIPES}
    return tuple(known[known_name(name, list(known), "recipe")] for name in names) or RECIPES


def known_name(name: str, known: Sequence[str], what: str) -> str:
    """The name, if it is one of these; raises InvalidRequest with a near one."""
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    raise InvalidRequest(f"there is no {what} {name!r}; {hint}")


def lacking(recipe: Recipe) -> str:
    """What a recipe needs and is not installed, and how to get it; "" if nothing."""
    missing = [name for name in recipe.needs if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"it needs {', '.join(missing)}: pip install 'cotenant[optimize]'"


def check_asked(recipes: Sequence[Recipe]) -> None:
    """Raises EnvironmentProblem if one that was asked for by name cannot be had."""
    for recipe in recipes:
        if why := lacking(recipe):
            raise EnvironmentProblem(f"the recipe {recipe.name}: {why}")
