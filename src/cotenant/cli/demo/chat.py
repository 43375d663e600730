"""The chat of the demo: a prompt, answers as they come, what they cost, and a few commands."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Final

from cotenant.cli.demo.client import ChatClient, Conversation, Declined, Lost, Piece
from cotenant.cli.demo.figures import Answered, Rates, line
from cotenant.cli.demo.node import DemoNode
from cotenant.cli.demo.screen import Screen, stats
from cotenant.domain.errors import CotenantError

HELP: Final = """\
/train on|off   let the training job go on, or hold it
/stats          the node's figures against its objective
/help           this
/quit           end everything (Ctrl-D and Ctrl-C do, too)
Ctrl-C during an answer stops the answer. All else is said to the model."""
GONE_S: Final = 3.0
"""Whether a connection broke because the node ended shows within this time."""


class Chat:
    """Questions until there are none any more. ``trains``: whether the job runs."""

    def __init__(self, screen: Screen, node: DemoNode, client: ChatClient) -> None:
        self._screen = screen
        self._node = node
        self._client = client
        self._conversation = Conversation()
        self._rates = Rates()
        self._trains = False
        self._tokens = 0
        self._commands: dict[str, Callable[[str], bool]] = {
            "/help": self._help,
            "/quit": self._quit,
            "/stats": self._stats,
            "/train": self._train,
        }

    def trains(self) -> None:
        """The job runs from now on."""
        self._trains = True
        self._mark(self._rates.answered)

    def run(self) -> None:
        """Until /quit or the end of the input. Raises KeyboardInterrupt at the prompt."""
        while (text := self._screen.question()) is not None:
            said = text.strip()
            if said.startswith("/"):
                name, _, rest = said.partition(" ")
                command = self._commands.get(name, self._unknown)
                try:
                    if not command(rest.strip()):
                        return
                except CotenantError as error:
                    self._trouble(error)
            elif said:
                self._answer(said)

    # answers

    def _answer(self, question: str) -> None:
        text: list[str] = []
        times: list[float] = []
        asked = ended = time.monotonic()
        tokens = 0
        self._conversation.ask(question)
        try:
            most = self._conversation.fit(self._client.count)
            self._mark(self._rates.asked)
            asked = time.monotonic()
            answer = self._client.answer(self._conversation.messages, most)
            with contextlib.closing(answer):
                for piece in answer:
                    self._say(piece, text, times)
                    tokens, ended = piece.tokens or tokens, time.monotonic()
        except KeyboardInterrupt:
            self._screen.say("\n(stopped)")
        except CotenantError as error:
            self._screen.say()
            self._trouble(error)
        else:
            self._screen.say()
        self._conversation.answered("".join(text))
        self._mark(self._rates.answered)
        if times:
            answered = Answered(asked, tuple(times), ended, tokens or len(times))
            self._tokens += answered.tokens
            training = "" if self._trains else "off"
            self._screen.say(line(answered, self._rates, training), "dim")

    def _say(self, piece: Piece, text: list[str], times: list[float]) -> None:
        if piece.text:
            times.append(time.monotonic())
            self._screen.add(piece.text if text else piece.text.lstrip("\n"))
            text.append(piece.text)

    def _trouble(self, error: CotenantError) -> None:
        """Say what went wrong; the chat goes on, unless the node is gone."""
        if isinstance(error, Lost):
            self._node.wait_gone(GONE_S)
        self._screen.say(error.words if isinstance(error, Declined) else str(error), "yellow")

    def _mark(self, what: Callable[..., None]) -> None:
        """Tell ``what`` how far training is; the chat needs no training."""
        steps = None
        if self._trains:
            with contextlib.suppress(CotenantError):
                steps = self._node.steps()
        what(steps)

    # commands: whether the chat goes on

    def _help(self, _: str) -> bool:
        self._screen.say(HELP)
        return True

    def _quit(self, _: str) -> bool:
        return False

    def _stats(self, _: str) -> bool:
        status = self._node.status()
        self._screen.show(stats(status, self._node.job(), self._tokens))
        return True

    def _train(self, how: str) -> bool:
        if how not in ("on", "off"):
            state = "on" if self._trains else "off"
            self._screen.say(f"training is {state}; change it with /train on or /train off")
            return True
        if how == "on":
            self._node.train()
        else:
            self._node.hold()
        self._trains = how == "on"
        self._rates.forget()
        self._mark(self._rates.answered)
        self._screen.say(f"training is {how}", "dim")
        return True

    def _unknown(self, _: str) -> bool:
        self._screen.say("there is no such command; /help lists them", "yellow")
        return True
