"""What a model sees: tiles on their way from pixels to rows, kept while a sequence has them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from cotenant.domain.errors import InvalidRequest
from cotenant.engines.llm.checkpoint import Checkpoint
from cotenant.engines.llm.families.base import Floats
from cotenant.engines.llm.pictures import Cutting, Pixels, read_cutting
from cotenant.engines.llm.tiles import token_of
from cotenant.engines.llm.vision_graph import VisionRunner


class Sight:
    """``runner``: the tower; ``cutting``: how pixels are made numbers."""

    def __init__(self, runner: VisionRunner, cutting: Cutting) -> None:
        self.vision = runner.vision
        self.images: dict[int, Floats] = {}
        """By key of a tile, its rows [rows, hidden]."""
        self._runner = runner
        self._cutting = cutting
        self._pixels: dict[int, Pixels] = {}
        """Of tiles that are not encoded yet."""

    def placed(
        self, prompt: Sequence[int], tiles: Sequence[Pixels]
    ) -> tuple[tuple[int, ...], dict[int, Pixels]]:
        """A prompt with the rows of the tiles in the places of image tokens, and the tiles by their
        keys, which are made of their pixels. Raises InvalidRequest where these do not fit."""
        rows, token = self.vision.rows, self.vision.token
        places = [at for at, each in enumerate(prompt) if each == token]
        if not tiles:
            return tuple(prompt), {}
        if len(places) != len(tiles) * rows:
            raise InvalidRequest(
                f"the prompt has {len(places)} image tokens; {len(tiles)} tiles of {rows} rows"
                f" need {len(tiles) * rows}"
            )
        keys = [_key(tile) for tile in tiles]
        placed = list(prompt)
        for index, at in enumerate(places):
            placed[at] = token_of(keys[index // rows], index % rows)
        return tuple(placed), dict(zip(keys, tiles, strict=True))

    def keep(self, tiles: dict[int, Pixels]) -> None:
        """Of a sequence that was taken up."""
        for key, pixels in tiles.items():
            if key not in self.images and key not in self._pixels:
                self._pixels[key] = pixels.copy()

    def encode(self, units: int, tile: int) -> None:
        """The tile with this key, on so many threads. Raises ModelError."""
        if tile not in self.images:  # it is, if the engine failed at what came behind it
            pixels = self._cutting.normalized(self._pixels[tile])
            self.images[tile] = self._runner.encode(units, pixels)
            del self._pixels[tile]

    def try_out(self, units: int) -> None:
        """Encode a tile that nobody has. Raises ModelError."""
        side = self.vision.side
        self._runner.encode(units, np.zeros((side, side, 3), np.float32))

    def forget(self, held: frozenset[int]) -> None:
        """All but those that are held."""
        for kept in (self.images, self._pixels):
            for key in kept.keys() - held:
                del kept[key]


def _key(tile: Pixels) -> int:
    digest = blake2b(np.ascontiguousarray(tile).tobytes(), digest_size=16)
    return int.from_bytes(digest.digest(), "big")


def open_sight(checkpoint: Checkpoint, folder: Path, units: Sequence[int]) -> Sight | None:
    """Of the model in a folder; None: it sees no images. Raises ModelError."""
    if checkpoint.vision is None:
        return None
    return Sight(VisionRunner(checkpoint, units), read_cutting(folder, checkpoint.vision))
