"""The servers compared. A new one is a file here with the methods of `rivals.base.Rival`."""

from __future__ import annotations

from rivals.bare import Bare
from rivals.base import Arm, Rival
from rivals.cotenant import Cotenant
from rivals.litserve import LitServe
from rivals.mlserver import MLServer
from rivals.triton import Triton

RIVALS: dict[str, Rival] = {
    rival.name: rival for rival in (Cotenant(), Bare(), Triton(), MLServer(), LitServe())
}

__all__ = ["RIVALS", "Arm", "Rival"]
