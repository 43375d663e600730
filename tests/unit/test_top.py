"""``cotenant top``: what keys mean, what is remembered, and that it can be read at 80 columns."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from cotenant.cli.top import view
from cotenant.cli.top.keys import keys_in
from cotenant.cli.top.state import (
    DOWN,
    ENTER,
    ERASE,
    ESCAPE,
    SORTS,
    SPAN_S,
    UP,
    History,
    Mode,
    Order,
    Row,
    Top,
    rows_of,
)
from cotenant.telemetry.explain import Explanation, Incident, RefusalGroup
from tests.unit.test_views import nulls, status


def box(services: int = 2, jobs: int = 3) -> dict[str, Any]:
    """A status with so many of each; the last of them have the highest figures."""
    whole = status()
    service, job = whole["services"][0], whole["jobs"][0]
    return {
        **whole,
        "services": [
            {**service, "name": f"s{i}", "rate": float(i), "p99_ms": 10.0 * i}
            for i in range(services)
        ],
        "jobs": [{**job, "id": f"id{i}", "name": f"j{i}", "rate": float(i)} for i in range(jobs)],
    }


def top(**kwargs: int) -> Top:
    made = Top()
    made.see(0.0, box(**kwargs))
    return made


def press(made: Top, *keys: str) -> Order | None:
    order = None
    for key in keys:
        order = made.press(key)
    return order


def names(made: Top) -> list[str]:
    return [row.name for row in made.rows]


def drawn(picture: Any, width: int = 80, height: int = 24) -> list[str]:
    """The lines of a picture on a terminal of that size."""
    console = Console(width=width, height=height, force_terminal=True, color_system=None)
    options = console.options.update(height=height)
    lines = console.render_lines(picture, options, pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


# --- keys ---------------------------------------------------------------------------------------


def test_keys_of_a_terminal_are_told_apart() -> None:
    assert keys_in("j\x1b[A\x1b[B\x1bOA\r\x7fž") == ["j", UP, DOWN, UP, ENTER, ERASE, "ž"]
    assert keys_in("\x1b") == [ESCAPE]
    assert keys_in("\x1b[5~\x1b[1;5Cq") == ["q"]
    assert keys_in("\x1b[") == []


def test_a_row_is_selected_and_kept_while_others_come_and_go() -> None:
    made = top()
    assert made.selected == made.rows[0]
    press(made, DOWN, "j", "j")
    assert made.selected is not None and made.selected.name == "j1"
    made.see(1.0, box(services=1))
    assert made.selected is not None and made.selected.name == "j1"
    press(made, *[UP] * 9)
    assert made.selected is not None and made.selected.name == "s0"
    press(made, *["j"] * 9)
    assert made.selected is not None and made.selected.name == "j2"
    made.see(2.0, box(services=0, jobs=0))
    assert made.selected is None
    assert press(made, UP, DOWN, ENTER, "h", "c", "l") is None


def test_rows_are_sorted_within_services_and_jobs() -> None:
    made = top()
    seen = []
    for _ in SORTS:
        seen.append((made.sort, names(made)))
        press(made, "s")
    listed, turned = ["s0", "s1", "j0", "j1", "j2"], ["s1", "s0", "j2", "j1", "j0"]
    assert dict(seen)["rate"] == turned
    assert dict(seen)["name"] == listed
    assert (made.sort, names(made)) == seen[0]


def test_a_filter_leaves_what_matches_and_is_typed_like_text() -> None:
    made = top()
    press(made, "/", "J", "q", ERASE)
    assert made.mode is Mode.FILTER and not made.over
    assert names(made) == ["j0", "j1", "j2"]
    press(made, "2", ENTER)
    assert (made.mode, names(made)) == (Mode.LIST, ["j2"])
    press(made, ESCAPE)
    assert len(names(made)) == 5
    press(made, "/", "x", ESCAPE)
    assert len(names(made)) == 5


def test_a_job_is_held_let_go_and_cancelled_only_once_that_is_confirmed() -> None:
    made = top(services=1, jobs=1)
    assert press(made, "h") is None, "a service cannot be held"
    assert made.message
    order = press(made, DOWN, "h")
    assert order is not None and (order.what, order.row.id) == ("hold", "id0")
    held = box(services=1, jobs=1)
    held["jobs"][0]["held"] = True
    made.see(1.0, held)
    order = press(made, "h")
    assert order is not None and order.what == "resume"
    for other in ("n", "c", ESCAPE, "q"):
        assert press(made, "c", other) is None
        assert made.mode is Mode.LIST and not made.over
    order = press(made, "c", "y")
    assert order is not None and (order.what, order.row.id) == ("cancel", "id0")
    press(made, "c")
    made.see(2.0, box(services=1, jobs=0))
    order = press(made, "y")
    assert order is not None and order.row.id == "id0", "what was asked about, not what is there"


def test_log_and_explanation_are_pages_to_come_back_from() -> None:
    made = top()
    for key, what, mode in (("l", "log", Mode.LOG), (ENTER, "explain", Mode.EXPLAIN)):
        order = press(made, key)
        assert order is not None and (order.what, order.row) == (what, made.selected)
        assert made.mode is mode
        press(made, "q")
        assert made.mode is Mode.LIST and not made.over
    press(made, "q")
    assert made.over


# --- figures ------------------------------------------------------------------------------------


def test_a_minute_of_figures_is_kept_by_row() -> None:
    history = History()
    row = Row("job", "a", "a", {"rate": 1.0})
    for second in range(200):
        history.note(float(second), [Row("job", "a", "a", {"rate": float(second >= 169)})])
    cells = history.cells("job:a", "rate", 199.0, 10)
    assert cells == [0.0] * 5 + [1.0] * 5
    assert history.cells("job:a", "rate", 199.0 + SPAN_S / 2, 10) == [1.0] * 6 + [None] * 4
    assert history.cells("job:b", "rate", 199.0, 4) == [None] * 4
    history.note(200.0, [])
    assert history.cells("job:a", "rate", 200.0, 4) == [None] * 4
    assert row.matches("JOB")


def test_a_sparkline_is_as_high_as_its_values() -> None:
    assert view.sparkline([0.0, 7.0, None, 3.5]).plain == "▁█ ▅"
    assert view.sparkline([0.0, 0.0]).plain == "▁▁"
    assert view.sparkline([5.0], objective=10.0).plain != "█"
    assert "red" in {str(s.style) for s in view.sparkline([5.0, 15.0], objective=10.0).spans}


@pytest.mark.parametrize("width", [80, 120, 200])
def test_it_can_be_read_at_80_columns(width: int) -> None:
    made = top()
    for second in range(61):
        made.see(float(second), box())
    lines = drawn(view.picture(made, box(), 60.0, (width, 24)), width)
    assert len(lines) == 24
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for word in ("s0", "j2", "p99 ms", "REFUSED", "GRANTED", "cpu:0", "98.2%", "running"):
        assert word in text
    assert "…" not in lines[-1], "all keys are named"
    assert sum(bar in text for bar in view.BARS) >= 2


def test_before_anything_was_measured_and_on_a_small_terminal_it_is_drawn_too() -> None:
    made = Top()
    made.see(0.0, nulls(box()))
    assert drawn(view.picture(made, nulls(box()), 0.0, (80, 24)))
    made.see(0.0, {"jobs": [], "services": [], "partitions": []})
    assert drawn(view.picture(made, {}, 0.0, (80, 24)))
    made = top(jobs=100)
    press(made, *[DOWN] * 60)
    lines = drawn(view.picture(made, box(jobs=100), 0.0, (80, 24)))
    assert len(lines) == 24
    assert any(line.startswith("j58 ") for line in lines), "the selected row is among those shown"
    assert len(drawn(view.picture(made, box(), 0.0, (40, 8)), 40, 8)) == 8


def test_the_end_of_a_log_is_shown_without_its_control_characters() -> None:
    data = "".join(f"line {i}\x1b[31m\n" for i in range(100)).encode() + b"\xff last"
    lines = drawn(view.page("log", view.log_text(data), end=True))
    assert len(lines) == 24
    assert "\x1b" not in "".join(lines)
    assert lines[-3].endswith("last")


def test_what_is_explained_is_about_the_row() -> None:
    told = Explanation(
        asked=9.0,
        refusals=[RefusalGroup("a", "OVERLOADED", "m"), RefusalGroup("b", "OVERLOADED", "m")],
        jobs=[Incident(1.0, "id1", "started"), Incident(1.0, "id2", "started")],
        workers=[Incident(1.0, "a#1", "lost"), Incident(1.0, "ab#1", "lost")],
    )
    service = view.concerning(told, Row("service", "a", "a", {}))
    assert [r.service for r in service.refusals] == ["a"]
    assert [w.subject for w in service.workers] == ["a#1"]
    job = view.concerning(told, Row("job", "id1", "train", {}))
    assert [j.subject for j in job.jobs] == ["id1"]
    assert job.refusals == []
    row = rows_of(box())[-1]
    lines = drawn(view.page("why", view.explanation(row, told)))
    assert "started" in "".join(lines) and "loss=" in "".join(lines)
