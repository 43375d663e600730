"""The gate at load: judge a model once, remember it, say it.

A judgement is kept in the user's cache (``$XDG_CACHE_HOME/cotenant/builds``). It holds for one file
as it is now, one check text, and these libraries on this processor. Workers that load the same
model at once judge it once.

``python -m cotenant.engines.llm.verdicts MODEL.gguf`` shows it, judges where there is none, and
takes models that are too large to be judged at load.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from math import inf, prod
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from cotenant.domain.config import Exactness
from cotenant.domain.errors import ModelError
from cotenant.engines.llm.checkpoint import Checkpoint, GgufCheckpoint, open_checkpoint
from cotenant.engines.llm.gate import (
    CANDIDATES,
    FLOOR,
    REFERENCE,
    Judgement,
    Reader,
    check_text,
    judge,
    passages,
    quantized,
    unjudged,
)
from cotenant.engines.llm.text import Text
from cotenant.engines.llm.weights import Build
from cotenant.engines.usercache import user_cache


class Bounds(NamedTuple):
    """Up to which a model is judged: ``size`` of its FP32 weights in bytes, and ``seconds``. It
    takes about three times that memory meanwhile. ``floor``: what it is held to."""

    size: int
    seconds: float
    floor: Exactness = FLOOR


AT_LOAD: Final = Bounds(1 << 30, 45.0)
"""A worker that is not ready in two minutes is given up."""
FORMAT: Final = 1
"""Of what is kept; a new way to judge is a new one."""
COMMAND: Final = "cotenant.engines.llm.verdicts"
_LIBRARIES: Final = ("cotenant", "onnxruntime", "numpy", "tokenizers")

log = logging.getLogger("cotenant.models")


def chosen_build(
    checkpoint: Checkpoint, text: Text, units: Sequence[int], floor: Exactness
) -> Build:
    """The build that is to be served. Raises ModelError if ``check.txt`` cannot be read."""
    found = judgement(checkpoint, text, max(units), AT_LOAD._replace(floor=floor))
    log.log(logging.INFO if found.judged else logging.WARNING, "%s", described(found))
    return found.build


def judgement(
    checkpoint: Checkpoint, text: Text, threads: int, bounds: Bounds, fresh: bool = False
) -> Judgement:
    """Of a model: remembered, unless ``fresh``, or made on so many threads within ``bounds``."""
    if not isinstance(checkpoint, GgufCheckpoint) or not quantized(checkpoint):
        return Judgement(Build(), "the file is not quantized: there is nothing to judge")
    until = time.monotonic() + bounds.seconds
    path = checkpoint.file.path
    written = check_text(path.parent)
    kept = _kept(path, written, bounds.floor)
    with _alone(kept):
        known = None if kept is None or fresh else _recall(kept)
        if known is not None:
            return known
        made = _made(checkpoint, text, written, bounds, (threads, until))
        if made.judged:
            _remember(kept, made)
            return made
    again = f"; judge it once with python -m {COMMAND} {path.name}"
    return msgspec.structs.replace(made, why=made.why + again)


def _made(
    checkpoint: Checkpoint, text: Text, written: str, bounds: Bounds, limits: tuple[int, float]
) -> Judgement:
    size = 4 * sum(map(prod, checkpoint.decoder.tensors().values()))
    if size > bounds.size:
        return unjudged(f"its weights take {size} bytes as FP32, more than {bounds.size}")
    script = passages(written, text, checkpoint.decoder.context)
    return judge(Reader(checkpoint, text, script, *limits), bounds.floor)


# --- what is kept -------------------------------------------------------------------------------


def _kept(path: Path, written: str, floor: Exactness) -> Path | None:
    """Where a judgement of this file is kept; None if there is no place."""
    folder = user_cache("builds")
    try:
        found = path.stat()
        name = str(path.resolve())
    except (OSError, RuntimeError):  # gone, or a loop of links
        return None
    if folder is None:
        return None
    holds = (
        FORMAT,
        (name, found.st_size, found.st_mtime_ns, found.st_ino),
        written,
        floor,
        CANDIDATES,
        [_version(library) for library in _LIBRARIES],
        (platform.machine(), _processor()),
    )
    return folder / f"{hashlib.sha256(msgspec.json.encode(holds)).hexdigest()[:32]}.json"


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    """ONNX Runtime picks kernels by it."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


@contextlib.contextmanager
def _alone(kept: Path | None) -> Iterator[None]:
    """No other process judges the same meanwhile."""
    with contextlib.ExitStack() as stack:
        if kept is not None:
            with contextlib.suppress(OSError):
                lock = stack.enter_context(kept.with_suffix(".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _recall(kept: Path) -> Judgement | None:
    try:
        return msgspec.json.decode(kept.read_bytes(), type=Judgement)
    except (OSError, msgspec.DecodeError):
        return None


def _remember(kept: Path | None, made: Judgement) -> None:
    """Not to be able to costs the next load some seconds, and nothing else."""
    if kept is None:
        return
    new = kept.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        new.write_bytes(msgspec.json.encode(made))
        new.replace(kept)


# --- said ---------------------------------------------------------------------------------------


def described(found: Judgement) -> str:
    """A judgement as lines of text."""
    lines = []
    if found.positions:
        lines.append(
            f"{found.positions} positions, some of them in {found.answers} answers; perplexity of "
            f"the file's weights as FP32: {found.perplexity:.3f}"
        )
    for verdict in found.verdicts:
        figures, said = verdict.figures, "no figures"
        if figures is not None:
            said = (
                f"agreement {figures.agreement:.4f}, perplexity x {figures.perplexity:.4f}, "
                f"{figures.answers} of {found.answers} answers the same"
            )
        ruling = f"refused: {verdict.refused}" if verdict.refused else "passes"
        lines.append(f"{named(verdict.build)}: {said}; {ruling}")
    lines.append(f"served: {named(found.build)} ({found.why})")
    return "\n".join(lines)


def named(build: Build) -> str:
    """In words."""
    if build == REFERENCE:
        return "FP32"
    bits = "as stored" if build.bits is None else f"{build.bits} bits"
    return f"{bits}, activations rounded" if build.rounded else bits


def main() -> None:
    """Show the judgement of a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--agreement", type=float, default=FLOOR.agreement)
    parser.add_argument("--perplexity", type=float, default=FLOOR.perplexity)
    parser.add_argument("--fresh", action="store_true", help="judge it again")
    args = parser.parse_args()
    try:
        checkpoint = open_checkpoint(args.model)
        if not isinstance(checkpoint, GgufCheckpoint):
            raise ModelError(f"{args.model.name} is no GGUF file; only those are judged")
        text = Text.from_gguf(checkpoint.file.keys)
        bounds = Bounds(1 << 62, inf, Exactness(args.agreement, args.perplexity))
        found = judgement(checkpoint, text, args.threads, bounds, args.fresh)
    except ModelError as error:
        parser.exit(1, f"{error}\n")
    print(described(found))


if __name__ == "__main__":
    main()
