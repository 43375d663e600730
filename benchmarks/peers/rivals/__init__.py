"""The servers compared. A new one is a file here with the methods of `rivals.base.Rival`."""

from __future__ import annotations

from rivals.bare import Bare
from rivals.base import Arm, Rival
from rivals.litserve import LitServe
from rivals.mlserver import MLServer
from rivals.triton import Triton
from rivals.weft import Weft, WeftCompiled

RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (Weft(), WeftCompiled(), Bare(), Triton(), MLServer(), LitServe())
}

__all__ = ["RIVALS", "Arm", "Rival"]
