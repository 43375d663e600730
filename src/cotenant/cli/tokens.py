"""``cotenant token``: who may use the jobs API of a node, and for what."""

from __future__ import annotations

import argparse
import secrets
import time
from pathlib import Path
from typing import Any, Final

from cotenant.cli import options
from cotenant.cli.output import as_json, command, note, show
from cotenant.domain.errors import InvalidRequest, NotFound
from cotenant.domain.tokens import MOST_NAME, PREFIX, Scope, Token, digest, read_scopes
from cotenant.domain.units import S
from cotenant.serving import tokenfile

FILE: Final = Path("cotenant-tokens.json")
DAY_S: Final = 86_400.0
_AT = "%Y-%m-%d %H:%M"


@command
def cmd_add(args: argparse.Namespace) -> int:
    """``cotenant token add``: prints the token, which nobody can print again."""
    name = args.name
    if not name.isprintable() or name != name.strip() or not 0 < len(name) <= MOST_NAME:
        raise InvalidRequest(f"a token's name has up to {MOST_NAME} printable characters")
    text, now = PREFIX + secrets.token_urlsafe(32), time.time()
    expires = None if args.expires is None else now + args.expires
    with tokenfile.changing(args.file) as tokens:
        if any(token.name == name for token in tokens):
            raise InvalidRequest(
                f"{args.file} has a token {name!r} already: choose another name, or: "
                f"cotenant token revoke {name}"
            )
        tokens.append(Token(name, digest(text), args.scope, now, expires))
    note(f"{args.file} knows it by its SHA-256 alone: keep the token, it is not shown again")
    print(text)
    return 0


@command
def cmd_list(args: argparse.Namespace) -> int:
    """``cotenant token list``: names, scopes and dates."""
    from cotenant.cli.views import new_table, plain

    tokens, now = tokenfile.load(args.file), time.time()
    if args.json:
        return as_json([_told(token) for token in tokens])
    if not tokens:
        return show(plain("no tokens; make one with: cotenant token add NAME --scope read"))
    table = new_table("TOKEN", "SCOPES", "CREATED", "EXPIRES")
    for token in tokens:
        until = "never" if token.expires is None else time.strftime(_AT, _local(token.expires))
        told = until if token.valid(now) else f"{until}, expired"
        scopes = ",".join(scope.value for scope in token.scopes)
        made = time.strftime(_AT, _local(token.created))
        table.add_row(*map(plain, (token.name, scopes, made, told)))
    return show(table)


@command
def cmd_revoke(args: argparse.Namespace) -> int:
    """``cotenant token revoke``: a node that runs knows within a second or two."""
    with tokenfile.changing(args.file) as tokens:
        left = [token for token in tokens if token.name != args.name]
        if len(left) == len(tokens):
            raise NotFound(f"{args.file} has no token {args.name!r}: cotenant token list")
        tokens[:] = left
    print(f"revoked {args.name}")
    return 0


def _told(token: Token) -> dict[str, Any]:
    scopes = [scope.value for scope in token.scopes]
    times = {"created": token.created, "expires": token.expires}
    return {"name": token.name, "scopes": scopes, **times}


def _local(wall: float) -> time.struct_time:
    return time.localtime(wall)


def _scopes(text: str) -> tuple[Scope, ...]:
    try:
        return read_scopes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _lasts(text: str) -> float:
    """Seconds of ``90d``, ``12h`` …"""
    number = text.removesuffix("d")
    if number != text and number.isascii() and number.isdigit() and 0 < int(number) < 40_000:
        return int(number) * DAY_S
    seconds = options.duration(text) / S if number == text else 0.0
    if not 0 < seconds < 40_000 * DAY_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90d or 12h")
    return seconds


def add_token(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``cotenant token``."""
    token = subparsers.add_parser(
        "token",
        help="make, list and revoke tokens for a node's jobs API",
        description="Tokens for a node's jobs API. A node that runs follows changes of the file.",
    )
    actions = token.add_subparsers(title="actions", metavar="ACTION", required=True)
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument(
        "--file", type=Path, default=FILE, metavar="F", help=f"the token file ({FILE})"
    )
    add = actions.add_parser("add", parents=[file], help="make a token, and print it once")
    add.add_argument("name", metavar="NAME", help="whose it is, such as alice or ci")
    add.add_argument(
        "--scope",
        type=_scopes,
        required=True,
        metavar="SCOPES",
        help="what it is for: read, submit, control, or several with commas",
    )
    add.add_argument(
        "--expires", type=_lasts, metavar="TIME", help="valid for so long, such as 90d (for ever)"
    )
    add.set_defaults(func=cmd_add)
    listed = actions.add_parser("list", parents=[file], help="show names, scopes and dates")
    listed.add_argument("--json", action="store_true", help="print JSON, for machines")
    listed.set_defaults(func=cmd_list)
    revoke = actions.add_parser("revoke", parents=[file], help="have a token be worth nothing")
    revoke.add_argument("name", metavar="NAME", help="the token's name")
    revoke.set_defaults(func=cmd_revoke)
