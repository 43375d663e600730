"""The ledger of a device's memory: each law, each refusal."""

from __future__ import annotations

import msgspec
import pytest

from cotenant.domain.units import S
from cotenant.policy.memory.account import (
    REST,
    UNLOAD_BEYOND,
    Account,
    Grant,
    Kind,
    Order,
    Rank,
    Report,
    Terms,
)
from cotenant.policy.memory.fairness import divide
from cotenant.policy.memory.ledger import Ledger
from cotenant.telemetry import records  # noqa: F401 - it has the types of a checkpoint known

NOW = 100 * S


class Box:
    """A ledger of 1,000 bytes, and holders that are easily told."""

    def __init__(self, capacity: int = 1000, reserved: int = 0) -> None:
        self.ledger = Ledger(Account(capacity, reserved))

    def admit(self, name: str, kind: Kind, guaranteed: int = 0, **more: object) -> str:
        limit = more.pop("limit", self.ledger.account.capacity)
        return self.ledger.admit(Terms(name, kind, guaranteed, limit, **more))  # type: ignore[arg-type]

    def holder(
        self, name: str, kind: Kind, held: int = 0, guaranteed: int = 0, **more: int
    ) -> None:
        """One that holds so much, and reports ``evictable``, ``cold`` and so on."""
        report = {
            k: more.pop(k) for k in ("evictable", "cold", "wanted", "returns_at") if k in more
        }
        assert self.admit(name, kind, guaranteed, **more) == ""
        assert self.ledger.ask(name, held, 0).granted == held, "arranged in free memory"
        self.ledger.took(name, held)
        self.report(name, **report)

    def report(self, name: str, **more: int) -> list[Grant]:
        held = more.pop("held", self.ledger.account.holders[name].held)
        wanted = more.pop("wanted", held)
        grants = self.ledger.holds(name, Report(held, wanted, **more))
        self.ledger.check()
        return grants

    def ask(self, name: str, size: int, now: int = NOW) -> tuple[int, int, list[tuple[str, int]]]:
        answer = self.ledger.ask(name, size, now)
        self.ledger.check()
        return answer.granted, answer.waiting, told(answer.orders)

    def settle(self, now: int = NOW) -> list[tuple[str, int]]:
        moves = self.ledger.settle(now)
        self.ledger.check()
        return told(moves)

    def gave(self, name: str, size: int) -> list[tuple[str, int]]:
        grants = self.ledger.gave(name, size)
        self.ledger.check()
        return told(grants)

    def has(self, name: str) -> int:
        return self.ledger.account.holders[name].has


def told(moves: list[Order] | list[Grant] | list[Order | Grant]) -> list[tuple[str, int]]:
    """Orders below zero."""
    return [(m.holder, -m.bytes if isinstance(m, Order) else m.bytes) for m in moves]


# --- admission ------------------------------------------------------------------------------


def test_guarantees_fit_together_into_what_the_node_leaves() -> None:
    box = Box(1000, reserved=100)
    assert box.admit("a", Kind.KV, 500) == ""
    why = box.admit("b", Kind.JOB, 401)
    assert all(part in why for part in ("401B", "900B", "400B"))
    assert box.admit("b", Kind.JOB, 400) == ""
    assert box.admit("c", Kind.JOB, 0) == "", "without a guarantee there is always room"
    box.ledger.left("a")
    assert box.admit("d", Kind.JOB, 500) == ""


@pytest.mark.parametrize(
    ("terms", "right"),
    [
        (Terms("a", Kind.JOB, 0, 10), "has to leave first"),
        (Terms("b", Kind.JOB, 20, 10), "up to the limit"),
        (Terms("b", Kind.JOB, -1, 10), "up to the limit"),
        (Terms("b", Kind.JOB, 0, 10, weight=0.0), "above 0"),
        (Terms("b", Kind.INSTANCE, 5, 10, cooperative=False), "0 or its limit"),
        (Terms("b", Kind.KV, 0, 10, cooperative=False), "cooperative"),
    ],
)
def test_terms_that_make_no_sense_are_refused(terms: Terms, right: str) -> None:
    box = Box()
    box.holder("a", Kind.JOB)
    assert right in box.ledger.admit(terms)
    assert list(box.ledger.account.holders) == ["a"]


