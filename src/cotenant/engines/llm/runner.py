"""Carries out iterations on the CPU with ONNX Runtime: the graph, its sessions, and the pool.

The pool is a NumPy array that is ours: blocks, each with all layers. Memory that nobody uses is not
there: pages come with the first write, and a block that is released is given back to the system.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Mapping, Sequence
from math import prod
from typing import Final, NamedTuple

import numpy as np
import onnxruntime as ort

from cotenant.domain.errors import ModelError
from cotenant.engines.base import Array, first_line
from cotenant.engines.llm.blocks import Move, Offload, Release, Restore
from cotenant.engines.llm.checkpoint import Checkpoint
from cotenant.engines.llm.decoder import Decoder
from cotenant.engines.llm.families.base import Floats
from cotenant.engines.llm.graph import build_graph, session_of
from cotenant.engines.llm.plan import Work
from cotenant.engines.llm.tiles import row_of
from cotenant.engines.llm.weights import Build

SHORT: Final = 8
"""Blocks; sequences below it are computed with any."""


Images = Mapping[int, Floats]
"""By the key of a tile, its rows."""


class Sizes(NamedTuple):
    """``blocks`` of ``size`` tokens, ``host`` slots beside them; ``context``: the most tokens of a
    sequence."""

    blocks: int
    size: int
    host: int
    context: int


class Computed(NamedTuple):
    """Of one ``Work``: ``logits`` [sampled, vocab] behind its last tokens, and ``hidden``
    [tokens, hidden] of all."""

    logits: Floats
    hidden: Floats


class Memory:
    """Blocks of KV in memory that the system gives and takes back by pages. ``blocks`` is FP32
    [count, *shape]."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self._size = prod(shape) * 4
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, max(1, count * self._size), flags)
        self.blocks = np.frombuffer(self._map, np.float32, count * prod(shape))
        self.blocks = self.blocks.reshape(count, *shape)

    def release(self, block: int) -> None:
        """Give the pages back that no other block is on. What was there is lost."""
        begin = -(-block * self._size // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (block + 1) * self._size // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class Runner:
    """A model that is ready, with a session for each number of threads in ``units``.

    Raises ModelError if the files are damaged or ONNX Runtime refuses the graph."""

    def __init__(
        self, checkpoint: Checkpoint, build: Build, memory: Sizes, units: Sequence[int]
    ) -> None:
        self.decoder: Decoder = checkpoint.decoder
        self.memory = memory
        self._sees = checkpoint.vision is not None
        graph, self._weights = build_graph(checkpoint, build, memory.size, memory.context)
        try:
            self._sessions = {n: session_of(graph, self._weights, n) for n in sorted(units)}
        except Exception as error:  # ONNX Runtime raises a dozen kinds of its own
            raise ModelError(f"ONNX Runtime refuses the model: {first_line(error)}") from error
        shape = self.decoder.block(memory.size)
        self._pool = Memory(memory.blocks, shape)
        self._host = Memory(memory.host, shape)

    def move(self, moves: Sequence[Move]) -> tuple[int, int]:
        """Carry out, one after the other. How long (ns) copies to the host took, and those back."""
        pool, host = self._pool, self._host
        took = {Offload: 0, Restore: 0, Release: 0}
        for move in moves:
            began = time.monotonic_ns()
            if isinstance(move, Offload):
                host.blocks[move.slot] = pool.blocks[move.block]
            elif isinstance(move, Restore):
                pool.blocks[move.block] = host.blocks[move.slot]
            else:
                pool.release(move.block)
            took[type(move)] += time.monotonic_ns() - began
        return took[Offload], took[Restore]

    def compute(
        self, units: int, works: Sequence[Work], images: Images | None = None
    ) -> dict[int, Computed]:
        """By key. Works of the same length are computed together; keys and values of their tokens
        are in the pool afterwards. ``images``: the rows of the tiles that are read. Raises
        ModelError."""
        fitting = [n for n in self._sessions if n <= units]
        session = self._sessions[max(fitting, default=min(self._sessions))]
        found: dict[int, Computed] = {}
        for group in _groups(works, self.memory.size):
            found |= self._compute(session, group, images or {})
        return found

    def _compute(
        self, session: ort.InferenceSession, works: Sequence[Work], images: Images
    ) -> dict[int, Computed]:
        count, pool = len(works[0].tokens), self._pool.blocks
        blocks = max(1, *(self._read(work) for work in works))
        table = np.zeros((len(works), blocks), np.int64)
        for row, work in enumerate(works):
            table[row, : self._read(work)] = work.blocks[: self._read(work)]
        ends = [(row + 1) * count for row in range(len(works))]
        rows = [range(e - w.sampled, e) for e, w in zip(ends, works, strict=True)]
        feed = {
            **self._tokens(works, images),
            "past": np.array([work.start for work in works], np.int64),
            "table": table,
            "rows": np.array([row for each in rows for row in each], np.int64),
            "pool": pool,
        }
        try:
            logits, hidden, new = session.run(["logits", "hidden", "new"], feed)
        except Exception as error:
            raise ModelError(first_line(error)) from error
        found, at = {}, 0
        for row, work in enumerate(works):
            self._write(work, new[:, row])
            part = logits[at : at + work.sampled]
            found[work.key] = Computed(part, hidden[row * count : (row + 1) * count])
            at += work.sampled
        return found

    def _tokens(self, works: Sequence[Work], images: Images) -> dict[str, Array]:
        """Those of all works [works, tokens]; and where, of a model that sees, which rows are."""
        if not self._sees:
            return {"tokens": np.array([work.tokens for work in works], np.int64)}
        flat = [token for work in works for token in work.tokens]
        places = [at for at, token in enumerate(flat) if token < 0]
        rows = np.zeros((len(places), self.decoder.hidden), np.float32)
        for index, at in enumerate(places):
            tile, row = row_of(flat[at])
            rows[index] = images[tile][row]
        tokens = np.array([max(0, token) for token in flat], np.int64)
        return {
            "tokens": tokens.reshape(len(works), -1),
            "places": np.array(places, np.int64).reshape(-1, 1),
            "images": rows,
        }

    def _read(self, work: Work) -> int:
        """How many blocks hold what was computed before."""
        return -(-work.start // self.memory.size)

    def _write(self, work: Work, new: Floats) -> None:
        """Keys and values of its tokens, [layers * 2, kv_heads, tokens, head_dim]."""
        size, at = self.memory.size, 0
        while at < len(work.tokens):
            index, offset = divmod(work.start + at, size)
            count = min(size - offset, len(work.tokens) - at)
            block = self._pool.blocks[work.blocks[index]]
            flat = block.reshape(-1, *block.shape[2:])
            flat[:, :, offset : offset + count] = new[:, :, at : at + count]
            at += count


def _groups(works: Sequence[Work], size: int) -> list[list[Work]]:
    """What is computed in one call: equally many tokens, and about as many before them, for each
    call reads as much for all as for the one that has the most."""
    groups: list[list[Work]] = []
    for work in sorted(works, key=lambda w: (len(w.tokens), -w.start)):
        first = groups[-1][0] if groups else None
        if (
            first is not None
            and len(first.tokens) == len(work.tokens)
            and first.start <= max(2 * work.start, SHORT * size)
        ):
            groups[-1].append(work)
        else:
            groups.append([work])
    return groups
