"""Controls of a process's own channel group: time slice, preempt, disable. Last, and alone."""

from __future__ import annotations

from record import Record, Setting


def run(setting: Setting, record: Record) -> None:
    """The shim has none."""
    record.without(setting.name, "not in this version: the shim has no controls of channels")
