"""Which of several devices carries which service: greedily, then by an integer program."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.policy import assigning
from cotenant.policy.assigning import (
    COPY,
    LEAST_PART,
    MOVE,
    OVER,
    Fleet,
    Shares,
    improve,
    settle,
    uneven,
)
from cotenant.policy.prospects import RHO_MAX

GIB = 2**30


def fleet(
    loads: dict[str, float],
    devices: int,
    memory: int = 0,
    needs: dict[str, int] | None = None,
) -> Fleet:
    """Equal devices d0, d1, …; every service can run on all of them."""
    names = [f"d{i}" for i in range(devices)]
    return Fleet(
        {name: dict.fromkeys(names, load) for name, load in loads.items()},
        {name: dict.fromkeys(names, (needs or {}).get(name, 0)) for name in loads},
        dict.fromkeys(names, memory),
    )


def used(of: Fleet, shares: Shares) -> dict[str, float]:
    found = dict.fromkeys(of.memory, 0.0)
    for name, parts in shares.items():
        for device, part in parts.items():
            found[device] += part * of.demands[name][device]
    return found


def test_services_of_unknown_load_keep_out_of_each_others_way() -> None:
    shares = settle(fleet(dict.fromkeys("abcdef", 0.0), 3), {})
    assert sorted(next(iter(parts)) for parts in shares.values()) == [
        "d0",
        "d0",
        "d1",
        "d1",
        "d2",
        "d2",
    ]


def test_large_loads_go_first_and_to_the_emptiest() -> None:
    of = fleet({"a": 0.6, "b": 0.3, "c": 0.3, "d": 0.1}, 2)
    shares = settle(of, {})
    assert max(used(of, shares).values()) == pytest.approx(0.7)


def test_memory_is_shared_by_all_on_a_device() -> None:
    of = fleet(dict.fromkeys("abc", 0.1), 2, 10 * GIB, dict.fromkeys("abc", 6 * GIB))
    shares = settle(of, {})
    assert sorted(len(parts) for parts in shares.values()) == [0, 1, 1]
    assert uneven(of, shares)
    assert improve(of, shares) == shares  # there is no place for the third


def test_room_is_made_for_one_that_found_no_place() -> None:
    # By size: 6 + 4 on one device and 5 + 5 on the other; before, 5 and 4 were together.
    needs = {"a": 6 * GIB, "b": 5 * GIB, "c": 5 * GIB, "d": 4 * GIB}
    of = fleet(dict.fromkeys("abcd", 0.1), 2, 10 * GIB, needs)
    before: Shares = {"b": {"d0": 1.0}, "d": {"d0": 1.0}, "c": {"d1": 1.0}}
    shares = settle(of, before)
    assert shares["a"] == {}
    found = improve(of, shares)
    assert all(found.values())
    for device in ("d0", "d1"):
        assert sum(needs[n] for n, parts in found.items() if device in parts) <= 10 * GIB


def test_what_is_more_than_a_device_should_carry_is_split() -> None:
    of = fleet({"big": 1.5, "small": 0.2}, 3)
    shares = settle(of, {})
    assert len(shares["big"]) == 2
    assert sum(shares["big"].values()) == pytest.approx(1.0)
    assert max(used(of, shares).values()) <= RHO_MAX + 1e-9


def test_too_much_for_all_is_shared_by_all() -> None:
    of = fleet({"big": 3.0, "small": 0.2}, 2)
    shares = settle(of, {})
    assert sum(shares["big"].values()) == pytest.approx(1.0)
    assert sum(used(of, shares).values()) == pytest.approx(3.2)
    assert all(part >= LEAST_PART for part in shares["big"].values())


def test_services_stay_while_the_load_is_even_enough() -> None:
    of = fleet({"a": 0.4, "b": 0.3, "c": 0.3, "d": 0.35}, 2)
    before: Shares = {n: {"d0" if n in "ab" else "d1": 1.0} for n in "abcd"}
    assert settle(of, before) == before
    assert not uneven(of, before)


def test_a_device_with_too_much_is_relieved_with_few_moves() -> None:
    of = fleet({"a": 0.6, "b": 0.4, "c": 0.1, "d": 0.1, "e": 0.2}, 2)
    before: Shares = {n: {"d0" if n in "ab" else "d1": 1.0} for n in "abcde"}
    assert uneven(of, before)
    found = improve(of, before)
    assert max(used(of, found).values()) <= RHO_MAX
    assert sum(found[n] != before[n] for n in found) <= 2


def test_one_alone_on_a_full_device_is_left_alone() -> None:
    of = fleet({"a": 0.8, "b": 0.1}, 2)
    assert not uneven(of, {"a": {"d0": 1.0}, "b": {"d1": 1.0}})


def test_a_split_service_is_made_whole_when_one_device_can_carry_it_easily() -> None:
    before: Shares = {"a": {"d0": 0.6, "d1": 0.4}, "b": {"d1": 1.0}}
    easy = fleet({"a": 0.4, "b": 0.2}, 2)
    assert uneven(easy, before)
    assert improve(easy, before)["a"] == {"d0": 1.0}
    tight = fleet({"a": 0.8, "b": 0.2}, 2)
    assert improve(tight, before) == before


def test_devices_of_different_speed_are_told_apart() -> None:
    of = Fleet(
        {n: {"fast": 0.2, "slow": 0.6} for n in "abcd"},
        {n: {"fast": 0, "slow": 0} for n in "abcd"},
        {"fast": 0, "slow": 0},
    )
    found = improve(of, settle(of, {}))
    assert sum("slow" in parts for parts in found.values()) <= 1
    assert max(used(of, found).values()) <= RHO_MAX


def test_one_that_can_run_on_few_devices_stays_on_those() -> None:
    of = fleet({"a": 0.5, "b": 0.5}, 2)
    of.demands["a"].pop("d1")  # type: ignore[attr-defined]
    found = improve(of, settle(of, {"b": {"d0": 1.0}}))
    assert found == {"a": {"d0": 1.0}, "b": {"d1": 1.0}}


def test_one_that_grew_beyond_its_device_is_split() -> None:
    of = fleet({"a": 1.5, "b": 0.1}, 2)
    found = improve(of, {"a": {"d0": 1.0}, "b": {"d1": 1.0}})
    assert len(found["a"]) == 2
    assert max(used(of, found).values()) <= RHO_MAX + 1e-6


def test_devices_that_cannot_help_are_passed_over() -> None:
    # Three idle devices are full of memory; the fourth has room.
    loads = {"a": 0.6, "b": 0.6, "i": 0.0, "j": 0.0, "k": 0.0, "l": 0.1}
    needs = {"a": 5 * GIB, "b": 5 * GIB, **dict.fromkeys("ijk", 16 * GIB), "l": GIB}
    of = fleet(loads, 5, 16 * GIB, needs)
    where = {"a": "d0", "b": "d0", "i": "d1", "j": "d2", "k": "d3", "l": "d4"}
    found = improve(of, {name: {device: 1.0} for name, device in where.items()})
    assert max(used(of, found).values()) == pytest.approx(0.7)


def test_devices_that_cannot_be_relieved_keep_nobody_from_being_so() -> None:
    of = fleet(dict.fromkeys("xyz", 1.2) | dict.fromkeys("ab", 0.55), 7)
    for name, device in zip("xyz", ("d0", "d1", "d2"), strict=True):
        of.demands[name] = {device: 1.2}  # type: ignore[index]
    before: Shares = {"x": {"d0": 1.0}, "y": {"d1": 1.0}, "z": {"d2": 1.0}}
    before |= {"a": {"d3": 1.0}, "b": {"d3": 1.0}}
    found = improve(of, before)
    assert found["a"] != found["b"]


def test_one_without_a_place_does_not_keep_others_from_theirs() -> None:
    needs = {"huge": 99 * GIB}
    of = fleet({"huge": 0.1, "a": 0.7, "b": 0.6}, 3, 16 * GIB, needs)
    found = improve(of, {"huge": {}, "a": {"d0": 1.0}, "b": {"d0": 1.0}})
    assert found["huge"] == {}
    assert max(used(of, found).values()) == pytest.approx(0.7)


def test_room_is_looked_for_where_it_can_be() -> None:
    # "new" runs on the last two only; they have room once "a" changes places.
    names = [f"d{i}" for i in range(8)]
    of = Fleet(
        {
            "new": {"d6": 0.1, "d7": 0.1},
            "a": dict.fromkeys(("d6", "d7"), 0.1),
            "b": dict.fromkeys(("d6", "d7"), 0.1),
        },
        {
            "new": dict.fromkeys(names, 10 * GIB),
            "a": dict.fromkeys(names, 5 * GIB),
            "b": dict.fromkeys(names, 5 * GIB),
        },
        dict.fromkeys(names, 12 * GIB) | {"d0": 0},
    )
    found = improve(of, {"new": {}, "a": {"d6": 1.0}, "b": {"d7": 1.0}})
    assert all(found.values())


def test_memory_of_what_does_not_move_counts() -> None:
    loads = {"a": 0.5, "b": 0.5, "w1": 0.66, "w2": 0.66, "late": 0.34}
    needs = {"a": 6 * GIB, "b": 6 * GIB, "w1": 12 * GIB, "w2": 12 * GIB, "late": GIB}
    of = fleet(loads, 12, 16 * GIB, needs)
    before: Shares = {"a": {"d0": 1.0}, "b": {"d0": 1.0}, "late": {"d3": 1.0}}
    # A little of each on the emptiest devices, and most where no program looks: they do not move.
    before |= {"w1": {"d1": 0.1, "d10": 0.9}, "w2": {"d2": 0.1, "d11": 0.9}}
    for name in "ab":
        of.demands[name] = dict.fromkeys(("d0", "d1", "d2", "d3"), 0.5)  # type: ignore[index]
    of.demands["late"] = {"d3": 0.34}  # type: ignore[index]
    found = improve(of, before)
    assert sorted(next(iter(found[name])) for name in "ab") == ["d0", "d3"]


def cost(of: Fleet, shares: Shares, before: Shares) -> float:
    """The program's objective, written once more."""
    loads = used(of, shares).values()
    moves = sum(device not in before[name] for name, parts in shares.items() for device in parts)
    copies = sum(map(len, shares.values()))
    over = sum(max(0.0, load - RHO_MAX) for load in loads)
    return max(loads) + OVER * over + COPY * copies + MOVE * moves


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.02, 0.7), st.integers(1, 6)), min_size=2, max_size=6),
    st.integers(2, 3),
    st.randoms(use_true_random=False),
)
def test_the_program_is_as_good_as_trying_everything(
    drawn: list[tuple[float, int]], devices: int, random: object
) -> None:
    loads = {f"s{i}": load for i, (load, _) in enumerate(drawn)}
    needs = {f"s{i}": need * GIB for i, (_, need) in enumerate(drawn)}
    of = fleet(loads, devices, 12 * GIB, needs)
    before = settle(of, {n: {f"d{random.randrange(devices)}": 1.0} for n in loads})  # type: ignore[attr-defined]
    if not all(len(parts) == 1 for parts in before.values()):
        return  # those that are split or have no place are not for this reading
    found = improve(of, before)
    assert improve(of, before) == found  # deterministic
    for device in of.memory:
        assert sum(needs[n] for n, parts in found.items() if device in parts) <= 12 * GIB
    assert all(sum(parts.values()) == pytest.approx(1.0) for parts in found.values())
    if not uneven(of, before):
        assert found == before
        return
    best = cost(of, before, before)
    for where in product(of.memory, repeat=len(loads)):
        shares: Shares = {n: {device: 1.0} for n, device in zip(loads, where, strict=True)}
        held = [sum(needs[n] for n in loads if device in shares[n]) for device in of.memory]
        if max(held) <= 12 * GIB:
            best = min(best, cost(of, shares, before))
    assert cost(of, found, before) <= best + assigning._GAP + assigning.GAIN + 1e-6


def test_a_large_fleet_is_looked_at_a_few_devices_at_a_time() -> None:
    loads = {f"s{i}": 0.05 + 0.03 * (i % 7) for i in range(120)}
    of = fleet(loads, 30, 80 * GIB, {n: (1 + i % 9) * GIB for i, n in enumerate(loads)})
    before: Shares = {n: {f"d{i % 10}": 1.0} for i, n in enumerate(loads)}
    shares = settle(of, before)
    over = [sum(max(0.0, u - RHO_MAX) for u in used(of, shares).values())]
    while uneven(of, shares) and len(over) < 30:
        shares = improve(of, shares)
        over.append(sum(max(0.0, u - RHO_MAX) for u in used(of, shares).values()))
    assert over == sorted(over, reverse=True)
    assert over[0] > 1.0
    assert over[-1] == pytest.approx(0.0)