def test_what_only_a_bug_would_say_is_an_error() -> None:
    with pytest.raises(ValueError, match="reserved"):
        Box(10, reserved=11)
    box = Box()
    box.holder("a", Kind.JOB, 10)
    with pytest.raises(KeyError, match="admit it first"):
        box.ledger.ask("b", 1, NOW)
    with pytest.raises(ValueError, match="0 or more"):
        box.ledger.ask("a", -1, NOW)
    with pytest.raises(ValueError, match="ask first"):
        box.ledger.took("a", 1)
    with pytest.raises(ValueError, match="at most"):
        box.ledger.gave("a", 11)
    with pytest.raises(ValueError, match="below 0"):
        box.report("a", cold=-1)


# --- who may have more ----------------------------------------------------------------------


def test_free_memory_comes_first_and_only_up_to_the_limit() -> None:
    box = Box()
    box.holder("cache", Kind.RESULTS, 500, evictable=500, cold=500)
    box.holder("job", Kind.JOB, limit=300)
    answer = box.ledger.ask("job", 400, NOW)
    assert (answer.granted, answer.waiting, answer.orders) == (300, 0, [])
    assert "300B" in answer.why


def test_a_need_within_a_guarantee_is_served_in_the_end() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 900, guaranteed=100)
    box.admit("pool", Kind.KV, 600)
    assert box.ask("pool", 600) == (100, 500, [("job", -500)])
    assert box.gave("job", 200) == [("pool", 200)]
    assert box.gave("job", 300) == [("pool", 300)]
    assert box.has("pool") == 600


def test_what_is_held_within_a_guarantee_is_never_asked_for() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 900, guaranteed=900, evictable=900, cold=900)
    box.holder("pool", Kind.KV, 100, guaranteed=100)
    assert box.ask("pool", 100) == (0, 0, [])
    assert box.ledger.ask("pool", 100, NOW).why
    box.report("pool", wanted=500)
    assert box.settle() == []


def test_what_it_does_not_want_of_its_guarantee_is_lent_and_comes_back() -> None:
    box = Box()
    box.holder("owner", Kind.JOB, held=600, guaranteed=600, wanted=0, evictable=600)
    box.holder("pool", Kind.KV, held=400)
    granted, waiting, orders = box.ask("pool", 500)
    assert (granted, waiting, orders) == (0, 500, [("owner", -500)])
    box.report("owner", held=600, wanted=600)
    assert box.ledger.target("owner") == 600, "it wants it again: the order is void"
    assert box.ledger.coming == 0
    box.report("owner", held=100, wanted=100)
    assert box.ask("pool", 500)[0] == 500
    box.ledger.took("pool", 500)
    box.report("pool", held=900, wanted=900)
    assert box.ask("owner", 500) == (0, 500, [("pool", -500)])


def test_who_gives_all_or_nothing_is_asked_for_no_part_of_its_guarantee() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 400, guaranteed=400, limit=400, cooperative=False, wanted=90)
    box.holder("pool", Kind.KV, 600, guaranteed=600)
    box.report("pool", wanted=1000)
    assert box.settle() == []


def test_what_needs_more_than_it_said_is_guaranteed_what_others_leave() -> None:
    box = Box()
    box.holder("instance", Kind.INSTANCE, held=300, guaranteed=300, limit=300, cooperative=False)
    box.holder("job", Kind.JOB, guaranteed=400)
    box.ledger.outgrew("instance", 900)
    terms = box.ledger.account.holders["instance"].terms
    assert terms.guaranteed == terms.limit == 600
    box.ledger.check()


def test_jobs_borrow_what_nobody_uses_and_services_what_jobs_borrowed() -> None:
    box = Box()
    box.holder("pool", Kind.KV, 500, evictable=100, cold=60)
    box.holder("job", Kind.JOB, 500, guaranteed=100, evictable=400)
    box.admit("other", Kind.JOB)
    box.admit("service", Kind.INSTANCE)
    box.admit("cache", Kind.RESULTS)
    assert box.ask("cache", 50) == (0, 0, []), "a cache takes only what is free"
    assert box.ask("other", 300) == (0, 100, [("pool", -60), ("pool", -40)])
    assert box.ask("service", 300) == (0, 300, [("job", -300)])


