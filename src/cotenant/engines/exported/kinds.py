"""The engine for PyTorch exported programs."""

from __future__ import annotations

import os
from typing import Final

from cotenant.domain.errors import ModelError
from cotenant.engines.base import Engine, EngineKind, Opening

PASSIVE: Final = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
"""Threads of OpenMP sleep while they wait: what spins is taken from the training beside it. It is
read once, when PyTorch is imported. What the owner set stands."""


class Torch:
    """``engines.exported.engine``."""

    name = "torch"
    suffixes = (".pt2",)
    rank = 30
    drafts = False

    def refuses(self, opening: Opening) -> str:
        if opening.target.on_cpu:
            return ""
        return "it runs on the CPU alone; let the service run there (kinds: [cpu])"

    def open(self, opening: Opening) -> Engine:
        for name, value in PASSIVE.items():
            os.environ.setdefault(name, value)
        try:
            from cotenant.engines.exported.engine import ExportedEngine
        except ImportError as error:
            needs = "exported programs need the extra torch: pip install 'cotenant[torch]'"
            raise ModelError(f"{needs} ({error})") from error
        return ExportedEngine(opening.path)


KIND: Final[EngineKind] = Torch()
