"""Notation of people: durations and sizes always have units."""

from __future__ import annotations

import pytest

from cotenant.domain.units import MS, S, format_bytes, format_duration, parse_bytes, parse_duration


@pytest.mark.parametrize(
    ("text", "ns"),
    [("20ms", 20 * MS), ("1.5 s", 3 * S // 2), ("250us", 250_000), ("2m", 120 * S), ("0ms", 0)],
)
def test_durations_have_units(text: str, ns: int) -> None:
    assert parse_duration(text) == ns


@pytest.mark.parametrize("text", ["", "20", "ms", "-1ms", "1 ms 2", "1MS", "1e3ms", "1,5s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def test_sizes_are_binary_or_decimal_as_written() -> None:
    assert (parse_bytes("1KiB"), parse_bytes("1KB"), parse_bytes("1.5 MiB")) == (
        1024,
        1000,
        3 * 2**19,
    )
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes("1kb")


def test_short_forms_are_for_people() -> None:
    assert format_duration(4_560_000) == "4.56ms"
    assert format_duration(12) == "12ns"
    assert format_bytes(1536) == "1.5KiB"
    assert format_bytes(5 * 2**30) == "5GiB"
