"""Jobs as users see them."""

from __future__ import annotations

import pytest

from cotenant.domain.workload import JobSpec
from cotenant.runtime.joblive import MOST_SHOWN, status_of
from cotenant.runtime.jobstore import JobRecord


def shown(*command: str) -> tuple[str, ...]:
    spec = JobSpec("j", "train", command, "/")
    return status_of(JobRecord(spec, created=0.0), None).command


def test_a_command_is_shown_as_it_is() -> None:
    assert shown("python", "train.py", "") == ("python", "train.py", "")


@pytest.mark.parametrize(
    "command",
    [
        ("x" * 10 * MOST_SHOWN,),
        ("python", *["x"] * 10 * MOST_SHOWN),
        ("a", "b" * MOST_SHOWN, "c"),
        ("",) * 10 * MOST_SHOWN,
    ],
    ids=["one word", "many words", "in the middle", "no letters"],
)
def test_of_a_long_one_only_the_beginning(command: tuple[str, ...]) -> None:
    found = shown(*command)
    assert len(found) <= MOST_SHOWN + 1 and sum(map(len, found)) <= MOST_SHOWN + 1
    assert "".join(command).startswith("".join(found).rstrip("…"))
