"""Structured pruning: whole channels go, and what is left is trained to say what the parent says.

Which channels belong together is found by Torch-Pruning (G. Fang and others, "DepGraph: towards any
structural pruning", CVPR 2023). The layers before the outputs stay as wide as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cotenant.domain.errors import ModelError
from cotenant.engines.base import first_line
from cotenant.optimize.parent import Parent, Told
from cotenant.optimize.recipes.base import Made
from cotenant.optimize.recipes.trained import NEEDS, imported, with_int8

if TYPE_CHECKING:
    from cotenant.optimize.torchwork.importing import Graph
    from cotenant.optimize.torchwork.training import Lesson

SHARES: Final = (0.25, 0.5)
"""Of the channels of each layer that goes."""
_MULTIPLE: Final = 4


class Pruned:
    """See the module's text."""

    name = "pruned"
    needs = (*NEEDS, "torch_pruning")
    trains = True

    def make(self, parent: Parent, work: Path, seconds: float, told: Told) -> Iterator[Made]:
        from cotenant.optimize.torchwork import exporting, training

        given = training.lesson(parent)
        model, whole = imported(parent, given, work)
        for share in SHARES:
            told(f"structured pruning of {share:.0%}")
            module = copy.deepcopy(whole)
            _prune(module, given, share)
            loss = training.train(module, given, seconds / len(SHARES), told)
            name = f"{self.name}-{share * 100:.0f}"
            folder = work / name
            folder.mkdir()
            path = exporting.write(model, module, folder / "model.onnx")
            said = f"{share:.0%} of the channels pruned, the rest trained (loss {loss:.4f})"
            yield from with_int8(parent, Made(name, said, path), work)


def _prune(module: Graph, given: Lesson, share: float) -> None:
    """Take channels out of all layers; raises ModelError where that breaks the module."""
    import torch
    import torch_pruning as tp

    rows = [torch.from_numpy(array[:2]) for array in given.rows]
    before = sum(p.numel() for p in module.parameters())
    try:
        pruner = tp.pruner.BasePruner(
            module,
            tuple(rows),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            ignored_layers=module.last(),
            round_to=_MULTIPLE,
        )
        pruner.step()
        with torch.no_grad():
            found = module(*rows)
    except Exception as error:  # what Torch-Pruning and torch say of graphs that they cannot cut
        raise ModelError(f"its channels cannot be pruned: {first_line(error)}") from error
    wanted = given.answer([row.numpy() for row in rows])
    if [f.shape for f in found] != [w.shape for w in wanted]:
        raise ModelError("its channels cannot be pruned: its outputs would change their shapes")
    if sum(p.numel() for p in module.parameters()) >= before:
        raise ModelError("none of its channels can be pruned")
