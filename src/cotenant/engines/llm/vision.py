"""What the vision tower of a model looks like: all that its graph and its weights need.

It is a transformer without a mask over patches of one tile (ViT, Dosovitskiy et al., ICLR 2021, as
SigLIP has it), and a connector that makes rows of the decoder's width of squares of patches.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cotenant.domain.errors import ModelError

PREFIX: Final = "vision."
"""Before the names of its weights, where they stand beside a decoder's."""
MOST: Final = {
    "side": 4096,
    "patch": 256,
    "layers": 512,
    "hidden": 65_536,
    "heads": 1024,
    "ffn": 1 << 20,
    "shuffle": 16,
    "out": 65_536,
}
"""Larger ones are taken for damage."""
MOST_PATCHES: Final = 1 << 14
"""Of a tile: attention looks at each pair."""


class Vision(msgspec.Struct, frozen=True, kw_only=True):
    """``side``: pixels of a tile, which is a square, and ``patch`` those of a patch. ``shuffle``
    by ``shuffle`` patches become one row of ``out`` numbers. ``token``: the token that stands for
    a row in a prompt."""

    side: int
    patch: int
    layers: int
    hidden: int
    heads: int
    ffn: int
    epsilon: float
    shuffle: int
    out: int
    token: int

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ModelError(f"vision: {name} is {getattr(self, name)}, not from 1 to {most}")
        if not 0 < self.epsilon < 1:
            raise ModelError(f"vision: epsilon {self.epsilon:g} is not between 0 and 1")
        if self.hidden % self.heads:
            raise ModelError(f"vision: {self.heads} heads do not share {self.hidden} evenly")
        if not self.across or self.across % self.shuffle or self.across**2 > MOST_PATCHES:
            raise ModelError(
                f"vision: {self.side} pixels are {self.across} patches of {self.patch}; they must"
                f" be a multiple of {self.shuffle}, and at most {MOST_PATCHES} in all"
            )

    @property
    def across(self) -> int:
        """Patches along a side."""
        return self.side // self.patch

    @property
    def rows(self) -> int:
        """That a tile becomes."""
        return (self.across // self.shuffle) ** 2

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each weight; matrices are [out, in]. Those of a layer begin with its
        number."""
        hidden, ffn = self.hidden, self.ffn
        layer: dict[str, tuple[int, ...]] = {
            "first_norm": (hidden,),
            "second_norm": (hidden,),
            "q": (hidden, hidden),
            "k": (hidden, hidden),
            "v": (hidden, hidden),
            "o": (hidden, hidden),
            "up": (ffn, hidden),
            "down": (hidden, ffn),
        }
        found: dict[str, tuple[int, ...]] = {
            "patches": (hidden, 3, self.patch, self.patch),
            "patches_bias": (hidden,),
            "positions": (self.across**2, hidden),
            "norm": (hidden,),
            "norm_bias": (hidden,),
            "connector": (self.out, hidden * self.shuffle**2),
        }
        for number in range(self.layers):
            for name, shape in layer.items():
                found[f"{number}.{name}"] = shape
                found[f"{number}.{name}_bias"] = shape[:1]
        return {PREFIX + name: shape for name, shape in found.items()}