def test_they_give_by_meaning_and_then_the_cheapest_byte_first() -> None:
    box = Box()
    box.holder("busy", Kind.JOB, 100, evictable=100)
    box.holder("idle", Kind.JOB, 100, evictable=100, cold=100)
    box.holder("put aside", Kind.KV, 100, evictable=100)
    box.holder("instance", Kind.INSTANCE, 100, evictable=100, cooperative=False)
    box.holder("prefix", Kind.KV, 100, evictable=100, cold=100)
    box.holder("dear", Kind.RESULTS, 100, evictable=100, give_cost=1, back_cost=9)
    box.holder("cheap", Kind.RESULTS, 100, evictable=100, give_cost=2)
    box.holder("in use", Kind.INSTANCE, 300, cooperative=False)
    box.admit("owner", Kind.INSTANCE, 1000)
    answer = box.ledger.ask("owner", 1000, NOW)
    assert [(order.holder, order.rank) for order in answer.orders] == [
        ("cheap", Rank.RESULTS),
        ("dear", Rank.RESULTS),
        ("prefix", Rank.PREFIX),
        ("instance", Rank.IDLE_INSTANCE),
        ("put aside", Rank.COLD_KV),
        ("idle", Rank.IDLE_JOB),
        ("busy", Rank.BUSY_JOB),
        ("in use", Rank.IN_USE),
    ]
    assert {order.to for order in answer.orders} == {"owner"}


def test_who_rests_for_any_byte_gives_all_before_another_has_to_rest() -> None:
    box = Box()
    box.holder("long", Kind.JOB, 300, evictable=300, give_cost=1, rest_ns=5000)
    box.holder("short", Kind.JOB, 300, evictable=300, give_cost=2, rest_ns=1000)
    box.admit("service", Kind.INSTANCE)
    assert box.ask("service", 500) == (400, 100, [("short", -100)])
    assert box.ask("service", 600) == (0, 200, [("short", -100)]), "it rests already"
    box.admit("other", Kind.INSTANCE)
    _, _, orders = box.ask("other", 300)
    assert orders == [("short", -100), ("long", -200)]


def test_of_much_the_cheaper_byte_goes_first_whoever_rests_longer() -> None:
    box = Box(100_000)
    box.holder("fast", Kind.JOB, 50_000, evictable=50_000, give_cost=1, rest_ns=5000)
    box.holder("slow", Kind.JOB, 50_000, evictable=50_000, give_cost=2, rest_ns=1000)
    box.admit("service", Kind.INSTANCE)
    assert box.ask("service", 100)[2] == [("slow", -100)]
    box.ledger.waive("service")
    assert box.ask("service", 40_000)[2] == [("fast", -40_000)]


def test_an_order_says_what_is_left_after_all_orders() -> None:
    box = Box()
    box.holder("pool", Kind.KV, 1000, evictable=500, cold=200)
    box.admit("a", Kind.INSTANCE)
    orders = box.ledger.ask("a", 300, NOW).orders
    assert [(o.bytes, o.target) for o in orders] == [(200, 800), (100, 700)]
    assert box.ledger.target("pool") == 700
    assert box.ask("a", 400) == (0, 400, [("pool", -100)]), "and is not asked twice for the same"


def test_who_does_not_cooperate_gives_all_or_nothing() -> None:
    box = Box()
    box.holder("instance", Kind.INSTANCE, 1000, evictable=1000, cooperative=False)
    box.admit("pool", Kind.KV)
    assert box.ask("pool", 10) == (0, 10, [("instance", -1000)])
    assert box.gave("instance", 1000) == [("pool", 10)]
    assert box.ledger.free == 990


def test_a_guarantee_takes_the_place_of_who_waits_to_borrow() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 1000, evictable=1000)
    box.admit("borrower", Kind.KV)
    box.admit("owner", Kind.KV, 800)
    assert box.ask("borrower", 500) == (0, 500, [("job", -500)])
    assert box.ask("owner", 800) == (0, 800, [("job", -500)])
    assert box.ledger.account.holders["borrower"].waiting == 200, "for more it has to ask again"
    assert box.gave("job", 850) == [("owner", 800), ("borrower", 50)]


