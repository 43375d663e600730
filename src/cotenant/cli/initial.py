"""``cotenant init``: a commented configuration file for the devices and models of this machine."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from cotenant.cli.modelfile import ModelFile, find
from cotenant.cli.output import command
from cotenant.devices import npu_look, processor
from cotenant.devices.features import GATE, Standing
from cotenant.devices.npu_look import Npus
from cotenant.devices.nvidia.facts import Cause, Found
from cotenant.devices.nvidia.survey import survey
from cotenant.devices.processor import ProcessorFacts
from cotenant.domain import reading
from cotenant.domain.config import parse_config
from cotenant.domain.device import PreemptLevel
from cotenant.domain.errors import EnvironmentProblem, ModelError
from cotenant.domain.units import format_bytes

FILE: Final = "cotenant.yaml"
MODELS: Final = "models"


class Box(NamedTuple):
    """What there is to write about."""

    cpu: ProcessorFacts
    gpus: Found
    npus: Npus
    models: tuple[ModelFile, ...] = ()
    """Their names are those of their directories."""


def look(directory: Path) -> Box:
    """This machine, and what of models lies in ``directory/models``."""
    return Box(processor.look(), survey(), npu_look.look(), tuple(_models(directory / MODELS)))


def _models(root: Path) -> Iterable[ModelFile]:
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        versions = sorted(
            (v for v in path.glob("*") if v.name.isascii() and v.name.isdigit()),
            key=lambda version: int(version.name),
        )
        try:
            reading.name(path.name)
            if versions:
                yield find(versions[-1])._replace(name=path.name)
        except (ValueError, ModelError):
            continue


def document(box: Box) -> str:
    """The file's text. Pure."""
    return "\n".join(
        [
            "# A node of Cotenant. Start it with: cotenant serve cotenant.yaml",
            "# Every key and its default: docs/configuration.md. Paths are relative to this file.",
            "",
            "node:",
            f"  models: ./{MODELS}            # NAME/VERSION/model.onnx; versions are numbers",
            "  http: 127.0.0.1:8000        # Open Inference Protocol, OpenAI's API, metrics",
            "  grpc: 127.0.0.1:8001        # null switches it off",
            "  # token_file: ./token       # needed for any address that is not loopback",
            "",
            *_devices(box),
            "",
            *_services(box.models),
            "",
            "# Jobs run on what is left. One can also be given to a running node:",
            "#   cotenant run --name train -- python train.py",
            "# jobs:",
            "#   - name: train",
            "#     command: [python, train.py]",
            "#     restart: on-failure",
            "",
        ]
    )


def _devices(box: Box) -> list[str]:
    cpu = box.cpu
    realtime = any(
        feature.name == GATE and feature.level is PreemptLevel.PRIORITY
        for feature in cpu.features
        if feature.standing is Standing.TESTED
    )
    right = (
        "there is the right to real-time priority"
        if realtime
        else "no right to real-time priority: cotenant doctor says how to get it"
    )
    lines = [
        f"# {len(cpu.cores)} cores, {format_bytes(cpu.memory)}; {right}.",
        "devices:",
        "  - {kind: cpu, cores: all}   # a list of numbers leaves the others to other programs",
    ]
    for gpu in box.gpus.gpus:
        lines += [
            f"  # {gpu.name}, {format_bytes(gpu.memory)}",
            f"  - {{kind: cuda, id: gpu{gpu.index}, gpu: {gpu.index}}}",
        ]
    if (trouble := box.gpus.trouble) is not None and trouble.cause is not Cause.ABSENT:
        lines += [
            f"  # a GPU is here, but {_one_line(trouble.what)}.",
            f"  # First: {_one_line(trouble.how)}",
            "  # - {kind: cuda, gpu: 0}",
        ]
    for npu in box.npus.npus:
        name = npu.id.lower().replace(".", "-")
        lines += [
            f"  # {_one_line(npu.name or npu.id)}; it serves only",
            f"  - {{kind: npu, id: {name}, device: {npu.id}}}",
        ]
    if (missing := box.npus.trouble) is not None and box.npus.cause is not Cause.ABSENT:
        lines += [
            f"  # an NPU is here, but {_one_line(missing.what)}.",
            f"  # First: {_one_line(missing.how)}",
            "  # - {kind: npu, device: NPU}",
        ]
    return lines


def _services(models: Sequence[ModelFile]) -> list[str]:
    head = "# What is promised to clients: this percentile of answers within this time."
    if not models:
        return [
            head,
            f"# No model lies in ./{MODELS} yet. Put one into {MODELS}/NAME/1/model.onnx, and say:",
            "# services:",
            "#   - name: NAME",
            "#     objective: {latency: 25ms, percentile: 99}",
            "#     batch: {max: 8}           # requests that may be executed together",
            "#     accuracy_floor: 0.9       # with a check.npz: a worse version is refused",
        ]
    lines = [head, "services:"]
    for model in models:
        lines.append(f"  - name: {model.name}")
        if model.speaks:
            lines.append(
                "    objective: {ttft: 1s, tpot: 150ms, percentile: 95}  # first token, each"
            )
        else:
            lines.append("    objective: {latency: 100ms, percentile: 99}")
            lines.append("    # batch: {max: 8}         # requests that may be executed together")
        lines.append("    # guaranteed: {cpu: 0.25} # a share that jobs never have in the long run")
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


@command
def cmd_init(args: argparse.Namespace) -> int:
    """Write the file and its directory of models; refuses to overwrite one."""
    directory = args.directory
    path = directory / FILE
    if not args.force and path.exists():
        raise EnvironmentProblem(f"{path} is there already; --force overwrites it")
    text = document(look(directory))
    parse_config(text)  # what is written loads
    try:
        (directory / MODELS).mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error.strerror}") from None
    print(f"{path} is written; start it with: cotenant serve {path}")
    return 0


def add_init(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``cotenant init``."""
    init = subparsers.add_parser(
        "init", help="write a configuration file for what this machine has"
    )
    init.add_argument(
        "directory", nargs="?", type=Path, default=Path(), metavar="DIR", help="where (here)"
    )
    init.add_argument("--force", action="store_true", help="overwrite a file that is there")
    init.set_defaults(func=cmd_init)
