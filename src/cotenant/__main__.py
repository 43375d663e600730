"""``python -m cotenant`` is the ``cotenant`` command."""

import sys

from cotenant.cli.main import main

sys.exit(main())
