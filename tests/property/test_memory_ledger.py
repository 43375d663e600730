"""The ledger under random histories: gifts come late, in part or never, holders come and go.

The laws hold after each step, all that is granted is told, and once everybody answers guarantees
are served and nothing moves any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cotenant.domain.units import S
from cotenant.policy.memory.account import (
    REST,
    USES,
    Account,
    Grant,
    Holder,
    Kind,
    Order,
    Report,
    Terms,
)
from cotenant.policy.memory.ledger import Ledger

SIZES = st.integers(0, 130)
PARTS = st.sampled_from([0.0, 0.3, 0.5, 1.0])
DATA = st.data()
TERMS = st.tuples(
    st.sampled_from([Kind.KV, *Kind]),
    st.sampled_from([0, 0, 10, 25, 40]),
    st.sampled_from([0, 5, 60, 100]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.booleans(),
)


class Ledgers(RuleBasedStateMachine):
    """Holders that do as they like within what they were told."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(Account(capacity=100, reserved=5))
        self.now = 100 * S
        self.told: Counter[str] = Counter()
        """What each may have, by what it was told."""

    @property
    def holders(self) -> dict[str, Holder]:
        return self.ledger.account.holders

    def one(self, data: st.DataObject) -> tuple[str, Holder]:
        """One of those that are there."""
        name = data.draw(st.sampled_from(sorted(self.holders)))
        return name, self.holders[name]

    def hear(self, moves: Iterable[Order | Grant]) -> int:
        """Grants and orders are as they should be; how many bytes they are about."""
        size = 0
        for move in moves:
            assert move.bytes > 0
            size += move.bytes
            if isinstance(move, Grant):
                self.told[move.holder] += move.bytes
                continue
            giver, taker = self.holders[move.holder], self.holders[move.to]
            assert giver is not taker
            assert move.target >= giver.sure
            assert giver.terms.cooperative or move.target == 0, "a part of what cannot be parted"
            if taker.has >= taker.sure and giver.terms.kind != Kind.KV:
                assert move.rank < USES[taker.terms.kind], "what is in use is not lent"
        return size

    # --- what happens -------------------------------------------------------------------

    @initialize(holders=st.lists(TERMS, min_size=3, max_size=5))
    def begin(self, holders: list[tuple]) -> None:
        """They fill the memory, more or less."""
        for name, terms in zip("abcde", holders, strict=False):
            self.admit(name, terms)
        for name, holder in self.holders.items():
            answer = self.ledger.ask(name, 45, self.now)
            self.hear([Grant(name, answer.granted)] if answer.granted else [])
            self.ledger.took(name, holder.promised)
            self.told[name] += 0

    @rule(name=st.sampled_from("abcdef"), terms=TERMS)
    def admit(self, name: str, terms: tuple) -> None:
        kind, guaranteed, more, weight, cost, cooperative = terms
        there = name in self.holders
        left = self.ledger.usable - sum(h.terms.guaranteed for h in self.holders.values())
        cooperative = cooperative or kind == Kind.KV
        if not cooperative and more:
            guaranteed, more = 0, guaranteed + more
        limit = guaranteed + more
        found = Terms(name, kind, guaranteed, limit, weight, cost, 0.0, 3 * S, cooperative)
        assert bool(self.ledger.admit(found)) == (there or guaranteed > left)

    @rule(data=DATA, size=SIZES)
    def guarantee(self, data: st.DataObject, size: int) -> None:
        name, holder = self.one(data)
        terms = holder.terms
        others = sum(h.terms.guaranteed for h in self.holders.values()) - terms.guaranteed
        size = min(size, terms.limit, self.ledger.usable - others)
        if terms.cooperative:
            self.hear(self.ledger.guarantee(name, size))
            assert terms.guaranteed == size

    @rule(data=DATA, part=PARTS)
    def shed(self, data: st.DataObject, part: float) -> None:
        """Less than a block was promised: its report gives that back."""
        name, holder = self.one(data)
        unit, holder.terms.unit = holder.terms.unit, holder.promised + 1
        self.told[name] -= holder.promised
        evictable = int(holder.held * part)
        report = Report(holder.held, holder.wanted, evictable, 0, holder.returns_at)
        self.hear(self.ledger.holds(name, report))
        holder.terms.unit = unit

    @rule(data=DATA, size=SIZES)
    def ask(self, data: st.DataObject, size: int) -> None:
        self.want(*self.one(data), size)

    def want(self, name: str, holder: Holder, size: int) -> None:
        answer = self.ledger.ask(name, size, self.now)
        self.hear(answer.orders)
        self.hear([Grant(name, answer.granted)] if answer.granted else [])
        assert holder.promised + answer.waiting >= size or answer.why
        enough = min(holder.held + size, holder.terms.guaranteed)
        assert holder.has + holder.waiting >= enough, "a guarantee is promised at once"

    @rule(data=DATA, parts=st.tuples(PARTS, PARTS), wanted=SIZES, away=st.integers(0, 40))
    def report(
        self, data: st.DataObject, parts: tuple[float, float], wanted: int, away: int
    ) -> None:
        name, holder = self.one(data)
        evictable = int(holder.held * parts[0])
        back = self.now + away * S if away else 0
        report = Report(holder.held, wanted, evictable, int(evictable * parts[1]), back)
        assert not self.ledger.holds(name, report)

    @rule(data=DATA, held=SIZES)
    def report_held(self, data: st.DataObject, held: int) -> None:
        """It took, or gave, and says so by a report."""
        name, holder = self.one(data)
        lost, asked = max(0, holder.held - held), holder.asked
        self.told[name] -= lost
        report = Report(held, holder.wanted, holder.evictable, holder.cold, holder.returns_at)
        self.hear(self.ledger.holds(name, report))
        assert holder.asked <= max(0, asked - lost)

    @rule(data=DATA, more=SIZES)
    def outgrow(self, data: st.DataObject, more: int) -> None:
        """It needs more than it said."""
        name, holder = self.one(data)
        if not holder.terms.cooperative:
            self.ledger.outgrew(name, holder.terms.limit + more)

    @rule(data=DATA, part=PARTS)
    def take(self, data: st.DataObject, part: float) -> None:
        name, holder = self.one(data)
        self.ledger.took(name, int(holder.promised * part))

    @rule(data=DATA, part=PARTS, beyond=st.sampled_from([0, 0, 0, 7]))
    def give(self, data: st.DataObject, part: float, beyond: int) -> None:
        name, holder = self.one(data)
        size = min(holder.has, int(holder.asked * part) + beyond)
        self.told[name] -= size
        self.hear(self.ledger.gave(name, size))

    @rule(data=DATA)
    def yields(self, data: st.DataObject) -> None:
        name, holder = self.one(data)
        held, keeps, has = holder.held, holder.keeps, holder.has
        moves = self.ledger.yields(name)
        self.told[name] -= has - holder.has + sum(g.bytes for g in moves if g.holder == name)
        assert (holder.held, holder.keeps) == (held, keeps)
        assert not (holder.asked and holder.promised)
        self.hear(moves)

    @rule(data=DATA)
    def waive(self, data: st.DataObject) -> None:
        name, holder = self.one(data)
        lost, asked = holder.promised, holder.asked
        self.told[name] -= lost
        self.hear(self.ledger.waive(name))
        assert holder.asked <= max(0, asked - lost)

    @precondition(lambda self: len(self.holders) > 2)
    @rule(data=DATA)
    def leave(self, data: st.DataObject) -> None:
        name, _ = self.one(data)
        del self.told[name]
        self.hear(self.ledger.left(name))

    @rule(passed=st.sampled_from([0, S, REST]))
    def settle(self, passed: int) -> None:
        self.now += passed
        self.hear(self.ledger.settle(self.now))

    # --- what holds ---------------------------------------------------------------------

    @invariant()
    def laws(self) -> None:
        self.ledger.check()
        for name, holder in self.holders.items():
            assert holder.has == self.told[name], f"{name} was not told what it may have"
        lines = self.ledger.view()
        lent = sum(line.lent for line in lines)
        assert lent <= sum(line.borrowed for line in lines)
        assert all(line.lent <= line.guaranteed for line in lines)

    def answer(self) -> None:
        """Everybody does what it was told, once."""
        for name, holder in self.holders.items():
            self.ledger.took(name, holder.promised)
            size = holder.asked
            self.told[name] -= size
            self.hear(self.ledger.gave(name, size))
            self.laws()
        for name, holder in self.holders.items():
            self.ledger.took(name, holder.promised)

    def teardown(self) -> None:
        if not self.holders:
            return
        self.answer()
        assert not any(h.waiting for h in self.holders.values()), "one answer from each is enough"
        self.calm()
        for name, holder in self.holders.items():
            guaranteed = holder.terms.guaranteed
            self.want(name, holder, max(0, guaranteed - holder.held))
            self.answer()
            assert holder.has >= guaranteed, f"{name} lacks what it is guaranteed"
        self.calm()

    def calm(self) -> None:
        """With constant wants all ends where it is fair, and soon."""
        moved = []
        for _ in range(6):
            self.now += REST
            moved.append(self.hear(self.ledger.settle(self.now)))
            self.answer()
        assert not any(moved[3:]), f"it does not end: {moved}"
        for name, holder in self.holders.items():
            if holder.terms.kind == Kind.KV:
                enough = min(holder.wanted, holder.terms.guaranteed)
                assert holder.has >= enough, f"{name} wants what it is guaranteed"


TestLedgers = Ledgers.TestCase
TestLedgers.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
