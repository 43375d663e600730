"""The ``cotenant`` command, also ``python -m cotenant``."""

from __future__ import annotations

import sys


def main() -> int:
    """See ``cotenant.cli.main``; a package that is missing is said in one line."""
    try:
        from cotenant.cli.main import main as command
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "cotenant"):
            raise
        fix = f"{sys.executable} -m pip install --force-reinstall cotenant"
        print(f"cotenant: the package {package} is missing; try: {fix}", file=sys.stderr)
        return 1
    return command()


if __name__ == "__main__":
    sys.exit(main())
