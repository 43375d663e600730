"""KV memory in blocks: who has which, what is shared, what was put aside on the host.

A block holds the keys and values of ``size`` tokens in all layers. Its laws:

1. A block is free, given back (``resize``), a sequence's own, or that of a node of the tree.
2. A node stands for a full block: its tokens, behind those of its parent. Sequences that begin
   alike hold the same nodes. A block that is not full is one sequence's own, so none is ever copied
   because two write to it.
3. Who holds a node holds its parents. So what nobody holds can go leaf by leaf, least recently used
   first, and what a sequence left *wanting to come back* goes last.
4. What goes is copied to the host if that is worth it and there is room, else dropped. That loses
   time, never an answer: tokens whose block is gone are computed again.
5. Copies are orders (``Move``), to be carried out one after the other before the next computation.
   A block or slot may be another's as soon as the order stands, for its orders stand behind it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Final, NamedTuple


class Offload(NamedTuple):
    """Copy a block to a slot on the host."""

    block: int
    slot: int


class Restore(NamedTuple):
    """Copy a slot on the host to a block."""

    slot: int
    block: int


class Release(NamedTuple):
    """Give the memory of a block back to the system; it is written before it is read again."""

    block: int


Move = Offload | Restore | Release


class Node:
    """A full block; see the module's text. ``block`` and ``slot`` are -1 where it has none."""

    def __init__(self, tokens: tuple[int, ...], parent: Node | None) -> None:
        self.tokens = tokens
        self.parent = parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.block = -1
        self.slot = -1
        self.refs = 0
        """Tables that hold it."""
        self.wanted = 0
        """Claims on it: sequences that left it and come back."""
        self.used = 0
        self.resident = 0
        """Children that have a block."""


class _Root(Node):
    """What sequences of one salt begin with; no block. ``refs`` counts their tables."""

    def __init__(self, salt: str) -> None:
        super().__init__((), None)
        self.salt = salt


class Table:
    """The blocks of one sequence: shared ones (as many as it has ``nodes``), then its own."""

    def __init__(self, root: _Root) -> None:
        self.root = root
        self.nodes: list[Node] = []
        self.ids: list[int] = []

    @property
    def blocks(self) -> tuple[int, ...]:
        """Ids, in the order of the tokens."""
        return tuple(self.ids)

    @property
    def own(self) -> list[int]:
        """Ids of those that nobody else may hold."""
        return self.ids[len(self.nodes) :]

    def __len__(self) -> int:
        return len(self.ids)


Claim = tuple[Node, ...]
"""What a sequence left and wants to find again."""
Entry = tuple[bool, int, int, Node]
"""Of a heap: wanted or not, last used, a number that is given once."""
GAIN: Final = 1 / 64


