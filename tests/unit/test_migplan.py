"""The steps from one MIG layout to another."""

from __future__ import annotations

import pytest

from cotenant.devices.nvidia.migplan import Act, Seen, steps
from cotenant.domain.errors import DeviceError
from cotenant.domain.mig import Placement, table

TABLE = table("A100-SXM4-40GB")
BIG, SMALL, MIDDLE = Placement(0, "3g.20gb"), Placement(4, "1g.5gb"), Placement(4, "2g.10gb")


def seen(placement: Placement, ours: bool = True, compute: tuple[int, ...] = (0,)) -> Seen:
    return Seen(placement, 1, ours, compute, whole=len(compute) == 1)


def test_what_stands_where_it_is_wanted_stays() -> None:
    assert steps([seen(BIG), seen(SMALL)], (SMALL, BIG), TABLE) == ()


def test_everything_goes_inside_out_before_anything_comes_outside_in() -> None:
    found = steps([seen(BIG), seen(SMALL, compute=(0, 1))], (BIG, MIDDLE), TABLE)
    assert [(step.act, step.placement) for step in found] == [
        (Act.REMOVE_COMPUTE, SMALL),
        (Act.REMOVE_COMPUTE, SMALL),
        (Act.REMOVE, SMALL),
        (Act.MAKE, MIDDLE),
        (Act.MAKE_COMPUTE, MIDDLE),
    ]
    assert [step.compute for step in found[:2]] == [1, 0]


def test_what_is_not_whole_is_made_so() -> None:
    (made,) = steps([seen(BIG, compute=())], (BIG,), TABLE)
    assert made.act is Act.MAKE_COMPUTE
    gone, *_, made = steps([seen(BIG, compute=(0, 0))], (BIG,), TABLE)
    assert (gone.act, made.act) == (Act.REMOVE_COMPUTE, Act.MAKE_COMPUTE)


def test_what_is_not_ours_is_let_be_and_built_around() -> None:
    found = steps([seen(BIG, ours=False)], (SMALL,), TABLE)
    assert {step.placement for step in found} == {SMALL}
    assert steps([seen(BIG, ours=False, compute=())], (), TABLE) == ()
    for wanted in ((BIG,), (Placement(0, "1g.5gb"),), (Placement(4, "3g.20gb"), SMALL)):
        with pytest.raises(DeviceError):
            steps([seen(BIG, ours=False)], wanted, TABLE)


def test_a_step_and_its_opposite_are_each_others() -> None:
    for step in steps([seen(BIG)], (MIDDLE,), TABLE):
        assert step.opposite != step and step.opposite.opposite == step


def test_a_layout_that_has_one_instance_twice_is_impossible() -> None:
    assert TABLE.why_not([SMALL, SMALL]) is not None
    assert TABLE.why_not([SMALL, BIG]) is None
