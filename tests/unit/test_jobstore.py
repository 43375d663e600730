"""The durable job queue: what it keeps, what it refuses, what it says when it cannot."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from cotenant.domain.device import Launch
from cotenant.domain.errors import EnvironmentProblem, InvalidRequest, NotFound
from cotenant.domain.workload import JOB_TRANSITIONS, JobSpec, JobState, RestartPolicy
from cotenant.runtime.jobledger import JobLedger
from cotenant.runtime.jobrun import Outcome
from cotenant.runtime.jobspec import checked, environment, minimal
from cotenant.runtime.jobstore import JobRecord, JobStore, advance
from cotenant.runtime.jobverdict import RestartRules, verdict


def spec(id: str = "j1", **fields: object) -> JobSpec:
    return JobSpec(id=id, name="train", command=("true",), **fields)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path):
    store = JobStore(tmp_path / "state" / "jobs.db")
    store.open()
    yield store
    store.close()


def test_a_job_survives_the_store(store: JobStore) -> None:
    store.add(spec(env={"A": "ä"}, restart=RestartPolicy.ALWAYS), created=12.5)
    store.transition("j1", JobState.STARTING, run="r1", started=13.0)
    store.transition("j1", JobState.RUNNING, pid=7, shim_pid=6, progress=3.0)
    store.close()

    again = JobStore(store.path)
    again.open()
    record = again.get("j1")
    again.close()
    assert record.spec == spec(env={"A": "ä"}, restart=RestartPolicy.ALWAYS)
    assert (record.created, record.state, record.run) == (12.5, JobState.RUNNING, "r1")
    assert (record.pid, record.shim_pid, record.progress) == (7, 6, 3.0)


def test_jobs_are_listed_oldest_first_even_if_the_clock_goes_back(store: JobStore) -> None:
    for number, created in enumerate([30.0, 20.0, 10.0]):
        store.add(spec(f"j{number}"), created)
    assert [record.spec.id for record in store.list()] == ["j0", "j1", "j2"]


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("to", JobState)
def test_only_the_steps_of_the_table_are_legal(state: JobState, to: JobState) -> None:
    record = JobRecord(spec=spec(), created=0.0, state=state)
    if to is state or to in JOB_TRANSITIONS[state]:
        assert advance(record, to).state is to
    else:
        with pytest.raises(ValueError, match="cannot go from"):
            advance(record, to)


def test_an_illegal_step_changes_nothing(store: JobStore) -> None:
    store.add(spec(), 0.0)
    with pytest.raises(ValueError, match="legal next: cancelled, starting"):
        store.transition("j1", JobState.SUCCEEDED)
    assert store.get("j1").state is JobState.QUEUED
    assert store.transition("j1", JobState.CANCELLED).ended


def test_unknown_and_duplicate_jobs_are_named(store: JobStore) -> None:
    store.add(spec(), 0.0)
    with pytest.raises(InvalidRequest, match="j1"):
        store.add(spec(), 0.0)
    with pytest.raises(NotFound, match="j2"):
        store.get("j2")
    with pytest.raises(NotFound, match="j2"):
        store.transition("j2", JobState.STARTING)


def test_only_ended_jobs_are_removed(store: JobStore) -> None:
    store.add(spec(), 0.0)
    store.remove("j1")
    assert len(store.list()) == 1
    store.transition("j1", JobState.CANCELLED)
    store.remove("j1")
    assert not store.list()


def test_nobody_else_reads_the_environments(store: JobStore) -> None:
    store.add(spec(), 1.0)
    files = list(store.path.parent.glob(store.path.name + "*"))
    assert files
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    for file in files:
        file.chmod(0o644)  # as a copy would be
    again = JobStore(store.path)
    again.open()
    again.close()
    assert store.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "content",
    [b"not a database, but as long as a header of one", None],
    ids=["another file", "torn pages"],
)
def test_a_damaged_file_is_an_environment_problem(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "jobs.db"
    if content is None:
        store = JobStore(path)
        store.open()
        for number in range(200):
            store.add(spec(f"j{number}"), 0.0)
        store.close()
        data = bytearray(path.read_bytes())
        data[4096:12288] = b"\xa5" * 8192
        content = bytes(data)
    path.write_bytes(content)
    with pytest.raises(EnvironmentProblem, match=r"damaged .*; move it away"):
        JobStore(path).open()


def test_a_full_disk_is_an_environment_problem(store: JobStore) -> None:
    store._connection.execute("PRAGMA max_page_count = 8")  # the same SQLITE_FULL
    with pytest.raises(EnvironmentProblem, match="full"):
        for number in range(1000):
            store.add(spec(f"j{number}", env={"A": "x" * 1000}), 0.0)
    assert store.list()
    store._connection.execute("PRAGMA max_page_count = 1000")
    store.add(spec("later"), 0.0)
    assert store.get("later").state is JobState.QUEUED


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("PRAGMA user_version = 99", "newer Cotenant"),
        ("PRAGMA application_id = 1", "another program"),
    ],
)
def test_foreign_files_are_left_alone(tmp_path: Path, statement: str, problem: str) -> None:
    store = JobStore(tmp_path / "jobs.db")
    store.open()
    store.close()
    db = sqlite3.connect(store.path)
    db.execute(statement)
    db.close()
    with pytest.raises(EnvironmentProblem, match=problem):
        store.open()


def test_the_ledger_goes_on_while_the_store_cannot(store: JobStore) -> None:
    ledger = JobLedger(store)
    ledger.add(spec(), 0.0)
    store.close()
    store.open()
    write = store.transition

    def full(*args: object, **fields: object) -> JobRecord:
        raise EnvironmentProblem("full")

    store.transition = full  # type: ignore[method-assign]
    ledger.step("j1", JobState.STARTING, run="r1")
    ledger.step("j1", JobState.RUNNING, pid=5)
    assert ledger.records["j1"].state is JobState.RUNNING
    assert not ledger.saved
    assert store.get("j1").state is JobState.QUEUED

    store.transition = write  # type: ignore[method-assign]
    ledger.flush()
    assert ledger.saved
    assert store.get("j1") == ledger.records["j1"]


def test_references_are_ids_names_or_prefixes(store: JobStore) -> None:
    ledger = JobLedger(store)
    for id, name in [("abc1", "bert"), ("abd2", "bert"), ("fed3", "abc")]:
        ledger.add(JobSpec(id=id, name=name, command=("true",)), 0.0)
    assert ledger.resolve("abc1") == "abc1"
    assert ledger.resolve("bert") == "abd2"
    assert ledger.resolve("f") == "fed3"
    assert ledger.resolve("abc") == "fed3"
    with pytest.raises(NotFound, match="several jobs: abc1, abd2"):
        ledger.resolve("ab")
    with pytest.raises(NotFound, match="did you mean bert"):
        ledger.resolve("bret")
    with pytest.raises(NotFound, match="no job ''"):
        ledger.resolve("")


RUNNING = JobState.RUNNING
CASES = [
    # state, policy, outcome, closing, recovering -> next state, in its reason
    (RUNNING, "never", Outcome(code=0), 0, 0, "succeeded", ""),
    (RUNNING, "on-failure", Outcome(code=0), 0, 0, "succeeded", ""),
    (RUNNING, "always", Outcome(code=0), 0, 0, "backoff", ""),
    (RUNNING, "never", Outcome(code=3), 0, 0, "failed", "exited with 3"),
    (RUNNING, "on-failure", Outcome(code=-11), 0, 0, "backoff", "killed by SIGSEGV"),
    (RUNNING, "on-failure", Outcome(lost=True), 0, 1, "backoff", "supervising process"),
    (RUNNING, "never", Outcome(lost=True), 0, 1, "failed", "supervising process"),
    (RUNNING, "never", Outcome(lost=True), 1, 0, "queued", "stopped with the daemon"),
    (RUNNING, "never", Outcome(code=-15, stopped=True), 1, 0, "queued", "stopped with"),
    (RUNNING, "never", Outcome(code=-15, stopped=True), 0, 1, "queued", "stopped with"),
    (RUNNING, "never", Outcome(code=0), 1, 0, "succeeded", ""),
    (JobState.HELD, "always", Outcome(code=-9, over_memory=2**30), 0, 0, "failed", "memory limit"),
    (JobState.STARTING, "always", Outcome(failed="exec", errno=2), 0, 0, "failed", "not found"),
    (JobState.STARTING, "always", Outcome(failed="cwd", errno=2), 1, 0, "failed", "directory"),
    (JobState.STARTING, "never", Outcome(lost=True, begun=False), 0, 1, "queued", ""),
    (JobState.STARTING, "never", Outcome(lost=True, begun=False), 0, 0, "backoff", "started"),
    (JobState.STARTING, "never", Outcome(failed="spawn", begun=False), 0, 0, "backoff", "started"),
    (JobState.STOPPING, "always", Outcome(code=0), 0, 0, "cancelled", "because"),
    (JobState.STOPPING, "always", Outcome(lost=True), 1, 1, "cancelled", "because"),
]


@pytest.mark.parametrize(
    ("state", "policy", "outcome", "closing", "recovering", "to", "say"), CASES
)
def test_what_follows_from_the_end_of_a_run(
    state: JobState, policy: str, outcome: Outcome, closing: int, recovering: int, to: str, say: str
) -> None:
    record = JobRecord(
        spec=spec(restart=RestartPolicy(policy), memory=2**29, cwd="/nowhere"),
        created=0.0,
        state=state,
        reason="because",
    )
    next_state, reason, _ = verdict(
        record, outcome, closing=bool(closing), recovering=bool(recovering), rules=RestartRules()
    )
    assert next_state.value == to
    assert say in reason
    assert bool(reason) == bool(say)


def test_a_streak_of_short_runs_ends_and_a_healthy_run_resets_it() -> None:
    rules = RestartRules()
    record = JobRecord(spec=spec(max_restarts=2), created=0.0, state=RUNNING, streak=2)
    state, reason, _ = verdict(
        record, Outcome(code=1, ran_s=0.2), closing=False, recovering=False, rules=rules
    )
    assert state is JobState.FAILED
    assert "exited with 1; given up after 2 restarts in a row" in reason
    state, _, streak = verdict(
        record, Outcome(code=1, ran_s=60.0), closing=False, recovering=False, rules=rules
    )
    assert (state, streak) == (JobState.BACKOFF, 1)
    assert [rules.delay_s(n) for n in (0, 1, 2, 3, 7, 5000)] == [1, 1, 2, 4, 60, 60]


def test_a_spec_that_can_never_run_is_refused() -> None:
    bad: list[tuple[JobSpec, str]] = [
        (JobSpec(id="", name="x", command=()), "needs a command"),
        (JobSpec(id="../x", name="x", command=("a",)), "job id"),
        (JobSpec(id="", name="a\nb", command=("a",)), "job name"),
        (JobSpec(id="", name="x", command=("a\0b",)), "NUL"),
        (JobSpec(id="", name="x", command=("a",), env={"A=B": "c"}), "'='"),
        (JobSpec(id="", name="x", command=("a",), memory=-1), "negative"),
    ]
    for wrong, message in bad:
        with pytest.raises(InvalidRequest, match=message):
            checked(wrong, ())
    filled = checked(JobSpec(id="", name="", command=("/bin/echo",)), ())
    assert filled.id
    assert filled.name == "echo"
    assert Path(filled.cwd).is_absolute()


def test_the_environment_of_a_job_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTENANT_TOKEN", "secret")
    monkeypatch.setenv("OF_THE_NODE", "1")
    launch = Launch(env={"GOMP_SPINCOUNT": "1000"})
    env = environment(spec(env={"A": "1", "PWD": "/elsewhere"}, cwd="/data"), launch)
    assert env == {"A": "1", "PWD": "/data", "GOMP_SPINCOUNT": "1000", "PYTHONUNBUFFERED": "1"}
    own = {"GOMP_SPINCOUNT": "7", "PYTHONUNBUFFERED": ""}
    assert environment(spec(env=own), launch).items() >= own.items()


def test_a_job_does_not_pass_its_launch_gate_on_to_one_that_it_submits() -> None:
    shim = "/some/where/cotenant/devices/nvidia/shim"
    gate = Launch(
        fixed={"COTENANT_GATE": "/dev/shm/page", "COTENANT_GATE_DRIVER": "/lib/libcuda.so.1"},
        prepend={"LD_PRELOAD": f"{shim}/libcuda.so.1", "LD_LIBRARY_PATH": shim},
    )
    for own in (
        {},
        {"LD_PRELOAD": "/a b.so /c.so", "LD_LIBRARY_PATH": "/with space:", "A": "1"},
        {"COTENANT_GATE_MEMORY": "plain", "LD_LIBRARY_PATH": f"/x:{shim}-of-mine"},
    ):
        plain = environment(spec(env=own), Launch())
        assert plain.items() >= own.items()
        gated = environment(spec(env=plain), gate)
        passed = {name: value.replace(" ", ":") for name, value in plain.items()}
        again = environment(spec(env=gated), Launch())
        assert {name: value.replace(" ", ":") for name, value in again.items()} == passed
        assert environment(spec(env=gated), gate)["LD_LIBRARY_PATH"] == gated["LD_LIBRARY_PATH"]


def test_a_declared_job_has_what_any_process_needs() -> None:
    node = {
        "PATH": "/opt/bin:/bin",
        "LC_ALL": "C.UTF-8",
        "TZ": "Europe/Berlin\udcff",
        "COTENANT_TOKEN": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    env = minimal(node)
    assert (env["PATH"], env["LC_ALL"]) == ("/opt/bin:/bin", "C.UTF-8")
    assert "secret" not in env.values()
    assert "TZ" not in env
    assert minimal({})["PATH"]
    assert minimal({})["HOME"]
