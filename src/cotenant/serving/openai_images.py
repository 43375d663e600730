"""Images in the messages of OpenAI's API: data URLs to tiles.

Nothing is fetched: a URL of another kind is refused. Which bytes are an image, and how large it may
be, the model's language says (``engines.llm.pictures``).
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Sequence
from typing import Final, NamedTuple

from cotenant.domain.errors import InvalidRequest
from cotenant.domain.port import Language, Picture, TensorIn
from cotenant.engines.llm.contract import TILES
from cotenant.serving.openai_ask import Part, Unfit
from cotenant.serving.tensors import shown

MOST_IMAGES: Final = 16
"""Of a request."""


class Image(NamedTuple):
    """``where`` in a request, and what it is."""

    where: str
    picture: Picture


def opened(part: Part, where: str, language: Language) -> Image:
    """The image of a part of a content, its size known. Raises Unfit."""
    if part.image_url is None:
        raise Unfit(f"{where} is missing; give an object with a url", where)
    try:
        return Image(where, language.picture(_data(part.image_url.url, where)))
    except InvalidRequest as exc:
        raise exc if isinstance(exc, Unfit) else Unfit(f"{where}: {exc}", where) from None


def _data(url: str, where: str) -> bytes:
    """Of a data URL (RFC 2397) in base64. Raises Unfit."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        raise Unfit(
            f"{where}.url begins with {shown(url[:16])}; this server fetches nothing: give the"
            " image itself, as data:image/jpeg;base64,... or data:image/png;base64,...",
            where,
        )
    kind, comma, encoded = rest.partition(",")
    if not comma or not kind.lower().endswith(";base64"):
        raise Unfit(f"{where}.url: a data URL is data:TYPE;base64, and the image in base64", where)
    try:
        return b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise Unfit(f"{where}.url is not valid base64: {exc}", where) from None


def tiles_of(images: Sequence[Image]) -> TensorIn | None:
    """All of a prompt as the model's input, decoded; None without any. Raises Unfit."""
    if not images:
        return None
    parts = []
    for where, picture in images:
        try:
            parts.append(picture.pixels())
        except InvalidRequest as exc:
            raise Unfit(f"{where}: {exc}", where) from None
    data = b"".join(parts)
    count = sum(image.picture.shape[0] for image in images)
    return TensorIn(TILES, "UINT8", (count, *images[0].picture.shape[1:]), len(data), data)
