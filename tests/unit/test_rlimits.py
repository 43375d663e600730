"""Resource limits of a tenant's process."""

from __future__ import annotations

import resource
import subprocess
import sys

from cotenant.runtime.rlimits import limit, lower

CORE = resource.RLIMIT_CORE


def test_a_hard_limit_that_is_lower_stays() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        limit({CORE: (10, 20)}, process.pid)
        assert resource.prlimit(process.pid, CORE) == (10, 20)
        limit({CORE: (15, 30)}, process.pid)
        assert resource.prlimit(process.pid, CORE) == (15, 20)
        limit({CORE: (resource.RLIM_INFINITY, resource.RLIM_INFINITY)}, process.pid)
        assert resource.prlimit(process.pid, CORE) == (20, 20)
    finally:
        process.kill()
        process.communicate()
    limit({CORE: (1, 1)}, process.pid)  # it is gone


def test_anything_is_lower_than_infinity() -> None:
    assert lower(resource.RLIM_INFINITY, 5) == lower(5, resource.RLIM_INFINITY) == 5
    assert lower(resource.RLIM_INFINITY, resource.RLIM_INFINITY) == resource.RLIM_INFINITY
