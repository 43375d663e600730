"""The durable job queue: one SQLite file that survives the daemon and the machine.

What a user was told (a job was accepted, a job has ended) is on the disk before the call
returns (``synchronous=FULL``). The steps between are written through the operating system only
(``NORMAL``): they outlive a crash of the daemon, and after a loss of power no process is left
that they could describe. The write-ahead log keeps the file sound in either case.

The daemon's loop is the only writer. One commit costs some 0.1 ms, with a sync to disk a few.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cotenant.domain.device import Launch
from cotenant.domain.errors import EnvironmentProblem, InvalidRequest, NotFound
from cotenant.domain.reservation import Adopted
from cotenant.domain.workload import ENDED_STATES, JOB_ENDED, JOB_TRANSITIONS, JobSpec, JobState

SCHEMA_VERSION = 1
APPLICATION_ID = 0x434F544E  # "COTN": another program's database is refused, not written into

_SCHEMA = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    record BLOB NOT NULL
) STRICT
"""


class JobRecord(msgspec.Struct, frozen=True):
    """A job and where it stands. Times are wall-clock seconds since 1970, 0 if not yet."""

    spec: JobSpec
    created: float
    state: JobState = JobState.QUEUED
    held: bool = False
    """A user holds it: it is not started, and if it runs it gets no partition."""
    run: str = ""
    """Id of the current or last run; empty before the first."""
    shim_pid: int = 0
    pid: int = 0
    """Root process of the run, 0 unless it is there."""
    restarts: int = 0
    streak: int = 0
    """Restarts in a row, each after a run too short to count as healthy."""
    exit_code: int | None = None
    """Of the last run; -N if signal N ended it."""
    reason: str = ""
    started: float = 0.0
    finished: float = 0.0
    progress: float = 0.0
    progress_unit: str = ""
    cpu_s: float = 0.0
    """CPU seconds used by the runs that have ended."""
    apart: tuple[str, ...] = ()
    """Devices on which it was seen to compute where they cannot hold it back."""
    adopted: tuple[Adopted, ...] = ()
    """Processes that somebody else started for it."""
    launch: Launch | None = None
    """What its devices want of those."""
    checkpoint: str = ""
    """Path or URL of the newest checkpoint it reported: its next run is told."""
    checkpoint_step: float | None = None
    checkpoint_at: float = 0.0
    ran_s: float = 0.0
    """How long the runs took that have ended."""
    overdue: bool = False
    """It was stopped because its time was over."""
    met: tuple[str, ...] = ()
    """Of the jobs that it comes after, those that have succeeded."""

    @property
    def waits_for(self) -> tuple[str, ...]:
        """Jobs that have to succeed first."""
        return tuple(id for id in self.spec.after if id not in self.met)

    @property
    def ended(self) -> bool:
        """Whether no step leads on from its state."""
        return self.state in JOB_ENDED


def advance(record: JobRecord, to: JobState, **fields: Any) -> JobRecord:
    """The record after a step to ``to`` with ``fields`` changed.

    The same state again is no step and always allowed. Raises ``ValueError`` for a step that
    ``JOB_TRANSITIONS`` lacks (a bug of the caller), ``TypeError`` for an unknown field.
    """
    if to is not record.state and to not in JOB_TRANSITIONS[record.state]:
        legal = ", ".join(sorted(s.value for s in JOB_TRANSITIONS[record.state])) or "nothing"
        raise ValueError(
            f"job {record.spec.id} cannot go from {record.state.value} to {to.value}; "
            f"legal next: {legal}"
        )
    return msgspec.structs.replace(record, state=to, **fields)


