"""A model served without a configuration file: ``cotenant serve model.onnx --latency 25ms``.

The model is linked into a repository of its own, below the state directory, for as long as the node
runs. What stands in the file of other nodes is written here and parsed as theirs is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from cotenant.devices import proctree
from cotenant.domain.config import NodeConfig, parse_config
from cotenant.domain.errors import ConfigError, EnvironmentProblem, ModelError
from cotenant.domain.units import parse_duration
from cotenant.engines.base import Speaking
from cotenant.engines.registry import kinds, suffixes

LATENCY: Final = "100ms"
SPEAKING_LATENCY: Final = "1s"
"""To the first token of a language model."""
PLACE: Final = "served-"
CONFIGS: Final = (".yaml", ".yml")


class ModelFile(NamedTuple):
    """A model on disk. ``path``: its file, or a directory; ``suffix``: how its file ends ("" for a
    directory of versions); ``name``: what clients call it."""

    name: str
    path: Path
    suffix: str

    @property
    def speaks(self) -> bool:
        """Whether it is a language model."""
        ends = (kind.suffixes for kind in kinds() if isinstance(kind, Speaking))
        return self.suffix in {suffix for several in ends for suffix in several}


class Wishes(NamedTuple):
    """What the command line says of serving it. ``shapes``: of its inputs, where axes are free."""

    latency: str = ""
    percentile: float = 99.0
    http: str = "127.0.0.1:8000"
    token_file: str | None = None
    shapes: dict[str, tuple[int, ...]] = {}


def is_model(path: Path) -> bool:
    """Whether ``path`` is meant as a model and not as a configuration."""
    return not path.name.endswith(CONFIGS) and (path.is_dir() or _suffix(path.name) != "")


def find(path: Path) -> ModelFile:
    """The model at ``path``, a file or a directory. Raises ModelError saying what would be one."""
    path = path.expanduser().absolute()
    if path.is_file():
        suffix = _suffix(path.name)
        return ModelFile(_word(path.name.removesuffix(suffix)), path, suffix)
    if not path.is_dir():
        raise ModelError(f"there is no {path}; name a model's file or directory")
    if any(child.name.isdigit() and _whole(child) for child in path.iterdir()):
        return ModelFile(_word(path.name), path, "")
    if _whole(path):
        return ModelFile(_word(path.name), path, _whole(path))
    found = [child for child in sorted(path.iterdir()) if _suffix(child.name) and child.is_file()]
    if len(found) == 1:
        name = found[0].name
        return ModelFile(_word(name.removesuffix(_suffix(name))), path, _suffix(name))
    what = f"{len(found)} model files; name one of them" if found else "no model file"
    raise ModelError(f"{path} holds {what} (known: {', '.join(suffixes())})")


@contextlib.contextmanager
def placed(model: ModelFile, state: Path, wishes: Wishes) -> Iterator[NodeConfig]:
    """The configuration of a node that serves this model alone; its repository goes when this is
    left. Raises ConfigError, EnvironmentProblem."""
    config = _config(model, state, wishes)
    try:
        root = _fresh(state)
    except OSError as error:
        raise EnvironmentProblem(
            f"{state} cannot be written: {error.strerror}; name another with --state-dir"
        ) from None
    try:
        _link_model(model, root / model.name, wishes)
        yield parse_config(json.dumps(config | {"node": config["node"] | {"models": str(root)}}))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _config(model: ModelFile, state: Path, wishes: Wishes) -> dict[str, Any]:
    """What a file would say but for ``models``; parsed once, so that errors come early."""
    latency = wishes.latency or (SPEAKING_LATENCY if model.speaks else LATENCY)
    try:
        parse_duration(latency)
    except ValueError as error:
        raise ConfigError(f"--latency {error}") from None
    objective = {
        "ttft" if model.speaks else "latency": latency,
        "percentile": wishes.percentile,
    }
    node: dict[str, Any] = {"state_dir": str(state), "http": wishes.http, "grpc": None}
    if wishes.token_file:
        node["token_file"] = str(Path(wishes.token_file).absolute())
    config = {"node": node, "services": [{"name": model.name, "objective": objective}]}
    try:
        parse_config(json.dumps(config))
    except ConfigError as error:
        hint = "; here that is --token-file FILE" if "token_file" in str(error) else ""
        raise ConfigError(f"{error}{hint}") from None
    return config


def _fresh(state: Path) -> Path:
    """An empty directory for links; those of nodes that were killed go."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in state.glob(f"{PLACE}*"):
        number = old.name.removeprefix(PLACE)
        if number.isdigit() and not proctree.runs(int(number)):
            shutil.rmtree(old, ignore_errors=True)
    root = state / f"{PLACE}{os.getpid()}"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    return root


def _link_model(model: ModelFile, place: Path, wishes: Wishes) -> None:
    """Lay the model where a repository has it."""
    if not model.suffix:  # it has versions already
        if wishes.shapes:
            raise ConfigError(f"say warmup_shapes in {model.path}/model.yaml, not --shape")
        place.symlink_to(model.path)
        return
    place.mkdir()
    if wishes.shapes:
        shapes = {name: list(shape) for name, shape in wishes.shapes.items()}
        (place / "model.yaml").write_text(json.dumps({"warmup_shapes": shapes}))
    version = place / "1"
    if model.path.is_dir() and _whole(model.path):
        version.symlink_to(model.path)
        return
    version.mkdir()
    for path in _files(model):
        name = path.name
        if name.endswith(model.suffix):
            stem = name.removesuffix(model.suffix)
            _link(path, version / f"model{model.suffix}")
            if model.suffix == ".xml" and (weights := path.with_name(f"{stem}.bin")).is_file():
                _link(weights, version / "model.bin")
        else:
            _link(path, version / name)


def _files(model: ModelFile) -> list[Path]:
    """The model's file and those beside it that hold its weights: all of a directory, and of a file
    those whose names begin as its own does."""
    if model.path.is_dir():
        return sorted(model.path.iterdir())
    stem = model.path.name.removesuffix(model.suffix)
    beside = (path for path in model.path.parent.glob("*") if path.name.startswith(stem))
    rest = (path for path in beside if not _suffix(path.name) and path.is_file())
    return [model.path, *sorted(rest)]


def _link(path: Path, to: Path) -> None:
    """A hard link, since some engines refuse files that lie elsewhere; else a symbolic one."""
    if path.is_file():
        with contextlib.suppress(OSError):
            to.hardlink_to(path.resolve())
            return
    to.symlink_to(path)


def _whole(directory: Path) -> str:
    """How the model of a version's directory ends, "" where it is none."""
    return next((s for s in suffixes() if (directory / f"model{s}").is_file()), "")


def _suffix(name: str) -> str:
    """Of a model's file, the longest that is known; "" of other files."""
    return max((s for s in suffixes() if name.endswith(s)), key=len, default="")


def _word(name: str) -> str:
    """A name that a service can have."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name.lower())
    return kept.strip("-_") or "model"
