"""``cotenant demo llm``: a chat with a small language model while a job trains on the same box. The
``cotenant demo`` without a name is ``first``."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from cotenant.cli import options
from cotenant.cli.demo import model
from cotenant.cli.demo.chat import Chat
from cotenant.cli.demo.client import ChatClient
from cotenant.cli.demo.ending import Ended, Signals
from cotenant.cli.demo.first import cmd_first
from cotenant.cli.demo.node import OBJECTIVE, DemoNode, Gone
from cotenant.cli.demo.screen import Screen
from cotenant.domain.errors import EnvironmentProblem

ALONE_S = 2.0
"""Training is looked at for so long before the first question."""


def cmd_llm(args: argparse.Namespace) -> int:
    """Chat until the user has enough; nothing is left behind."""
    try:
        model.check_extra()
        found = model.find(args.model)
    except model.Missing as error:
        print(f"cotenant: {error}", file=sys.stderr)
        return 2
    node = DemoNode(found, args.port, args.keep)
    signals = Signals(node.look)
    with signals:
        try:
            with signals.held():
                node.open()
            try:
                _chat(node, train=not args.no_train)
            except BaseException:
                with contextlib.suppress(OSError):
                    print(flush=True)  # the line that the cursor is in is no longer ours
                raise
            return 0
        except Ended as ended:
            return 128 + ended.number
        except Gone as gone:
            raise EnvironmentProblem(str(gone)) from None
        finally:
            signals.hold()
            node.close()


def _chat(node: DemoNode, train: bool) -> None:
    screen = Screen()
    node.wait(lambda: screen.progress(f"starting a node with {node.model.path.name}"))
    chat = Chat(screen, node, ChatClient(node.port, node.model.name))
    if train:
        screen.progress("starting a training job beside it")
        node.train()
        node.wait_trains()
        chat.trains()
        time.sleep(ALONE_S)
    screen.reached()
    screen.say(
        f"{node.model.name} is ready: first token within {OBJECTIVE['ttft']} and"
        f" {OBJECTIVE['tpot']} a token, {OBJECTIVE['percentile']} times of 100."
    )
    screen.say(f"Other clients of OpenAI's API find it at http://127.0.0.1:{node.port}/v1")
    screen.say("Ask something; /help lists commands, /quit ends everything.", "dim")
    chat.run()


def add_demo(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``cotenant demo``."""
    demo = subparsers.add_parser(
        "demo",
        help="see it work on this machine",
        description=(
            "Serve a small built-in model while a job trains on the same box. Show which cores are "
            "lent, how fast answers are and how fast training is. The key s switches scheduling "
            "off and on. In a pipe lines are printed, and it switches once and ends by itself."
        ),
    )
    demo.add_argument("--off", action="store_true", help="begin with scheduling off")
    demo.add_argument(
        "--seconds",
        type=options.positive,
        metavar="S",
        help="end after so many (until Ctrl-C; in a pipe 24)",
    )
    demo.add_argument("--port", type=_port, default=0, metavar="N", help="HTTP port (a free one)")
    demo.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw a PNG at the end (needs matplotlib)"
    )
    demo.set_defaults(func=cmd_first)
    kinds = demo.add_subparsers(title="other demos", metavar="NAME")
    llm = kinds.add_parser(
        "llm",
        help="chat with a small language model while a job trains on the same box",
        description=(
            "Start a node with a small language model and a training job, and chat with the model. "
            "Behind each answer stand what it took and how training went on meanwhile."
        ),
    )
    llm.add_argument(
        "--model",
        default=model.PACKAGE,
        metavar="MODEL",
        help=f"a GGUF file, a directory with one, or a package that holds one ({model.PACKAGE})",
    )
    llm.add_argument("--no-train", action="store_true", help="no training job beside it")
    llm.add_argument("--port", type=_port, default=0, metavar="N", help="HTTP port (a free one)")
    llm.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="a new directory for the node's files, which stays (a temporary one)",
    )
    llm.set_defaults(func=cmd_llm)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port; give one from 0 to 65535")
    return port