def test_those_that_wait_are_served_in_order_guarantees_first() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 1000, evictable=1000)
    for name, guaranteed in (("first", 0), ("second", 0), ("owner", 100)):
        box.admit(name, Kind.KV, guaranteed)
        box.ask(name, 100)
    assert box.gave("job", 150) == [("owner", 100), ("first", 50)]
    assert box.gave("job", 150) == [("first", 50), ("second", 100)]


def test_a_need_that_is_told_again_replaces_the_one_before() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 1000, evictable=1000)
    box.admit("pool", Kind.KV, 500)
    assert box.ask("pool", 100) == (0, 100, [("job", -100)])
    assert box.ask("pool", 100) == (0, 100, [])
    assert box.gave("job", 60) == [("pool", 60)]
    assert box.ask("pool", 100) == (0, 40, []), "what was granted and not taken counts"
    assert box.ask("pool", 60) == (0, 0, [])
    assert box.gave("job", 40) == []


def test_who_waives_gives_way() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 900, evictable=900)
    box.admit("a", Kind.KV, 500)
    box.admit("b", Kind.KV, 300)
    assert box.ask("a", 200) == (100, 100, [("job", -100)])
    assert box.ask("b", 50) == (0, 50, [("job", -50)])
    assert told(box.ledger.waive("a")) == [("b", 50)]
    box.ledger.check()
    assert (box.has("a"), box.ledger.free) == (0, 50)


def test_who_waives_has_given_that() -> None:
    box = Box()
    box.admit("pool", Kind.KV)
    box.admit("owner", Kind.KV, 300)
    assert box.ask("pool", 1000) == (1000, 0, [])
    assert box.ask("owner", 300) == (0, 300, [("pool", -300)])
    assert told(box.ledger.waive("pool")) == [("owner", 300)]
    box.ledger.check()
    assert box.ledger.coming == 0


def test_who_leaves_gives_everything() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 1000)
    box.admit("pool", Kind.KV, 1000)
    assert box.ask("pool", 700) == (0, 700, [("job", -700)])
    assert told(box.ledger.left("job")) == [("pool", 700)]
    box.ledger.check()
    assert box.ledger.free == 300


def test_who_is_to_give_borrows_only_what_is_free() -> None:
    box = Box()
    box.holder("a", Kind.KV, 500, evictable=500)
    box.holder("job", Kind.JOB, 500, evictable=500)
    box.admit("owner", Kind.JOB, 100)
    assert box.ask("owner", 100) == (0, 100, [("a", -100)])
    assert box.ask("a", 100) == (0, 0, [])
    box.gave("job", 130)
    assert box.ask("a", 100) == (30, 0, [])


def test_who_waits_to_borrow_waits_no_more_once_it_has_to_give() -> None:
    box = Box()
    box.holder("cache", Kind.RESULTS, 100, evictable=100)
    box.holder("pool", Kind.KV, 400, evictable=400, cold=400)
    box.holder("other", Kind.JOB, 500, guaranteed=500)
    box.admit("owner", Kind.JOB, 100)
    assert box.ask("pool", 100) == (0, 100, [("cache", -100)])
    assert box.ask("owner", 100) == (0, 100, [("pool", -100)])
    assert box.gave("cache", 100) == [("owner", 100)]


def test_who_comes_again_has_no_past() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 1000, evictable=1000)
    box.admit("pool", Kind.KV)
    assert box.ask("pool", 1000) == (0, 1000, [("job", -1000)])
    box.gave("job", 1000)
    box.ledger.left("pool")
    box.ask("job", 500)
    box.holder("pool", Kind.KV, 500, evictable=500)
    assert box.ask("job", 600) == (0, 100, [("pool", -100)])


# --- reports --------------------------------------------------------------------------------


def test_a_report_is_as_good_as_word_of_each_step() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 900, evictable=900)
    box.admit("pool", Kind.KV, 500)
    box.ask("pool", 300)
    box.report("pool", held=100)
    assert box.ledger.account.holders["pool"].promised == 0, "it took what it was granted"
    assert told(box.report("job", held=750)) == [("pool", 150)]
    assert box.ledger.coming == 50


def test_what_nobody_granted_is_not_booked_but_seen() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 400)
    box.report("job", held=600)
    (line,) = box.ledger.view()
    assert (line.held, line.over, box.ledger.free) == (400, 200, 600)
    box.report("job", held=400)
    assert box.ledger.view()[0].over == 0


