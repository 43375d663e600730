"""Images of prompts: read, resized and cut to the tiles that a model's tower takes.

It follows what ``preprocessor_config.json`` (or ``processor_config.json``) beside the model says,
as Idefics 3 means it (Laurençon et al., 2024): an image is brought to a fixed length, then to whole
tiles. Those are read one by one, and behind them the whole image as one tile more.

What comes is a stranger's. So only JPEG and PNG are tried, and the size is read and held against
the bounds before anything is decoded.
"""

from __future__ import annotations

from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from cotenant.domain.errors import InvalidRequest, ModelError
from cotenant.engines.llm.families.base import Floats
from cotenant.engines.llm.keys import Keys, read_json
from cotenant.engines.llm.vision import Vision

FORMATS: Final = ("JPEG", "PNG")
MOST_BYTES: Final = 4 << 20
"""Of an image as it comes."""
MOST_PIXELS: Final = 1 << 24
"""Of an image when it is decoded."""
MOST_LENGTH: Final = 4096
"""Pixels of the longer side, once it is resized."""
MOST_SCANS: Final = 100
"""Of a JPEG: each goes over all of it again. Usual are up to a dozen."""
SCAN: Final = b"\xff\xda"
"""Begins one; within its data there is no such pair of bytes."""
ORIENTATION: Final = 0x0112
"""In EXIF: how a camera was held."""
UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What to do with a picture; from 5 on width and height change places."""

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]
"""Width and height."""


class Grid(msgspec.Struct, frozen=True):
    """What becomes of an image: it is brought to each of ``sizes``, one after the other, then cut
    to ``rows`` times ``columns`` tiles (0: it is one tile)."""

    sizes: tuple[Size, ...]
    rows: int = 0
    columns: int = 0

    @property
    def tiles(self) -> int:
        """With that of the whole image."""
        return self.rows * self.columns + 1


class Cutting(msgspec.Struct, frozen=True, kw_only=True):
    """How a model wants images. ``side``: pixels of a tile. ``length``: of the longer side, to
    which an image is brought first (0: it is not). ``splits``: whether it is cut, else it is one
    tile. A number of a tile is ``scale`` times a pixel plus ``shift``, by colour."""

    side: int
    length: int
    splits: bool
    filter: int
    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def grid(self, size: Size) -> Grid:
        """Of an image of this size."""
        first = (_bounded(_stretched(size, self.length)),) if self.length else ()
        if not self.splits:
            return Grid((*first, (self.side, self.side)))
        width, height = whole = self._whole(first[0] if first else size)
        if max(whole) <= self.side:
            return Grid((*first, whole))
        return Grid((*first, whole), height // self.side, width // self.side)

    def _whole(self, size: Size) -> Size:
        """The next size that whole tiles fill."""
        width, height = size
        ratio, side = width / height, self.side
        if width >= height:
            width = ceil(width / side) * side
            return width, max(1, ceil(int(width / ratio) / side)) * side
        height = ceil(height / side) * side
        return max(1, ceil(int(height * ratio) / side)) * side, height

    def normalized(self, tile: Pixels) -> Floats:
        """As the tower takes it."""
        scale, shift = (np.array(each, np.float32) for each in (self.scale, self.shift))
        return np.asarray(tile * scale + shift, np.float32)


def _stretched(size: Size, length: int) -> Size:
    """With a longer side of this length; the other one is even."""
    width, height = size
    ratio = width / height
    if width >= height:
        other = int(length / ratio)
        return length, max(1, other + other % 2)
    other = int(length * ratio)
    return max(1, other + other % 2), length


def _bounded(size: Size) -> Size:
    width, height = size
    ratio = width / height
    if width >= height and width > MOST_LENGTH:
        return MOST_LENGTH, max(1, int(MOST_LENGTH / ratio))
    if height > width and height > MOST_LENGTH:
        return max(1, int(MOST_LENGTH * ratio)), MOST_LENGTH
    return size


def read_cutting(folder: Path, vision: Vision) -> Cutting:
    """What the files beside a model say of images. Raises ModelError."""
    path = folder / "preprocessor_config.json"
    if path.exists():
        keys = Keys(read_json(path))
    else:
        path = folder / "processor_config.json"
        found = Keys(read_json(path)).table("image_processor")
        if found is None:
            raise ModelError(f"{path.name} has no image_processor")
        keys = found
    tile = _edge(keys, "max_image_size")
    if tile != vision.side:
        raise ModelError(
            f"{path.name}: max_image_size {tile} is not image_size of the tower, {vision.side}"
        )
    for name in ("do_rescale", "do_normalize", "do_convert_rgb"):
        if not keys.flag(name, True):
            raise ModelError(f"{path.name}: {name} is false; served is true")
    resample = keys.whole("resample", int(Image.Resampling.LANCZOS))
    if resample not in list(Image.Resampling):
        raise ModelError(f"{path.name}: resample {resample} is no filter of Pillow's")
    mean, deviation = (_colours(keys, name) for name in ("image_mean", "image_std"))
    if min(deviation) <= 0:
        raise ModelError(f"{path.name}: image_std must be above 0")
    factor = keys.number("rescale_factor", 1 / 255)
    return Cutting(
        side=tile,
        length=_edge(keys, "size") if keys.flag("do_resize", True) else 0,
        splits=keys.flag("do_image_splitting", True),
        filter=resample,
        scale=tuple(factor / each for each in deviation),
        shift=tuple(-m / d for m, d in zip(mean, deviation, strict=True)),
    )


def _edge(keys: Keys, name: str) -> int:
    table = keys.table(name)
    edge = table.whole("longest_edge", 0) if table is not None else 0
    if not 1 <= edge <= MOST_LENGTH:
        raise ModelError(f"{name} needs longest_edge, from 1 to {MOST_LENGTH}")
    return edge


def _colours(keys: Keys, name: str) -> tuple[float, ...]:
    found: Any = keys.values.get(name, [0.5, 0.5, 0.5])
    if (
        not isinstance(found, list)
        or len(found) != 3
        or not all(isinstance(each, int | float) and abs(each) < 1e6 for each in found)
    ):
        raise ModelError(f"{name} must be three numbers, one a colour")
    return tuple(map(float, found))


class Opened:
    """A ``domain.port.Picture``. Raises InvalidRequest for what is no JPEG or PNG, or is beyond the
    bounds."""

    def __init__(self, data: bytes, cutting: Cutting, vision: Vision) -> None:
        if len(data) > MOST_BYTES:
            raise InvalidRequest(f"the image has {len(data)} bytes; at most {MOST_BYTES} are read")
        self._cutting = cutting
        try:
            self._image: Image.Image = Image.open(BytesIO(data), formats=FORMATS)
            size = self._image.size
            jpeg = self._image.format == "JPEG"
            held = self._image.getexif().get(ORIENTATION, 1) if jpeg else 1
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise InvalidRequest(f"the image has more than {MOST_PIXELS} pixels") from None
        except UnidentifiedImageError:
            raise InvalidRequest(f"it is no {' or '.join(FORMATS)} image") from None
        except Exception as error:  # Pillow raises a dozen kinds
            raise _unreadable(error) from error
        if size[0] * size[1] > MOST_PIXELS:
            raise InvalidRequest(
                f"the image has {size[0]} x {size[1]} pixels; at most {MOST_PIXELS} are read"
            )
        if jpeg and data.count(SCAN) > MOST_SCANS:
            raise InvalidRequest(f"the JPEG has more than {MOST_SCANS} scans")
        self._turn = UPRIGHT.get(held)
        self.grid = cutting.grid((size[1], size[0]) if held in (5, 6, 7, 8) else size)
        self.tokens = self.grid.tiles * vision.rows
        self.shape = (self.grid.tiles, cutting.side, cutting.side, 3)

    def pixels(self) -> bytes:
        try:
            self._image.load()
            image = _coloured(self._image)
        except Exception as error:
            raise _unreadable(error) from error
        if self._turn is not None:
            image = image.transpose(self._turn)
        for size in self.grid.sizes:
            image = image.resize(size, self._cutting.filter)
        side, grid = self._cutting.side, self.grid
        corners = [(c * side, r * side) for r in range(grid.rows) for c in range(grid.columns)]
        tiles = [image.crop((x, y, x + side, y + side)) for x, y in corners]
        tiles.append(image.resize((side, side), self._cutting.filter) if corners else image)
        return b"".join(tile.tobytes() for tile in tiles)


def _unreadable(error: Exception) -> InvalidRequest:
    return InvalidRequest(f"the image cannot be read: {str(error) or type(error).__name__}")


def _coloured(image: Image.Image) -> Image.Image:
    """In RGB; what is transparent is white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def layout(grid: Grid, token: str, rows: int) -> str:
    """What a prompt has for an image: ``token`` for each of the ``rows`` of a tile, and where in
    the image it is."""
    edge, of_tile = "<fake_token_around_image>", token * rows
    lines = [
        "".join(f"{edge}<row_{r + 1}_col_{c + 1}>{of_tile}" for c in range(grid.columns)) + "\n"
        for r in range(grid.rows)
    ]
    before = "".join(lines) + "\n" if lines else ""
    return f"{before}{edge}<global-img>{of_tile}{edge}"
