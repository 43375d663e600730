"""Every legal MIG layout of every table, and no illegal one, against a brute-force reading."""

from __future__ import annotations

import itertools

import pytest

from cotenant.domain.errors import ConfigError
from cotenant.domain.mig import Placement, Placements, Table, table, tables


def brute_force(found: Table, media: bool) -> set[Placements]:
    """Nothing or one profile at each slice, all combinations, each read against the rules."""
    at = [
        [None, *(p for p in found.profiles if s in p.starts and (media or not p.media_extensions))]
        for s in range(found.memory_slices)
    ]
    legal = set()
    for choice in itertools.product(*at):
        taken = [
            s
            for start, profile in enumerate(choice)
            if profile
            for s in range(start, start + profile.size)
        ]
        chosen = [profile for profile in choice if profile]
        if len(taken) != len(set(taken)) or max(taken, default=0) >= found.memory_slices:
            continue
        if any(chosen.count(p) > p.max_instances for p in chosen):
            continue
        if sum(int(p.name[0]) for p in chosen) > found.compute_slices:
            continue
        legal.add(tuple(Placement(s, p.name) for s, p in enumerate(choice) if p))
    return legal


@pytest.mark.parametrize("media", [False, True])
@pytest.mark.parametrize("gpu", sorted(tables()))
def test_layouts_are_those_of_a_brute_force_reading(gpu: str, media: bool) -> None:
    found = table(gpu)
    layouts = list(found.layouts(media))
    assert len(layouts) == len(set(layouts))
    assert set(layouts) == brute_force(found, media)


@pytest.mark.parametrize("gpu", sorted(tables()))
def test_why_not_agrees_with_the_layouts(gpu: str) -> None:
    found = table(gpu)
    legal = set(found.layouts(media=True))
    places = [Placement(s, p.name) for p in found.profiles for s in p.starts]
    for pair in itertools.combinations(sorted(places), 2):
        assert (found.why_not(pair) is None) == (pair in legal), pair


def test_what_is_wrong_is_said() -> None:
    a100 = table("A100-SXM4-40GB")
    assert a100.why_not([Placement(1, "2g.10gb")]) == "2g.10gb cannot start at 1, only at 0, 2, 4"
    overlap = a100.why_not([Placement(0, "4g.20gb"), Placement(2, "1g.5gb")])
    assert overlap == "1g.5gb at 2 overlaps 4g.20gb at 0"
    with pytest.raises(ConfigError, match=r"no MIG profile '2g.12gb'; it has 1g.5gb"):
        a100.why_not([Placement(0, "2g.12gb")])
    with pytest.raises(ConfigError, match="there are A100"):
        table("A100")


def test_every_table_says_what_it_rests_on() -> None:
    for found in tables().values():
        assert found.evidence
        assert {p.compute for p in found.profiles} <= set(range(1, found.compute_slices + 1))
