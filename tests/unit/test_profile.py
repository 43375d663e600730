"""What is made of measured times, and how the file of a profile is written and read."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cotenant.domain.errors import ConfigError, EnvironmentProblem
from cotenant.domain.profile import FORMAT, PROFILE_FILE, Figures, Profiles, read_profiles
from cotenant.runtime.profiling import batches, figures, write_profile
from cotenant.runtime.repository import stamp
from tests.builders import profiled


def test_figures_are_of_all_runs() -> None:
    found = figures(1, 2, 4, [*range(1, 20), 1000])
    assert (found.units, found.rows, found.runs) == (2, 4, 20)
    assert found.median_ns == 10
    assert found.p95_ns == 19
    assert found.cv > 1


def test_one_run_has_no_spread() -> None:
    assert figures(1, 1, 1, [7]) == Figures(1, 1, 1, 7, 7, 0.0)


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_sizes_double_up_to_the_largest(most: int, sizes: list[int]) -> None:
    assert batches(most) == sizes


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = write_profile(profiled(), tmp_path)
    assert read_profiles(path.read_bytes()) == (profiled(),)
    assert [entry.name for entry in tmp_path.iterdir()] == [PROFILE_FILE]


def test_a_kind_that_is_measured_again_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    write_profile(profiled("cpu"), tmp_path)
    write_profile(profiled("npu", 1), tmp_path)
    again = msgspec.structs.replace(profiled("cpu"), load_ns=7)
    path = write_profile(again, tmp_path)
    assert read_profiles(path.read_bytes()) == (again, profiled("npu", 1))


def test_what_was_measured_of_other_files_is_not_kept(tmp_path: Path) -> None:
    write_profile(profiled("cpu"), tmp_path)
    other = msgspec.structs.replace(profiled("npu", 1), files=(("model.onnx", 1, 2, 3),))
    path = write_profile(other, tmp_path)
    assert read_profiles(path.read_bytes()) == (other,)


@pytest.mark.parametrize("there", [b"{", b'{"format": 1, "kind": "cpu"}'])
def test_a_file_that_cannot_be_read_gives_way(tmp_path: Path, there: bytes) -> None:
    (tmp_path / PROFILE_FILE).write_bytes(there)
    path = write_profile(profiled(), tmp_path)
    assert read_profiles(path.read_bytes()) == (profiled(),)


def test_a_profile_is_of_the_engine_that_was_named_or_chosen() -> None:
    chosen = profiled()
    assert chosen.holds("auto") and chosen.holds(chosen.engine) and not chosen.holds("other")
    named = msgspec.structs.replace(chosen, asked="other", engine="other")
    assert named.holds("other") and not named.holds("auto")


def test_a_profile_does_not_make_its_version_another(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_text("x")
    before = stamp(model)
    write_profile(profiled(), tmp_path)
    assert stamp(model) == before


def test_where_no_profile_can_be_written_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        write_profile(profiled(), tmp_path / "gone")


def bad(**changes: object) -> bytes:
    one = {**msgspec.to_builtins(profiled()), **changes}
    return msgspec.json.encode({"format": FORMAT, "profiles": [one]})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[1, 2]",
        b"\xff\xfe",
        bad()[:-9],
        msgspec.json.encode(Profiles(FORMAT + 1, (profiled(),))),
        msgspec.json.encode(Profiles(FORMAT, ())),
        msgspec.json.encode(Profiles(FORMAT, (profiled(), profiled()))),
        msgspec.json.encode({"format": 1, **msgspec.to_builtins(profiled())}),
        bad(figures=[]),
        bad(load_ns=-1),
        bad(extra=1),
        bad(figures=[msgspec.to_builtins(Figures(0, 1, 1, 5, 5, 0.1))]),
        bad(figures=[msgspec.to_builtins(Figures(1, 1, 1, 0, 5, 0.1))]),
        bad(figures=[msgspec.to_builtins(Figures(1, 1, 1, 5, 5, -0.1))]),
    ],
)
def test_a_file_that_is_no_profile_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="measure again"):
        read_profiles(data)


def test_the_table_has_a_median_for_each_size() -> None:
    found = profiled()
    assert len(found.table) == len(found.figures)
