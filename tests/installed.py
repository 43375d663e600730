"""The package that is tested: what is installed, or what ``PYTHONPATH`` puts before it."""

from __future__ import annotations

from pathlib import Path

import cotenant

SITE = str(Path(cotenant.__file__).parents[1])
"""The directory that it is imported from, for programs with an environment of their own."""