# --- pools ----------------------------------------------------------------------------------


def test_pools_share_by_need_beyond_their_guarantees() -> None:
    box = Box()
    box.holder("small", Kind.KV, 0, guaranteed=100, wanted=150)
    box.holder("a", Kind.KV, 0, wanted=900)
    box.holder("b", Kind.KV, 0, wanted=900, weight=3)
    assert box.settle() == [("small", 150), ("a", 213), ("b", 637)]


def test_what_idles_stays_until_somebody_wants_it() -> None:
    box = Box()
    box.holder("idle", Kind.KV, 700, guaranteed=100, wanted=0)
    box.holder("busy", Kind.KV, 300, wanted=300)
    assert box.settle() == []
    box.report("busy", wanted=600)
    assert box.settle() == [("idle", -300)]
    assert box.gave("idle", 300) == [("busy", 300)]
    box.report("busy", held=600, wanted=2000)
    assert box.settle() == [("idle", -300)]
    assert box.ledger.target("idle") == 100


def test_pools_give_only_what_is_beyond_their_fair_shares() -> None:
    box = Box()
    box.holder("even", Kind.KV, 300, wanted=300, evictable=300, cold=300)
    box.holder("idle", Kind.KV, 500)
    box.holder("small", Kind.KV, 200, wanted=500)
    box.report("idle", wanted=0)
    assert box.settle() == [("idle", -300)]


def test_pools_share_what_guarantees_of_others_leave() -> None:
    box = Box()
    box.holder("a", Kind.KV, 1000, wanted=1000)
    box.admit("job", Kind.JOB, 400)
    box.holder("b", Kind.KV, 0, wanted=1000)
    assert box.ask("job", 400) == (0, 400, [("a", -400)])
    assert box.settle() == [("a", -300)]


def test_pools_share_what_is_left_beside_idle_guarantees() -> None:
    box = Box()
    box.holder("idle", Kind.KV, 400, guaranteed=400)
    box.holder("a", Kind.KV, 600, wanted=600)
    box.holder("b", Kind.KV, 0, wanted=600)
    box.report("idle", wanted=0)
    assert box.settle() == [("a", -300)]


def test_what_a_pool_asked_for_it_wants() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 1000, evictable=1000)
    box.admit("pool", Kind.KV)
    assert box.ask("pool", 500) == (0, 500, [("job", -500)])
    assert box.settle() == []
    assert box.gave("job", 500) == [("pool", 500)]


def test_a_pool_takes_from_all_that_means_less() -> None:
    box = Box()
    box.holder("cache", Kind.RESULTS, 400, evictable=400)
    box.holder("job", Kind.JOB, 500, guaranteed=200, evictable=500)
    box.holder("pool", Kind.KV, 100, wanted=1000)
    assert box.settle() == [("cache", -400), ("job", -300)]


def test_little_moves_only_if_it_is_free_or_guaranteed() -> None:
    box = Box(6400)
    box.holder("a", Kind.KV, 3250, wanted=3250)
    box.holder("b", Kind.KV, 3000, guaranteed=0, wanted=3200)
    assert box.settle() == [("b", 150)], "50 more are not worth it"
    box.ledger.took("b", 150)
    box.ledger.left("b")
    box.holder("b", Kind.KV, 3150, guaranteed=3200, wanted=3200)
    assert box.settle() == [("a", -50)]


def test_two_pools_do_not_thrash() -> None:
    box = Box()
    box.holder("a", Kind.KV, 500, wanted=500)
    box.holder("b", Kind.KV, 500, wanted=200)
    box.report("a", wanted=800)
    assert box.settle(NOW) == [("b", -300)]
    box.gave("b", 300)
    box.ledger.took("a", 300)
    box.report("a", wanted=200)
    box.report("b", wanted=800)
    assert box.settle(NOW + REST - 1) == []
    assert box.settle(NOW + REST) == [("a", -600)]


def test_a_guarantee_does_not_wait_for_the_rest() -> None:
    box = Box()
    box.holder("a", Kind.KV, 500, wanted=500)
    box.holder("b", Kind.KV, 500, guaranteed=400, wanted=200)
    box.report("a", wanted=800)
    assert box.settle() == [("b", -100)]
    box.gave("b", 100)
    box.ledger.took("a", 100)
    box.gave("b", 50)
    assert box.ask("a", 50) == (50, 0, []), "its owner did not need it"
    assert box.ask("b", 50)[1:] == (50, [("a", -50)])


