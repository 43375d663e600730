"""Write the golden journal anew, after a change of the policy that was meant::

    PYTHONPATH=src python -m tests.replay.regenerate

Look at what ``cotenant replay tests/replay/golden`` says before: it names the first decision that
changed. The result depends on the policy alone, so running it twice changes nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from cotenant.telemetry.records import MAGIC, Entry, Header, block, read
from tests.replay.histories import record

GOLDEN = Path(__file__).parent / "golden"


def entries() -> list[Entry]:
    """A short history with every kind of event, without what differs from run to run."""
    with tempfile.TemporaryDirectory() as directory:
        record(Path(directory), seed=7, steps=600, segment_bytes=16_000)
        return [
            msgspec.structs.replace(entry, cotenant="golden", run="golden")
            if isinstance(entry, Header)
            else entry
            for entry in read(directory)
        ]


def main() -> None:
    """Replace the golden journal."""
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.cotj"):
        old.unlink()
    (GOLDEN / "00000001-golden.cotj").write_bytes(MAGIC + block(entries()))


if __name__ == "__main__":
    main()
