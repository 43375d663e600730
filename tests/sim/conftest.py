"""Runs that take long, on all cores."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import pytest


@pytest.fixture(scope="package")
def cores() -> Iterator[Executor]:
    """For runs that do not depend on each other."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        yield pool