# --- instances ------------------------------------------------------------------------------


@pytest.mark.parametrize(("ahead", "goes"), [(0, False), (1, True)])
def test_an_instance_goes_only_if_it_is_back_in_time(ahead: int, goes: bool) -> None:
    box = Box()
    back = NOW + UNLOAD_BEYOND * S + ahead
    more = {"evictable": 1000, "returns_at": back, "load_ns": S}
    box.holder("instance", Kind.INSTANCE, 1000, cooperative=False, **more)
    box.admit("pool", Kind.KV)
    assert box.settle() == [], "nobody wants it"
    box.report("pool", wanted=500)
    assert box.settle() == ([("instance", -1000)] if goes else [])


def test_an_instance_that_is_being_loaded_is_not_idle() -> None:
    box = Box()
    box.admit("instance", Kind.INSTANCE, cooperative=False)
    box.admit("pool", Kind.KV)
    assert box.ask("instance", 1000) == (1000, 0, [])
    assert box.ask("pool", 100) == (0, 0, [])


def test_a_guarantee_does_not_spare_an_instance() -> None:
    box = Box()
    box.holder("instance", Kind.INSTANCE, 1000, cooperative=False)
    box.admit("pool", Kind.KV, 100)
    assert box.ask("pool", 50) == (0, 50, [("instance", -1000)])


# --- to be looked at ------------------------------------------------------------------------


def test_the_view_adds_up() -> None:
    box = Box()
    box.holder("owner", Kind.KV, 100, guaranteed=600)
    box.holder("job", Kind.JOB, 800, guaranteed=200, evictable=800)
    box.ask("owner", 300)
    owner, job = box.ledger.view()
    assert (owner.held, owner.promised, owner.target, owner.waiting) == (100, 100, 200, 200)
    assert owner.lent == 400
    assert (job.kind, job.held, job.target, job.borrowed, job.asked) == ("job", 800, 600, 600, 200)


def test_an_account_survives_a_checkpoint() -> None:
    box = Box()
    box.holder("job", Kind.JOB, 900, evictable=900)
    box.admit("pool", Kind.KV, 500)
    box.ask("pool", 300)
    encoded = msgspec.msgpack.encode(box.ledger.account)
    again = Ledger(msgspec.msgpack.decode(encoded, type=Account))
    assert again.account == box.ledger.account
    assert again.gave("job", 200) == box.ledger.gave("job", 200)


@pytest.mark.parametrize(
    ("break_it", "law"),
    [
        ("account.capacity = 500", "guaranteed"),
        ("account.holders['a'].promised = 900", "granted twice"),
        ("account.holders['a'].waiting = 900", "less come"),
        ("account.holders['a'].held = -1", "negative"),
        ("account.holders['a'].cold = 1", "more than it holds"),
        ("account.holders['a'].terms.limit = 50", "limit"),
        ("account.holders['a'].asked = 1", "within its guarantee"),
    ],
)
def test_check_names_the_law_that_is_broken(break_it: str, law: str) -> None:
    box = Box()
    box.holder("a", Kind.JOB, 100, guaranteed=600)
    box.holder("b", Kind.JOB, 100)
    box.ledger.check()
    exec(break_it, {"account": box.ledger.account})
    with pytest.raises(AssertionError, match=law):
        box.ledger.check()


# --- fairness -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "needs", "weights", "shares"),
    [
        (100, (10, 80, 80), (1, 1, 1), (10, 45, 45)),
        (100, (80, 80), (1, 3), (25, 75)),
        (100, (20, 30), (1, 1), (20, 30)),
        (100, (0, 500), (9, 1), (0, 100)),
        (0, (5, 5), (1, 1), (0, 0)),
    ],
)
def test_max_min(left: int, needs: tuple, weights: tuple, shares: tuple) -> None:
    names = [str(i) for i in range(len(needs))]
    needed = dict(zip(names, needs, strict=True))
    found = divide(left, needed, dict(zip(names, weights, strict=True)))
    assert tuple(found.values()) == shares