class JobStore:
    """See the module's text. ``open`` before use, ``close`` after; both may be repeated.

    Every method raises ``EnvironmentProblem`` if the file is damaged, its disk is full or it
    cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._db: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open or create the file; refuses damage, other programs' files and newer schemas."""
        if self._db is not None:
            return
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The specs hold users' environments: nobody else reads them.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            db = sqlite3.connect(self.path, isolation_level=None, timeout=1.0)
            try:
                self._prepare(db)
            except BaseException:
                db.close()
                raise
            self._db = db

    def close(self) -> None:
        """Write the log back into the file and let go of it."""
        if self._db is not None:
            db, self._db = self._db, None
            with self._explained():
                db.close()

    def add(self, spec: JobSpec, created: float) -> JobRecord:
        """Queue a job; it is on the disk on return. ``InvalidRequest`` if its id is taken."""
        record = JobRecord(spec=spec, created=created)
        try:
            with self._transaction(durable=True) as db:
                db.execute(
                    "INSERT INTO jobs (id, state, record) VALUES (?, ?, ?)",
                    (spec.id, record.state.value, msgspec.msgpack.encode(record)),
                )
        except sqlite3.IntegrityError:
            raise InvalidRequest(f"a job with the id {spec.id} exists; leave the id out") from None
        return record

    def get(self, id: str) -> JobRecord:
        """One job by its whole id; raises ``NotFound``."""
        with self._explained():
            return self._get(self._connection, id)

    def list(self) -> tuple[JobRecord, ...]:
        """All jobs, oldest first."""
        with self._explained():
            rows = self._connection.execute("SELECT record FROM jobs ORDER BY seq").fetchall()
        return tuple(self._decode(row[0]) for row in rows)

    def transition(self, id: str, to: JobState, **fields: Any) -> JobRecord:
        """Take a job one step on (see ``advance``, also for errors) and return it.

        A step to an end state is on the disk on return. Raises ``NotFound``.
        """
        with self._transaction(durable=to in JOB_ENDED) as db:
            record = advance(self._get(db, id), to, **fields)
            db.execute(
                "UPDATE jobs SET state = ?, record = ? WHERE id = ?",
                (to.value, msgspec.msgpack.encode(record), id),
            )
        return record

    def remove(self, id: str) -> None:
        """Forget a job that has ended; nothing happens if it is not there."""
        with self._transaction(durable=False) as db:
            ended = sorted(ENDED_STATES)
            marks = ", ".join("?" * len(ended))
            db.execute(f"DELETE FROM jobs WHERE id = ? AND state IN ({marks})", (id, *ended))

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise RuntimeError("JobStore used before open() or after close()")
        return self._db

    def _prepare(self, db: sqlite3.Connection) -> None:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and application != APPLICATION_ID:
            raise EnvironmentProblem(
                f"{self.path} is another program's database; choose another state directory"
            )
        if version > SCHEMA_VERSION:
            raise EnvironmentProblem(
                f"{self.path} has schema {version}, written by a newer Cotenant; this one knows "
                f"{SCHEMA_VERSION}: upgrade Cotenant or choose another state directory"
            )
        mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise EnvironmentProblem(
                f"{self.path} is on a file system without shared memory maps (a network "
                "mount?); put the state directory on a local disk"
            )
        db.execute("PRAGMA synchronous = FULL")
        if version == 0:
            db.execute("BEGIN IMMEDIATE")
            db.execute(_SCHEMA)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            db.execute("COMMIT")
        for suffix in ("", "-wal", "-shm"):  # also where somebody restored a copy
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").chmod(0o600)
        verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)

    def _get(self, db: sqlite3.Connection, id: str) -> JobRecord:
        row = db.execute("SELECT record FROM jobs WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise NotFound(f"there is no job with the id {id}")
        return self._decode(row[0])

    def _decode(self, data: bytes) -> JobRecord:
        try:
            return msgspec.msgpack.decode(data, type=JobRecord)
        except msgspec.DecodeError as error:
            raise self._damaged(str(error)) from error

    @contextlib.contextmanager
    def _transaction(self, durable: bool) -> Iterator[sqlite3.Connection]:
        with self._explained():
            db = self._connection
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's and the system's errors into what the user can do about them."""
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # a duplicate, or a bug of ours
        except sqlite3.OperationalError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_FULL:
                problem = f"the disk of the job store {self.path} is full; make room"
            elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                problem = f"the job store {self.path} is locked by another process; stop that one"
            else:
                problem = f"the job store {self.path} cannot be used: {error}"
            raise EnvironmentProblem(problem) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            problem = "its disk is full; make room" if full else str(error)
            raise EnvironmentProblem(f"the job store {self.path}: {problem}") from error

    def _damaged(self, detail: str) -> EnvironmentProblem:
        detail = " ".join(detail.split())
        return EnvironmentProblem(
            f"the job store {self.path} is damaged ({detail}); move it away (queued jobs must be "
            "submitted again) or restore a copy"
        )
