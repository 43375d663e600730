"""Read the text in a picture: ``python ocr.py --image FILE``

Three models of rapidocr: one finds lines (pictures of any size), one says which are upside down,
one reads. For text that runs from left to right; slanted lines are cut out as upright boxes.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from asking import Array, Server
from PIL import Image

MOST_SIDE = 960
STEP = 32
"""Sides that the model of boxes takes are multiples of this."""
INK, LINE, GROW = 0.3, 0.5, 1.6
"""From how much on a pixel belongs to a text; a box is one; and by how much boxes are too small."""
LEAST = 3
"""Pixels of a side below which it is no text."""
HEIGHT, WIDTH = 48, 320
"""Of a line as the model reads it: the least width, to which shorter ones are filled up."""
TURNED = 0.9


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    left: int
    top: int
    right: int
    bottom: int


def _tensor(picture: Image.Image, width: int, height: int) -> Array:
    """FP32 [3, height, width], blue first, -1 to 1."""
    small = picture.resize((width, height), Image.Resampling.BILINEAR)
    values = np.asarray(small, np.float32)[:, :, ::-1] / 127.5 - 1
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def whole(picture: Image.Image, most: int = MOST_SIDE) -> Array:
    """What finds lines takes: FP32 [1, 3, height, width], no side above ``most`` pixels."""
    scale = min(1.0, most / max(picture.size))
    width, height = (max(STEP, round(side * scale / STEP) * STEP) for side in picture.size)
    return _tensor(picture, width, height)[None]


def boxes(chances: Array, size: tuple[int, int]) -> list[Box]:
    """Lines of a picture of this size (width, height), from top to bottom. ``chances``: FP32
    [1, 1, height, width], how likely each pixel is text."""
    field = chances[0, 0]
    across, down = size[0] / field.shape[1], size[1] / field.shape[0]
    found = []
    for part in _parts(field > INK):
        wide, high = part.right - part.left, part.bottom - part.top
        inside = field[part.top : part.bottom, part.left : part.right]
        if min(wide, high) < LEAST or inside.mean() < LINE:
            continue
        grow = wide * high * GROW / (2 * (wide + high))
        found.append(
            Box(
                max(0, int((part.left - grow) * across)),
                max(0, int((part.top - grow) * down)),
                min(size[0], round((part.right + grow) * across)),
                min(size[1], round((part.bottom + grow) * down)),
            )
        )
    return sorted(found, key=lambda box: (box.top, box.left))


def _parts(mask: Array) -> list[Box]:
    """Boxes of what hangs together in a mask: runs of a row are joined to those of the row before
    that they touch."""
    joined: list[int] = []
    runs: list[Box] = []

    def root(number: int) -> int:
        while joined[number] != number:
            number = joined[number]
        return number

    before: list[int] = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(row.astype(np.int8), prepend=0, append=0))
        now = []
        for left, right in edges.reshape(-1, 2).tolist():
            number = len(runs)
            runs.append(Box(left, y, right, y + 1))
            joined.append(number)
            for other in before:
                if runs[other].left <= right and left <= runs[other].right:
                    joined[root(other)] = root(number)
            now.append(number)
        before = now
    parts: dict[int, list[Box]] = {}
    for number, run in enumerate(runs):
        parts.setdefault(root(number), []).append(run)
    return [
        Box(
            min(run.left for run in part),
            part[0].top,
            max(run.right for run in part),
            part[-1].bottom,
        )
        for part in parts.values()
    ]


def line(picture: Image.Image, least: int, most: int = 4096) -> Array:
    """A line, FP32 [1, 3, 48, width]: as wide as it is, but filled up to ``least`` or else to a
    multiple of it, so that lines of about one width can share a batch; no wider than ``most``."""
    width = max(1, min(most, round(HEIGHT * picture.width / picture.height)))
    made = np.zeros((1, 3, HEIGHT, -(-width // least) * least), np.float32)
    made[0, :, :, :width] = _tensor(picture, width, HEIGHT)
    return made


def upright(server: Server, picture: Image.Image) -> Image.Image:
    """A line, turned round where it stands on its head."""
    scores = server.ask("text-angle", x=line(picture, 192, 192))
    (row,) = next(iter(scores.values()))
    return picture.rotate(180) if row[1] > TURNED else picture


def text(scores: Array, known: list[str]) -> str:
    """What scores (FP32 [steps, classes]) say: of a class that stays the first step counts."""
    best = scores.argmax(axis=1)
    starts = np.concatenate([[True], best[1:] != best[:-1]])
    return "".join(known[number - 1] for number in best[starts] if number)


def read(address: str, picture: Image.Image, known: list[str], most: int = MOST_SIDE) -> list[str]:
    """The lines of a picture, from top to bottom; all of them are asked for at once."""
    server = Server(address)
    (chances,) = server.ask("text-boxes", x=whole(picture, most)).values()
    server.close()

    def one(box: Box) -> str:
        server = Server(address)
        cut = upright(server, picture.crop(box))
        (scores,) = server.ask("text-lines", x=line(cut, WIDTH)).values()
        server.close()
        return text(scores[0], known)

    found = boxes(chances, picture.size)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, found))


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).resolve().parent
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=here / "models", help="as of prepare.py")
    parser.add_argument("--server", default="127.0.0.1:8000", metavar="HOST:PORT")
    args = parser.parse_args()
    known = json.loads((args.models / "text-lines" / "characters.json").read_text())
    picture = Image.open(args.image).convert("RGB")
    for found in read(args.server, picture, known):
        print(found)


if __name__ == "__main__":
    main()
