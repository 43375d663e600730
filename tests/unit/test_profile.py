"""What is made of measured times, and how the file of a profile is written and read."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cotenant.domain.errors import ConfigError, EnvironmentProblem
from cotenant.domain.profile import FORMAT, PROFILE_FILE, Figures, ModelProfile, read_profile
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
    assert read_profile(path.read_bytes()) == profiled()
    assert [entry.name for entry in tmp_path.iterdir()] == [PROFILE_FILE]


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
    return msgspec.json.encode({**msgspec.to_builtins(profiled()), **changes})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[1, 2]",
        b"\xff\xfe",
        msgspec.json.encode(profiled())[:-9],
        bad(format=FORMAT + 1),
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
        read_profile(data)


def test_the_table_has_a_median_for_each_size() -> None:
    found: ModelProfile = profiled()
    assert len(found.table) == len(found.figures)
