"""Tokens for the jobs API: their file, and the command that writes it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cotenant.cli.main import main
from cotenant.domain.errors import ConfigError, EnvironmentProblem
from cotenant.domain.tokens import Scope, find, read_scopes, read_tokens
from cotenant.serving.tokenfile import Keyring, load

NOW = 1e9


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def add(file: Path, name: str, scope: str = "read", *more: str) -> int:
    return main(["token", "add", name, "--scope", scope, "--file", str(file), *more])


def test_a_token_is_printed_once_and_kept_nowhere(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add(file, "alice", "submit,read", "--expires", "90d") == 0
    text = capsys.readouterr().out.strip()
    assert len(text) > 40 and text not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    (token,) = load(file)
    assert token.name == "alice" and set(token.scopes) == {Scope.READ, Scope.SUBMIT}
    assert token.expires is not None and round((token.expires - token.created) / 86400) == 90
    assert find([token], text, token.created) == token
    assert find([token], text, token.expires) is None
    assert find([token], text + "x", token.created) is None
    assert main(["token", "list", "--file", str(file), "--json"]) == 0
    told = capsys.readouterr().out
    assert json.loads(told)[0]["name"] == "alice" and token.sha256 not in told
    assert main(["token", "list", "--file", str(file)]) == 0
    assert "alice" in capsys.readouterr().out


def test_a_token_is_revoked_by_its_name(file: Path) -> None:
    for name in ("alice", "bob"):
        assert add(file, name) == 0
    assert add(file, "bob") == 1
    assert main(["token", "revoke", "alice", "--file", str(file)]) == 0
    assert main(["token", "revoke", "alice", "--file", str(file)]) == 1
    assert [token.name for token in load(file)] == ["bob"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("words", [["--scope", "all"], ["--scope", ""], ["--expires", "0d"], []])
def test_what_is_no_scope_or_time_is_refused(file: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["token", "add", "alice", "--file", str(file), *words])
    assert not file.exists()


@pytest.mark.parametrize("name", ["", " a", "a\nb", "x" * 65])
def test_a_name_can_be_printed(file: Path, name: str) -> None:
    assert add(file, name) == 1 and not file.exists()


def test_scopes_are_read_in_one_order() -> None:
    assert read_scopes("control, read") == (Scope.READ, Scope.CONTROL)
    with pytest.raises(ValueError):
        read_scopes("read,,")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(file: Path, mode: int) -> None:
    add(file, "alice")
    file.chmod(mode)
    with pytest.raises(EnvironmentProblem):
        load(file)
    assert add(file, "bob") == 1


def told(**changes: object) -> dict[str, object]:
    return {"name": "a", "sha256": "0" * 64, "scopes": [], "created": 0, **changes}


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"tokens": [], "version": 2},
        {"tokens": [], "more": 1},
        {"tokens": [told(sha256="")]},
        {"tokens": [told(scopes=["all"])]},
        {"tokens": [told(), told()]},
    ],
)
def test_what_is_no_token_file_is_refused(value: object) -> None:
    with pytest.raises(ConfigError):
        read_tokens(json.dumps(value).encode())
    for text in (b"", b"[" * 100_000, b"\xff"):
        with pytest.raises(ConfigError):
            read_tokens(text)


def test_a_keyring_follows_its_file_and_trusts_nobody_without(file: Path) -> None:
    now = 0.0
    add(file, "alice")
    keys = Keyring(file, lambda: now)
    (alice,) = load(file)
    assert keys.again(alice) == alice and keys.usable
    file.rename(file.with_suffix(".away"))
    now += 10
    assert keys.again(alice) is None and not keys.usable
    file.with_suffix(".away").rename(file)
    now += 10
    assert keys.again(alice) == alice and keys.usable


def test_a_keyring_wants_a_file(file: Path) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        Keyring(file)
    assert str(file) in str(caught.value)


def test_a_pipe_in_its_place_is_refused_and_waited_for_by_nobody(file: Path) -> None:
    os.mkfifo(file, 0o600)
    with pytest.raises(EnvironmentProblem):
        load(file)
