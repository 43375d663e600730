"""The ledger of one device's memory: who may take how much, and who gives it.

Laws (``check`` states them, ``docs/memory.md`` explains them):

* Guarantees fit into the device together, so each is served in the end.
* What is granted exists: it is free. Who waits waits for memory that is free or was asked for.
* What a holder has and wants within its guarantee it is never asked for. Nobody has more than its
  limit.
* Above guarantees memory is borrowed: what is free, then what means less to its holder than it
  would to the borrower (``account.Rank``), the cheapest byte first.
* A need within a guarantee comes before what is borrowed, and moves at once.
* What idles stays where it is until somebody wants it.

Holders answer in their own time, or never: an order stands until it is carried out. Whoever leaves
gives everything, so to end a holder that does not answer is always enough. A need is told anew
whenever it has changed (``ask``, ``holds``): it replaces what was told before.
"""

from __future__ import annotations

from typing import Final

from cotenant.domain.units import format_bytes
from cotenant.policy.memory.account import (
    GIVES,
    REST,
    STEP,
    UNLOAD_BEYOND,
    USES,
    Account,
    Answer,
    Grant,
    Holder,
    Kind,
    Line,
    Order,
    Rank,
    Report,
    Terms,
)
from cotenant.policy.memory.fairness import divide

Move = Order | Grant


