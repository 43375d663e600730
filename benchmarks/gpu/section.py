"""One section in a process of its own: ``section.py SETTING``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from driver import DriverError
from record import Record, Setting


def main() -> None:
    """Run the module of the section's name; what it finds is in the file that the setting names."""
    setting = Setting.read(Path(sys.argv[1]))
    record = Record(Path(setting.out), setting.seconds)
    record.write()
    try:
        importlib.import_module(setting.name).run(setting, record)
    except DriverError as error:  # outside of any part: nothing can be done
        record.without(setting.name, str(error))


if __name__ == "__main__":
    main()
