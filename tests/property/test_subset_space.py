"""A GPU in subsets, under random layouts: partitions are disjoint and of units that there are, or
refused; the planner's own are never refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotenant.devices.nvidia.facts import Driver
from cotenant.devices.nvidia.subsetspace import Found, SubsetSpace
from cotenant.domain.device import DeviceSpec, Partition, PreemptLevel
from cotenant.domain.errors import DeviceError
from cotenant.policy.layouts import even_layouts, make_partition

BARE = DeviceSpec("cuda", "cuda", (), 2**30, (), PreemptLevel.NONE, 0, 0)


class Gpu:
    """Of NVML what a space asks."""

    def uuid(self) -> str:
        return "GPU-1"


@pytest.fixture(autouse=True)
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a running MPS daemon leaves."""
    found = tmp_path_factory.mktemp("mps")
    (found / "control").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "CUDA_MPS_PIPE_DIRECTORY", str(found))
        yield found


def space_of(units: int) -> SubsetSpace:
    gpu: Any = Gpu()
    space = SubsetSpace(
        gpu, "cuda", Driver("580.1", (13, 0)), lambda *_: Found(8 * units + 4, 8, units)
    )
    space.open()
    return space


def accepts(space: SubsetSpace, partitions: tuple[Partition, ...]) -> bool:
    try:
        space.repartition(partitions)
    except DeviceError:
        return False
    return True


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 40), data=st.data())
def test_a_layout_is_had_exactly_if_its_units_are_there_and_nobody_shares_one(
    count: int, data: st.DataObject
) -> None:
    space = space_of(count)
    unit = st.integers(-1, count)
    drawn = data.draw(st.lists(st.lists(unit, min_size=1, max_size=6), max_size=6))
    partitions = tuple(
        Partition(f"cuda:{n}", "cuda", tuple(units)) for n, units in enumerate(drawn)
    )
    used = [unit for units in drawn for unit in units]
    sound = len(used) == len(set(used)) and set(used) <= set(range(count))
    assert accepts(space, partitions) == sound


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 40), data=st.data())
def test_any_cut_of_shuffled_units_is_a_layout(count: int, data: st.DataObject) -> None:
    space = space_of(count)
    units = data.draw(st.permutations(range(count)))
    cuts = sorted(data.draw(st.sets(st.integers(0, count))))
    parts = [tuple(sorted(units[a:b])) for a, b in pairwise(cuts)]
    assert accepts(space, tuple(make_partition(space.fit(BARE), p) for p in parts if p))


@given(count=st.integers(1, 64))
def test_the_planners_layouts_have_every_unit_once_and_sizes_that_models_are_measured_on(
    count: int,
) -> None:
    space = space_of(count)
    spec = space.fit(BARE)
    layouts = even_layouts(spec)
    assert [len(layout.mine) for layout in layouts] == list(range(1, count + 1))
    for layout in layouts:
        assert sorted(u for p in layout.mine for u in p.units) == list(spec.units)
        assert {p.compute for p in layout.mine} <= set(spec.shapes) and not layout.free
        assert accepts(space, layout.mine)
    assert set(spec.shapes) == {p.compute for layout in layouts for p in layout.mine}
