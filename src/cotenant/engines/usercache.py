"""What engines keep between loads, in the user's cache (``$XDG_CACHE_HOME/cotenant``)."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str) -> Path | None:
    """The folder of that name, this user's alone; None where there is no place for it."""
    own = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(own) if own.startswith("/") else Path.home() / ".cache"
        folder = folder / "cotenant" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError):  # no home, or none that can be written to
        return None
    others = about.st_uid != os.geteuid() or about.st_mode & 0o022
    return None if others or not os.access(folder, os.W_OK) else folder
