"""Arrival sources: their rates, their order, and what is said of a bad trace."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from cotenant.domain.errors import ConfigError
from cotenant.domain.units import S
from cotenant.sim.arrivals import (
    Arrivals,
    Bursts,
    Diurnal,
    Poisson,
    Recorded,
    Steps,
    Trace,
    read_trace,
    thin,
)


def until(arrivals: Arrivals, seconds: float, seed: int = 1) -> list[int]:
    times = arrivals.times(np.random.default_rng(seed))
    return list(itertools.takewhile(lambda t: t < seconds * S, times))


@pytest.mark.parametrize(
    ("arrivals", "rate"),
    [
        (Poisson(50), 50),
        (Bursts(rate=10, burst_rate=200, mean_quiet=3, mean_burst=1), (3 * 10 + 200) / 4),
        (Diurnal(rate=50, swing=0.8, period=10), 50),
        (Steps(((0, 20), (500, 80))), 50),
    ],
    ids=lambda x: type(x).__name__,
)
def test_rate_and_order(arrivals: Arrivals, rate: float) -> None:
    times = until(arrivals, 1000)
    assert times == sorted(times)
    assert len(times) == pytest.approx(1000 * rate, rel=0.1)


def test_a_seed_fixes_the_times() -> None:
    assert until(Poisson(50), 10, seed=3) == until(Poisson(50), 10, seed=3)
    assert until(Poisson(50), 10, seed=3) != until(Poisson(50), 10, seed=4)


def test_steps_follow_their_times() -> None:
    times = until(Steps(((0, 10), (100, 40))), 200)
    early = sum(t < 100 * S for t in times)
    assert len(times) - early == pytest.approx(4 * early, rel=0.25)


@pytest.mark.parametrize(
    "arrivals",
    [Poisson(50), Bursts(10, 200, 3, 1), Steps(((0, 20), (50, 80))), Trace((5, 9, 30) * 1000)],
    ids=lambda x: type(x).__name__,
)
def test_fewer_of_the_same_arrivals(arrivals: Arrivals) -> None:
    all_of_them = until(arrivals, 200)
    most, few = until(thin(arrivals, 0.8), 200), until(thin(arrivals, 0.2), 200)
    assert set(few) <= set(most) <= set(all_of_them)
    assert len(most) == pytest.approx(0.8 * len(all_of_them), rel=0.05)
    assert len(few) == pytest.approx(0.2 * len(all_of_them), rel=0.1)
    assert thin(thin(arrivals, 0.5), 0.4) == thin(arrivals, 0.2)


def test_recorded_requests_that_stay_keep_what_is_theirs() -> None:
    many = range(1000)
    found = thin(Recorded(*(tuple(range(k, 1000 + k)) for k in range(4))), 0.3)
    assert isinstance(found, Recorded)
    assert len(found.at) == pytest.approx(300, rel=0.15)
    assert set(found.at) <= set(many)
    assert [(a + 1, a + 2, a + 3) for a in found.at] == list(
        zip(found.rows, found.priorities, found.budgets, strict=True)
    )


def test_no_rate_gives_no_arrivals() -> None:
    assert until(Poisson(0), 10) == []


def test_a_trace_keeps_its_gaps_and_takes_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("at,x\n10,a\n11,b\n14,c\n")
    assert read_trace(path, "at").recorded == (0, S, 4 * S)
    assert read_trace(path, "at", rate=1.0).recorded == (0, S // 2, 2 * S)
    path.write_text("TIMESTAMP\n2023-11-16 18:17:03.9799600\n2023-11-16 18:17:04.0319600\n")
    assert read_trace(path, "TIMESTAMP").recorded[1] == pytest.approx(0.052 * S, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("when\n1\n2\n", "no column 'at'; its columns: when"),
        ("", "no column 'at'; its columns: none"),
        ("at\n1\n3\n2\n", "line 4: earlier than the line before"),
        ("at\n1\n1\n2\n", "line 3: the same time as the line before"),
        ("at\n1\nsoon\n", "line 3: 'soon' is neither seconds nor an ISO date"),
        ("at\n1\n", "at least two different times"),
        ("at\n1\nnan\n", "line 3: 'nan' is neither seconds nor"),
        ("at\n1\ninf\n", "line 3: 'inf' is neither seconds nor"),
        ("at\n" + "1" * 200_000 + "\n", "not a CSV file"),
    ],
)
def test_a_bad_trace_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"bad.csv.*{said}"):
        read_trace(path, "at")


def test_a_trace_from_a_spreadsheet_is_read_and_a_binary_one_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfat\n1\n2\n")
    assert read_trace(path, "at").recorded == (0, S)
    path.write_bytes(b"\xff\xfea\x00t\x00")
    with pytest.raises(ConfigError, match="not a CSV file in UTF-8"):
        read_trace(path, "at")


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(tmp_path / "none.csv", "at")
