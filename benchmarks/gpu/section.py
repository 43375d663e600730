"""One section in a process of its own: ``section.py SETTING``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from record import Record, Setting


def main() -> None:
    """Run the module of the section's name; what it finds is in the file that the setting names."""
    setting = Setting.read(Path(sys.argv[1]))
    record = Record(Path(setting.out), setting.seconds)
    record.write()
    importlib.import_module(setting.name).run(setting, record)


if __name__ == "__main__":
    main()
