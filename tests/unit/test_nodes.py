"""Nodes are found: by name, by where one stands, or because there is only one."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cotenant.cli import finding
from cotenant.domain.errors import EnvironmentProblem, InvalidRequest, NotFound
from cotenant.runtime import nodes


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, in a directory where no node runs."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("COTENANT_STATE_DIR", raising=False)
    monkeypatch.setenv(nodes.DIRECTORY, str(tmp_path / "nodes"))
    return tmp_path / "nodes"


def found(*argv: str) -> str:
    parser = argparse.ArgumentParser()
    finding.add_node(parser)
    return str(finding.state_dir(parser.parse_args(argv)))


def test_a_node_is_found_while_it_runs(registry: Path) -> None:
    with nodes.registered("box", "/a/state", "127.0.0.1:8000", "1.0") as name:
        (entry,) = nodes.running()
        assert (name, entry.name, entry.state_dir, entry.pid) == (
            "box",
            "box",
            "/a/state",
            os.getpid(),
        )
        assert (registry / "box.json").stat().st_mode & 0o777 == 0o644
        assert registry.stat().st_mode & 0o777 == 0o755
        assert found() == "/a/state"
    assert nodes.running() == []
    assert list(registry.iterdir()) == []


def test_two_of_one_name_are_told_apart_and_have_to_be_named(registry: Path) -> None:
    with (
        nodes.registered("box", "/a/state", None, "1.0") as first,
        nodes.registered("box", "/b/state", None, "1.0") as second,
    ):
        assert first != second
        assert (found("--node", first), found("--node", second)) == ("/a/state", "/b/state")
        with pytest.raises(InvalidRequest) as several:
            found()
        assert all(f"--node {name}" in str(several.value) for name in (first, second))
        with pytest.raises(NotFound, match="cotenant nodes"):
            found("--node", "third")


def test_what_was_named_comes_before_what_is_found(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nodes.registered("box", "/a/state", None, "1.0"):
        monkeypatch.setenv("COTENANT_STATE_DIR", "/from/env")
        assert found() == "/from/env"
        assert found("--node", "box") == "/a/state"
        assert found("--state-dir", "/given") == "/given"


def test_without_any_the_error_names_the_next_command(registry: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="cotenant serve"):
        found()


def test_a_node_that_was_killed_is_forgotten_and_its_name_is_free(registry: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    registry.mkdir()
    entry = nodes.NodeEntry("box", gone.pid, 1, "/a", None, "1.0")
    other = nodes.NodeEntry("later", os.getpid(), 1, "/a", None, "1.0")  # the pid of another one
    for one in (entry, other):
        (registry / f"{one.name}.json").write_text(json.dumps(vars_of(one)))
    (registry / "broken.json").write_text("{")
    with nodes.registered("box", "/b", None, "1.0") as name:
        assert name == "box"
        assert [one.state_dir for one in nodes.running()] == ["/b"]
    assert not (registry / "later.json").exists()


def vars_of(entry: nodes.NodeEntry) -> dict[str, object]:
    return {name: getattr(entry, name) for name in entry.__struct_fields__}


def test_a_node_runs_without_a_registry(registry: Path, tmp_path: Path) -> None:
    registry.write_text("in the way")
    with nodes.registered("box", "/a", None, "1.0") as name:
        assert name == "box"
    assert registry.read_text() == "in the way"


def test_the_default_name_is_that_of_the_directory(tmp_path: Path) -> None:
    assert nodes.default_name(tmp_path / "edge 7" / "state") == "edge-7"
    assert nodes.default_name("/state")


def test_a_service_is_found_by_others_where_root_gave_it_the_directory(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    service, stranger = 64_001, 64_002
    system = tmp_path / "run" / "nodes"
    monkeypatch.setattr(nodes, "SYSTEM", system)
    monkeypatch.setenv(nodes.DIRECTORY, str(system))
    with nodes.registered("box", "/a", None, "1.0"):
        os.chown(system.parent, service, service)
        for owner, seen in ((service, ["box"]), (stranger, [])):
            os.chown(system / "box.json", owner, owner)
            assert [one.name for one in nodes.running()] == seen
        monkeypatch.setattr(nodes, "SYSTEM", tmp_path / "other")
        os.chown(system / "box.json", service, service)
        assert nodes.running() == []
