"""Write the pages that are made from the code; ``--check`` only compares."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from cotenant.cli import main as cli
from cotenant.domain import config, reading
from cotenant.domain.npu import OPERATORS
from cotenant.domain.protocol import answer_table
from cotenant.domain.units import format_bytes, format_duration, parse_bytes, parse_duration
from cotenant.domain.workload import JOB_TRANSITIONS
from cotenant.kube import boost
from cotenant.kube import command as dra
from cotenant.policy.state import HOLD_TRANSITIONS, DispatcherState
from cotenant.telemetry import metrics, othernames
from cotenant.telemetry.monitor import Monitor

DOCS = Path(__file__).parent
MADE = "Made from the code by `python docs/generate.py`; do not edit."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown, and the empty line behind it."""
    lines = [head, ["---"] * len(head), *([c.replace("|", r"\|") for c in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


# --- actions, answers, life cycles ------------------------------------------------------------


def protocol() -> Iterator[str]:
    yield from ("# Actions, answers, life cycles", "", MADE, "")
    yield from ("## Actions and the events that answer them", "")
    yield "An action that takes time is answered by exactly one of its events. Where a failure"
    yield "and an ordinary answer cross, the first counts and the other is ignored."
    yield from ("", answer_table(), "", "## How a job stands to a partition", "")
    yield from ("```mermaid", "stateDiagram-v2", "    [*] --> NONE")
    for state, steps in HOLD_TRANSITIONS.items():
        for event, to in steps.items():
            yield f"    {state.name} --> {to.name}: {event}"
    yield from ("```", "", "## Life of a job", "")
    yield from ("```mermaid", "stateDiagram-v2", "    [*] --> queued")
    for job, targets in JOB_TRANSITIONS.items():
        for to_job in sorted(targets, key=lambda s: s.value):
            yield f"    {job.value} --> {to_job.value}"
    yield from ("```", "")


# --- commands ---------------------------------------------------------------------------------


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command that can be typed, by its words."""
    with mock.patch.dict(os.environ):
        os.environ.pop("COTENANT_STATE_DIR", None)
        roots = {
            "cotenant": cli._parser(),
            "cotenant-dra": dra._parser(),
            "python -m cotenant.kube.boost": boost._parser(),
        }
    found: dict[str, argparse.ArgumentParser] = {}
    for words, parser in roots.items():
        _gather(words, parser, found)
    return found


def _gather(
    words: str, parser: argparse.ArgumentParser, found: dict[str, argparse.ArgumentParser]
) -> None:
    found[words] = parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                _gather(f"{words} {name}", below, found)


def commands() -> Iterator[str]:
    yield from ("# Commands", "", MADE, "", "`COMMAND --help` says the same.", "")
    every = parsers()
    for words, parser in every.items():
        yield from (f"## `{words}`", "")
        said = parser.description or _summary(words, every)
        if said:
            yield from (_sentence(said), "")
        below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        rows = [
            (_written(action), _meaning(action))
            for action in parser._actions
            if action not in below and not isinstance(action, argparse._HelpAction)
        ]
        if rows:
            yield from table(("argument", "meaning"), rows)
        for action in below:
            rows = [(f"`{a.dest}`", a.help or "") for a in action._choices_actions]
            yield from table(("command", "meaning"), rows)
        if parser.epilog:
            yield from (_sentence(parser.epilog), "")


def _summary(words: str, every: Mapping[str, argparse.ArgumentParser]) -> str:
    """What the command above says of it."""
    above, _, name = words.rpartition(" ")
    for action in every[above]._actions if above in every else ():
        if isinstance(action, argparse._SubParsersAction):
            return next((a.help or "" for a in action._choices_actions if a.dest == name), "")
    return ""


def _sentence(text: str) -> str:
    """The first paragraph; what else a command has to say is not made for a page."""
    text = " ".join(text.strip().partition("\n\n")[0].split()).replace("``", "`")
    return text[0].upper() + text[1:].rstrip(".") + "."


def _written(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest.upper()}`"
    value = "" if action.nargs == 0 else f" {_value(action)}"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _value(action: argparse.Action) -> str:
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    metavar = action.metavar or action.dest.upper()
    return metavar if isinstance(metavar, str) else " ".join(metavar)


def _meaning(action: argparse.Action) -> str:
    if action.help:
        filled = {**vars(action), "prog": "cotenant"}
        return " ".join((action.help % filled).split())
    if isinstance(action.default, str | int | float):
        return f"default: `{action.default}`"
    return ""


# --- configuration ----------------------------------------------------------------------------


class Key(NamedTuple):
    """A key of the configuration. ``default``: as one would write it; "": it is required."""

    section: str
    name: str
    value: str
    default: str


MODEL = "model.yaml"
_SECTIONS = {
    "node": "node: {jobs_api: {address: 127.0.0.1:1, tokens: FILE}}",
    "policy": "services: []",
    "services[]": "services: [{name: NAME, objective: {latency: 1s}, batch: {}}]",
    "jobs[]": "jobs: [{name: NAME, command: x}]",
    "devices[], kind cpu": "devices: [{kind: cpu}]",
    "devices[], kind npu": "devices: [{kind: npu, emulate: [1]}]",
    "devices[], kind cuda": "devices: [{kind: cuda}]",
    'devices[], kind "null"': 'devices: [{kind: "null"}]',
    MODEL: "objective: {latency: 1s}\nbatch: {}",
}
"""By section, a file from which all of its keys are asked for."""
_MORE = {
    "services[]": ("services: [{name: NAME, objective: {ttft: 1s}, batch: {}}]",),
    "devices[], kind npu": ("devices: [{kind: npu, device: NPU}]",),
}
"""The other form, where an entry has two."""
_NAMED = {
    "_emulating": "core numbers",
    "_gpu": "a GPU's number or UUID",
    "_kind": "a kind of device",
    "_listed": "an NPU as OpenVINO lists it",
    "address": "host:port",
    "boolean": "true or false",
    "command": "a command line, or a list of words",
    "cores": "`all`, or core numbers",
    "duration": "a duration",
    "duration_or_zero": "a duration, or 0",
    "environment": "names and values",
    "integers": "a list of whole numbers",
    "name": "a name",
    "names": "a name, or a list of names",
    "percentile": "50 to below 100",
    "positive": "a number above 0",
    "positive_shares": "a share above 0, or shares by kind",
    "share": "0 to 1",
    "shares": "a share, or shares by kind",
    "size": "a size",
    "split": "`{cores: N, size: N}`",
    "text": "text",
}


def known_keys() -> list[Key]:
    """Every key that the parser of the configuration asks for, seen while it reads."""
    found = []
    for section, text in _SECTIONS.items():
        forms = [_asked(section, form) for form in (text, *_MORE.get(section, ()))]
        for name in dict.fromkeys(name for form in forms for name in form):
            key = next(form[name] for form in forms if name in form)
            if key.default == "required" and not all(name in form for form in forms):
                key = key._replace(default="required, in one of two forms")
            found.append(key)
    return found


def _asked(section: str, text: str) -> dict[str, Key]:
    found: dict[str, Key] = {}
    prefix = "" if section == MODEL else section.partition(",")[0].replace("[]", "[0]")
    take, raw = reading.Section.take, reading.Section.raw

    def name(of: reading.Section, key: str) -> str | None:
        path = of.at(key)
        if not prefix:
            return path
        return path.removeprefix(f"{prefix}.") if path.startswith(f"{prefix}.") else None

    def seen_raw(of: reading.Section, key: str, *default: Any) -> Any:
        if path := name(of, key):
            found[path] = Key(section, path, "a mapping", "none")
        return raw(of, key, *default)

    def seen_take(of: reading.Section, key: str, read: Any, *default: Any) -> Any:
        try:
            return take(of, key, read, *default)
        finally:
            if path := name(of, key):
                found[path] = Key(section, path, _kind_of(read), _shown(read, *default))

    with (
        mock.patch.object(reading.Section, "raw", seen_raw),
        mock.patch.object(reading.Section, "take", seen_take),
    ):
        (config.parse_model_settings if section == MODEL else config.parse_config)(text)
    above = {path.rpartition(".")[0] for path in found}
    return {path: key for path, key in found.items() if path not in above}


def _kind_of(read: Callable[[Any], object]) -> str:
    held = inspect.getclosurevars(read).nonlocals
    if "options" in held:
        return ", ".join(f"`{option}`" for option in held["options"])
    if "low" in held:
        return f"{held['low']} to {held['high']:,}"
    if "read" in held:
        return f"{_kind_of(held['read'])}, or null"
    return _NAMED[read.__name__]


def _shown(read: Callable[[Any], object], *default: Any) -> str:
    if not default:
        return "required"
    value = default[0]
    if value is None and read.__name__ == "cores":
        return "`all`"
    if value is OPERATORS:
        return "a list"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value == "NAME":
        return "the name"
    if value == () and read.__name__ == "names":
        return "all"
    if value in (None, "", ()) or value == {}:
        return "none"
    for name, write, parse in (
        ("duration", format_duration, parse_duration),
        ("size", format_bytes, parse_bytes),
    ):
        if value and read.__name__.startswith(name):
            assert parse(write(value)) == value, f"{value} is written as {write(value)}"
            return f"`{write(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def configuration() -> Iterator[str]:
    yield from ("# Keys of the configuration", "", MADE, "")
    yield "What each means, and what else must hold, is in [Configuration](../configuration.md)."
    yield "`model.yaml` lies in a model's directory; all else is in the node's file. Some entries"
    yield "have two forms: a latency or a time to the first token; an NPU that is there, or an"
    yield "emulated one."
    yield ""
    every = known_keys()
    for section in _SECTIONS:
        yield from (f"## `{section}`", "")
        rows = [(f"`{k.name}`", k.value, k.default) for k in every if k.section == section]
        yield from table(("key", "value", "default"), rows)


# --- metrics ----------------------------------------------------------------------------------


class Family(NamedTuple):
    """A metric as it is exposed."""

    name: str
    type: str
    labels: tuple[str, ...]
    says: str


def families() -> list[Family]:
    """Every metric that the exposition can have, in its order."""
    found: list[Family] = []

    def seen(type: str) -> Callable[..., None]:
        def note(name: str, says: str, labels: Sequence[str], _: object) -> None:
            bare = type != "counter" or name.startswith("nv_")
            found.append(Family(name if bare else f"{name}_total", type, tuple(labels), says))

        return note

    def unwritten(families: Iterable[object]) -> bytes:
        for _ in families:
            pass
        return b""

    kinds = {"counter": seen("counter"), "gauge": seen("gauge"), "histogram": seen("histogram")}
    pool = SimpleNamespace(up=True, pool=1, service="s")
    served: Any = SimpleNamespace(workers={"w": pool}, services={"s": None})
    with (
        mock.patch.multiple(metrics, **kinds, histogram_of_sizes=kinds["histogram"]),
        mock.patch.multiple(othernames, **kinds),
        mock.patch.multiple(metrics, text=unwritten, bare_text=unwritten),
    ):
        metrics.exposition(Monitor(), DispatcherState(), [], metrics.Memory({}, {}), {})
        unwritten(othernames.vllm(Monitor(), served, {}))
    return found


def exposed() -> Iterator[str]:
    yield from ("# Names of the metrics", "", MADE, "")
    yield "What each means to who watches a node is in [Metrics](../metrics.md)."
    yield ""
    rows = [
        (f"`{f.name}`", f.type, ", ".join(f"`{label}`" for label in f.labels), f.says)
        for f in families()
    ]
    yield from table(("name", "type", "labels", "help"), rows)


# --- all of them ------------------------------------------------------------------------------

PAGES: dict[str, Callable[[], Iterator[str]]] = {
    "protocol.md": protocol,
    "reference/commands.md": commands,
    "reference/configuration.md": configuration,
    "reference/metrics.md": exposed,
}


def page(name: str) -> str:
    """A page as the code has it now."""
    return "\n".join(PAGES[name]()).rstrip("\n") + "\n"


def main() -> int:
    """Write or compare; 1 if a page is not what the code says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        for name in PAGES:
            (DOCS / name).parent.mkdir(exist_ok=True)
            (DOCS / name).write_text(page(name))
        return 0
    stale = [
        name
        for name in PAGES
        if not (DOCS / name).exists() or (DOCS / name).read_text() != page(name)
    ]
    if stale:
        print(f"out of date: {', '.join(stale)}; run: python docs/generate.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
