"""Waiting for what does not answer."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from cotenant.kube.waiting import Backoff


@given(st.integers(0, 4000))
def test_waits_grow_up_to_a_bound_however_long_nothing_answers(outage: int) -> None:
    backoff = Backoff(1.0, 60.0)
    waits = [backoff.take() for _ in range(outage)]
    assert all(0 < wait <= 60.0 for wait in waits)
    assert outage < 10 or waits[-1] > waits[0]
    backoff.reset()
    assert backoff.take() <= 1.0


def test_whoever_is_to_end_does_not_wait() -> None:
    stop = threading.Event()
    stop.set()
    assert Backoff(3600.0, 3600.0).wait(stop)
