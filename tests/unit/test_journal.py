"""The journal: nothing is lost unsaid, and the node never pays for a bad disk."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cotenant.domain import actions as a
from cotenant.domain import events as e
from cotenant.domain.errors import JournalError
from cotenant.domain.plan import EMPTY_PLAN
from cotenant.domain.snapshot import Snapshot
from cotenant.domain.units import MS, S
from cotenant.policy.dispatcher import Dispatcher
from cotenant.policy.planner import Planner
from cotenant.telemetry import journal as module
from cotenant.telemetry.journal import Gap, Header, Journal, PlanRecord, Record, checkpoint, read
from cotenant.telemetry.records import BLOCK, MAGIC, Entry, block, segments
from cotenant.telemetry.segments import SegmentFiles
from tests.builders import cpu


class Node:
    """A dispatcher that writes a journal, and how often it was asked for a checkpoint."""

    def __init__(self, directory: Path, **kwargs: int) -> None:
        self.dispatcher, self.planner = Dispatcher((cpu(2),)), Planner()
        self.now = 1 * S
        self.checkpoints = 0
        self.journal = Journal(directory, self._checkpoint, **kwargs)

    def _checkpoint(self) -> Header:
        self.checkpoints += 1
        return checkpoint(self.dispatcher, self.planner, self.now, 1000.0 + self.now / S)

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1 * MS
            event = e.Cancelled(self.now)
            self.journal.append(self.now, event, self.dispatcher.handle(self.now, event))


def wait_for(condition: Callable[[], object], timeout: float = 10.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.002)
    monkeypatch.setattr(module, "RETRY_S", 0.05)


class FullDisk:
    """``os.write`` of a disk that can be full; a write to it gets half-way first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self.attempts = 0
        self._write = os.write
        monkeypatch.setattr("cotenant.telemetry.segments.os.write", self.write)

    def write(self, fd: int, data: memoryview) -> int:
        if not self.full:
            return self._write(fd, data)
        self.attempts += 1
        if self.attempts % 2:
            return self._write(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    node = Node(tmp_path / "deep" / "journal")
    node.journal.open()
    order = e.WorkerUp("w", "s", "1", "cpu", ((1, 1, 5 * MS),))
    node.journal.append(7, order, [a.WakeAt("x", 9), a.Complete("x", batch=4, requests=(1, 2))])
    node.tick(3)
    node.journal.close()
    header, first, *rest = read(tmp_path / "deep" / "journal")
    assert isinstance(header, Header)
    assert header.dispatcher_state().now == 0
    assert header.cotenant and header.run and header.wall == 1001.0
    assert first == Record(7, order, (a.WakeAt("x", 9), a.Complete("x", batch=4, requests=(1, 2))))
    assert [type(r) for r in rest] == [Record] * 3
    assert (node.journal.dropped, node.journal.error) == (0, None)


def test_plans_and_their_snapshots_are_kept(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.journal.open()
    snapshot = cpu_snapshot()
    plan = node.planner.plan(snapshot)
    assert plan is not None
    node.journal.append_plan(5, snapshot, plan)
    node.journal.append_plan(6, snapshot, None)
    node.tick()
    node.journal.close()
    plans = list(read(tmp_path, kinds=(PlanRecord,)))
    assert plans == [PlanRecord(5, snapshot, plan), PlanRecord(6, snapshot, None)]


def cpu_snapshot() -> Snapshot:
    return Snapshot(1 * S, (cpu(2),), EMPTY_PLAN, (), ())


def test_segments_rotate_and_the_oldest_go(tmp_path: Path) -> None:
    node = Node(tmp_path, segment_bytes=2000, keep=3)
    node.journal.open()
    for _ in range(50):
        node.tick(20)
    node.journal.close()
    found = segments(tmp_path)
    assert len(found) == 3
    assert node.checkpoints > 5
    records: list[Record] = []
    for path in found:
        first, *rest = read(path)
        assert isinstance(first, Header), "every segment starts with a checkpoint"
        records += [r for r in rest if isinstance(r, Record)]
    times = [r.now for r in records]
    assert times == list(range(times[0], times[0] + len(times) * MS, MS)), "nothing is missing"
    assert times[-1] == node.now


def test_each_start_begins_a_segment_whose_name_sorts_last(tmp_path: Path) -> None:
    for _ in range(3):
        node = Node(tmp_path)
        node.journal.open()
        node.tick()
        node.journal.close()
    headers = [entry for entry in read(tmp_path) if isinstance(entry, Header)]
    assert len(segments(tmp_path)) == len(headers) == 3
    assert len({h.run for h in headers}) == 3


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_record_is_reported_and_the_rest_read(tmp_path: Path, cut: int) -> None:
    node = Node(tmp_path)
    node.journal.open()
    node.tick(20)
    node.journal.close()
    (path,) = segments(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    *entries, last = read(tmp_path)
    assert isinstance(last, Gap)
    assert path.name in last.reason and "offset" in last.reason
    assert 17 <= len(entries) - 1 <= 19


def test_a_file_cut_anywhere_is_read_without_an_error(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.journal.open()
    node.tick(5)
    node.journal.close()
    (path,) = segments(tmp_path)
    data = path.read_bytes()
    whole = {len(MAGIC)}
    """Lengths at which no block is cut: how many there are is the writer's affair."""
    while max(whole) < len(data):
        length, _ = BLOCK.unpack_from(data, max(whole))
        whole.add(max(whole) + BLOCK.size + length)
    most = 0
    for length in range(len(data)):
        path.write_bytes(data[:length])
        entries = list(read(path))
        assert length in whole or isinstance(entries[-1], Gap)
        assert len(entries) >= most
        most = len(entries) - 1
    path.write_bytes(data + bytes(4096))  # some file systems leave zeros after a power failure
    assert isinstance(list(read(path))[-1], Gap)


def test_a_killed_node_leaves_a_readable_journal(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
from pathlib import Path
from tests.unit.test_journal import Node
node = Node(Path(sys.argv[1]))
node.journal.open()
node.tick(500)
time.sleep(0.3)
node.tick(500)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == -9
    assert sum(isinstance(r, Record) for r in read(tmp_path)) >= 500


def test_damage_names_file_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "1.cotj"
    record = Record(1, e.Woke(), ())
    good = MAGIC + block([record])
    bad = bytearray(block([record, record]))
    bad[BLOCK.size + 12] ^= 0xFF
    path.write_bytes(good + bytes(bad) + block([record]))
    read_so_far = []
    with pytest.raises(JournalError, match=f"1.cotj: damaged at offset {len(good)}"):
        read_so_far.extend(read(path))
    # extend() keeps what came before the error
    assert read_so_far == [record]


def test_a_record_of_another_shape_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "1.cotj"
    path.write_bytes(MAGIC + block([["Record", 1, ["Unheard", 1], []]]))  # type: ignore[list-item]
    with pytest.raises(JournalError, match=r"1\.cotj: the record at offset .* none that this"):
        list(read(path))


def test_another_format_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "1.cotj"
    path.write_bytes(b"cotenant journal 3\n\x00\x01")
    with pytest.raises(
        JournalError, match=r"journal format 3, this Cotenant reads 2; use the Cotenant"
    ):
        list(read(path))
    path.write_bytes(b"PNG and more")
    with pytest.raises(JournalError, match="not a journal of Cotenant"):
        list(read(path))
    with pytest.raises(JournalError, match="no journal segments"):
        list(read(tmp_path / "..", kinds=(Header,)))
    with pytest.raises(JournalError, match="cannot be read: No such file"):
        list(read(tmp_path / "none.cotj"))


def test_a_full_disk_costs_records_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk(monkeypatch)
    node = Node(tmp_path)
    node.journal.open()
    node.tick(10)
    wait_for(
        lambda: any(isinstance(r, Record) for r in read(tmp_path)) if segments(tmp_path) else 0
    )
    with caplog.at_level(logging.INFO, "cotenant.journal"):
        disk.full = True
        node.tick(10)
        wait_for(lambda: node.journal.error)
        assert "No space left on device" in (node.journal.error or "")
        while disk.attempts < 12:  # several attempts fail
            node.tick()
            time.sleep(0.002)
        assert [r.levelname for r in caplog.records] == ["WARNING"], "it is said once"
        disk.full = False

        def writes_again() -> bool:
            node.tick()
            return node.journal.error is None

        wait_for(writes_again)
        node.tick(10)
        node.journal.close()
        assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    entries = list(read(tmp_path))
    (gap,) = [entry for entry in entries if isinstance(entry, Gap)]
    kept = sum(isinstance(entry, Record) for entry in entries)
    written = (node.now - 1 * S) // MS
    assert gap.records == node.journal.dropped == written - kept > 0
    assert isinstance(entries[entries.index(gap) + 1], Header)
    assert "No space left" in gap.reason and 1 * S < gap.since < gap.until < node.now


def test_a_full_tmpfs_is_survived(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        node = Node(small / "journal")
        node.journal.open()
        node.tick(5)
        wait_for(lambda: segments(small / "journal"))
        wait_for(lambda: list(read(small / "journal")))
        node.tick(5000)
        wait_for(lambda: node.journal.error)
        node.journal.close()
        assert node.journal.dropped > 0
        assert list(read(small / "journal")), "what fitted is readable"
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_directory_that_cannot_be_made_sets_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    node = Node(tmp_path / "file" / "journal")
    node.journal.open()
    node.tick(5)
    wait_for(lambda: node.journal.error)
    node.journal.close()
    assert node.journal.dropped == 5
    assert str(tmp_path / "file") in (node.journal.error or "")


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    write = SegmentFiles.write

    def slow(self: SegmentFiles, data: bytes) -> None:
        time.sleep(0.05)
        write(self, data)

    monkeypatch.setattr(SegmentFiles, "write", slow)


def test_a_slow_disk_drops_counts_and_goes_on_from_a_checkpoint(
    tmp_path: Path, slow_disk: None
) -> None:
    node = Node(tmp_path, buffer_bytes=2000)
    node.journal.open()
    node.tick(500)
    assert node.journal.dropped > 0
    dropped = node.journal.dropped

    def goes_on() -> bool:
        node.tick()
        return node.checkpoints > 1

    wait_for(goes_on)
    node.tick(5)
    node.journal.close()
    entries = list(read(tmp_path))
    gap = next(entry for entry in entries if isinstance(entry, Gap))
    assert gap.records >= dropped
    after = entries[entries.index(gap) + 1 :]
    assert isinstance(after[0], Header)
    assert any(isinstance(entry, Record) for entry in after)
    assert_accounted(entries, node)


def test_what_is_dropped_until_the_end_is_counted_in_the_journal(
    tmp_path: Path, slow_disk: None
) -> None:
    node = Node(tmp_path, buffer_bytes=2000)
    node.journal.open()
    node.tick(500)
    node.journal.close()
    entries = list(read(tmp_path))
    assert isinstance(entries[-1], Gap)
    assert_accounted(entries, node)


def assert_accounted(entries: list[Entry], node: Node) -> None:
    """All that was appended is there, or counted as lost."""
    lost = sum(entry.records for entry in entries if isinstance(entry, Gap))
    kept = sum(isinstance(entry, Record) for entry in entries)
    assert lost + kept == (node.now - 1 * S) // MS and lost == node.journal.dropped


def test_what_cannot_be_encoded_never_reaches_the_node(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.journal.open()
    node.journal.append(1, e.Cancelled(2**80), [])
    node.tick(3)
    node.journal.close()
    kinds = [type(entry) for entry in read(tmp_path)]
    assert kinds == [Header, Gap, Header, Record, Record, Record]
    assert node.journal.dropped == 1


def test_a_checkpoint_that_fails_never_reaches_the_node(tmp_path: Path) -> None:
    def broken() -> Header:
        raise RuntimeError("no state")

    journal = Journal(tmp_path, broken)
    journal.open()
    journal.append(1, e.Woke(), [])
    assert journal.error is not None and journal.dropped == 1
    journal.close()


def test_a_closed_journal_takes_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.tick()
    node.journal.open()
    node.journal.close()
    node.tick()
    node.journal.close()
    assert node.journal.dropped == 2
