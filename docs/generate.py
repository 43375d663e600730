"""Write the parts of the docs that are made from the code; ``--check`` only compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cotenant.domain.protocol import answer_table
from cotenant.domain.workload import JOB_TRANSITIONS
from cotenant.policy.state import HOLD_TRANSITIONS

TARGET = Path(__file__).parent / "protocol.md"


def document() -> str:
    """docs/protocol.md as the code has it now."""
    return "\n".join(
        [
            "# Actions, answers, life cycles",
            "",
            "Made from the code by `python docs/generate.py`; do not edit.",
            "",
            "## Actions and the events that answer them",
            "",
            "An action that takes time is answered by exactly one of its events. Where a failure",
            "and an ordinary answer cross, the first counts and the other is ignored.",
            "",
            answer_table(),
            "",
            "## How a job stands to a partition",
            "",
            "```mermaid",
            "stateDiagram-v2",
            "    [*] --> NONE",
            *(
                f"    {state.name} --> {to.name}: {event}"
                for state, steps in HOLD_TRANSITIONS.items()
                for event, to in steps.items()
            ),
            "```",
            "",
            "## Life of a job",
            "",
            "```mermaid",
            "stateDiagram-v2",
            "    [*] --> queued",
            *(
                f"    {state.value} --> {to.value}"
                for state, targets in JOB_TRANSITIONS.items()
                for to in sorted(targets, key=lambda s: s.value)
            ),
            "```",
            "",
        ]
    )


def main() -> int:
    """Write or compare; 1 if the file is not what the code says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        TARGET.write_text(document())
        return 0
    if TARGET.read_text() == document():
        return 0
    print(f"{TARGET.name} is out of date; run: python docs/generate.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