class BlockPool:
    """See the module's text. ``blocks``: the most that there can be; ``host``: slots there."""

    def __init__(self, blocks: int, size: int, host: int = 0) -> None:
        if blocks < 1 or size < 1 or host < 0:
            raise ValueError(f"blocks {blocks} and size {size} are 1 or more, host {host} is not")
        self.size = size
        self.target = blocks
        """How many blocks there should be (``resize``)."""
        self.spill = True
        """Whether a block that nobody is known to want is worth a copy on the host."""
        self.chance = 0.5
        """How many of the copies that nobody was known to want came back; the newer count more."""
        self.most = blocks
        """How many blocks there can ever be."""
        self._host = host
        self._free = list(range(blocks - 1, -1, -1))
        self._out: list[int] = []
        self._slots = list(range(host - 1, -1, -1))
        self._roots: dict[str, _Root] = {}
        self._tables: set[Table] = set()
        self._cached = 0
        self._moves: list[Move] = []
        self._clock = count(1)
        self._idle: list[Entry] = []
        """Heap of leaves that nobody holds; entries that are true no more are passed over."""
        self._aside: list[Entry] = []
        """The same of slots."""

    # --- how much ---------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Blocks that there are."""
        return self.most - len(self._out)

    @property
    def available(self) -> int:
        """Blocks that can be had now: free, or held by nobody."""
        return max(0, len(self._free) + self._cached - self.excess)

    @property
    def excess(self) -> int:
        """Blocks that are still to be given back."""
        return max(0, self.capacity - self.target)

    def needed(self, tokens: int) -> int:
        """Blocks that so many tokens fill."""
        return -(-tokens // self.size)

    def resize(self, target: int) -> None:
        """Have so many blocks. What is held goes as soon as it is let go of."""
        if not 0 <= target <= self.most:
            raise ValueError(f"{target} blocks: there can be 0 to {self.most}")
        self.target = target
        while self._out and self.capacity < target:
            self._free.append(self._out.pop())
        while self.excess and (self._free or self._cached):
            self._give_back(self._free.pop() if self._free else self._evict())

    def moves(self) -> tuple[Move, ...]:
        """The orders since last time, to be carried out in this order."""
        moves, self._moves = tuple(self._moves), []
        return moves

    # --- tables -----------------------------------------------------------------------------

    def held(self, tokens: Sequence[int], salt: str = "") -> int:
        """How many blocks of these tokens others hold: to hold them too takes no room."""
        return sum(node.refs > 0 for node in self._find(tokens, salt))

    def open(self, tokens: Sequence[int], salt: str = "") -> Table:
        """A table that begins with what is known of these tokens, all but the last at most: what
        follows a token is known by computing it. Those with another ``salt`` share nothing."""
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = _Root(salt)
        root.refs += 1
        table = Table(root)
        self._tables.add(table)
        chain = list(self._find(tokens, salt))
        resident = [node for node in chain if node.block >= 0]
        for node in resident:
            self._hold(table, node)
        away = tuple(chain[len(resident) :])
        for node in away:  # or they might be dropped to make room for each other
            node.wanted += 1
        for node in away:
            if not self.available:
                break
            block = self._take()
            self._moves.append(Restore(node.slot, block))
            if node.wanted == 1:  # by nobody but this
                self.chance += (1 - self.chance) * GAIN
            self._settle(table, node, block)
        self.drop(away)
        return table

    def extend(self, table: Table, tokens: int) -> bool:
        """Have room for so many tokens; False if there is none, and then nothing has changed."""
        more = self.needed(tokens) - len(table)
        if more > self.available:
            return False
        table.ids.extend(self._take() for _ in range(more))
        return True

    def publish(self, table: Table, tokens: Sequence[int], computed: int) -> None:
        """Let others find the full blocks of the first ``computed`` tokens. Where another sequence
        was faster its block is taken, and the own one is free."""
        size = self.size
        while (len(table.nodes) + 1) * size <= computed:
            at = len(table.nodes) * size
            key = tuple(tokens[at : at + size])
            parent = table.nodes[-1] if table.nodes else table.root
            block = table.ids[len(table.nodes)]
            node = parent.children.get(key)
            if node is not None and node.block >= 0:
                self._put_back(block)
                self._hold(table, node)
                continue
            if node is None:
                node = parent.children[key] = Node(key, parent)
            self._settle(table, node, block)

    def close(self, table: Table, wanted: bool = False) -> Claim:
        """Let go of everything. ``wanted``: its sequence comes back, and keeps a claim until it
        ``drop``s it."""
        self._tables.discard(table)
        table.root.refs -= 1
        now, claim = next(self._clock), tuple(table.nodes) if wanted else ()
        for node in reversed(table.nodes):
            node.refs -= 1
            node.used = now
            node.wanted += wanted
            if not node.refs:
                self._cached += 1
                self._offer(node)
        for block in table.own:
            self._put_back(block)
        table.nodes, table.ids = [], []
        self._forget_root(table.root)
        while self.excess and self._cached:
            self._give_back(self._evict())
        return claim

    def drop(self, claim: Claim) -> None:
        """The sequence has come back, or never will."""
        for node in claim:
            node.wanted -= 1
            self._offer(node)
            if node.slot >= 0:
                self._push(self._aside, node)

    # --- nodes ------------------------------------------------------------------------------

    def _find(self, tokens: Sequence[int], salt: str) -> Iterator[Node]:
        node: Node | None = self._roots.get(salt)
        for at in range(0, (len(tokens) - 1) // self.size * self.size, self.size):
            node = node and node.children.get(tuple(tokens[at : at + self.size]))
            if node is None:
                return
            yield node

    def _hold(self, table: Table, node: Node) -> None:
        if not node.refs:
            self._cached -= 1
        node.refs += 1
        node.used = next(self._clock)
        self._note(table, node)

    def _settle(self, table: Table, node: Node, block: int) -> None:
        """A node that had no block gets one, and is held."""
        assert node.parent is not None
        node.parent.resident += 1
        node.block = block
        node.refs = 1
        node.used = next(self._clock)
        self._note(table, node)

    @staticmethod
    def _note(table: Table, node: Node) -> None:
        """It is the next shared one of a table, in the place of an own one if there is one."""
        at = len(table.nodes)
        table.nodes.append(node)
        table.ids[at : at + 1] = [node.block]

    def _offer(self, node: Node) -> None:
        """It may be a leaf now that nobody holds."""
        if node.block >= 0 and not node.refs and not node.resident:
            self._push(self._idle, node)

    def _push(self, heap: list[Entry], node: Node) -> None:
        heapq.heappush(heap, (node.wanted > 0, node.used, next(self._clock), node))
        if len(heap) > 2 * (self.most + self._host) + 64:
            self._renew()

    def _renew(self) -> None:
        """Drop the entries of both heaps that are true no more."""
        nodes = list(self._nodes())
        leaves = [n for n in nodes if n.block >= 0 and not n.refs and not n.resident]
        for heap, found in (
            (self._idle, leaves),
            (self._aside, [n for n in nodes if n.slot >= 0]),
        ):
            heap[:] = [(n.wanted > 0, n.used, next(self._clock), n) for n in found]
            heapq.heapify(heap)

    def _forget_root(self, root: _Root) -> None:
        if not root.refs and not root.children:
            self._roots.pop(root.salt, None)

    # --- blocks and slots -------------------------------------------------------------------

    def _take(self) -> int:
        return self._free.pop() if self._free else self._evict()

    def _put_back(self, block: int) -> None:
        if self.excess:
            self._give_back(block)
        else:
            self._free.append(block)

    def _give_back(self, block: int) -> None:
        self._out.append(block)
        self._moves.append(Release(block))

    def _evict(self) -> int:
        """The block of the leaf that is missed least."""
        while True:
            wanted, used, _, node = heapq.heappop(self._idle)
            current = (node.wanted > 0, node.used) == (wanted, used)
            if current and node.block >= 0 and not node.refs and not node.resident:
                break
        block, node.block = node.block, -1
        self._cached -= 1
        parent = node.parent
        assert parent is not None
        parent.resident -= 1
        if node.slot < 0 and (self.spill or node.wanted):
            node.slot = self._take_slot()
            if node.slot >= 0:
                self._moves.append(Offload(block, node.slot))
                self._push(self._aside, node)
        if node.slot < 0:
            self._forget(node)
        self._offer(parent)
        return block

    def _take_slot(self) -> int:
        """A slot, if need be that of a copy that nobody wants; -1 if there is none."""
        while not self._slots and self._aside:
            wanted, used, _, node = self._aside[0]
            if node.slot < 0 or (node.wanted > 0, node.used) != (wanted, used):
                heapq.heappop(self._aside)
                if node.slot >= 0:
                    self._push(self._aside, node)
                continue
            if wanted:
                return -1
            heapq.heappop(self._aside)
            self._free_slot(node)
            if node.block < 0:
                self.chance -= self.chance * GAIN
                self._forget(node)
        return self._slots.pop() if self._slots else -1

    def _free_slot(self, node: Node) -> None:
        self._slots.append(node.slot)
        node.slot = -1

    def _forget(self, node: Node) -> None:
        """A node is neither here nor there: what hangs on it cannot be reached any more."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens]
        if isinstance(parent, _Root):
            self._forget_root(parent)
        gone = list(node.children.values())
        while gone:
            child = gone.pop()
            gone.extend(child.children.values())
            if child.slot >= 0:
                self._free_slot(child)
        node.children = {}

    # --- for tests --------------------------------------------------------------------------

    def check(self, claims: Iterable[Claim] | None = None) -> None:
        """Raise AssertionError naming the law that is broken. ``claims``: all that there are."""
        nodes = list(self._nodes())
        claimed = Counter(id(node) for claim in claims or () for node in claim)
        blocks = [*self._free, *self._out]
        blocks += [block for table in self._tables for block in table.own]
        blocks += [node.block for node in nodes if node.block >= 0]
        assert sorted(blocks) == list(range(self.most)), "each block is in one place"
        slots = [*self._slots, *(node.slot for node in nodes if node.slot >= 0)]
        assert sorted(slots) == list(range(self._host)), "each slot is in one place"
        for node in nodes:
            held = sum(node in table.nodes for table in self._tables)
            assert node.refs == held, "a node is held by those tables that have it"
            assert node.block >= 0 or node.slot >= 0, "a node is somewhere"
            assert node.block >= 0 or not node.refs, "what is held is here"
            assert len(node.tokens) == self.size, "a node is a full block"
            if claims is not None:
                assert node.wanted == claimed[id(node)], "a node is wanted by those with a claim"
            here = sum(child.block >= 0 for child in node.children.values())
            assert node.resident == here, "children that are here are counted"
            parent = node.parent
            assert parent is not None
            if node.block >= 0 and parent.parent is not None:
                assert parent.block >= 0, "what is here has its parents here"
        idle = sum(node.block >= 0 and not node.refs for node in nodes)
        assert idle == self._cached, "what nobody holds is counted"
        assert self.excess == 0 or not (self._free or self._cached), "what can be given back is"

    def _nodes(self) -> Iterator[Node]:
        found = [node for root in self._roots.values() for node in root.children.values()]
        while found:
            node = found.pop()
            found.extend(node.children.values())
            yield node
