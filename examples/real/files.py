"""What kinds of files these are, by their content: ``python files.py PATH ...``

The model (magika) sees the first and the last 1,024 bytes. Sizes, names of kinds and how sure it
has to be stand in the package's ``config.min.json``, which is read here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from asking import Array, Server, found


class Rules(NamedTuple):
    """Of the package's configuration what is needed here; sizes in bytes."""

    first: int
    last: int
    least: int
    block: int
    filler: int
    kinds: list[str]
    thresholds: dict[str, float]
    threshold: float
    renamed: dict[str, str]
    texts: frozenset[str]


def rules() -> Rules:
    """Read the package's files; raises SystemExit if it is not installed."""
    said = json.loads(found("magika", "config.min.json").read_text())
    known: dict[str, Any] = json.loads(found("magika", "content_types_kb.min.json").read_text())
    return Rules(
        said["beg_size"],
        said["end_size"],
        said["min_file_size_for_dl"],
        said["block_size"],
        said["padding_token"],
        said["target_labels_space"],
        said["thresholds"],
        said["medium_confidence_threshold"],
        said["overwrite_map"],
        frozenset(name for name, about in known.items() if about["is_text"]),
    )


def tokens(content: bytes, how: Rules) -> Array | None:
    """What the model takes, INT32 [1, first + last]; None where there are too few bytes to tell."""
    if len(content) < how.least:
        return None
    first = content[: how.block].lstrip()[: how.first]
    last = content[-how.block :].rstrip()[-how.last :]
    if len(first) < how.least:
        return None
    made = np.full((1, how.first + how.last), how.filler, np.int32)
    made[0, : len(first)] = np.frombuffer(first, np.uint8)
    made[0, made.shape[1] - len(last) :] = np.frombuffer(last, np.uint8)
    return made


def kind(scores: Array, how: Rules) -> tuple[str, float]:
    """The kind that scores (FP32 [kinds]) say, and how sure the model is; "txt" or "unknown" where
    that is too little."""
    best = int(scores.argmax())
    name, score = how.kinds[best], float(scores[best])
    said = how.renamed.get(name, name)
    if score < how.thresholds.get(name, how.threshold):
        said = "txt" if said in how.texts else "unknown"
    return said, score


def few(content: bytes) -> str:
    """What too few bytes are, without a model."""
    if not content:
        return "empty"
    try:
        content.decode()
    except UnicodeDecodeError:
        return "unknown"
    return "txt"


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--server", default="127.0.0.1:8000", metavar="HOST:PORT")
    args = parser.parse_args()
    how, server = rules(), Server(args.server)
    for path in args.paths:
        content = path.read_bytes()
        made = tokens(content, how)
        if made is None:
            print(f"{path}: {few(content)}")
            continue
        said, score = kind(server.ask("file-types", bytes=made)["target_label"][0], how)
        print(f"{path}: {said} ({score:.2f})")
    server.close()


if __name__ == "__main__":
    main()
