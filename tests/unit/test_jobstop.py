"""In which order the processes of a job hear that it is to stop."""

from __future__ import annotations

from cotenant.runtime.jobstop import Stop

SHIM, ROOT, CHILD, GRANDCHILD, DAEMON = 1, 10, 11, 12, 13
TREE = {ROOT: SHIM, CHILD: ROOT, GRANDCHILD: CHILD, DAEMON: SHIM}


def test_the_command_hears_of_it_alone() -> None:
    stop = Stop(0.0, 8.0, SHIM, ROOT)
    assert stop.due(0.0, TREE) == [ROOT]
    assert stop.due(1.0, TREE) == []


def test_children_hear_when_their_parent_has_ended_one_generation_at_a_time() -> None:
    stop = Stop(0.0, 8.0, SHIM, ROOT)
    stop.due(0.0, TREE)
    orphans = {CHILD: SHIM, GRANDCHILD: CHILD, DAEMON: SHIM}
    assert stop.due(0.1, orphans) == [CHILD, DAEMON]
    assert stop.due(0.2, orphans) == []
    assert stop.due(0.3, {GRANDCHILD: SHIM, DAEMON: SHIM}) == [GRANDCHILD]


def test_a_command_that_does_not_end_leaves_time_for_each_generation() -> None:
    stop, told = Stop(0.0, 8.0, SHIM, ROOT), dict[int, float]()
    for tenth in range(80):
        for pid in stop.due(tenth / 10, TREE):
            assert pid not in told
            told[pid] = tenth / 10
    assert told[ROOT] < told[CHILD] < told[GRANDCHILD] < stop.ends
    assert told[ROOT] < told[DAEMON] < stop.ends


def test_who_is_born_later_hears_of_it_too() -> None:
    stop = Stop(0.0, 8.0, SHIM, ROOT)
    stop.due(0.0, TREE)
    assert stop.due(0.1, {14: SHIM}) == [14]
    assert stop.due(0.2, {15: SHIM}) == [15]


def test_without_a_command_all_that_it_left_hears() -> None:
    stop = Stop(0.0, 8.0, SHIM, ROOT)
    assert stop.due(0.0, {DAEMON: SHIM, 14: DAEMON}) == [DAEMON]
