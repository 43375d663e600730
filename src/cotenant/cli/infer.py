"""``cotenant infer``: ask a model once, over the node's HTTP address, with inputs from a file."""

from __future__ import annotations

import argparse
import http.client
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
import numpy as np
from rich.console import Group, RenderableType

from cotenant.cli import finding, options
from cotenant.cli.inputs import PICTURES, Input, Output, read_answer, read_request
from cotenant.cli.output import as_json, command, note, show
from cotenant.cli.views import plain
from cotenant.domain.errors import CotenantError, EnvironmentProblem, NotFound

SHOWN = 16
"""Values of a tensor that are shown whole; of longer ones the ``TOP`` largest are."""
TOP = 5
EXIT_CODES = {429: 3, 503: 4, 504: 5, 422: 5}
"""By HTTP status: too busy, not there at the moment, too late; all else is 1."""


class _Answer(NamedTuple):
    status: int
    head: int
    body: bytes


@command
def cmd_infer(args: argparse.Namespace) -> int:
    """Asks, and prints the outputs; a refusal is an exit code of its own."""
    status = finding.client(args).status()
    if not status.get("http"):
        raise EnvironmentProblem("this node has no HTTP address: set node.http in its file")
    front = _Front(status["http"], args.timeout / 1e9, _token(args.token_file))
    path = "/v2/models/" + quote(args.model, safe="")
    path += "/versions/" + quote(args.version, safe="") if args.version else ""
    described = front.ask("GET", path)
    if described.status == 404:
        raise NotFound(f"{_error(described)}; cotenant models lists them")
    if described.status != 200:
        return _refused(described)
    inputs = msgspec.json.decode(described.body, type=_Described).inputs
    request = read_request(args.input, inputs)
    if args.input.suffix.lower() in PICTURES:
        note("pixels are sent as they are; a model that wants others (a mean taken off) needs .npy")
    answer = front.ask("POST", f"{path}/infer", request.body, request.head)
    if answer.status != 200:
        return _refused(answer)
    outputs = read_answer(answer.body, answer.head)
    if args.json:
        return as_json([
            {"name": o.name, "datatype": o.datatype, "shape": o.values.shape, "data": _plain(o)}
            for o in outputs
        ])  # fmt: skip
    return show(answer_view(outputs))


class _Described(msgspec.Struct, frozen=True):
    inputs: tuple[Input, ...]


class _Front:
    """The HTTP front end of a node on this machine. ``timeout`` in seconds."""

    def __init__(self, address: str, timeout: float, token: str) -> None:
        host, _, port = address.rpartition(":")
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        host = host.strip("[]")
        self._place = everywhere.get(host, host), int(port)
        self._timeout = timeout
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def ask(self, method: str, path: str, body: bytes = b"", head: int = 0) -> _Answer:
        """One request. Raises EnvironmentProblem if there is no answer."""
        headers = dict(self._headers)
        if head:
            headers["Inference-Header-Content-Length"] = str(head)
        connection = http.client.HTTPConnection(*self._place, timeout=self._timeout)
        try:
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            length = answer.getheader("Inference-Header-Content-Length") or 0
            return _Answer(answer.status, int(length), answer.read())
        except TimeoutError:
            return _Answer(504, 0, msgspec.json.encode({"error": self._late()}))
        except (OSError, http.client.HTTPException) as error:
            host, port = self._place
            raise EnvironmentProblem(
                f"the node does not answer at {host}:{port} ({error}); cotenant status tells more"
            ) from None
        finally:
            connection.close()

    def _late(self) -> str:
        return f"no answer within {self._timeout:g} s; wait longer with --timeout"


def _error(answer: _Answer) -> str:
    try:
        return str(msgspec.json.decode(answer.body)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"the node answered with HTTP status {answer.status}"


def _refused(answer: _Answer) -> int:
    """Say why; the exit code."""
    if answer.status == 401:
        raise EnvironmentProblem(f"{_error(answer)}: --token-file FILE, or $COTENANT_TOKEN")
    if answer.status not in EXIT_CODES:
        raise CotenantError(_error(answer))
    note(_error(answer))
    return EXIT_CODES[answer.status]


def _token(path: Path | None) -> str:
    if path is None:
        return os.environ.get("COTENANT_TOKEN", "")
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentProblem(f"--token-file cannot be read: {error}") from None


def _plain(output: Output) -> list[Any]:
    """The elements as JSON has them: what is no number is null."""
    values = output.values.ravel().tolist()
    return [None if isinstance(v, float) and not math.isfinite(v) else v for v in values]


# --- how it is shown ----------------------------------------------------------------------------


def answer_view(outputs: list[Output]) -> RenderableType:
    """Each output under its name; of a long row its largest values, with their places."""
    lines = [line for output in outputs for line in _lines(output)]
    return Group(*map(plain, lines))


def _lines(output: Output) -> Iterator[str]:
    values = output.values
    yield f"{output.name}  {output.datatype} {list(values.shape)}"
    rows = values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)
    for row in rows[:SHOWN]:
        yield f"  {_row(row)}"
    if len(rows) > SHOWN:
        yield f"  and {len(rows) - SHOWN:,} rows more (all: --json)"


def _row(row: np.ndarray[Any, Any]) -> str:
    if row.dtype == object:
        return "  ".join(repr(v) for v in row[:SHOWN].tolist()) + (" …" if len(row) > SHOWN else "")
    if len(row) <= SHOWN:
        return "  ".join(f"{v:.6g}" for v in row.tolist())
    best = np.argsort(-np.nan_to_num(row.astype(float), nan=-np.inf), kind="stable")[:TOP]
    top = "  ".join(f"[{i}] {row[i]:.6g}" for i in best.tolist())
    return f"largest of {len(row):,}: {top}"


def add_infer(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.description = (
        "Ask a model once. The file is JSON (a request of the Open Inference Protocol, or a "
        "mapping from names of inputs to lists), .npy, .npz, or a picture."
    )
    parser.epilog = (
        "Exits with 3 if the node was too busy, 4: the model is not there at the moment, 5: the "
        "answer would have come too late, or did not come in time."
    )
    parser.add_argument("model", metavar="MODEL", help="a model that is served: cotenant models")
    parser.add_argument("--input", type=Path, required=True, metavar="FILE",
                        help="file.json, .npy, .npz, .png or .jpg")  # fmt: skip
    parser.add_argument("--version", default="", metavar="V", help="default: the one that serves")
    parser.add_argument("--timeout", type=options.duration, default="60s", metavar="TIME",
                        help="how long to wait for the answer (60s)")  # fmt: skip
    parser.add_argument("--token-file", type=Path, metavar="FILE",
                        help="the node's token, if any (default: $COTENANT_TOKEN)")  # fmt: skip