class Ledger:
    """See the module's text. All that it remembers is in ``account``."""

    def __init__(self, account: Account) -> None:
        if not 0 <= account.reserved <= account.capacity:
            raise ValueError(
                f"{account.reserved} bytes are reserved of {account.capacity}: it must be 0 to that"
            )
        self.account: Final = account
        self._holders = account.holders

    # --- how much there is ------------------------------------------------------------------

    @property
    def usable(self) -> int:
        """Bytes for holders."""
        return self.account.capacity - self.account.reserved

    @property
    def free(self) -> int:
        """Bytes that nobody has."""
        return self.usable - sum(h.has for h in self._holders.values())

    @property
    def unpromised(self) -> int:
        """Bytes that are not guaranteed to anybody."""
        return self.usable - sum(h.terms.guaranteed for h in self._holders.values())

    @property
    def coming(self) -> int:
        """Bytes that were asked for and are not given yet."""
        return sum(h.asked for h in self._holders.values())

    def target(self, name: str) -> int:
        """What a holder may have now, less what it is to give: the size of a pool."""
        return self._of(name).keeps

    def reach(self, kind: Kind, now: int) -> int:
        """What holders of a kind could have together, if others gave what means less to them."""
        found = self.usable
        for other in self._holders.values():
            if other.terms.kind != kind:
                found -= other.keeps + other.waiting
                for rank, size in self._layers(other, other.sure, now):
                    found += size if rank < USES[kind] else 0
        return max(0, found)

    # --- who comes and goes -----------------------------------------------------------------

    def admit(self, terms: Terms) -> str:
        """Take a holder in; "", or why it cannot be and what would be right."""
        name, guaranteed, limit = terms.name, terms.guaranteed, terms.limit
        if name in self._holders:
            return f"{name} is there already: it has to leave first"
        if not 0 <= guaranteed <= limit:
            told = f"{format_bytes(guaranteed)}, its limit {format_bytes(limit)}"
            return f"{name} has a guarantee of {told}: it must be 0 up to the limit"
        if terms.weight <= 0:
            return f"{name} has a weight of {terms.weight:g}: it must be above 0"
        if not terms.cooperative and guaranteed not in (0, limit):
            return (
                f"{name} gives all or nothing, so its guarantee must be 0 or its limit"
                f" {format_bytes(limit)}, not {format_bytes(guaranteed)}"
            )
        if not terms.cooperative and terms.kind == Kind.KV:
            return f"{name} is a pool, which has to be cooperative"
        left = self.unpromised
        if guaranteed > left:
            return (
                f"{name} wants {format_bytes(guaranteed)} guaranteed: of"
                f" {format_bytes(self.usable)} others leave {format_bytes(left)}, so at most that"
            )
        self._holders[name] = Holder(terms)
        return ""

    def guarantee(self, name: str, size: int) -> list[Grant]:
        """A holder's guarantee is another one from now on; who may take what. Raises ValueError if
        it does not fit beside the others'."""
        holder = self._of(name)
        most = min(holder.terms.limit, self.unpromised + holder.terms.guaranteed)
        if not 0 <= size <= most:
            raise ValueError(f"{name} cannot be guaranteed {size} bytes: it must be 0 to {most}")
        holder.terms.guaranteed = size
        self._spare(holder)
        return self._grant()

    def outgrew(self, name: str, size: int) -> None:
        """A holder that gives all or nothing turned out to need so many bytes, more than its limit:
        that is its limit now, and its guarantee if it had one, as far as others leave that."""
        holder = self._of(name)
        guaranteed = holder.terms.guaranteed
        if guaranteed:
            size = min(size, guaranteed + self.unpromised)
            holder.terms.guaranteed = max(guaranteed, size)
        holder.terms.limit = max(holder.terms.limit, size)

    def left(self, name: str) -> list[Grant]:
        """A holder is gone, and with it all that it had; who gets that."""
        del self._holders[self._of(name).terms.name]
        for other in self._holders.values():
            other.gave_to.pop(name, None)
        grants = self._grant()
        self._recall()
        return grants

    # --- what holders say -------------------------------------------------------------------

    def holds(self, name: str, report: Report) -> list[Grant]:
        """A holder says what it has and wants; who gets what it gave. It is booked no more than it
        was granted: the rest is ``over``, for whoever enforces its limit."""
        numbers = (report.held, report.wanted, report.evictable, report.cold)
        if min(numbers) < 0:
            raise ValueError(f"{name} reports {numbers}: no number of bytes is below 0")
        holder = self._of(name)
        holder.wanted, holder.returns_at = report.wanted, report.returns_at
        held = min(report.held, holder.has)
        holder.over = report.held - held
        if held >= holder.held:
            holder.promised -= held - holder.held
        else:
            holder.asked -= min(holder.asked, holder.held - held)
        holder.held = held
        if holder.promised < holder.terms.unit:  # of that it can take nothing
            holder.asked -= min(holder.asked, holder.promised)
            holder.promised = 0
        holder.evictable = min(report.evictable, held)
        holder.cold = min(report.cold, holder.evictable)
        self._spare(holder)
        return self._grant()

    def took(self, name: str, size: int) -> None:
        """A holder has taken so much of what it was granted."""
        holder = self._of(name)
        if not 0 <= size <= holder.promised:
            raise ValueError(f"{name} took {size} bytes of {holder.promised} granted: ask first")
        holder.promised -= size
        holder.held += size

    def gave(self, name: str, size: int) -> list[Grant]:
        """A holder has given so much, asked or not: what is coldest, or what it was granted and
        does not take. Who gets that."""
        holder = self._of(name)
        if not 0 <= size <= holder.has:
            raise ValueError(f"{name} gave {size} bytes, it has {holder.has}: at most that")
        held = min(size, holder.held)
        holder.held -= held
        holder.promised -= size - held
        holder.asked -= min(holder.asked, size)
        holder.evictable = max(0, holder.evictable - held)
        holder.cold = max(0, holder.cold - held)
        return self._grant()

    def yields(self, name: str) -> list[Grant]:
        """A holder gives of what it is to give all that it was granted and has not taken."""
        holder = self._of(name)
        size = min(holder.asked, holder.promised)
        holder.promised -= size
        holder.asked -= size
        return self._grant()

    def waive(self, name: str) -> list[Grant]:
        """A holder wants none of what it waits for, or was granted and has not taken."""
        holder = self._of(name)
        holder.waiting = 0
        holder.asked -= min(holder.asked, holder.promised)
        holder.promised = 0
        grants = self._grant()
        self._recall()
        return grants

    # --- who wants more ---------------------------------------------------------------------

    def ask(self, name: str, size: int, now: int) -> Answer:
        """A holder wants ``size`` bytes beyond what it holds (what it was granted and has not taken
        counts). This replaces what it waited for."""
        if size < 0:
            raise ValueError(f"{name} asks for {size} bytes: it must be 0 or more")
        holder = self._of(name)
        promised = holder.promised
        want = min(size, holder.terms.limit - holder.held)
        holder.wanted = max(holder.wanted, holder.held + want)
        self._spare(holder)
        self._wait(holder, want - promised)
        self._grant()
        orders = self._cover(holder, now, {})
        why = ""
        if want < size:
            limit = format_bytes(holder.terms.limit)
            why = f"it has {format_bytes(holder.has)}, its limit is {limit}"
        elif holder.promised + holder.waiting < size:
            missing = format_bytes(size - holder.promised - holder.waiting)
            why = f"{missing} are above its guarantee and nobody can spare them: ask again later"
        return Answer(holder.promised - promised, holder.waiting, orders, why)

    def settle(self, now: int) -> list[Move]:
        """Let pools grow to their fair shares of what they may have together, at most to what they
        want. To be called when needs were reported, once a second or so."""
        before = {name: h.promised for name, h in self._holders.items()}
        shares = self._shares(now)
        orders: list[Order] = []
        for name, share in shares.items():
            pool = self._holders[name]
            gap = max(0, share - pool.has)
            owed = min(gap, max(0, pool.sure - pool.keeps))
            sure = max(self.free, owed + pool.waiting - pool.owed)
            if (gap - sure) * STEP < self.usable:
                gap = min(gap, sure)
            self._wait(pool, gap)
            self._grant()
            orders += self._cover(pool, now, shares)
        grants = [Grant(n, h.promised - before[n]) for n, h in self._holders.items()]
        return [*orders, *(g for g in grants if g.bytes)]

    def _spare(self, holder: Holder) -> None:
        """What a holder wants now within its guarantee it is not to give, whatever was ordered."""
        holder.asked -= min(holder.asked, max(0, holder.sure - holder.keeps))
        self._trim()

    def _recall(self) -> None:
        """Orders end whose memory nobody waits for any more."""
        needless = self.coming - sum(h.waiting for h in self._holders.values())
        for holder in self._holders.values():
            size = min(holder.asked, max(0, needless))
            if size and (holder.terms.cooperative or size == holder.asked):
                holder.asked -= size
                needless -= size

    def _wait(self, holder: Holder, size: int) -> None:
        if not holder.waiting:
            self.account.turns += 1
            holder.turn = self.account.turns
        holder.waiting = max(0, size)

    def _grant(self) -> list[Grant]:
        """Hand out what is free to those that wait: guarantees first, then in order."""
        free, grants = self.free, []
        queue = self._queue()
        for holder, most in [(h, h.owed) for h in queue] + [(h, h.waiting) for h in queue]:
            size = min(free, most, holder.waiting)
            if size > 0:
                free -= size
                holder.promised += size
                holder.waiting -= size
                grants.append(Grant(holder.terms.name, size))
        return grants

    def _cover(self, taker: Holder, now: int, shares: dict[str, int]) -> list[Order]:
        """Ask others for what a holder waits for: first what means less to them, then what its
        guarantee lacks. What is borrowed and does not come is not waited for any more, by it or by
        those whom its guarantee took it from. Who is to give gets only what is free."""
        if taker.asked:
            taker.waiting = 0
            return []
        queue = self._queue()
        short = sum(h.waiting for h in queue) - self.free - self.coming
        orders = self._collect(taker, min(short, taker.waiting), now, shares)
        short = sum(h.owed for h in queue) - self.free - self.coming
        orders += self._collect(taker, min(short, taker.owed), now, None)
        self._trim()
        return orders

    def _trim(self) -> None:
        """Nobody waits for more than comes: guarantees first, then in order."""
        queue, left = self._queue(), self.free + self.coming
        kept = {}
        for holder in queue:
            kept[holder.terms.name] = min(holder.owed, left)
            left -= kept[holder.terms.name]
        for holder in queue:
            borrows = min(holder.waiting - holder.owed, left)
            left -= borrows
            holder.waiting = kept[holder.terms.name] + borrows

    def gives_in(self) -> int:
        """Ns until what was asked for is given, at what that costs each holder."""
        giving = [h.terms.give_cost * h.asked for h in self._holders.values() if h.asked]
        return round(max(giving, default=0))

    # --- who gives --------------------------------------------------------------------------

    def _collect(
        self, taker: Holder, need: int, now: int, shares: dict[str, int] | None
    ) -> list[Order]:
        """Ask others for ``need`` bytes, or what there is. ``shares``: to borrow, with the fair
        shares of pools if they are to give what is beyond; None: for a guarantee."""
        orders: list[Order] = []
        if need <= 0:
            return orders
        offers: list[tuple[Rank, float, str, int]] = []
        name = taker.terms.name
        for giver in self._holders.values():
            if giver is taker:
                continue
            least = giver.sure
            beyond = Rank.IN_USE + 1
            if shares is not None:
                last = taker.gave_to.get(giver.terms.name)
                if last is not None and now - last < REST:
                    continue
                if giver.terms.name in shares:
                    least = max(least, shares[giver.terms.name])
                else:
                    beyond = int(USES[taker.terms.kind])
            for rank, size in self._layers(giver, least, now):
                if rank < beyond:
                    price = giver.price(min(size, need))
                    offers.append((rank, price, giver.terms.name, size))
        for rank, _, other, size in sorted(offers):
            giver = self._holders[other]
            part = min(need, size) if giver.terms.cooperative else size
            giver.asked += part
            giver.waiting = 0
            giver.gave_to[name] = now
            orders.append(Order(other, part, giver.keeps, rank, name))
            need -= part
            if need <= 0:
                break
        return orders

    def _layers(self, giver: Holder, least: int, now: int) -> list[tuple[Rank, int]]:
        """What a holder could still give and keep ``least``, by what it means to it."""
        spare = giver.keeps - least
        if spare <= 0:
            return []
        cold_rank, rank = GIVES[giver.terms.kind]
        if not giver.terms.cooperative:
            return [(rank if self._may_end(giver, now) else Rank.IN_USE, spare)]
        untaken = 0
        if giver.terms.kind == Kind.JOB:  # it takes what it needs unasked
            untaken = min(spare, max(0, giver.promised - giver.asked))
            spare -= untaken
        cold = min(spare, max(0, giver.cold - giver.asked))
        evictable = min(spare, max(0, giver.evictable - giver.asked))
        layers = [
            (Rank.RESULTS, untaken),
            (cold_rank, cold),
            (rank, evictable - cold),
            (Rank.IN_USE, spare - evictable),
        ]
        return [layer for layer in layers if layer[1] > 0]

    def _may_end(self, giver: Holder, now: int) -> bool:
        """Whether one that gives all or nothing can go without work in progress."""
        if giver.promised or giver.evictable < giver.held:
            return False
        if giver.terms.kind != Kind.INSTANCE or not giver.returns_at:
            return True
        return giver.returns_at - now > UNLOAD_BEYOND * giver.terms.load_ns

    def _shares(self, now: int) -> dict[str, int]:
        """Bytes for each pool: what it has or wants within its guarantee, and a fair part of what
        pools may have beyond."""
        pools = {n: h for n, h in self._holders.items() if h.terms.kind == Kind.KV}
        least, needs = {}, {}
        left = self.reach(Kind.KV, now)
        for name, pool in pools.items():
            terms = pool.terms
            least[name] = min(terms.guaranteed, max(pool.wanted, pool.keeps))
            needs[name] = min(pool.wanted, terms.limit) - least[name]
            left -= least[name]
        weights = {name: pool.terms.weight for name, pool in pools.items()}
        more = divide(max(0, left), needs, weights)
        return {name: size + more[name] for name, size in least.items()}

    def _queue(self) -> list[Holder]:
        """Those that wait, in order."""
        waiting = [h for h in self._holders.values() if h.waiting]
        return sorted(waiting, key=_turn)

    def _of(self, name: str) -> Holder:
        holder = self._holders.get(name)
        if holder is None:
            raise KeyError(f"{name} holds nothing here: admit it first")
        return holder

    # --- to be looked at --------------------------------------------------------------------

    def view(self) -> list[Line]:
        """One line for each holder."""
        holders = self._holders.values()
        above = {h.terms.name: max(0, h.has - h.terms.guaranteed) for h in holders}
        unused = {h.terms.name: max(0, h.terms.guaranteed - h.has) for h in holders}
        nobodys = self.usable - sum(h.terms.guaranteed for h in holders)
        lent = max(0, sum(above.values()) - nobodys)
        total = max(1, sum(unused.values()))
        return [
            Line(
                name=name,
                kind=h.terms.kind.name.lower(),
                held=h.held,
                promised=h.promised,
                guaranteed=h.terms.guaranteed,
                limit=h.terms.limit,
                wanted=h.wanted,
                target=h.keeps,
                lent=lent * unused[name] // total,
                borrowed=above[name],
                asked=h.asked,
                waiting=h.waiting,
                over=h.over,
            )
            for name, h in self._holders.items()
        ]

    def check(self) -> None:
        """Raise AssertionError naming the law that is broken."""
        holders = self._holders.values()
        promised = sum(h.terms.guaranteed for h in holders)
        assert promised <= self.usable, f"{promised} bytes are guaranteed of {self.usable}"
        assert self.free >= 0, f"{-self.free} bytes are granted twice"
        waiting = sum(h.waiting for h in holders)
        assert waiting <= self.free + self.coming, f"{waiting} bytes are waited for, less come"
        assert not waiting or not self.free, f"{self.free} bytes are free while somebody waits"
        for h in holders:
            terms, name = h.terms, h.terms.name
            numbers = (h.held, h.wanted, h.cold, h.promised, h.waiting, h.asked, h.over)
            assert min(numbers) >= 0, f"{name}: negative among {numbers}"
            assert h.cold <= h.evictable <= h.held, f"{name}: can give more than it holds"
            assert h.has + h.waiting <= terms.limit, f"{name}: above its limit"
            assert not h.asked or h.keeps >= h.sure, f"{name}: asked within its guarantee"
            assert not h.asked or not h.waiting, f"{name}: waits while it is to give"


def _turn(holder: Holder) -> int:
    return holder.turn
