"""``python -m cotenant.engines.cuda [GPU]``: what a worker could use of a GPU, as JSON.

In a process of its own: to ask this makes a context, which takes memory of the GPU.
"""

from __future__ import annotations

import json
import sys

from cotenant.domain.errors import ModelError
from cotenant.engines.cuda.driver import Gpu
from cotenant.engines.cuda.subsets import Subsets


def probe(which: str) -> dict[str, object]:
    """SMs of the GPU and of a unit, how many units, and the highest priority; raises
    ModelError."""
    gpu = Gpu(which)
    gpu.open()
    subsets = Subsets(gpu)
    try:
        subsets.open()
        return {
            "sms": subsets.sms,
            "unit_sms": subsets.unit_sms,
            "units": len(subsets.units),
            "priority": gpu.highest(),
            "refusal": subsets.refusal,
        }
    finally:
        subsets.close()
        gpu.close()


def main() -> int:
    """Print it; 1 where there is no such GPU."""
    try:
        found = probe(sys.argv[1] if len(sys.argv) > 1 else "0")
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
